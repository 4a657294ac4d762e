# Written by tools/tangle.py from book/18_real_models.ipynb: change it there.
"""Checks of models, files and tokenizers that go to other programs and come back."""

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import (
    LLAMA_CHOICES,
    ModernConfig,
    apply_rotary,
    build,
    rotary_tables,
)
from glassgpt.tokens import BPETokenizer


def random_model(config: GPTConfig, seed: int = 0) -> GPT:
    """A model in 64 bits whose weights are large enough for a mistake to show.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    generator = torch.Generator().manual_seed(seed)
    model = build(config).double().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.25, generator=generator)
    return model


def theirs_in_double(content: dict[str, Any]) -> Any:
    """The model of `transformers` that a config.json describes, in 64 bits throughout.

    Llama's norms and rotary tables, which are made in 32 bits, are made as ours.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {key: value for key, value in content.items() if key != "glassgpt"}
    config = AutoConfig.for_model(**options)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for part in model.modules():
        if type(part).__name__ == "LlamaRMSNorm":
            part.forward = _norm_of(part)
        if type(part).__name__ == "LlamaRotaryEmbedding":
            kind = config.rope_parameters["rope_type"]
            assert kind == "default", f"Llama: rotary positions are {kind}, not default"
            base = float(config.rope_parameters["rope_theta"])
            width = config.hidden_size // config.num_attention_heads
            part.forward = _tables_of(base, width)
    return model


