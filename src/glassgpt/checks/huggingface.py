# Written by tools/tangle.py from book/18_real_models.ipynb: change it there.


"""Checks of models, files and tokenizers that go to other programs and come back."""

import json
import pickle
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glassgpt.checks.expect import expect_same
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import (
    LLAMA_CHOICES,
    ModernConfig,
    apply_rotary,
    build,
    rotary_tables,
)
from glassgpt.tokens import BPETokenizer

SMALL_LLAMA = {
    **LLAMA_CHOICES,
    "hidden": 20,
    "rotary_base": 500.0,
    "norm_eps": 1e-4,
}


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
    if config.model_type != "llama":
        return model
    rope = config.rope_parameters
    kind, base = rope["rope_type"], float(rope["rope_theta"])
    assert kind == "default", f"Llama: rotary positions are {kind}, not default"
    width, eps = config.hidden_size // config.num_attention_heads, config.rms_norm_eps

    def tables(x: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        made = rotary_tables(position_ids, width, base)
        return tuple(torch.cat((table, table), -1).double() for table in made)

    def norm_with(weight: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: F.rms_norm(x, x.shape[-1:], weight, eps)

    model.model.rotary_emb.forward = tables
    for part in model.modules():
        if type(part).__name__ == "LlamaRMSNorm":
            part.forward = norm_with(part.weight)
    return model


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
    wanted = {name: value.shape for name, value in theirs.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    if config.tied and "lm_head.weight" not in found:
        del wanted["lm_head.weight"]
    wrong = [n for n in wanted | found if wanted.get(n) != found.get(n)]
    assert not wrong, f"missing, unknown, or of another shape: {', '.join(wrong[:3])}"
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
    configs = [
        GPTConfig(31, context=24, layers=2, heads=4, width=16),
        GPTConfig(31, context=24, layers=12, heads=2, width=16, tied=False),
        ModernConfig(31, 24, 2, 4, 16, tied=True, key_value_heads=2, **SMALL_LLAMA),
        ModernConfig(31, 24, 12, 2, 16, tied=False, **SMALL_LLAMA),  # 10 follows 9
    ]
    for seed, config in enumerate(configs):
        kind = "Llama" if isinstance(config, ModernConfig) else "GPT-2"
        gap = parity_gap(export, config, seed)
        hint = "nearly the same function;\nanother GELU, epsilon or rotary base?"
        if gap > 0.1:
            hint = "a matrix stands the wrong way round,\nor rows are in another order"
        assert gap < 1e-9, f"{kind}: logits differ by {gap:.1g}: {hint}"


def check_special(make: Callable[[str], Any]) -> None:
    """Text never becomes a special token unless that is allowed, and all text survives.

    make: called with the text of a tokenizer.json; returns a tokenizer.

    Book: 18_real_models.html#agreement-4-tokenizer-json-the-same-tokens
    """
    mark, text = "<|endoftext|>", "a tower<|endoftext|> of \u2615 and\n\n  caf\u00e9"
    ours = BPETokenizer.train("a tower, a miniature tower " * 5, 270)
    facts, end = json.loads(ours.to_json()), ours.special_tokens[mark]
    around = {"type": "BertProcessing", "cls": [mark, end], "sep": [mark, end]}
    content = json.dumps({**facts, "post_processor": around})
    tokenizers = {
        "here": make(content),
        "in another process": pickle.loads(pickle.dumps(make(content))),
        "where the file calls it not special": make(
            content.replace('"special": true', '"special": false')
        ),
    }
    for where, tokenizer in tokenizers.items():
        ids = tokenizer.encode(text)
        assert end not in ids, f"{where}, text was turned into the special token {mark}"
        assert ids == ours.encode(text), f"{where}, other ids than those of the file"
        allowed = tokenizer.encode(text, allow_special=True)
        assert allowed.count(end) == 1, f"{where}, allow_special did not allow {mark}"
        back = tokenizer.decode(allowed)
        assert back == text, f"{where}, with {mark} as an id it came back as {back!r}"


def _expect_unpacked(unpack: Callable[[np.ndarray], np.ndarray], kind: str) -> None:
    """The same numbers as by the library that llama.cpp's authors wrote."""
    import gguf

    known = gguf.GGMLQuantizationType[kind]
    numbers = np.random.default_rng(0).normal(0, 3, (6, 64)).astype(np.float32)
    packed = torch.from_numpy(gguf.quantize(numbers, known))  # (rows, bytes)

    def attempt(data: Tensor) -> Tensor:
        return torch.from_numpy(unpack(data.numpy()))

    def reference(data: Tensor) -> Tensor:
        return torch.from_numpy(gguf.dequantize(data.numpy(), known))

    def neighbors(data: Tensor) -> Tensor:
        return reference(data).view(len(data), -1, 2, 16).mT.flatten(1)

    order = f"{kind}: the right numbers in the wrong order: lower halves first"
    hint = f"This is {kind}: another formula, or lost signs?"
    expect_same(attempt, reference, packed, mistakes={order: neighbors}, hint=hint)


def check_unpack(unpack: Callable[[str, np.ndarray], np.ndarray]) -> None:
    """Packed numbers are what the format says, each in its place.

    unpack: called as unpack(kind, data) with the bytes of rows (rows, bytes).

    Book: 18_real_models.html#agreement-5-gguf-four-bits-for-a-number
    """
    _expect_unpacked(lambda data: unpack("Q4_1", data), "Q4_1")
    _expect_unpacked(lambda data: unpack("Q8_0", data), "Q8_0")


def check_q4_0(unpack: Callable[[np.ndarray], np.ndarray]) -> None:
    """Numbers packed as Q4_0 are scale times (q - 8), each in its place.

    unpack: called with the bytes of rows (rows, bytes).

    Book: 18_real_models.html#agreement-5-gguf-four-bits-for-a-number
    """
    _expect_unpacked(unpack, "Q4_0")


def _neighbors(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions where each column rotates with its neighbor."""
    a, b = y[..., ::2], y[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)


def _scores(x: Tensor, rows: list[Tensor], width: int, rotate: Callable) -> Tensor:
    """Scores (H, T, T) of x (T, C), with rows of queries (H D, C) and keys (G D, C)."""
    tables = [t.double() for t in rotary_tables(torch.arange(len(x)), width)]
    by_head = [(x @ part.T).view(len(x), -1, width).transpose(0, 1) for part in rows]
    queries, keys = (rotate(part, *tables) for part in by_head)
    return queries @ keys.repeat_interleave(len(queries) // len(keys), 0).mT


def check_pairs(reorder: Callable[[Tensor, int], Tensor]) -> None:
    """Reordered for neighboring pairs, rotated queries and keys have the same scores.

    reorder: called as reorder(rows, head_width), once with the rows (H D, C) of all
    queries, once with those of the keys, which may have fewer heads.

    Book: 18_real_models.html#rotary-positions-rows-in-the-right-order
    """
    generator = torch.Generator().manual_seed(0)
    x, q, k = torch.randn(3, 72, 6, dtype=torch.float64, generator=generator)
    for heads, shared, width in ((1, 1, 4), (6, 2, 12)):
        rows = [q[: heads * width], k[: shared * width]]
        wanted = _scores(x, rows, width, apply_rotary)
        changed = [reorder(part.clone(), width) for part in rows]
        gap = (_scores(x, changed, width, _neighbors) - wanted).abs().max()
        assert gap < 1e-9, (
            f"heads of queries: {heads}, of keys: {shared}, of width {width}: the "
            f"scores differ by {gap:.1g};\nrow i of a head goes to 2 i, row i + D / 2 "
            "to 2 i + 1"
        )


def _file(header: Any, size: int) -> bytes:
    """A file with this header, and so many bytes of numbers."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(range(size))


def check_safetensors(read: Callable[[bytes], dict[str, Tensor]]) -> None:
    """Whole safetensors files are read, and forged ones refused with a ValueError.

    read: called with the bytes of a file; returns tensors by name.

    Book: 18_real_models.html#exercises
    """
    from safetensors.torch import save

    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(2).half()}
    tensors |= {"empty": torch.zeros(0, 3), "c": torch.tensor([0.1]).bfloat16()}
    whole = save(tensors, {"format": "pt"})
    end = 8 + int.from_bytes(whole[:8], "little")
    reverse = dict(reversed(json.loads(whole[8:end]).items()))
    for content in (whole, _file(reverse, 0) + whole[end:]):
        try:
            found = read(content)
        except ValueError as error:
            raise AssertionError(f"a whole file was refused: {error}") from error
        assert found.keys() == tensors.keys(), f"the names are {sorted(found)}"
        for name, wanted in tensors.items():
            kind = f"{name} is {found[name].dtype}, not {wanted.dtype}"
            assert found[name].dtype == wanted.dtype, kind
            assert torch.equal(found[name], wanted), f"{name} has other numbers"
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    attacks = {
        "two tensors with the same bytes": _file({"a": one, "b": one}, 16),
        "a gap": _file({"a": {**one, "data_offsets": [4, 20]}}, 20),
        "bytes left over": _file({"a": one}, 20),
        "numbers that aren't there": _file({"a": one}, 12),
        "an unknown type": _file({"a": {**one, "dtype": "F31"}}, 16),
        "a shape that doesn't fit": _file({"a": {**one, "shape": [5]}}, 16),
        "a negative shape": _file({"a": {**one, "shape": [-2, -2]}}, 16),
        "a header that is a list": _file([one], 16),
        "a missing type": _file({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16),
        "a header longer than the file": (1 << 42).to_bytes(8, "little") + b"{}",
        "three bytes": b"abc",
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
    config = ModernConfig(31, 24, 2, 4, 16, tied=True, key_value_heads=2, **SMALL_LLAMA)
    model, ids = random_model(config), torch.arange(24)[None]
    wanted = model(ids)
    new = fold(model)
    assert torch.equal(model.eval()(ids), wanted), "the given model is changed"
    fields = {**asdict(config), "norm_weight": False, "tied": False}
    wrong = [n for n, v in fields.items() if getattr(new.config, n, None) != v]
    assert not wrong, f"its configuration has another {', '.join(wrong)}"
    names = build(new.config).state_dict().keys()
    assert new.state_dict().keys() == names, "its parameters are of another model"
    gap = (new.eval()(ids) - wanted).abs().max()
    assert gap < 1e-9, (
        f"logits differ by {gap:.0e}: are all norms folded,\nand is the new model in "
        "the precision of the one that came?"
    )
