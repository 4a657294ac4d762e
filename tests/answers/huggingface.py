"""Answers to the checks of chapter 18."""

import json
from dataclasses import replace
from importlib.util import find_spec

import torch

from glassgpt.checks import huggingface as checks
from glassgpt.gguf import unpack
from glassgpt.huggingface import (
    ForeignTokenizer,
    config_to_json,
    format_of,
    pair_neighbors,
    to_theirs,
)
from glassgpt.modern import build


def export(model):
    return config_to_json(model.config), to_theirs(model, format_of(model.config))


def rebased(content, state):
    if rope := content.get("rope_parameters"):
        rope["rope_theta"] = 9e3
    return content, state


def shortened(content, state):
    if "max_position_embeddings" in content:
        content["max_position_embeddings"] = 3
    return content, state


def unbiased(content, state):
    return content, {n: v * ("bias" not in n) for n, v in state.items()}


def exchanged(content, state):
    turned = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return content, {
        ".".join(turned.get(part, part) for part in name.split(".")): value
        for name, value in state.items()
    }


def renumbered(content, state, number):
    return content, {
        ".".join(
            number(part) if part.isdigit() else part for part in name.split(".")
        ): v
        for name, v in state.items()
    }


def by_text(content, state):
    """Blocks in the order of texts: 0, 1, 10, 11, 2."""
    count = content.get("n_layer", content.get("num_hidden_layers"))
    order = sorted(map(str, range(count)))
    return renumbered(content, state, lambda n: order[int(n)])


def one_digit(content, state):
    return renumbered(content, state, lambda n: n[0])


def exported(change):
    return lambda model: change(*export(model))


def with_one_more(content, state):
    return content, {**state, "x": torch.arange(24)}


def without_any(content, state):
    return content, {}


class Believing(ForeignTokenizer):
    def __init__(self, content):
        super().__init__(content)
        self._inner = type(self._inner).from_str(content)
        self._inner.no_truncation()
        self._inner.encode_special_tokens = True


class Dropping(ForeignTokenizer):
    def decode_bytes(self, ids):
        special = self.special_tokens.values()
        return super().decode_bytes(n for n in ids if n not in special)


class Ending(ForeignTokenizer):
    """With the special tokens that the file puts around each text."""

    def _encode(self, text):
        return self._inner.encode(text).ids


class Cutting(ForeignTokenizer):
    def __init__(self, content):
        super().__init__(content)
        if cut := json.loads(content).get("truncation"):
            self._inner.enable_truncation(cut["max_length"])


def library(kind, data):
    """The numbers of rows of bytes, as the library has them."""
    import gguf

    return gguf.dequantize(data, gguf.GGMLQuantizationType[kind])


def q4_0(data):
    return library("Q4_0", data)


def in_place(rows, width):
    return rows.copy_(pair_neighbors(rows.clone(), width))


def careful(content):
    """A reader of safetensors: the library's, with one kind of error."""
    from safetensors.torch import load

    try:
        return load(content)
    except Exception as error:
        raise ValueError(str(error)) from None


def careless(content):
    """The library's, whatever it raises."""
    from safetensors.torch import load

    return load(content)


def as_a_slice(content):
    """A header that ends where the file does, whatever its length says."""
    size = min(int.from_bytes(content[:8], "little"), max(len(content) - 8, 0))
    return careful(size.to_bytes(8, "little") + content[8:])


def in_order_only(content):
    size = int.from_bytes(content[:8], "little")
    tensors = careful(content)
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    places = [facts["data_offsets"] for facts in header.values()]
    if places != sorted(places):
        raise ValueError("a tensor in another place")
    return tensors


def as_float32(content):
    return {name: value.float() for name, value in careful(content).items()}


def fold(model, **changes):
    config = replace(model.config, norm_weight=False, tied=False, **changes)
    new = build(config).to(model.tokens.weight.dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for n in range(config.layers):
        for norm, matrix in (
            ("attention_norm", "attention.qkv"),
            ("mlp_norm", "mlp.expand"),
        ):
            factor = state.pop(f"blocks.{n}.{norm}.weight")
            state[f"blocks.{n}.{matrix}.weight"] *= factor
    state["head.weight"] *= state.pop("norm.weight")
    new.load_state_dict(state)
    return new


RIGHT = {
    checks.check_parity: [export],
    checks.check_special: [ForeignTokenizer],
    checks.check_unpack: [unpack],
    checks.check_q4_0: [q4_0],
    checks.check_pairs: [pair_neighbors],
    checks.check_safetensors: [careful],
    checks.check_fold: [fold],
}
WRONG = {
    checks.check_parity: [
        (exported(by_text), "of another"),
        (exported(one_digit), "missing"),
        (exported(rebased), "Llama: logits differ"),
        (exported(shortened), "context 3, not 24"),
        (exported(unbiased), "of another"),
        (exported(exchanged), "of another"),
        (exported(with_one_more), "unknown names"),
        (exported(without_any), "missing"),
    ],
    checks.check_special: [
        (Believing, "where the file calls it not special"),
        (Dropping, "as an id it came back as"),
        (Ending, "turned into the special token"),
        (Cutting, "a text came back as"),
    ],
    checks.check_unpack: [(lambda kind, data: unpack(kind, data)[:, :64], "shape")],
    checks.check_q4_0: [
        (lambda data: q4_0(data).reshape(-1, 64), "shape"),
        (lambda data: q4_0(data)[:, :64], "shape"),
    ],
    checks.check_pairs: [(in_place, "must stay as they are")],
    checks.check_safetensors: [
        (careless, "not a ValueError"),
        (as_a_slice, "in spite of a header longer than the file"),
        (in_order_only, "header in reverse was refused: a tensor in another place"),
        (as_float32, "is torch.float32, not"),
    ],
    checks.check_fold: [
        (lambda model: fold(model, rotary_base=1e4), "another rotary_base"),
        (lambda model: fold(model, norm_eps=1e-5), "another norm_eps"),
        (lambda model: fold(model.float()), "the given model is changed"),
        (lambda model: fold(model).float(), "nearly the same"),
    ],
}
if not all(map(find_spec, ("transformers", "gguf", "tokenizers", "safetensors"))):
    RIGHT, WRONG = {}, {}
