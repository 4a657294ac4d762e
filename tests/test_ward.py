"""The ward of the clinic: charts, examinations with prices, and answers to guesses."""

import json
import re
from pathlib import Path

import axe_playwright_python
import numpy as np
import pytest

from glassgpt.figures import Picture, fnv1a, patient_chart, ward

ROOT = Path(__file__).parent.parent
SCRIPT = (ROOT / "src" / "glassgpt" / "page" / "ward.js").read_text("utf-8")
AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js").read_text("utf-8")
TEXTS = ["", "a", "foobar", "7:no_mask", "12:clip_1e-3", "é ≠ e", "\U0001f600"]
FAR = "Healthy? Then “Cut the future off: does the past change?” would give 0.000"
GROUNDS = {"light": ("#fff", "#1f2933"), "dark": ("#12171c", "#ced6dd")}


@pytest.fixture
def record(names_in):
    """The made-up record of appendix A1: patient 1 is healthy, 2 looks ahead."""
    return names_in("a1_figures.ipynb", "ward-demo", np=np, fnv1a=fnv1a)["small_record"]


@pytest.fixture
def opened(browser):
    """A function that opens a ward in the browser, and what went wrong there."""
    pages, trouble = [], []

    def open_ward(record, theme="light", width=390, **options):
        size = {"width": width, "height": 800}
        page = browser.new_context(viewport=size, **options).new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: trouble.append(request.url))
        ground, ink = GROUNDS[theme]
        style = f"margin:8px;background:{ground};color:{ink}"
        head = "<!doctype html><html lang=en><title>A ward</title><main>"
        content = ward(record)._repr_html_()
        page.set_content(f'{head}<body style="{style}"><h1>Ward</h1>{content}</main>')
        pages.append(page)
        return page

    yield open_ward
    for page in pages:
        page.context.close()
    assert trouble == []


def data_of(picture):
    page = picture._repr_html_()
    inside = page.split('<script type="application/json">')[1].split("</script>")[0]
    return json.loads(inside)


def press(page, number):
    page.locator("li button").nth(number).click()


def guess(page, name):
    page.select_option("select.name", name)
    page.click("button.answer")
    return page.locator(".said").inner_text()


def choose(page, number):
    page.select_option("select.patient", str(number))


def price(page):
    return page.locator(".paid").inner_text()


# The hash


def test_the_hash_has_the_published_values():
    found = [fnv1a(text) for text in ("", "a", "foobar")]
    assert found == ["811c9dc5", "e40c292c", "bf9cf968"]


def test_python_and_the_page_compute_the_same_hash(browser):
    page = browser.new_page()
    page.evaluate(f"window.hash = (() => {{ {SCRIPT}\nreturn fnv1a; }})()")
    assert page.evaluate("texts => texts.map(hash)", TEXTS) == list(map(fnv1a, TEXTS))


# What stands in the page


def test_the_ward_is_described_and_holds_all_its_data(record):
    picture = ward(record)
    assert isinstance(picture, Picture)
    assert repr(picture).startswith("A ward of 2 patients with 3 examinations")
    found = data_of(picture)
    assert [patient["number"] for patient in found["patients"]] == [1, 2]
    assert found["patients"][1]["results"] == [0.01, 0.42, 0]
    assert found["expected"]["no_mask"] == [[-0.01, 0.02], [0.4, 0.45], [0, 0]]
    assert ward(record)._repr_html_() == picture._repr_html_()


def test_numbers_are_rounded_as_they_are_printed(record):
    record["patients"][0]["results"]["cut_future"] = 0.00049
    record["expected"]["no_mask"]["cut_future"] = [0.40049, None]
    record["patients"][0]["chart"]["training"][0] = 4.35678
    found = data_of(ward(record))
    assert found["patients"][0]["results"][1] == 0
    assert found["expected"]["no_mask"][1] == [0.4, None]
    assert found["patients"][0]["chart"]["training"][0] == 4.36


def test_a_glance_at_the_source_gives_no_answer_away(record):
    page = ward(record)._repr_html_()
    patients = json.dumps(data_of(ward(record))["patients"])
    assert "no_mask" not in patients
    assert "healthy" not in patients
    for kept in ("fetch(", "XMLHttpRequest", "Storage", "cookie", "import("):
        assert kept not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_nothing_is_asked_of_a_server_while_it_plays(opened, record):
    page = opened(record)  # which also wants a silent console
    choose(page, 2)
    press(page, 1)
    guess(page, "no_mask")
    page.wait_for_load_state("networkidle")


def test_the_script_is_small():
    assert len(SCRIPT) < 14_000


# The game


def test_an_examination_shows_its_number_and_its_price_adds_up(opened, record):
    page = opened(record)
    choose(page, 2)
    assert page.locator("li p").evaluate_all("all => all.every(p => p.hidden)")
    assert price(page) == "price so far: 0"
    press(page, 2)
    press(page, 1)
    press(page, 1)  # is paid once
    assert price(page) == "price so far: 11"
    found = page.locator("li p").nth(1).inner_text()
    assert found == "0.420; healthy: at most 0.001; outside: it looks ahead"
    assert page.locator("li p").nth(2).inner_text() == "0.000; healthy: 0.000; within"
    assert page.locator("li p").nth(0).is_hidden()
    said = page.locator(".glass-spoken").text_content()
    assert said.endswith("it looks ahead. Price so far: 11.")
    states = page.locator("li button").evaluate_all(
        "all => all.map(b => b.ariaExpanded)"
    )
    assert states == ["false", "true", "true"]


