# Written by tools/tangle.py from book/18_real_models.ipynb: change it there.
"""GGUF files, the format of llama.cpp: models in, and ours out."""

import json
import math
import mmap
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassgpt.atomic import atomic_write, refuse_other
from glassgpt.chat import template_of, to_jinja
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.huggingface import (
    ForeignTokenizer,
    Format,
    end_of,
    fill,
    fit,
    format_of,
    hub_library,
    read_config,
    require_fit,
    to_theirs,
    values_of,
)
from glassgpt.modern import ModernGPT
from glassgpt.tokens import Tokenizer


def unpack(kind: str, data: np.ndarray) -> np.ndarray:
    """The numbers of a tensor in a GGUF file, as float32.

    kind: Q4_1, Q8_0, or any other that the library `gguf` knows, such as F16. data: the
    bytes of each row (rows, bytes), or numbers already.

    Book: 18_real_models.html#agreement-5-gguf-four-bits-for-a-number
    """
    if kind == "Q4_1":  # a scale, a minimum, and 32 numbers of 4 bits
        blocks = data.reshape(-1, 20)
        scale, low = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
        steps = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        numbers = scale[:, None] * steps + low[:, None]
    elif kind == "Q8_0":  # a scale, and 32 numbers of 8 bits
        blocks = data.reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        numbers = scale * blocks[:, 2:].view(np.int8)
    else:
        gguf = hub_library("gguf")
        return gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    return numbers.reshape(len(data), -1)


GGUF_GPT2 = Format(
    kind="gpt2",
    block="blk",
    layers={
        "tokens": ("token_embd",),
        "positions": ("position_embd",),
        "attention_norm": ("attn_norm",),
        "attention.qkv": ("attn_qkv",),
        "attention.projection": ("attn_output",),
        "mlp_norm": ("ffn_norm",),
        "mlp.expand": ("ffn_up",),
        "mlp.projection": ("ffn_down",),
        "norm": ("output_norm",),
        "head": ("output",),
    },
    keys={
        "vocab_size": "vocab_size",
        "context": "context_length",
        "layers": "block_count",
        "heads": "attention.head_count",
        "width": "embedding_length",
        "tied": "tied",
    },
    options={"attention.layer_norm_epsilon": (1e-5,)},
)
GGUF_LLAMA = Format(
    kind="llama",
    block="blk",
    layers={
        **GGUF_GPT2.layers,
        "attention.qkv": ("attn_q", "attn_k", "attn_v"),
        "mlp.expand": ("ffn_gate", "ffn_up"),
    },
    one_qkv=False,
    keys={
        **GGUF_GPT2.keys,
        "rotary_base": "rope.freq_base",
        "norm_eps": "attention.layer_norm_rms_epsilon",
        "hidden": "feed_forward_length",
        "key_value_heads": "attention.head_count_kv",
    },
    options={
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (1.0, 0.0),
        "rope.scale_linear": (1.0, 0.0),
    },
    neighbors=("attn_q", "attn_k"),
)
GGUF_FORMATS = {form.kind: form for form in (GGUF_GPT2, GGUF_LLAMA)}


