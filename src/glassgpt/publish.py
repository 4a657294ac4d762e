# Written by tools/tangle.py from book/a4_publishing.ipynb: change it there.
"""Publishing: a GPT as one HTML file that runs in any browser."""

import base64
import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.atomic import refuse_other, write_file
from glassgpt.chat import template_of
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.tokens import BPETokenizer, CharTokenizer, Tokenizer


def as_text(parameter: Tensor, weights: str = "int8") -> dict[str, str]:
    """A parameter in base64: its float32 numbers, or for each row int8 and a scale.

    weights: "int8", for parameters with two axes, or "float32".

    Book: a4_publishing.html#one-byte-a-weight
    """

    def written(numbers: Tensor) -> str:
        return base64.b64encode(numbers.contiguous().numpy().tobytes()).decode()

    x = parameter.detach().cpu().float()
    if weights == "float32" or x.dim() == 1:
        return {"float32": written(x)}
    scales = x.abs().amax(dim=1) / 127 + 1e-30  # a row may be all 0
    whole = (x / scales[:, None]).round().to(torch.int8)
    return {"int8": written(whole), "scales": written(scales)}


LARGEST_MODEL = 50_000_000  # characters of a model: a browser has to read them all


def require_page(config: GPTConfig, weights: str = "int8") -> None:
    """Raise ValueError where a page can't run a model of this configuration.

    weights: "int8" or "float32", as in `publish`. No weight is needed to ask.

    Book: a4_publishing.html#the-block-and-the-gpt
    """
    if weights not in ("int8", "float32"):
        raise ValueError(f"weights must be int8 or float32, not {weights!r}")
    if type(config) is not GPTConfig:
        raise ValueError(
            "a page runs GPT-2's architecture (glassgpt.GPT), no other: "
            "use `glassgpt chat` or `glassgpt serve`"
        )
    count = 12 * config.layers * config.width**2
    count += (config.vocab_size + config.context) * config.width
    bytes_each = 4 if weights == "float32" else 1
    size = count * bytes_each * 4 // 3  # base64 writes 4 characters for 3 bytes
    if size > LARGEST_MODEL:
        raise ValueError(
            f"the page would have {size / 1e6:.0f} MB, "
            f"and a browser should read at most {LARGEST_MODEL / 1e6:.0f} MB"
        )


def page_model(
    model: GPT, tokenizer: Tokenizer, weights: str = "int8", prompt: str = ""
) -> dict[str, Any]:
    """All that a page needs to run a model, as JSON can hold it.

    weights: "int8", one byte for each, or "float32". prompt: what stands in the page at
    the start. Raises ValueError for another architecture than GPT-2's, a tokenizer of
    another package or another size, a prompt that it can't encode, weights that are
    not finite, and a model too large for a page.

    Book: a4_publishing.html#the-block-and-the-gpt
    """
    config = model.config
    require_page(config, weights)
    parameters = dict(model.named_parameters())
    if type(model) is not GPT or "blocks.0.mlp.expand.weight" not in parameters:
        raise ValueError("a page runs GPT-2's architecture (glassgpt.GPT), no other")
    if len(tokenizer) != config.vocab_size:
        raise ValueError(f"{len(tokenizer)} tokens for a model of {config.vocab_size}")
    for name, parameter in parameters.items():
        if not parameter.float().isfinite().all():
            raise ValueError(f"{name} is not finite: is the model damaged?")
    tokenizer.encode(prompt)  # raises where the vocabulary lacks one of its characters
    return {
        "config": {
            "context": config.context,
            "layers": config.layers,
            "heads": config.heads,
            "width": config.width,
        },
        "weights": {name: as_text(p, weights) for name, p in parameters.items()},
        "tokenizer": tokenizer_data(tokenizer),
        "chat": chat_data(tokenizer),
        "prompt": prompt,
    }


