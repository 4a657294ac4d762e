# Written by tools/tangle.py from book/20_runs_that_survive.ipynb: change it there.


"""Models on disk, as safetensors and JSON, which other programs can read."""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from glassgpt.device import on_paper
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig
from glassgpt.tokens import Tokenizer, load_tokenizer


def flush(path: Path) -> None:
    """Wait until the disk has the bytes of a file, or the names in a folder.

    Raises OSError. Windows and some file systems of networks flush no folder.

    Book: 20_runs_that_survive.html#write-flush-rename
    """
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    number = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(number)
    except OSError as error:
        if not folder or error.errno not in (errno.EBADF, errno.EINVAL):
            raise
    finally:
        os.close(number)


@contextmanager
def all_or_nothing(path: Path) -> Iterator[Path]:
    """Yield another name, for a file or a folder to write; then flush and rename it.

    Raises OSError where the disk is full or can't be written; what is old stays.

    Book: 20_runs_that_survive.html#write-flush-rename
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch's, safetensors'
        raise OSError(f"{path} could not be written: {error}") from error
    finally:  # it would fill a full disk; Ctrl-C, too, leaves nothing
        shutil.rmtree(partial, ignore_errors=True)
        if partial.is_file():
            partial.unlink()


def write_file(path: Path, content: bytes) -> None:
    """Write all of a file or nothing. Raises OSError, as `all_or_nothing`.

    Book: 20_runs_that_survive.html#write-flush-rename
    """
    with all_or_nothing(path) as partial:
        partial.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """The same for what JSON can say.

    Book: 20_runs_that_survive.html#write-flush-rename
    """
    write_file(path, json.dumps(content, indent=1).encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as a safetensors file, whole or not at all. Raises OSError.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with all_or_nothing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # the library makes it private
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(mode)


def read_shapes(path: Path) -> dict[str, tuple[Any, ...]]:
    """The names and shapes in a safetensors file; reads its header only.

    What isn't a real number has its type in place of a shape. Raises ValueError where
    it is not a whole safetensors file.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    real = ("F64", "F32", "F16", "BF16")
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            facts = {n: (p.get_dtype(), p.get_shape()) for n, p in parts.items()}
        return {n: tuple(s) if k in real else (k,) for n, (k, s) in facts.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


# Our names and GPT-2's for the same layers; all but the first four are in every block.
_GPT2_NAMES = {"tokens": "transformer.wte", "positions": "transformer.wpe"}
_GPT2_NAMES |= {"norm": "transformer.ln_f", "head": "lm_head"}
_GPT2_NAMES |= {"attention_norm": "ln_1", "attention.qkv": "attn.c_attn"}
_GPT2_NAMES |= {"attention.projection": "attn.c_proj", "mlp_norm": "ln_2"}
_GPT2_NAMES |= {"mlp.expand": "mlp.c_fc", "mlp.projection": "mlp.c_proj"}


def _gpt2_name(name: str) -> str:
    """GPT-2's name of one of our parameters."""
    layer, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
    if block:
        return f"transformer.h.{block[1]}.{_GPT2_NAMES[block[2]]}.{kind}"
    return f"{_GPT2_NAMES[layer]}.{kind}"


def _transposed(name: str) -> bool:
    """Whether GPT-2 stores this weight as (in, out), where we have (out, in)."""
    return bool(re.fullmatch(r"blocks\..+(qkv|projection|expand)\.weight", name))


def to_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under GPT-2's names and in its layout.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    return {
        _gpt2_name(name): value.T.contiguous() if _transposed(name) else value
        for name, value in state.items()
    }


def from_gpt2(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The inverse: GPT-2's parameters under our `names`.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    theirs = {name: state[_gpt2_name(name)] for name in names}
    return {n: value.T if _transposed(n) else value for n, value in theirs.items()}


# Our fields and GPT-2's keys for them in config.json.
_KEYS = {"vocab_size": "vocab_size", "context": "n_positions", "layers": "n_layer"}
_KEYS |= {"heads": "n_head", "width": "n_embd", "tied": "tie_word_embeddings"}
# What GPT-2's other options must be, for ours to be the same function.
_OPTIONS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def _config_to_json(config: GPTConfig, end: int | None) -> dict[str, Any]:
    """What stands in config.json: GPT-2's own keys where they fit, and all of ours."""
    if type(config) is not GPTConfig:
        return {"model_type": "glassgpt", "glassgpt": asdict(config)}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **{key: getattr(config, name) for name, key in _KEYS.items()},
        **{name: allowed[0] for name, allowed in _OPTIONS.items()},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        "glassgpt": asdict(config),
    }


def _config_from_json(content: dict[str, Any]) -> GPTConfig:
    """The inverse, also for a GPT-2 written by `transformers`."""
    if (kind := content.get("model_type")) == "glassgpt":
        return ModernConfig(**content["glassgpt"])
    if kind != "gpt2":
        raise ValueError(f"its model_type is {kind!r}, not a GPT-2")
    content = {"tie_word_embeddings": True, **content}
    if missing := sorted(set(_KEYS.values()) - set(content)):
        raise ValueError(f"{', '.join(missing)} is missing")
    for name, allowed in {**_OPTIONS, "n_inner": (None, 4 * content["n_embd"])}.items():
        if content.get(name, allowed[0]) not in allowed:
            raise ValueError(f"its {name} is {content[name]!r}, not what GPT-2 has")
    theirs = {name: content[key] for name, key in _KEYS.items()}
    ours = {**theirs, **content.get("glassgpt", {})}
    ours["vocab_size"] = theirs["vocab_size"]  # `transformers` can enlarge it
    for name, value in theirs.items():
        if (other := ours[name]) != value:
            raise ValueError(f"its {name} is {value}, and in another place {other}")
    return GPTConfig(**ours)


