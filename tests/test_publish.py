"""A published page, opened from the disk in a browser: it computes what we do."""

import copy
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import glassgpt
from glassgpt.generation import keep_top_k, keep_top_p
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.publish import (
    LARGEST_MODEL,
    PAGE,
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
    light = copy.deepcopy(model)
    for parameter in light.parameters():
        if parameter.dim() == 2:
            scale = parameter.data.abs().amax(1, keepdim=True) / 127 + 1e-30
            parameter.data = (parameter.data / scale).round() * scale
    return light


def test_greedy_ids_are_the_packages(page, shakespeare):
    model, tokenizer = lightened(shakespeare[0]), shakespeare[1]
    generator = random.Random(3)
    rows = [generator.choices(range(2047), k=n % 8 + 1) for n in range(90)]
    texts = [text for row in rows if "\ufffd" not in (text := tokenizer.decode(row))]
    assert len(texts) > 50
    wanted = [
        glassgpt.generate(model, tokenizer.encode(text), 6, top_k=1) for text in texts
    ]
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


TEXTS = ["", " ", "a  b", "\n\n x", "it's WE'LL", "na\u00efve \u65e5\u672c \U0001f409"]
TEXTS += ["x" * 500, "\u0085\ufeff\u00a0", "\x1c\x1d", "a\u0301 \u0660\u0661"]
TEXTS += ["<|endoftext|>", "\r\n\t", "\ufeffHi"]  # browsers drop a mark at the start


def test_tokens_on_nasty_text(page, shakespeare):
    for text in TEXTS:
        ids = shakespeare[1].encode(text)
        assert page.evaluate(ASK, ["encode", text]) == ids
        assert page.evaluate(ASK, ["decode", ids]) == text


@pytest.mark.parametrize(
    ("k", "p", "t"), [(3, 1.0, 1.0), (5000, 0.5, 0.7), (9, 0.6, 1.0)]
)
def test_filters_are_the_packages(page, shakespeare, k, p, t):
    model, tokenizer = shakespeare
    ids = tokenizer.encode("O")
    page.evaluate(ASK, ["read", ids])
    logits = lightened(model)(torch.tensor([ids]))[0, -1:].detach()
    kept = keep_top_p(keep_top_k(logits, min(k, 2048)), p, t)
    wanted = glassgpt.softmax(kept, temperature=t)[0]
    settings = {"topK": k, "topP": p, "temperature": t}
    choices = page.evaluate(ASK, ["next", ids, 0, settings, 5000])["choices"]
    assert {c["id"] for c in choices} == set(wanted.nonzero()[:, 0].tolist())
    assert all(abs(c["probability"] - wanted[c["id"]].item()) < 1e-5 for c in choices)


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


def small(vocab_size=3, **changes):
    return GPT(GPTConfig(vocab_size, 8, 1, 2, 8, **changes))


def vast():
    """One of its weights is finite, but not in 32 bits."""
    model = small().double()
    model.norm.weight.data[0] = 1e39
    return model


def own():
    return type("Own", (GPT,), {"forward": lambda *_: None})(small().config)


def modern():
    return glassgpt.ModernGPT(glassgpt.ModernConfig(3, 8, 1, 2, 8))


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (own, {}, "GPT-2's architecture"),
        (modern, {}, "GPT-2's architecture"),
        (lambda: glassgpt.quantize(small(), "int8"), {}, "GPT-2's architecture"),
        (vast, {}, "norm.weight is not finite"),
        (lambda: small(4), {}, "3 tokens for a model of 4"),
        (small, {"prompt": "abd"}, "is not in the vocabulary"),
        (small, {"weights": "int4"}, "int8 or float32"),
    ],
)
def test_what_a_page_cannot_run_is_refused(make, settings, message, tmp_path):
    path = tmp_path / "page.html"
    older = PAGE.partition("{")[0] + "an older page"
    path.write_text(older, "utf-8")
    with pytest.raises(ValueError, match=message):
        publish(make(), CharTokenizer("abc"), path, **settings)
    assert path.read_text("utf-8") == older
    assert list(tmp_path.iterdir()) == [path]


def test_the_largest_page_is_known_before_a_weight_is_read():
    config = GPTConfig(2048, 8, 12, 2, 512)
    assert LARGEST_MODEL < 12 * 12 * 512**2 * 4 / 3
    with pytest.raises(ValueError, match="the page would have 52 MB"):
        require_page(config)
    with pytest.raises(ValueError, match="MB"):
        require_page(replace(config, layers=3), "float32")
    require_page(replace(config, layers=3))


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
    model = small(len(odd))
    publish(model, odd, tmp_path / "page.html", "</title>&", prompt="</script>")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert text.count("</script>") == 2
    assert "<title>&lt;/title&gt;&amp;</title>" in text
    stored = text.split("globalThis.glassModel = ")[1].split(";\n</script>")[0]
    assert json.loads(stored) == page_model(model, odd, prompt="</script>")


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
