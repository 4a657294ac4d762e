"""A published page, opened from the disk in a browser: it computes what we do."""

import json
import os
import random
from math import ceil
from pathlib import Path

import pytest
import torch

import glassgpt
from glassgpt.checks.publish import check_kept, check_page_min_p, check_size
from glassgpt.generation import window_start
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.publish import (
    LARGEST,
    PAGE,
    as_text,
    page_model,
    publish,
    require_page,
)
from glassgpt.tokens import BPETokenizer, CharTokenizer

ASK = "(question) => document.querySelector('glass-gpt').ask(...question)"
# The greedy continuation by the page's own engine, as its button asks for it.
GREEDY = """async ([prompts, count]) => {
  const { ask } = document.querySelector("glass-gpt"), rows = [];
  for (const prompt of prompts) {
    const ids = await ask("encode", prompt);
    for (let n = 0; n < count; n++) ids.push(await ask("draw", ids, { topK: 1 }));
    rows.push(ids);
  }
  return rows;
}"""


@pytest.fixture(scope="module")
def shakespeare():
    return glassgpt.load("shakespeare")


def opened(browser, path, **options):
    """The page of a file, when its model answers; whatever goes wrong is collected."""
    page = browser.new_page(**options)
    page.trouble = []
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on("console", lambda message: page.trouble.append(message.text))
    page.on("request", lambda sent: page.trouble.append(sent.url))
    page.goto(path.as_uri())
    page.locator(".live:not([hidden])").wait_for()
    page.trouble = [
        text for text in page.trouble if not text.startswith(("file:", "blob:"))
    ]
    return page