def make_folder(directory: Path) -> None:
    """Make a folder and those above it, if they aren't there. Raises OSError.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file or a broken link, no folder")
    directory.mkdir(parents=True, exist_ok=True)


def save(directory: str | Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write model.safetensors, config.json and tokenizer.json into a directory.

    A model with GPT-2's architecture is written so that `transformers` reads the
    directory with AutoModelForCausalLM and AutoTokenizer.
    Raises OSError where the disk is full or can't be written, FileExistsError for the
    folder of a run, of a checkpoint or of tokens, ValueError for a model made lighter,
    whose weights are gone, or what `torch.compile` returned, TypeError without a
    tokenizer.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    directory = Path(directory)
    if not isinstance(model, GPT):
        kind = type(model).__name__
        raise ValueError(f"only a GPT can be saved, not a {kind}: save what is in it")
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError("a model is saved with its tokenizer: it is missing")
    due = dict(on_paper(model.config).named_parameters())
    if due.keys() != dict(model.named_parameters()).keys():
        raise ValueError("weights are missing: save the model before you lighten it")
    for name, what in (("run", "run"), ("hashes", "checkpoint"), ("tokens", "corpus")):
        if (directory / f"{name}.json").exists():
            raise FileExistsError(f"{directory} holds a {what}: use another folder")
    write_model(directory, model, tokenizer)


def write_model(directory: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """What `save` does, once it is known to be right.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    make_folder(directory)
    with all_or_nothing(directory / "tokenizer.json") as partial:
        tokenizer.save(partial)
    end = tokenizer.special_tokens.get("<|endoftext|>")
    kind: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    kind |= {"clean_up_tokenization_spaces": False}
    kind |= {"model_max_length": model.config.context}
    if end is not None:
        kind |= dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    write_json(directory / "tokenizer_config.json", kind)
    write_json(directory / "config.json", _config_to_json(model.config, end))
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    theirs = type(model.config) is GPTConfig
    parameters = to_gpt2(parameters) if theirs else parameters
    write_tensors(directory / "model.safetensors", parameters)


def load_parameters(path: Path, config: GPTConfig) -> GPT:
    """A GPT with the parameters of a file, ours or GPT-2's, after all shapes agree.

    Draws no random numbers. Raises ValueError for a file of another model, before
    memory is taken for it.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    found = read_shapes(path)
    theirs = type(config) is GPTConfig and "tokens.weight" not in found
    prefix = "transformer." if theirs and "wte.weight" in found else ""
    found = {prefix + name: shape for name, shape in found.items()}
    blocks = (re.search(r"(?:blocks|h)\.(\d+)\.", name) for name in found)
    layers = len({block[1] for block in blocks if block})
    try:
        if layers != config.layers:
            raise ValueError(f"it has {layers} layers where {config.layers} are due")
        model = on_paper(config)
        ours = dict(model.named_parameters())
        for name, value in (to_gpt2(ours) if theirs else ours).items():
            if (has := found.get(name, "nothing")) != (due := tuple(value.shape)):
                raise ValueError(f"{name} should be {due}, it has {has}")
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from None
    state = {prefix + name: value for name, value in load_file(path).items()}
    state = from_gpt2(state, list(ours)) if theirs else state
    options = {"copy": True, "memory_format": torch.contiguous_format}
    state = {name: state[name].to(torch.float32, **options) for name in ours}
    model.load_state_dict(state, strict=False, assign=True)
    if config.tied:
        model.head.weight = model.tokens.weight
    return model


MODELS = Path(str(files("glassgpt")), "models")  # what comes with the package


def load(name: str | Path) -> tuple[GPT, Tokenizer]:
    """The model, ready to generate, and the tokenizer of a name or from a directory.

    name: a folder that `save` or `train` filled, or else "shakespeare", the small model
    that comes with the package.
    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign
    one, before memory is taken for it.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    directory = Path(name)
    shipped = {path.name: path for path in MODELS.glob("*/")}
    if not directory.exists():  # a folder is never hidden by a name
        directory = shipped.get(str(name), directory)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / file).exists():
            if (directory / f"{file}.index.json").exists():  # written by `transformers`
                what = f"{directory} has its weights in several files (sharded)"
                raise ValueError(f"{what}: save them in one")
            advice = f"Give a run's folder, or a name: {', '.join(shipped)}"
            what = f"{directory} holds no model: {file} is missing"
            raise FileNotFoundError(f"{what}. {advice}")
    path = directory / "config.json"
    try:
        config = _config_from_json(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a GPT: {error}") from None
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model only {config.vocab_size}"
        raise ValueError(f"{directory} mixes two models: the tokenizer has {sizes}")
    return load_parameters(directory / "model.safetensors", config).eval(), tokenizer