def _norm_of(part: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.rms_norm(x, x.shape[-1:], part.weight, part.variance_epsilon)


def _tables_of(base: float, width: int) -> Callable[..., tuple[Tensor, ...]]:
    def tables(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        made = rotary_tables(position_ids, width, base)
        return tuple(torch.cat((table, table), -1).double() for table in made)

    return tables


Exported = tuple[dict[str, Any], dict[str, Tensor]]


@torch.no_grad()
def parity_gap(
    export: Callable[[GPT], Exported], config: GPTConfig, seed: int
) -> float:
    """How far logits of `transformers` are from ours, for a random model.

    Raises AssertionError for names and shapes that don't fit.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    model = random_model(config, seed)
    content, state = export(model)
    theirs = theirs_in_double(content)
    due = {name: value.shape for name, value in theirs.state_dict().items()}
    tied = {"lm_head.weight"} if config.tied else set()
    assert state.keys() <= due.keys(), f"unknown names: {sorted(state.keys() - due)}"
    assert due.keys() - tied <= state.keys(), f"missing: {sorted(due - state.keys())}"
    for name, value in state.items():
        shapes = f"{[*value.shape]}, not {[*due[name]]}"
        assert value.shape == due[name], f"{name} is {shapes}"
    context = theirs.config.max_position_embeddings
    assert context == config.context, f"context {context}, not {config.context}"
    theirs.load_state_dict(state, strict=False)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (2, config.context), generator=generator)
    return (model(ids) - theirs(ids).logits).abs().max().item()


@torch.random.fork_rng(devices=[])
def check_parity(export: Callable[[GPT], Exported]) -> None:
    """Exported, a model is the same function in `transformers`: to 1e-9, in 64 bits.

    export: called as export(model) for a GPT-2 or a Llama; returns the content of
    config.json, and the parameters under their names and in their layout.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    llama = {**LLAMA_CHOICES, "hidden": 20, "rotary_base": 500.0, "norm_eps": 1e-4}
    for seed, config in enumerate(
        [
            GPTConfig(31, context=24, layers=2, heads=4, width=16),
            GPTConfig(31, context=24, layers=12, heads=2, width=16, tied=False),
            ModernConfig(31, 24, 2, 4, 16, tied=True, key_value_heads=2, **llama),
            ModernConfig(31, 24, 12, 2, 16, tied=False, **llama),  # 10 follows 9
        ]
    ):
        kind = "Llama" if isinstance(config, ModernConfig) else "GPT-2"
        gap = parity_gap(export, config, seed)
        assert gap < 0.1, (
            f"{kind}: logits differ by {gap:.1g}: a matrix stands the wrong way "
            "round,\nrows are in another order, or a layer has the numbers of another"
        )
        assert gap < 1e-9, (
            f"{kind}: logits differ by {gap:.0e}: nearly the same function;\n"
            "another activation function, epsilon or rotary base?"
        )


def check_special(make: Callable[[str], Any]) -> None:
    """Text never becomes a special token unless that is allowed, and all text survives.

    make: called with the text of a tokenizer.json; returns a tokenizer.

    Book: 18_real_models.html#agreement-4-tokenizer-json-the-same-tokens
    """
    mark, text = "<|endoftext|>", "a tower<|endoftext|> of \u2615 and\n\n  caf\u00e9"
    with TemporaryDirectory() as place:
        path = Path(place, "tokenizer.json")
        due = BPETokenizer.train("a tower, a miniature tower " * 5, 270)
        due.save(path)
        facts, end = json.loads(path.read_text("utf-8")), due.special_tokens[mark]
    around = {"type": "BertProcessing", "cls": [mark, end], "sep": [mark, end]}
    short = {"max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content = json.dumps({**facts, "post_processor": around, "truncation": short})
    tokenizer = make(content)
    sent = pickle.loads(pickle.dumps(tokenizer))
    plain = make(content.replace('"special": true', '"special": false'))
    places = ("here", "in another process", "where the file calls it not special")
    for one, where in zip((tokenizer, sent, plain), places, strict=True):
        ids = one.encode(text)
        assert end not in ids, f"{where}, text was turned into the special token {mark}"
        back = one.decode(ids)
        assert back == text, f"{where}, a text came back as {back!r}"
        assert ids == due.encode(text), f"{where}, other ids than those of the file"
        allowed = one.encode(text, allow_special=True)
        assert allowed.count(end) == 1, f"{where}, allow_special did not allow {mark}"
        back = one.decode(allowed)
        assert back == text, f"{where}, with {mark} as an id it came back as {back!r}"
        assert one.vocab_size == 270, f"{one.vocab_size} ids, not 270"


def _blocks(kind: str, generator: np.random.Generator) -> tuple[bytes, list[float]]:
    """A random block of 32 numbers, written and calculated one by one."""
    scale, low = np.float16(generator.normal(0, 2, 2)).tolist()
    if kind == "Q8_0":
        whole = generator.integers(-128, 128, 32).tolist()
        return struct.pack("<e32b", scale, *whole), [scale * q for q in whole]
    steps = generator.integers(0, 16, 32).tolist()
    halves = bytes(a | b << 4 for a, b in zip(steps[:16], steps[16:], strict=True))
    if kind == "Q4_0":
        return struct.pack("<e", scale) + halves, [scale * (q - 8) for q in steps]
    return struct.pack("<2e", scale, low) + halves, [scale * q + low for q in steps]


def _check_kind(unpack: Callable[[np.ndarray], np.ndarray], kind: str) -> None:
    generator = np.random.default_rng(0)
    blocks = [_blocks(kind, generator) for _ in range(6)]
    packed = np.frombuffer(b"".join(b for b, _ in blocks), np.uint8)
    numbers = np.array([part for _, part in blocks], np.float32)
    for rows in (3, 1, 6):
        due, found = numbers.reshape(rows, -1), unpack(packed.reshape(rows, -1))
        assert isinstance(found, np.ndarray), "a NumPy array is wanted"
        assert found.shape == due.shape, f"{kind}: shape {found.shape}, not {due.shape}"
        assert found.dtype == np.float32, f"{kind}: {found.dtype}, not float32"
        if not np.allclose(found, due, atol=1e-3):
            mistake = "another formula, lost signs, or arithmetic in 16 bits"
            if np.allclose(np.sort(found), np.sort(due), atol=1e-3):
                mistake = "the right numbers in the wrong order: lower halves first"
            raise AssertionError(f"{kind}: {mistake}")


def check_unpack(unpack: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Packed numbers are what the format says, each in its place.

    unpack: called as unpack(kind, data) with the bytes of rows (rows, bytes).

    Book: 18_real_models.html#agreement-5-gguf-four-bits-for-a-number
    """
    for kind in ("Q4_1", "Q8_0"):
        _check_kind(lambda data, kind=kind: unpack(kind, data), kind)  # type: ignore
    for kind, dtype in (("F16", np.float16), ("F32", np.float32)):
        numbers = np.linspace(-3, 3, 12, dtype=dtype).reshape(3, 4)
        found = unpack(kind, numbers)
        assert found.dtype == np.float32, f"{kind}: {found.dtype}, not float32"
        assert (found == numbers).all(), f"{kind}: numbers were changed"


def check_q4_0(unpack: Callable[[np.ndarray], np.ndarray]) -> None:
    """Numbers packed as Q4_0 are scale times (q - 8), each in its place.

    unpack: called with the bytes of rows (rows, bytes).

    Book: 18_real_models.html#agreement-5-gguf-four-bits-for-a-number
    """
    _check_kind(unpack, "Q4_0")


def _scores(rows: list[Tensor], x: Tensor, width: int, rotate: Callable) -> Tensor:
    """Scores (H, T, T) of x (T, C), with rows of queries (H D, C) and keys (G D, C)."""
    parts = ((x @ part.T).view(len(x), -1, width).transpose(0, 1) for part in rows)
    tables = [t.double() for t in rotary_tables(torch.arange(len(x)), width)]
    queries, keys = (rotate(part, *tables) for part in parts)
    return queries @ keys.repeat_interleave(len(queries) // len(keys), 0).mT


def _neighbors(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions where each column rotates with its neighbor."""
    a, b = y[..., ::2], y[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def check_pairs(reorder: Callable[[Tensor, int], Tensor]) -> None:
    """Reordered for neighboring pairs, rotated queries and keys have the same scores.

    reorder: called as reorder(rows, head_width), once with the rows (H D, C) of all
    queries, once with those of the keys, which may have fewer heads.

    Book: 18_real_models.html#rotary-positions-rows-in-the-right-order
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 6, dtype=torch.float64, generator=generator)  # (T, C)
    for heads, shared, width in ((1, 1, 4), (6, 2, 12)):
        shapes = ((heads * width, 6), (shared * width, 6))
        rows = [
            torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes
        ]
        due = _scores(rows, x, width, apply_rotary)
        sent = [part.clone() for part in rows]
        changed = [reorder(part, width) for part in sent]
        for new, part, old in zip(changed, sent, rows, strict=True):
            assert torch.equal(part, old), "the rows that came must stay as they are"
            assert new.shape == old.shape, f"shape {new.shape}, not {old.shape}"
        gap = (_scores(changed, x, width, _neighbors) - due).abs().max()
        assert gap < 1e-9, (
            f"heads of queries: {heads}, of keys: {shared}, of width {width}: the "
            f"scores differ by {gap:.1g};\nrow i of a head goes to 2 i, row i + D / 2 "
            "to 2 i + 1"
        )


def _forged(header: Any, size: int, length: int | None = None) -> bytes:
    """A file with this header, so many bytes of numbers, and this length of header."""
    text = json.dumps(header).encode()
    number = len(text) if length is None else length
    return number.to_bytes(8, "little") + text + bytes(range(size))


def check_safetensors(read: Callable[[bytes], dict[str, Tensor]]) -> None:
    """Whole safetensors files are read, and forged ones refused with a ValueError.

    read: called with the bytes of a file; returns tensors by name.

    Book: 18_real_models.html#exercises
    """
    from safetensors.torch import save

    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2).half()}
    tensors |= {"c": torch.tensor(3.5), "empty": torch.zeros(0, 3)}
    tensors |= {"d": torch.tensor([0.1]).bfloat16(), "e": torch.ones(2).double() / 3}
    whole, with_metadata = save(tensors), save(tensors, {"format": "pt"})
    end = 8 + int.from_bytes(whole[:8], "little")
    entries = reversed(json.loads(whole[8:end]).items())
    files = {"a whole file": whole, "one with metadata": with_metadata}
    files["one with its header in reverse"] = _forged(dict(entries), 0) + whole[end:]
    for what, content in files.items():
        try:
            found = read(content)
        except ValueError as error:
            raise AssertionError(f"{what} was refused: {error}") from error
        assert found is not None, "nothing came back"
        names = f"names {sorted(found)}, not {sorted(tensors)}"
        assert found.keys() == tensors.keys(), names
        for name, due in tensors.items():
            assert found[name].shape == due.shape, f"{name} has another shape"
            kind = f"{name} is {found[name].dtype}, not {due.dtype}"
            assert found[name].dtype == due.dtype, kind
            assert torch.equal(found[name], due), f"{name} has other numbers"
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    late = {**one, "data_offsets": [20, 36]}
    huge = {**one, "shape": [1 << 62, 4, 0], "data_offsets": [0, 0]}
    empty = {"a": {**one, "shape": [0], "data_offsets": [0, 0]}}
    typeless = {"shape": [4], "data_offsets": [0, 16]}
    deep = b"[" * 200_000
    attacks = {
        "two tensors with the same bytes": _forged({"a": one, "b": one}, 16),
        "the same bytes twice, as many unused": _forged({"a": one, "b": one}, 32),
        "a gap between two tensors": _forged({"a": one, "b": late}, 36),
        "bytes left over": _forged({"a": one}, 20),
        "numbers that aren't there": _forged({"a": one}, 12),
        "a type that doesn't fit": _forged({"a": {**one, "dtype": "F16"}}, 16),
        "an unknown type": _forged({"a": {**one, "dtype": "F31"}}, 16),
        "a shape that doesn't fit": _forged({"a": {**one, "shape": [5]}}, 16),
        "a negative shape": _forged({"a": {**one, "shape": [-2, -2]}}, 16),
        "a shape too large, though empty": _forged({"a": huge}, 0),
        "a header that is a list": _forged([one], 16),
        "a missing type": _forged({"a": typeless}, 16),
        "a list for a type": _forged({"a": {**one, "dtype": ["F32"]}}, 16),
        "a header longer than the file": _forged(empty, 0, 1 << 42),
        "three bytes": b"abc",
        "a header nested too deeply": len(deep).to_bytes(8, "little") + deep,
    }
    for name, content in attacks.items():
        try:
            read(content)
        except ValueError:
            continue
        except Exception as error:
            kind = type(error).__name__
            raise AssertionError(f"{name}: a {kind}, not a ValueError") from error
        raise AssertionError(f"it was read in spite of {name}")


@torch.random.fork_rng(devices=[])
@torch.no_grad()
def check_fold(fold: Callable[[GPT], GPT]) -> None:
    """Without weights in its norms, a Llama is still the same function.

    fold: called with a ModernGPT; returns another with norm_weight=False.

    Book: 18_real_models.html#exercises
    """
    choices = {**LLAMA_CHOICES, "tied": True, "key_value_heads": 2, "hidden": 20}
    choices |= {"rotary_base": 500.0, "norm_eps": 1e-4}
    config = ModernConfig(31, 24, 2, 4, 16, **choices)
    model = random_model(config)
    ids = torch.arange(24)[None]
    due = model(ids)
    new = fold(model)
    assert new is not None, "nothing came back"
    assert torch.equal(model.eval()(ids), due), "the given model is changed"
    due_config = {**asdict(config), "norm_weight": False, "tied": False}
    wrong = [n for n, v in due_config.items() if getattr(new.config, n, None) != v]
    assert not wrong, f"its configuration has another {', '.join(wrong)}"
    names = build(new.config).state_dict().keys()
    assert new.state_dict().keys() == names, "its parameters are of another model"
    gap = (new.eval()(ids) - due).abs().max()
    assert gap < 1e-3, f"logits differ by {gap:.1g}: are all norms folded?"
    assert gap < 1e-9, (
        f"logits differ by {gap:.0e}: nearly the same;\nis the new model in the "
        "precision of the one that came?"
    )
