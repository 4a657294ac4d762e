"""Figures: same bytes twice, nothing fetched, described, moving without a kernel."""

import re
import runpy
import sys
from pathlib import Path

import notebook
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from glassgpt import figures
from glassgpt.figures import (
    PALETTE,
    Picture,
    bars,
    book_map,
    figure,
    guess_bars,
    heatmap,
    live,
    live_model,
    show,
    slider,
    token_boxes,
)


def line(height=1.0):
    fig, ax = figure(3, 2)
    ax.plot([0, 1], [0, height], marker="o")
    ax.set(xlabel="x", ylabel="y", title="a < b")
    return fig


def moving(start=1, values=(1, 2, 4)):
    return slider(line, values, "height", "A line of height {}.".format, start)


def names(page):
    return re.findall(r' id="([^"]*)"', page)


def test_no_color_stands_for_two_things():
    assert len(set(PALETTE.values())) == len(PALETTE)
    assert set("BTCHV") < set(PALETTE)


def test_the_same_figure_gives_the_same_bytes():
    assert moving()._repr_html_() == moving()._repr_html_()


def test_equal_frames_share_no_names():
    page = slider(lambda _: line(), [1, 2], "nothing", str)._repr_html_()
    assert names(page)
    assert len(names(page)) == len(set(names(page)))


def test_every_reference_has_its_target():
    page = moving()._repr_html_()
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', page)) == set(names(page))


def test_nothing_is_fetched_and_nothing_styles_the_page():
    page = moving()._repr_html_()
    rest = page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in rest
    assert "@import" not in rest
    assert "*{" not in rest
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)', rest))


def test_letters_stay_letters_in_the_font_of_the_page():
    fig, ax = figure()
    ax.text(0, 0, "café < tea")
    page = show(fig, "words")._repr_html_()
    assert "café &lt; tea" in page
    assert "system-ui" in page
    assert "DejaVu" not in page


@pytest.mark.parametrize("drawn", [line(), "<p>HTML</p>"])
def test_a_picture_needs_alternative_text(drawn):
    with pytest.raises(ValueError, match="alternative text"):
        show(drawn, "  ")


def test_alternative_text_is_escaped_and_is_the_plain_text():
    picture = show(line(), 'a "line" <b>')
    assert isinstance(picture, Picture)
    assert (
        'role="img" aria-label="a &quot;line&quot; &lt;b&gt;"' in picture._repr_html_()
    )
    assert repr(picture) == 'a "line" <b>'


def test_figure_leaves_the_settings_of_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    show(line(), "a line")
    assert dict(matplotlib.rcParams) == before


def cell_texts(matrix, **options):
    fig, ax = figure()
    heatmap(ax, matrix, **options)
    return re.findall(r">([^<>]+)</text>", show(fig, "a grid").content)


def test_heatmap_prints_every_number_row_by_row():
    assert cell_texts([[1, 2], [3, -4]], digits=1) == ["1.0", "2.0", "3.0", "−4.0"]


def test_heatmap_prints_labels_infinity_and_no_negative_zero():
    found = cell_texts([[-np.inf, -0.001]], rows=["r"], columns=["c", "d"], title="t")
    assert sorted(found) == sorted(["−∞", "0.00", "r", "c", "d", "t"])


@pytest.mark.parametrize(
    "matrix",
    [
        torch.eye(2, requires_grad=True),
        torch.eye(2, dtype=torch.bfloat16),
        torch.eye(2, dtype=torch.bool),
    ],
)
def test_heatmap_takes_tensors_of_any_kind(matrix):
    assert cell_texts(matrix, digits=0) == ["1", "0", "0", "1"]


def opacities(matrix, **options):
    _, ax = figure()
    heatmap(ax, matrix, **options)
    return [round(float(patch.get_facecolor()[3]), 3) for patch in ax.patches]


def test_heatmap_shades_by_magnitude_up_to_the_limit():
    assert opacities([[0, 1, -2]]) == [0, 0.25, 0.5]
    assert opacities([[0, 1, -2]], limit=4) == [0, 0.125, 0.25]
    assert opacities([[0, 0, 9]], limit=1) == [0, 0, 0.5]
    assert opacities([[0, 0]]) == [0, 0]


