"""Answers to the checks of chapter 18."""

import json
from dataclasses import replace
from importlib.util import find_spec

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


def rebased(model):
    content, state = export(model)
    if rope := content.get("rope_parameters"):
        rope["rope_theta"] = 9e3
    return content, state


def by_text(model):
    """Blocks in the order of texts: 0, 1, 10, 11, 2."""
    content, state = export(model)
    order = sorted(str(number) for number in range(model.config.layers))
    return content, {
        ".".join(order[int(x)] if x.isdigit() else x for x in name.split(".")): value
        for name, value in state.items()
    }


def without_biases(model):
    content, state = export(model)
    return content, {n: v for n, v in state.items() if not n.endswith("bias")}


class Believing(ForeignTokenizer):
    """A token is special where the file says so."""

    def __init__(self, content):
        super().__init__(content)
        self._inner = type(self._inner).from_str(content)
        self._inner.encode_special_tokens = True


class Dropping(ForeignTokenizer):
    def decode_bytes(self, ids):
        special = self.special_tokens.values()
        return super().decode_bytes(n for n in ids if n not in special)


class Ending(ForeignTokenizer):
    """With the special tokens that the file puts around each text."""

    def _encode(self, text):
        return self._inner.encode(text).ids


def q4_0(data):
    """The numbers of rows of bytes, as the library has them."""
    import gguf

    return gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_0)


def as_neighbors(data):
    return q4_0(data).reshape(6, 2, 2, 16).swapaxes(2, 3).reshape(6, 64)


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


def fold(model, **changes):
    config = replace(model.config, norm_weight=False, tied=False, **changes)
    new = build(config).to(model.tokens.weight.dtype)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    pairs = {"attention_norm": "attention.qkv", "mlp_norm": "mlp.expand"}
    for n in range(config.layers):
        for norm, matrix in pairs.items():
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
        (rebased, "Llama: logits differ"),
        (by_text, "rows are in another order"),
        (without_biases, "missing, unknown, or of another shape"),
    ],
    checks.check_special: [
        (Believing, "where the file calls it not special"),
        (Dropping, "as an id it came back as"),
        (Ending, "turned into the special token"),
    ],
    checks.check_unpack: [(lambda kind, data: unpack(kind, data)[:, :32], "the shape")],
    checks.check_q4_0: [
        (as_neighbors, "in the wrong order"),
        (lambda data: abs(q4_0(data)), "lost signs"),
    ],
    checks.check_pairs: [(lambda rows, width: rows, "row i of a head goes to 2 i")],
    checks.check_safetensors: [
        (careless, "not a ValueError"),
        (as_a_slice, "in spite of a header longer than the file"),
        (in_order_only, "a whole file was refused: a tensor in another place"),
    ],
    checks.check_fold: [
        (lambda model: fold(model, rotary_base=1e4), "another rotary_base"),
        (lambda model: fold(model.float()), "the given model is changed"),
        (lambda model: fold(model).float(), "are all norms folded"),
    ],
}
if not all(map(find_spec, ("transformers", "gguf", "tokenizers", "safetensors"))):
    RIGHT, WRONG = {}, {}