def _gguf_tokenizer(facts: dict[str, Any]) -> ForeignTokenizer:
    """The tokenizer in the fields of a GGUF file. Raises ValueError."""
    t = hub_library("tokenizers")
    ours = "tokenizer.ggml."
    own = {k.removeprefix(ours): v for k, v in facts.items() if k.startswith(ours)}
    kind = own["model"], own.get("pre", "gpt-2")
    if kind not in (("gpt2", "gpt-2"), ("gpt2", "smollm")):
        raise ValueError(f"its tokenizer is {kind}, not byte pairs as GPT-2's")
    ids = {token: n for n, token in enumerate(own["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in own["merges"]]
    inner = t.Tokenizer(t.models.BPE(ids, merges))
    parts = [t.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if kind[1] == "smollm":  # each digit is set apart
        parts.insert(0, t.pre_tokenizers.Digits(individual_digits=True))
    inner.pre_tokenizer = t.pre_tokenizers.Sequence(parts)
    inner.decoder = t.decoders.ByteLevel()
    kinds = zip(own["tokens"], own["token_type"], strict=True)
    inner.add_special_tokens([token for token, kind in kinds if kind == 3])
    return ForeignTokenizer(inner.to_str())


class _Fields:
    """What stands one after another at the start of a GGUF file."""

    codes = dict(enumerate("BbHhIif?__Qqd"))  # 8 and 9, texts and lists, are below

    def __init__(self, content: mmap.mmap):
        self.content, self.place = content, 0

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.place)
        self.place += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.require(length)
        start = self.place
        self.place += length
        return self.content[start : self.place].decode()

    def require(self, size: int) -> None:
        """ValueError where fewer bytes than that are left."""
        left = len(self.content) - self.place
        if size > left:
            raise ValueError(f"a text or a list takes {size} bytes, {left} are left")

    def value(self, kind: int) -> Any:
        if kind == 8:
            return self.text()
        if kind == 9:
            kind, length = self.number("I"), self.number("Q")
            sizes = {8: 8, 9: 12}  # of a text's length; of a list's kind and length
            size = sizes.get(kind) or struct.calcsize(f"<{self.codes[kind]}")
            self.require(length * size)
            return [self.value(kind) for _ in range(length)]
        return self.number(self.codes[kind])


def _read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, tuple], dict[str, Any]]:
    """The fields of a GGUF file; its tensors' shapes; their kinds and bytes, unread."""
    gguf = hub_library("gguf")  # it knows how many bytes each kind takes
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    fields = _Fields(content)
    if fields.number("4s") != b"GGUF" or fields.number("I") not in (2, 3):
        raise ValueError("it does not begin with GGUF and version 2 or 3")
    tensors = fields.number("Q")
    count = fields.number("Q")
    facts = {}
    for _ in range(count):
        key = fields.text()
        kind = fields.number("I")
        facts[key] = fields.value(kind)
    shapes, places = {}, {}
    for _ in range(tensors):
        name = fields.text()
        axes = fields.number("I")
        if axes > 4 or name in shapes:
            raise ValueError(f"{name} has {axes} axes, or is there twice")
        shapes[name] = tuple(fields.number("Q") for _ in range(axes))[::-1]
        kind = gguf.GGMLQuantizationType(fields.number("I"))
        places[name] = kind, fields.number("Q")
    edge, stored = facts.get("general.alignment", 32), {}
    if len(facts) < count or edge not in [1 << n for n in range(32)]:
        raise ValueError("a field is there twice, or its alignment is no power of two")
    start, due = math.ceil(fields.place / edge) * edge, 0
    for name, (kind, place) in places.items():
        numbers, size = gguf.GGML_QUANT_SIZES[kind]
        if shapes[name][-1] % numbers:
            raise ValueError(f"{name} has rows that end within a block")
        length = math.prod(shapes[name]) // numbers * size
        if place != due:
            raise ValueError(f"{name} is at {place}, not at {due}")
        due += math.ceil(length / edge) * edge
        data = np.frombuffer(content, np.uint8, length, start + place)
        stored[name] = kind.name, data.reshape(*shapes[name][:-1], -1)  # (rows, bytes)
    return facts, shapes, stored


LONGEST_REASON = 200  # characters of a message about a damaged file


def _config(facts: dict[str, Any], shapes: dict[str, tuple]) -> GPTConfig:
    """The configuration that a file's facts describe."""
    kind = facts["general.architecture"]
    if kind not in GGUF_FORMATS:
        raise ValueError(f"its architecture is {kind!r}, not gpt2 or llama")
    content = {k.removeprefix(f"{kind}."): _rounded(v) for k, v in facts.items()}
    content.pop("glassgpt", None)  # ours, in a config.json alone
    content["vocab_size"] = shapes["token_embd.weight"][0]
    content["tied"] = "output.weight" not in shapes
    return read_config(GGUF_FORMATS[kind], content)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever a broken file makes the code stumble over into a short message."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        reason = " ".join(reason[:LONGEST_REASON].split())  # it may quote the file
        raise ValueError(f"{path} is damaged or foreign: {reason}") from error


def gguf_config(path: Path) -> GPTConfig:
    """The configuration of the model in a GGUF file; its weights are not read.

    Raises what `load_gguf` raises.

    Book: 18_real_models.html#a-whole-gguf-file
    """
    hub_library("gguf")  # missing isn't damaged
    with _named(path):
        facts, shapes, _ = _read_gguf(path)
        return _config(facts, shapes)


def load_gguf(path: Path) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a GGUF file, as llama.cpp uses them.

    Raises ValueError for a damaged file and for what isn't GPT-2 or a Llama, before
    memory is taken for it; for weights that are nan or infinite.

    Book: 18_real_models.html#a-whole-gguf-file
    """
    for needed in ("gguf", "tokenizers"):
        hub_library(needed)  # missing isn't damaged
    with _named(path):
        facts, shapes, stored = _read_gguf(path)
        config = _config(facts, shapes)
        theirs = GGUF_FORMATS[facts["general.architecture"]]
        model = fit(config, shapes, theirs)
        tokenizer = _gguf_tokenizer(facts)
        require_fit(tokenizer, model.config)

        def read(name: str) -> Tensor:
            return torch.from_numpy(unpack(*stored[name]))

        return fill(model, read, theirs).eval(), tokenizer


def _rounded(value: Any) -> Any:
    """A float32 such as 9.99999975e-06 as the number that was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def write_gguf(
    path: str | Path, model: GPT, tokenizer: Tokenizer, dtype: str = "float16"
) -> None:
    """Write a model and its tokenizer as a GGUF file, for llama.cpp and Ollama.

    dtype: of the matrices, float16 or float32; vectors and the table of positions are
    float32. Raises ValueError for another dtype, for a model of a class of your own or
    one that is neither a GPT-2 nor a Llama, for weights that are nan, infinite or too
    large for the dtype, and for a tokenizer of characters or of another model;
    FileExistsError for a file of another kind.

    Book: 18_real_models.html#gguf-export-for-laptops
    """
    refuse_other(path, b"GGUF")
    config = model.config
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype: float16 or float32, not {dtype!r}")
    if type(model) not in (GPT, ModernGPT):
        raise ValueError(
            f"a {type(model).__name__} would be read back as another model: "
            "only a GPT or a ModernGPT can be written"
        )
    theirs = GGUF_FORMATS.get(format_of(config).kind)
    if theirs is None:
        raise ValueError("llama.cpp knows GPT-2 and Llama, not this model")
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, "
            f"the model {config.vocab_size}: it is the tokenizer of another model"
        )
    with atomic_write(path) as unfinished:
        writer = hub_library("gguf").GGUFWriter(unfinished, theirs.kind)
        values = values_of(config)
        keys = {"hidden": "feed_forward_length", **theirs.keys}
        del keys["tied"]  # the tensors show it
        for name, key in keys.items():
            real = name in ("rotary_base", "norm_eps")  # also where a config has 10000
            add = writer.add_float32 if real else writer.add_uint32
            add(f"{theirs.kind}.{key}", values[name])
        if theirs is GGUF_GPT2:
            writer.add_layer_norm_eps(1e-5)
        kinds = hub_library("gguf").LlamaFileType
        half = dtype == "float16"
        writer.add_file_type(kinds.MOSTLY_F16 if half else kinds.ALL_F32)
        _write_tokenizer(writer, tokenizer, config.vocab_size)
        for name, value in to_theirs(model, theirs).items():
            matrix = value.dim() > 1 and name != "position_embd.weight"
            kept = getattr(torch, dtype) if matrix else torch.float32
            stored = value.detach().cpu().to(kept).contiguous()
            if not stored.isfinite().all():
                raise ValueError(f"{name} is nan or infinite, or too large for {kept}")
            writer.add_tensor(name, stored.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _write_tokenizer(writer: Any, tokenizer: Tokenizer, size: int) -> None:
    """The fields of a tokenizer. Raises ValueError for what isn't byte pairs."""
    saved = json.loads(tokenizer.to_json())
    splitter = saved["pre_tokenizer"] or {"type": "none"}
    steps = {step["type"] for step in splitter.get("pretokenizers", [splitter])}
    if "ByteLevel" not in steps or not steps <= {"ByteLevel", "Digits"}:
        raise ValueError("a GGUF file wants a tokenizer of byte pairs, as GPT-2's")
    tokens, kinds = [f"[PAD{n}]" for n in range(size)], [5] * size  # 5: not used
    for symbol, n in saved["model"]["vocab"].items():
        tokens[n], kinds[n] = symbol, 1  # a piece of text
    for token in saved["added_tokens"]:
        tokens[token["id"]], kinds[token["id"]] = token["content"], 3  # special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if "Digits" in steps else "gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in saved["model"]["merges"]])
    writer.add_add_bos_token(False)
    end = end_of(tokenizer)
    if end:
        writer.add_eos_token_id(tokenizer.special_tokens[end])
        writer.add_bos_token_id(tokenizer.special_tokens[end])
    with suppress(ValueError):
        template = to_jinja(template_of(tokenizer))
        writer.add_chat_template(re.sub(r"{%-? (end)?generation -?%}", "", template))