def test_heatmap_shows_the_sign_by_color():
    _, ax = figure()
    heatmap(ax, [[1, -1]], color="query")
    positive, negative = (patch.get_facecolor()[:3] for patch in ax.patches)
    assert positive == to_rgb(PALETTE["query"])
    assert negative == to_rgb(PALETTE["highlight"])


def test_a_large_heatmap_has_no_numbers_and_stays_small():
    fig, ax = figure(6, 4)
    heatmap(ax, np.random.default_rng(0).random((64, 64)), range(64), range(64))
    page = show(fig, "a large grid")._repr_html_()
    assert "0." not in "".join(re.findall(r">([^<>]+)</text>", page))
    assert "data:image/png;base64," in page
    assert len(page) < 60_000


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        ([1, 2], {}, "2 axes"),
        ([[np.nan]], {}, "no NaN"),
        ([[1, 2]], {"rows": ["a", "b"]}, "labels"),
        ([[1, 2]], {"columns": ["a"]}, "labels"),
        ([[1, 2]], {"color": "no such color"}, "no such color"),
    ],
)
def test_heatmap_says_what_is_wrong(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        heatmap(figure()[1], matrix, **options)


def test_bars_have_the_lengths_and_numbers_of_the_values():
    fig, ax = figure()
    bars(ax, ["short", "long"], torch.tensor([0.5, 1.0]), digits=1)
    assert [bar.get_width() for bar in ax.patches] == [0.5, 1.0]
    page = show(fig, "bars")._repr_html_()
    for text in ("short", "long", "0.5", "1.0"):
        assert f">{text}</text>" in page
    assert ax.get_xlim() == (0, 1.2)
    bars(ax, ["short"], [0.5], limit=2)
    assert ax.get_xlim() == (0, 2.4)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1], "labels"), ([[1, 2]], "1 axes"), ([1, np.nan], "no NaN")],
)
def test_bars_say_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        bars(figure()[1], ["a", "b"], values)


def test_slider_draws_one_frame_for_each_value_and_shows_the_start():
    figure_ = moving(start=1)
    page = figure_._repr_html_()
    assert isinstance(figure_, Picture)
    frames = re.findall(
        r'<div class="glass-frame([^"]*)" data-value="(\w+)"( hidden)?>', page
    )
    assert frames == [
        ("", "1", " hidden"),
        (" glass-start", "2", ""),
        ("", "4", " hidden"),
    ]
    assert 'type="range" min="0" max="2" step="1"' in page
    assert ' value="1" ' in page
    assert '<output aria-live="off">2</output>' in page
    assert repr(figure_).startswith("A line of height 2.")


def test_slider_describes_every_frame():
    page = moving()._repr_html_()
    found = re.findall(r'role="img" aria-label="([^"]*)"', page)
    assert found == [f"A line of height {h}." for h in (1, 2, 4)]


def test_slider_escapes_its_label_and_rounds_floats():
    page = slider(line, [0.1 + 0.2, 1.0], "a < b", str)._repr_html_()
    assert 'aria-label="a &lt; b"' in page
    assert 'data-value="0.3"' in page


def drawn(height=2.0, other=False, text="word"):
    return line(height) if other else f"<p>{text}</p>"


def told_live(height, other, text):
    return f"{text} {height:g} {other}"


def test_a_live_figure_shows_its_defaults_and_has_a_control_for_each():
    widgets = pytest.importorskip("ipywidgets")
    found = live(drawn, told_live, height=(1.0, 4.0))
    *controls, picture = found.panel.children
    kinds = [type(control) for control in controls]
    assert kinds == [widgets.FloatSlider, widgets.Checkbox, widgets.Text]
    assert [control.value for control in controls] == [2.0, False, "word"]
    assert {control.style.description_width for control in controls} == {"initial"}
    assert repr(found) == "word 2 False"
    assert picture.value == found._repr_html_()


def test_a_control_of_a_live_figure_draws_again():
    pytest.importorskip("ipywidgets")
    found = live(drawn, told_live, height=(1.0, 4.0))
    height, other, text, picture = found.panel.children
    text.value = "new"
    assert "<p>new</p>" in picture.value
    other.value = True
    height.value = 3.1
    assert 'aria-label="new 3.1 True"' in picture.value
    assert repr(found) == "word 2 False"