@pytest.fixture(scope="module")
def page(browser, shakespeare, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "model.html"
    publish(*shakespeare, path, "A <page>", prompt="</script>ROMEO:\nO")
    page = opened(browser, path)
    yield page
    assert page.trouble == []
    page.close()


@pytest.fixture(scope="module")
def romeo(shakespeare, tmp_path_factory):
    """The file of a page that begins with a name."""
    path = tmp_path_factory.mktemp("romeo") / "page.html"
    publish(*shakespeare, path, prompt="ROMEO:")
    return path


def lightened(model):
    """The model with the weights that the page has, rounded to int8."""
    import copy

    light = copy.deepcopy(model)
    for parameter in light.parameters():
        if parameter.dim() == 2:
            scale = parameter.data.abs().amax(1, keepdim=True) / 127 + 1e-30
            parameter.data = (parameter.data / scale).round() * scale
    return light


def prompts(tokenizer, count):
    generator = random.Random(3)
    ids = [
        [generator.randrange(2047) for _ in range(generator.randint(1, 8))]
        for _ in range(count)
    ]
    return [text for row in ids if "\ufffd" not in (text := tokenizer.decode(row))]


def test_greedy_ids_are_the_packages(page, shakespeare):
    model, tokenizer = lightened(shakespeare[0]), shakespeare[1]
    texts = prompts(tokenizer, 90)[:60]
    assert len(texts) == 60
    ids = [tokenizer.encode(text) for text in texts]
    wanted = [glassgpt.generate(model, row, 6, top_k=1) for row in ids]
    assert page.evaluate(GREEDY, [texts, 6]) == wanted


def test_past_the_context_too(page, shakespeare):
    model, tokenizer = lightened(shakespeare[0]), shakespeare[1]
    (found,) = page.evaluate(GREEDY, [["ROMEO:"], 265])
    assert found == glassgpt.generate(model, tokenizer.encode("ROMEO:"), 265, top_k=1)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_probabilities_are_the_models(browser, shakespeare, tmp_path, kind):
    """All of them: what the bars and the generator are made of."""
    model, tokenizer = shakespeare
    publish(model, tokenizer, tmp_path / "page.html", weights=kind)
    page = opened(browser, tmp_path / "page.html")
    ids = tokenizer.encode("JULIET:\nO Romeo, Romeo, wherefore art thou")
    page.evaluate(ASK, ["read", ids])
    with torch.no_grad():
        logits = (model if kind == "float32" else lightened(model))(
            torch.tensor([ids])
        )[0]
    for place in (0, 1, len(ids) - 1):
        row = logits[place].double().softmax(-1)
        choices = page.evaluate(ASK, ["next", ids, place, {}, 5000])["choices"]
        found = torch.zeros_like(row)
        for choice in choices:
            found[choice["id"]] = choice["probability"]
        assert (found.log() - row.log()).abs().max() < 1e-4
    assert page.trouble == []


def test_tokens_on_nasty_text(page, shakespeare):
    texts = [
        "",
        " ",
        "a  b",
        "\n\n x",
        "it's WE'LL",
        "na\u00efve \u65e5\u672c \U0001f409",
        "x" * 500,
    ]
    texts += [
        "\u0085\ufeff\u00a0",
        "\x1c\x1d",
        "a\u0301 \u0660\u0661",
        "<|endoftext|>",
        "\r\n\t",
    ]
    for text in texts:
        ids = shakespeare[1].encode(text)
        assert page.evaluate(ASK, ["encode", text]) == ids
        assert page.evaluate(ASK, ["decode", ids]) == text
    start = shakespeare[1].encode("\ufeffHi")  # browsers drop such a mark by themselves
    assert page.evaluate(ASK, ["decode", start]) == "\ufeffHi"


def test_filters_are_the_packages(page, shakespeare):
    model, tokenizer = shakespeare
    ids = tokenizer.encode("O")
    page.evaluate(ASK, ["read", ids])
    logits = lightened(model)(torch.tensor([ids]))[0, -1:].detach()
    for settings in (
        {"topK": 3},
        {"topP": 0.5, "temperature": 0.7},
        {"topK": 9, "topP": 0.6},
    ):
        t = settings.get("temperature", 1.0)
        kept = logits
        if "topK" in settings:
            kept = glassgpt.generation.keep_top_k(kept, settings["topK"])
        if "topP" in settings:
            kept = glassgpt.generation.keep_top_p(kept, settings["topP"], t)
        p = glassgpt.softmax(kept, temperature=t)[0]
        choices = page.evaluate(ASK, ["next", ids, 0, settings, 5000])["choices"]
        assert {c["id"] for c in choices} == set(p.nonzero()[:, 0].tolist())
        assert all(abs(c["probability"] - p[c["id"]].item()) < 1e-5 for c in choices)


def test_weights_and_lens_are_the_models(page, shakespeare):
    model, tokenizer = lightened(shakespeare[0]), shakespeare[1]
    ids = tokenizer.encode("ROMEO:\nO Juliet,")
    page.evaluate(ASK, ["read", ids])
    seen = glassgpt.trace(model, torch.tensor([ids]))
    found = page.evaluate(
        "async (question) => [...await document.querySelector("
        "'glass-gpt').ask(...question)]",
        ["weights", ids, 5, 2, 4],
    )
    wanted = seen["2.weights"][0, 4, 5, :6]
    assert torch.allclose(torch.tensor(found), wanted, atol=1e-5)
    rows = page.evaluate(ASK, ["lens", ids, 5, 1])
    streams = [seen["embedding"], *(seen[f"{n}.stream"] for n in range(4))]
    best = [
        glassgpt.inspection.logit_lens(model, s)[0, 5].argmax().item() for s in streams
    ]
    assert [row[0]["id"] for row in rows] == best


def test_a_reader_writes_and_looks(browser, romeo):
    page = opened(browser, romeo, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    tokens = page.locator(".tokens span")
    assert tokens.all_inner_texts() == ["ROMEO", ":"]
    likeliest = page.locator(".guesses span").first.inner_text()
    page.locator(".guesses i").first.click()  # all of a row is its button
    page.get_by_text(f"\u201c{likeliest}\u201d is chosen.", exact=True).wait_for()
    page.get_by_role("button", name="Start over").click()
    page.wait_for_function("document.querySelector('glass-gpt').text.ids.length === 2")
    page.get_by_role("button", name="One token").click()
    page.wait_for_function("document.querySelector('glass-gpt').ids.length === 3")
    page.get_by_role("textbox", name="Prompt").fill("O Juliet")
    page.wait_for_function("document.querySelector('glass-gpt').text.pieces[0] === 'O'")
    box = page.get_by_role("listbox")
    box.focus()
    page.keyboard.press("ArrowLeft")
    chosen = page.locator("[aria-selected=true]")
    page.wait_for_function("document.querySelector('glass-gpt').text.position === 2")
    assert chosen.inner_text() == "ul"
    attention = page.locator("section", has_text="Attention")
    attention.get_by_text("\u201cul\u201d looks at").wait_for()  # drawn a moment later
    page.get_by_role("slider", name="head").press("ArrowRight")
    page.get_by_role("slider", name="top-k").press("Home")
    page.get_by_text("Tokens that can be drawn: 1", exact=True).wait_for()
    page.get_by_role("button", name="Write").click()
    page.wait_for_function("document.querySelector('glass-gpt').ids.length > 60")
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Write").wait_for()
    count = page.evaluate("document.querySelector('glass-gpt').ids.length")
    page.get_by_text(f"{count} tokens.", exact=True).wait_for()
    page.evaluate("document.querySelector('glass-gpt').write(20)")  # to its end
    count = page.evaluate("document.querySelector('glass-gpt').ids.length")
    last = tokens.last.inner_text().replace("\n", "\u21b5")
    assert tokens.count() == count
    titles = page.locator(".title", has_text=f"after \u201c{last}\u201d")
    assert titles.count() == 2  # the bars' and the lens', which waited
    tokens.last.hover()
    page.evaluate("document.querySelector('glass-gpt').begin('A')")  # under the mouse
    page.wait_for_function("document.querySelector('glass-gpt').text.ids.length < 3")
    page.emulate_media(media="print")
    assert page.get_by_role("listbox").is_visible()
    assert page.get_by_role("button", name="Write").is_hidden()
    assert page.trouble == []


OLD = """
delete Array.prototype.at;
for (const name of Object.getOwnPropertyNames(Element.prototype))
  if (name.startsWith("aria")) delete Element.prototype[name];
Blob = class extends Blob {
  constructor(parts, type) { super(["delete Array.prototype.at;", ...parts], type); }
};
"""


def test_a_browser_of_2022_runs_it(browser, romeo):
    context = browser.new_context()
    context.add_init_script(OLD)
    page = opened(context, romeo)
    page.evaluate("document.querySelector('glass-gpt').write(5)")
    assert page.locator(".tokens span").count() == 7
    assert page.locator(".tokens span[aria-selected=true]").count() == 1
    assert page.locator(".guesses span[aria-label]").count() == 10
    assert page.trouble == []
    context.close()


def test_a_reader_who_interrupts_breaks_nothing(browser, romeo):
    page = opened(browser, romeo)
    write, one = (page.get_by_role("button", name=n) for n in ("Write", "One token"))
    figure = "document.querySelector('glass-gpt')"
    write.click()
    for _ in range(12):
        page.get_by_role("slider", name="temperature").press("ArrowRight")
    page.evaluate(f"{figure}.become([1, 2, 3])")  # as a click on a bar does
    write.wait_for()
    assert page.evaluate(f"{figure}.text.ids") == [1, 2, 3]
    page.evaluate(f"const g = {figure}; g.write(50); g.stop(); g.write(50)")
    page.wait_for_function(f"!{figure}.writing")
    assert page.evaluate(f"{figure}.ids.length") <= 53
    one.focus()
    for _ in range(3):  # the focus stays where it is
        count = page.evaluate(f"{figure}.ids.length")
        page.keyboard.press("Enter")
        page.wait_for_function(f"{figure}.text.ids.length > {count}")
        page.wait_for_function(f"!{figure}.writing")
    assert page.trouble == []
    page.close()


def test_a_token_out_of_sight_cannot_be_chosen(browser, shakespeare, tmp_path):
    """Its numbers are gone; those of another one must not stand under its name."""
    model, tokenizer = shakespeare
    publish(model, tokenizer, tmp_path / "page.html", prompt="ROMEO: " * 150)
    page = opened(browser, tmp_path / "page.html")
    first, last = page.evaluate(
        "(({ text }) => [text.first, text.ids.length - 1])"
        "(document.querySelector('glass-gpt'))"
    )
    assert first > 0
    page.evaluate("document.querySelector('glass-gpt').select(1)")
    page.get_by_role("listbox").press("ArrowLeft")
    position = "document.querySelector('glass-gpt').text.position"
    page.wait_for_function(f"{position} === {last - 1}")
    page.get_by_role("listbox").press("Home")
    page.wait_for_function(f"{position} === {first}")
    assert page.locator(".tokens span[aria-disabled=true]").count() == first
    page.close()


def test_a_model_of_characters_and_one_that_chats(browser, tmp_path):
    torch.manual_seed(0)
    letters = CharTokenizer(sorted("abc .\n<>&"))
    model = glassgpt.GPT(glassgpt.GPTConfig(len(letters), 16, 1, 2, 8))
    publish(model, letters, tmp_path / "letters.html", prompt="a<b>&c")
    page = opened(browser, tmp_path / "letters.html")
    assert page.locator(".tokens span").all_inner_texts() == list("a<b>&c")
    page.get_by_role("textbox", name="Prompt").fill("az")
    page.get_by_text("does not know the character").wait_for()
    assert page.trouble == []
    small = glassgpt.GPT(glassgpt.GPTConfig(257, 64, 1, 2, 8))
    model, tokenizer = glassgpt.add_roles(small, BPETokenizer([]))
    publish(model, tokenizer, tmp_path / "chat.html")
    page = opened(browser, tmp_path / "chat.html")
    said = [{"role": "user", "content": "Hi <|end|>"}]
    wanted, _ = glassgpt.render(said, tokenizer, reply=True)
    assert page.evaluate(ASK, ["render", said]) == wanted
    page.get_by_label("Your message").fill("Hi")
    page.evaluate(
        "const form = document.querySelector('glass-gpt').shadowRoot"
        ".querySelector('form'); form.requestSubmit(); form.requestSubmit()"
    )
    page.get_by_text("Assistant", exact=True).wait_for()
    assert page.get_by_text("User", exact=True).count() == 1  # sent once
    message = page.get_by_label("Your message")
    message.fill("Hi again, " * 20)
    while message.input_value():  # the page takes it when the first answer is done
        message.press("Enter")
        page.wait_for_timeout(100)
    page.get_by_text("Too long: the model sees only the end").wait_for()
    page.wait_for_function("!document.querySelector('glass-gpt').writing")
    page.get_by_role("button", name="Start over").click()
    assert page.get_by_role("log").inner_text() == ""
    page.get_by_label("Your message").fill("Hi once more")
    page.evaluate(
        "const page = document.querySelector('glass-gpt').shadowRoot;"
        "page.querySelector('form').requestSubmit();"
        "page.querySelector('[type=button]').click()"
    )  # started over while the model reads
    page.wait_for_timeout(1000)
    assert page.get_by_role("log").inner_text() == ""
    assert page.evaluate("!document.querySelector('glass-gpt').writing")
    assert page.trouble == []
    small = glassgpt.GPT(glassgpt.GPTConfig(len(letters), 64, 1, 2, 8))
    publish(*glassgpt.add_roles(small, letters), tmp_path / "few.html")
    page = opened(browser, tmp_path / "few.html")
    page.get_by_label("Your message").fill("az")
    page.keyboard.press("Enter")
    page.get_by_text("does not know the character").wait_for()
    assert page.trouble == []


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_chatml_has_its_own_system_line(browser, tmp_path, system):
    """Where the reader writes none, the page adds the one that Python adds."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = BPETokenizer([], marks)
    model = GPT(GPTConfig(len(tokenizer), 256, 1, 2, 8))
    publish(model, tokenizer, tmp_path / "page.html")
    page = opened(browser, tmp_path / "page.html")
    asked = {"role": "user", "content": "Hi <|im_end|>"}
    figure = "document.querySelector('glass-gpt')"
    talk = f"([system, asked]) => {figure}.conversation(system, [], asked)"
    found, _ = page.evaluate(talk, [system, asked])
    turns = [{"role": "system", "content": system}, asked] if system else [asked]
    assert found == glassgpt.render(turns, tokenizer, reply=True)[0]
    assert page.trouble == []
    page.close()


def test_what_a_page_cannot_run_is_refused_and_nothing_is_written(
    tmp_path, shakespeare
):
    model, tokenizer = shakespeare
    path = tmp_path / "page.html"
    mine = PAGE.partition("{")[0] + "an older page"
    path.write_text(mine, "utf-8")
    modern = glassgpt.ModernGPT(glassgpt.ModernConfig(len(tokenizer), 8, 1, 2, 8))
    large = glassgpt.GPT(glassgpt.GPTConfig(len(tokenizer), 8, 12, 2, 512))
    assert large.parameter_count() * 4 / 3 > LARGEST
    letters = CharTokenizer("abc")
    small = glassgpt.GPT(glassgpt.GPTConfig(3, 8, 1, 2, 8))
    own = type("Own", (glassgpt.GPT,), {"forward": lambda *_: None})(small.config)
    vast = glassgpt.GPT(small.config).double()
    with torch.no_grad():
        vast.norm.weight[0] = 1e39  # finite, but not in 32 bits
    for wrong, sentence in (
        ((own, letters), "GPT-2's architecture"),
        ((vast, letters), "norm.weight is not finite"),
        ((modern, tokenizer), "GPT-2's architecture"),
        ((glassgpt.quantize(model, "int8"), tokenizer), "GPT-2's architecture"),
        ((model, CharTokenizer("abc")), "3 tokens for a model of 2048"),
        ((large, tokenizer), "the page would have 52 MB"),
    ):
        with pytest.raises(ValueError, match=sentence):
            publish(*wrong, path)
    with pytest.raises(ValueError, match="is not in the vocabulary"):
        publish(small, letters, path, prompt="abd")
    for config in (modern.config, large.config):
        with pytest.raises(ValueError, match="architecture|52 MB"):
            require_page(config)  # no weight is needed to ask
    with pytest.raises(ValueError, match="int8 or float32"):
        publish(model, tokenizer, path, weights="int4")
    assert path.read_text("utf-8") == mine
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_another_file_is_not_written_over(shakespeare, tmp_path):
    path = tmp_path / "page.html"
    path.touch()  # as mktemp leaves it
    publish(*shakespeare, path)
    publish(*shakespeare, path, title="a newer page")
    assert b"a newer page" in path.read_bytes()
    diary = PAGE.partition('<meta name="generator"')[0] + "<title>a diary</title>"
    path.write_text(diary)
    with pytest.raises(FileExistsError, match="page.html is another file"):
        publish(*shakespeare, path)
    assert "a diary" in path.read_text()


def test_no_text_can_end_the_script(tmp_path):
    odd = BPETokenizer([], ["</script><!-- <script>"])
    model = glassgpt.GPT(glassgpt.GPTConfig(len(odd), 8, 1, 2, 8))
    publish(model, odd, tmp_path / "page.html", "</title>&", prompt="</script>")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert text.count("</script>") == 2
    assert "<title>&lt;/title&gt;&amp;</title>" in text
    stored = text.split("globalThis.glassModel = ")[1].split(";\n</script>")[0]
    assert json.loads(stored) == page_model(model, odd, prompt="</script>")


def without_base64(layers, width, vocabulary, context):
    matrices = layers * 12 * width**2 + (vocabulary + context) * width
    rows = layers * 9 * width + vocabulary + context
    vectors = layers * 13 * width + 2 * width
    return matrices + 4 * rows + 4 * vectors


def padded_once(*sizes):
    return 4 * ceil(without_base64(*sizes) / 3)


def norms_padded_as_one(layers, width, vocabulary, context):
    def base64(numbers, size):
        return 4 * ceil(numbers * size / 3)

    shapes = [(3 * width, width), (width, width)]
    shapes += [(4 * width, width), (width, 4 * width)]
    tables = [(vocabulary, width), (context, width)]
    matrices = sum(base64(r * c, 1) + base64(r, 4) for r, c in layers * shapes + tables)
    biases = sum(base64(rows, 4) for rows, _ in layers * shapes)
    return matrices + biases + (2 * layers + 1) * base64(2 * width, 4)


def without(norms, layers, width, vocabulary, context):
    """Right but for the biases, or for the norms of the blocks."""
    model = GPT(GPTConfig(vocabulary, context, layers, 1, width))
    lost = "_norm." if norms else "bias"
    return sum(
        sum(map(len, as_text(parameter).values()))
        for name, parameter in model.named_parameters()
        if lost not in name or (lost == "bias" and "norm" in name)
    )


def kept_in_place(old, new, context):
    for ids in (old, new):
        ids[:] = ids[window_start(len(ids), context) :]
    return len(os.path.commonprefix([old, new]))


def min_p(choices, share, least=None, total=None, order=1):
    """Right as it stands; the wrong ones differ in one thing."""
    least = share * choices[0]["probability"] if least is None else least
    kept = [one for one in choices if one["probability"] >= least][::order]
    total = total or sum(one["probability"] for one in kept)
    return [{**one, "probability": one["probability"] / total} for one in kept]


def min_p_without_ties(choices, share):
    return min_p(choices, share, share * choices[0]["probability"] + 1e-12)


def min_p_in_place(choices, share):
    choices[:] = min_p(choices, share)
    return choices


def min_p_with_places_for_ids(choices, share):
    return [{**one, "id": place} for place, one in enumerate(min_p(choices, share))]


def min_p_of_nan(choices, share):
    return [{**one, "probability": None} for one in min_p(choices, share)]


def min_p_all_alike(choices, share):
    found = min_p(choices, share)
    return [{**one, "probability": 1 / len(found)} for one in found]


def test_the_right_min_p_passes():
    check_page_min_p(min_p)


@pytest.mark.parametrize(
    ("check", "wrong", "message"),
    [
        (check_size, padded_once, "padded by itself"),
        (check_size, without_base64, "these are bytes"),
        (check_size, lambda *sizes: without(False, *sizes), "biases and norms"),
        (check_size, lambda *sizes: without(True, *sizes), "two in a block"),
        (check_size, norms_padded_as_one, "7,872 characters, not 7,860"),
        (check_page_min_p, lambda c, s: min_p(c, s, least=s), "not with share"),
        (check_page_min_p, lambda c, s: min_p(c, s, total=1), "sums to 0.85, not 1"),
        (check_page_min_p, lambda c, s: min_p(c, s, order=-1), r"not \[4, 1, 2\]"),
        (check_page_min_p, min_p_without_ties, "Mind ties"),
        (check_page_min_p, min_p_in_place, "the list given was changed"),
        (check_page_min_p, min_p_with_places_for_ids, "a token that stays"),
        (check_page_min_p, min_p_of_nan, "begin with 0"),
        (check_page_min_p, min_p_all_alike, "by the same number"),
        (check_kept, kept_in_place, "the lists given were changed"),
    ],
)
def test_a_wrong_answer_is_named(check, wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong)


def test_the_chapter_shows_the_record_of_wrong_ports(names_in):
    book = Path(__file__).parents[1] / "book"
    record = json.loads((book / "runs" / "port.json").read_text("utf-8"))
    shown = names_in("a4_publishing.ipynb", "wrong-versions")
    versions = record["versions"]
    right = versions.pop("right")
    assert list(versions) == list(shown["EDITS"])
    for name, told in shown["CHANGES"].items():
        assert told == (versions[name]["change"], versions[name]["error"])
    assert f"{right['rms']:.1e}" == "9.9e-07"
    assert f"{record['PyTorch in float32']['rms']:.1e}" == "3.6e-06"