def tokenizer_data(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer as JSON can hold it; "start" is what an empty prompt stands for.

    Raises ValueError for a tokenizer of another package.

    Book: a4_publishing.html#byte-pairs
    """
    special = list(tokenizer.special_tokens)
    data = {"merges": list(tokenizer.merges), "special": special}
    if isinstance(tokenizer, BPETokenizer):
        data["bytes"] = list(tokenizer.decode_bytes(range(256)))
        data["start"] = tokenizer.encode("\n")
    elif isinstance(tokenizer, CharTokenizer):
        ids = range(len(tokenizer) - len(special))
        data["characters"] = [tokenizer.decode([n]) for n in ids]
        data["start"] = [0]
    else:
        kind = type(tokenizer).__name__
        raise ValueError(f"a page has tokenizers of this package only, no {kind}")
    return data


def chat_data(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """A model's chat template, its marks as ids, or None where it knows no roles.

    Book: a4_publishing.html#byte-pairs
    """
    try:
        template = template_of(tokenizer)
    except ValueError:
        return None

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, allow_special=True)

    return {
        "before": {role: ids(mark) for role, mark in template.before.items()},
        "stop": ids(template.stop),
        "after": ids(template.after),
        "usual": template.default_system,
    }


def model_script(
    model: GPT, tokenizer: Tokenizer, weights: str = "int8", prompt: str = ""
) -> str:
    """The JavaScript that hands a model to the page. settings: as in `page_model`.

    Book: a4_publishing.html#one-file
    """
    stored = json.dumps(page_model(model, tokenizer, weights, prompt))
    return f"globalThis.glassModel = {stored};\n".replace("<", "\\u003c")


def page_script() -> str:
    """The JavaScript that runs a model: the engine inside a function, and the page.

    Book: a4_publishing.html#one-file
    """
    folder = files("glassgpt") / "page"
    engine = (folder / "gpt.js").read_text("utf-8")
    page = (folder / "page.js").read_text("utf-8")
    return f"function engine() {{\n{engine}}}\n\n{page}"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="Glass GPT">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 42rem; margin: 1rem auto; padding: 0 1rem; font-family: system-ui;
  background: Canvas; color: CanvasText }}
</style>
<main>
<h1>{title}</h1>
<p>A GPT of {parameters:,} parameters, a small language model, runs in this page;
nothing you write leaves it. {does} one token (a piece of text) at a time, and makes up
what it says. {click} on a token of the text to look there.</p>
<glass-gpt></glass-gpt>
<noscript><p>It needs JavaScript.</p></noscript>
<p>Made with <a href="https://glassgpt.github.io/glassgpt/">Glass GPT</a>, a book that
explains every part of it.</p>
</main>
<script>{model}</script>
<script>{page}</script>
</html>
"""


def publish(
    model: GPT,
    tokenizer: Tokenizer,
    path: str | Path,
    title: str = "Glass GPT",
    weights: str = "int8",
    prompt: str = "",
) -> None:
    """Write one HTML file that runs a model in any browser, without a network.

    weights: "int8" (one byte for each weight) or "float32" (four). prompt: what stands
    there at the start. The file is written whole, or not at all.
    Raises ValueError for what a page can't run: another architecture than GPT-2's, a
    tokenizer of another package, a model too large, weights that are no numbers; and
    OSError for a path that is no file's, or that of a file which is no such page.

    Book: a4_publishing.html#one-file
    """
    refuse_other(path, PAGE.partition("{")[0].encode())
    script = model_script(model, tokenizer, weights=weights, prompt=prompt)
    chats = chat_data(tokenizer) is not None
    choose = "Click on a bar to choose the next token (what followed is cut off), or"
    text = PAGE.format(
        title=html.escape(title),
        does="It answers you," if chats else "It continues a text,",
        click="Click" if chats else choose,
        parameters=model.parameter_count(),
        model=script,
        page=page_script(),
    )
    write_file(path, text.encode())