def test_a_live_figure_says_what_went_wrong_and_goes_on():
    pytest.importorskip("ipywidgets")
    found = live(lambda text="1": f"<p>{1 / float(text):g}</p>", "{text}".format)
    text, picture = found.panel.children
    text.value = "<"
    assert picture.value.startswith("ValueError: could not convert")
    assert "&lt;" in picture.value
    text.value = "0"
    assert picture.value.startswith("ZeroDivisionError")
    text.value = "4"
    assert "<p>0.25</p>" in picture.value


def test_a_live_figure_offers_its_still_and_its_widget():
    pytest.importorskip("ipywidgets")
    found = live(drawn, told_live)
    bundle = found._repr_mimebundle_()
    assert repr(found) == "word 2 False"
    assert "<p>word</p>" in found._repr_html_()
    [(kind, view)] = bundle.items()
    assert kind == notebook.WIDGET
    assert view["model_id"] == found.panel.model_id


def test_a_live_figure_without_ipywidgets_is_its_still(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert isinstance(live(drawn, told_live), Picture)
    still = moving()
    assert live(drawn, told_live, still) is still


def test_a_moving_figure_may_stand_in_for_a_live_one():
    pytest.importorskip("ipywidgets")
    still = moving()
    found = live(drawn, told_live, still)
    assert found._repr_html_() == still._repr_html_()
    plain = live(drawn, told_live)
    assert found.panel.children[-1].value == plain.panel.children[-1].value


def test_the_module_needs_neither_ipython_nor_pyplot(monkeypatch):
    for name in ("IPython", "ipywidgets", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "show" in runpy.run_path(figures.__file__)


def two_sliders(browser, **options):
    page = browser.new_context(**options).new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    other = slider(line, [5, 6], "other", "Another line of height {}.".format)
    page.set_content(moving()._repr_html_() + other._repr_html_())
    return page, errors


def seen(page):
    """The description of each visible picture."""
    pictures = page.locator("svg").all()
    return [p.get_attribute("aria-label") for p in pictures if p.is_visible()]


def test_the_keyboard_moves_one_slider_and_leaves_the_other(browser):
    page, errors = two_sliders(browser)
    assert seen(page) == ["A line of height 2.", "Another line of height 5."]
    page.locator("input").first.focus()
    page.keyboard.press("ArrowRight")
    assert seen(page) == ["A line of height 4.", "Another line of height 5."]
    assert page.locator("output").first.inner_text() == "4"
    assert page.locator("input").first.get_attribute("aria-valuetext") == "4"
    assert page.locator(".glass-spoken").first.text_content() == "A line of height 4."
    page.keyboard.press("Home")
    assert seen(page) == ["A line of height 1.", "Another line of height 5."]
    assert errors == []


def test_print_shows_the_start_and_no_slider(browser):
    page, _ = two_sliders(browser)
    page.locator("input").first.focus()
    page.keyboard.press("ArrowRight")
    page.emulate_media(media="print")
    assert seen(page) == ["A line of height 2.", "Another line of height 5."]
    assert not page.locator("input").first.is_visible()
    assert page.locator(".glass-still").first.inner_text() == "height: 2"


def test_without_scripts_the_start_stands_still(browser):
    page, _ = two_sliders(browser, java_script_enabled=False)
    assert page.locator(".glass-start svg").first.is_visible()
    assert not page.locator("input").first.is_visible()


def test_the_line_about_trust_stands_once_and_shows_where_tags_are_stripped(browser):
    page, _ = two_sliders(browser)
    assert "Trust Notebook" not in page.locator("body").inner_text()
    words = show("<p>x</p>", "words")
    outer = live_model("next", "O", still=words)
    for picture in (moving(), show(line(), "a line"), words, outer):
        stripped = re.sub(r"</?template>| hidden", "", picture._repr_html_())
        page.set_content(stripped)
        shown = page.locator("body").inner_text()
        assert shown.count("Trust Notebook") == 1


@pytest.mark.parametrize("color", ["rgb(1, 2, 3)", "rgb(250, 250, 250)"])
def test_the_ink_follows_the_page_and_a_telephone_is_wide_enough(browser, color):
    page = browser.new_page(viewport={"width": 390, "height": 800})
    fig, ax = figure(8, 3)
    ax.plot([0, 1], [0, 1], color="black")
    picture = show(fig, "a line")._repr_html_()
    page.set_content(f'<body style="color:{color}">{picture}</body>')
    style = "getComputedStyle(document.querySelector('text')).fill"
    assert page.evaluate(style) == color
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def told(number):
    return token_boxes(["a", "<b>", "\n", "c"][: number + 1], new=True)


def test_tokens_stand_in_boxes_and_are_escaped():
    page = show(told(3), "four tokens")._repr_html_()
    assert re.findall(r"<i[^>]*>(.*?)</i>", page) == ["a", "&lt;b&gt;", "\u21b5", "c"]
    assert page.count("<br>") == 1
    assert page.count('<i class="glass-new"') == 1
    assert 'role="img" aria-label="four tokens"' in page


def test_a_chosen_guess_is_marked_in_words_and_added_where_it_is_missing():
    listed = [["x", 0.5], ["y", 0.25]]
    for chosen, rows in ((("y", 0.25), 2), (("z", 0.001), 3)):
        page = guess_bars(listed, chosen)
        assert page.count("<code>") == rows
        assert page.count("chosen</span>") == 1
    assert "chosen</span>" not in guess_bars(listed)
    assert "50.0%" in guess_bars(listed)


def test_a_figure_of_text_moves_and_carries_its_style_once():
    moving = slider(told, range(4), "tokens", "{} tokens".format, play=0.5)
    page = moving._repr_html_()
    assert page.count(".glass-tokens{") == 1
    assert page.count('class="glass-frame') == 4
    assert page.count("<button") == 1
    assert "<button" not in slider(told, range(4), "tokens", str)._repr_html_()


def test_a_live_model_holds_its_still_and_escapes_its_prompt():
    page = live_model("next", 'a "b"', still=show("<p>x</p>", "x"))._repr_html_()
    assert '<glass-gpt show="next" prompt="a &quot;b&quot;" temperature="0.8">' in page
    assert "<p>x</p>" in page


def test_the_map_shows_every_chapter_and_what_a_reader_does_at_the_end():
    book = Path(__file__).parent.parent / "book"
    links = re.findall(r'href="([^"]*)"', book_map(1)._repr_html_())
    shown = [*book.glob("[0-9]*.ipynb"), *book.glob("a[34]*.ipynb")]
    assert sorted(links) == sorted(path.name for path in shown)[1:]


def test_the_map_says_in_words_where_the_reader_is():
    page = book_map(6)._repr_html_()
    assert page.count('aria-current="page"') == page.count("you are here") == 1
    assert "<b>6</b>attention<small>you are here" in page
    assert 'href="06_attention.ipynb"' not in page
    assert 'role="navigation"' in page
    assert repr(book_map(6)).endswith("You are in chapter 6, attention.")
    assert repr(book_map(1)).endswith("You are in chapter 1, the whole.")


@pytest.mark.parametrize(("width", "high"), [(780, 165), (700, 165), (390, 310)])
def test_the_map_is_low_and_fits(browser, width, high):
    page = browser.new_page(viewport={"width": width, "height": 400})
    page.set_content(f'<body style="margin:0">{book_map(6)._repr_html_()}</body>')
    assert page.locator(".glass-map").bounding_box()["height"] <= high
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_play_moves_on_stops_at_the_end_and_begins_again(browser):
    page = browser.new_page()
    moving = slider(told, range(3), "tokens", "{} tokens".format, play=0.05)
    page.set_content(moving._repr_html_())
    button, output = page.get_by_role("button"), page.locator("output")
    button.click()
    page.wait_for_function("document.querySelector('output').textContent == '2'")
    page.wait_for_function("document.querySelector('button').textContent == 'Play'")
    page.wait_for_timeout(120)
    assert output.inner_text() == "2"


def test_play_can_be_stopped(browser):
    page = browser.new_page()
    moving = slider(told, range(3), "tokens", "{} tokens".format, play=60)
    page.set_content(moving._repr_html_())
    button = page.get_by_role("button")
    button.click()
    assert button.inner_text() == "Pause"
    button.click()
    assert button.inner_text() == "Play"