def test_a_wrong_guess_is_answered_by_the_number_that_contradicts_it(opened, record):
    page = opened(record)
    choose(page, 2)
    press(page, 0)
    press(page, 1)
    assert guess(page, "healthy") == f"{FAR}; here it is 0.420."


def test_what_is_not_ruled_out_names_the_cheapest_that_would_and_no_number(
    opened, record
):
    page = opened(record)
    choose(page, 2)
    press(page, 0)  # tells nothing apart
    assert guess(page, "dropout_on") == (
        "Judged with dropout? Your examinations don’t rule it out. This one would: "
        "“Cut the future off: does the past change?” (price 1)."
    )
    assert price(page) == "price so far: 0"


def test_the_number_farthest_outside_is_the_one_that_is_named(opened, record):
    record["expected"]["healthy"]["first_loss"] = [-0.2, 0.009]  # 0.01 is outside
    record["examinations"][0]["digits"] = 3
    page = opened(record)
    choose(page, 2)
    press(page, 0)
    press(page, 1)
    assert guess(page, "healthy").startswith(FAR)


def test_faults_that_nothing_tells_apart_are_said_to_be(opened, record):
    record["expected"]["healthy"] = record["expected"]["no_mask"]
    page = opened(record)
    choose(page, 2)
    found = guess(page, "healthy")
    assert (
        found == "Healthy? It is not that, but no examination here tells the two apart."
    )


def test_a_right_guess_is_confirmed_with_its_price(opened, record):
    page = opened(record)
    choose(page, 2)
    press(page, 1)
    assert page.locator("button.next").is_hidden()
    assert guess(page, "no_mask") == (
        "Right: no causal mask. You paid 1 (examinations: 1). "
        "The order of examinations pays 2."
    )
    assert page.locator(".patient option:checked").inner_text() == "2: no causal mask"
    assert guess(page, "healthy").startswith("Right: no causal mask.")
    page.click("button.next")
    assert page.locator("select.patient").input_value() == "1"
    assert page.evaluate("document.activeElement.className") == "patient"


def test_healthy_is_a_name_too_and_nothing_is_no_name(opened, record):
    page = opened(record)
    assert guess(page, "") == "Choose a name first."
    assert guess(page, "healthy").startswith("Right: healthy.")
    groups = page.locator(".name optgroup").evaluate_all("all => all.map(g => g.label)")
    assert groups == ["attention", "judging"]


def test_each_patient_keeps_what_was_opened_and_said(opened, record):
    page = opened(record)
    press(page, 2)
    assert guess(page, "dropout_on").startswith("Judged with dropout? Then")
    choose(page, 2)
    assert price(page) == "price so far: 0"
    assert page.locator(".said").inner_text() == ""
    assert page.locator("select.name").input_value() == ""
    choose(page, 1)
    assert price(page) == "price so far: 10"
    assert page.locator(".said").inner_text().startswith("Judged with dropout? Then")


def test_what_cannot_be_done_has_no_number_and_contradicts_nothing(opened, record):
    record["patients"][1]["results"]["cut_future"] = None
    record["expected"]["dropout_on"]["judged_twice"] = None
    page = opened(record)
    choose(page, 2)
    press(page, 1)
    found = page.locator("li p").nth(1).inner_text()
    assert found == "no number: this cannot be done here"
    assert guess(page, "dropout_on").endswith("tells the two apart.")


def test_two_wards_on_a_page_do_not_meet(opened, record):
    page = opened(record)
    again = ward(record)._repr_html_()
    page.set_content(f"<main>{again}{again}</main>")
    assert page.locator(".room").count() == 2
    page.locator("li button").nth(1).click()
    found = page.locator(".paid").all_inner_texts()
    assert found == ["price so far: 1", "price so far: 0"]


# Who reads it


def test_a_keyboard_is_enough(opened, record):
    page = opened(record)
    keys = page.keyboard
    page.locator("select.patient").focus()
    keys.press("ArrowDown")
    assert page.locator("select.patient").input_value() == "2"
    keys.press("Tab")  # the text, which may scroll
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Enter")
    focused = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(focused) == "solid"
    assert price(page) == "price so far: 1"
    keys.press("Tab")
    keys.press("Tab")
    keys.type("no causal")
    keys.press("Tab")
    keys.press("Space")
    assert page.locator(".said").inner_text().startswith("Right: no causal mask.")


@pytest.mark.parametrize("theme", GROUNDS)
def test_nobody_is_barred(opened, record, theme):
    page = opened(record, theme)
    choose(page, 2)
    press(page, 1)
    guess(page, "healthy")
    page.evaluate(AXE)
    found = page.evaluate("async () => (await axe.run()).violations")
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []


def test_every_panel_has_words(opened, record):
    page = opened(record)
    choose(page, 2)
    panels = page.locator(".chart [role=img]")
    words = panels.evaluate_all("all => all.map(p => p.ariaLabel)")
    assert len(words) == 5
    assert words[0].startswith("Loss, nats: training from 4.36 to 0.31; held out from")
    assert words[3] == "Loss by position, nats: held out from 0.02 to 2.60."
    assert "of a row, 79 % lie above the diagonal, 0 % on it" in words[4]
    label = page.locator(".chart").get_attribute("aria-label")
    assert label == "Chart of patient 2"
    assert page.locator(".words").inner_text() == "ROMEO:\nOYYYYSY"


@pytest.mark.parametrize(("width", "columns"), [(360, 2), (390, 2), (800, 3)])
def test_the_chart_fits_a_telephone_and_a_desk(opened, record, width, columns):
    page = opened(record, width=width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    places = page.locator(".chart > div").evaluate_all(
        "all => all.map(box => Math.round(box.getBoundingClientRect().left))"
    )
    assert len(set(places)) == columns
    page.set_viewport_size({"width": 800, "height": 800})
    page.wait_for_function("document.querySelector('.chart svg').clientWidth < 270")


def test_a_text_is_never_html(opened, record):
    text = "</script><b>ROMEO</b> & <!-- $x$"
    record["patients"][0]["chart"]["text"] = text
    page = opened(record)
    assert page.locator(".words").inner_text() == text


def test_curves_have_gaps_where_nothing_is_known(opened, record):
    chart = record["patients"][0]["chart"]
    chart["training"][3:5] = [None, None]
    chart["norm"]["blocks"] = [0] * len(chart["steps"])
    chart["spread"] = [None] * len(chart["steps"])
    page = opened(record)
    drawn = page.locator(".chart path.curve.one").first.get_attribute("d")
    assert drawn.count("M") == 2
    words = page.locator(".chart svg").nth(2).get_attribute("aria-label")
    assert words.endswith("no spread of logits.")


def test_a_loss_that_leaves_the_panel_says_how_far(opened, record):
    record["patients"][0]["chart"]["training"][0] = 62.04
    page = opened(record)
    assert page.get_by_text("▲ up to 62.0").count() == 1


# Where no script runs


def test_without_scripts_all_can_be_read(opened, record):
    page = opened(record, java_script_enabled=False)
    assert page.locator(".room").count() == 0
    assert page.locator(".still svg").count() == 2
    folds = page.locator(".still details")
    titles = folds.locator("summary").all_inner_texts()
    assert titles[1] == "Cut the future off: does the past change? Price 1"
    folds.nth(1).locator("summary").click()
    found = folds.nth(1).locator("p").inner_text()
    assert found == "Healthy: at most 0.001. Patient 1: 0.000, 2: 0.420."
    assert page.locator("table.paper").is_hidden()


def test_with_scripts_the_still_is_hidden_and_paper_has_it(opened, record):
    page = opened(record, width=672)
    assert page.locator(".still").is_hidden()
    page.emulate_media(media="print")
    assert page.locator(".room").is_hidden()
    assert page.locator(".still svg").count() == 2
    assert page.locator(".still svg").first.is_visible()
    cells = page.locator("table.paper tr").nth(2).locator("td").all_inner_texts()
    assert cells[1:] == ["1", "at most 0.001", "0.000", "0.420"]
    assert page.locator("details").first.is_hidden()


def test_paper_has_a_healthy_patient_and_three_others_or_those_asked_for(record):
    healthy, ill = record["patients"]
    for number in range(3, 8):
        more = {"number": number, "answer": fnv1a(f"{number}:no_mask")}
        record["patients"].append(ill | more)
    titles = re.compile(r'<p class="title">(A healthy patient|Patient \d)</p>')
    found = titles.findall(ward(record)._repr_html_())
    assert found == ["A healthy patient", "Patient 2", "Patient 3", "Patient 4"]
    found = titles.findall(ward(record, printed=[6])._repr_html_())
    assert found == ["A healthy patient", "Patient 6"]


# The still chart


def test_a_chart_is_a_drawing_that_is_described(record):
    chart = record["patients"][1]["chart"]
    chart["training"][5] = None
    picture = patient_chart(chart, record["band"], record["lines"], "patient 2")
    assert repr(picture).startswith(
        "The chart of patient 2: training loss from 4.36 to 0.31; held-out loss from"
    )
    for words in ("loss by position", "ln V", "OYYYYSY", "attention, first block"):
        assert f">{words}</text>" in picture.content
    assert "fill: #ffffff" not in picture.content
    assert len(picture.content) < 40_000


def test_a_chart_draws_a_text_with_dollars_as_it_is(record):
    chart = record["patients"][1]["chart"] | {"text": "a $x$ <b>\n\nc" + 40 * "y"}
    picture = patient_chart(chart, record["band"], record["lines"])
    assert ">a $x$ &lt;b&gt;</text>" in picture.content
