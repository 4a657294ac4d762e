# Written by tools/tangle.py from book/20_runs_that_survive.ipynb: change it there.
"""Models on disk, as safetensors and JSON, which other programs can read."""

import json
import os
import re
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
from glassgpt.modern import ModernConfig, build
from glassgpt.tokens import load_tokenizer


def write_file(path: Path, content: bytes) -> None:
    """Write under another name, flush to the disk, and rename: all of it or nothing.

    Book: 20_runs_that_survive.html#the-module
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)  # on a full disk it would be in the way
        raise


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as a safetensors file, whole or not at all.

    Raises OSError where the disk is full or can't be written.

    Book: 20_runs_that_survive.html#the-module
    """
    partial = path.with_name(path.name + ".partial")
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in tensors.items()
    }
    partial.touch()
    mode = partial.stat().st_mode  # the library makes it private
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.chmod(mode)
    except SafetensorError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a safetensors file; reads its header only.

    Raises ValueError where it is not a whole safetensors file.

    Book: 20_runs_that_survive.html#the-module
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from None


# Our names and GPT-2's for the same layers; the last six stand in every block.
_GPT2_NAMES = {
    "tokens": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.expand": "mlp.c_fc",
    "mlp.projection": "mlp.c_proj",
}


def _gpt2_name(name: str) -> str:
    """GPT-2's name of one of our parameters."""
    layer, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
    if block:
        return f"transformer.h.{block[1]}.{_GPT2_NAMES[block[2]]}.{kind}"
    return f"{_GPT2_NAMES[layer]}.{kind}"


def _transposed(name: str) -> bool:
    """Whether GPT-2 stores this weight as (in, out), where we have (out, in)."""
    kinds = ("qkv.weight", "projection.weight", "expand.weight")
    return name.startswith("blocks.") and name.endswith(kinds)


def to_gpt2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under GPT-2's names and in its layout.

    Book: 20_runs_that_survive.html#the-module
    """
    return {
        _gpt2_name(name): value.T.contiguous() if _transposed(name) else value
        for name, value in state.items()
    }


def from_gpt2(state: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The inverse: GPT-2's parameters under our `names`.

    Book: 20_runs_that_survive.html#the-module
    """
    theirs = {name: state[_gpt2_name(name)] for name in names}
    return {
        name: value.T if _transposed(name) else value for name, value in theirs.items()
    }


def _config_to_json(config: GPTConfig, end: int | None) -> dict[str, Any]:
    """What stands in config.json: GPT-2's own keys where they fit, and all of ours."""
    ours = {"glassgpt": asdict(config)}
    if type(config) is not GPTConfig:
        return {"model_type": "glassgpt", **ours}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        "tie_word_embeddings": config.tied,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), end),
        **ours,
    }


# What GPT-2's other options must be, for ours to be the same function.
_GPT2_OPTIONS = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def _config_from_json(content: dict[str, Any]) -> GPTConfig:
    """The inverse, also for a GPT-2 written by `transformers`."""
    kind, ours = content.get("model_type"), content.get("glassgpt")
    if ours and kind == "glassgpt":
        return ModernConfig(**ours)
    if kind != "gpt2":
        raise ValueError(f"its model_type is {kind!r}, not a GPT-2")
    allowed = {**_GPT2_OPTIONS, "n_inner": (None, 4 * content["n_embd"])}
    for name, values in allowed.items():
        if content.get(name, values[0]) not in values:
            raise ValueError(f"its {name} is {content[name]!r}, not what GPT-2 has")
    keys = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
    rest = {"tied": content.get("tie_word_embeddings", True)}
    if ours:  # what `transformers` has no single key for
        rest["dropout"] = ours["dropout"]
    config = GPTConfig(*(content[key] for key in keys), **rest)
    if ours and GPTConfig(**ours) != config:
        raise ValueError(f"it says {ours} and {asdict(config)}")
    return config


def save(directory: str | Path, model: GPT, tokenizer: Any) -> None:
    """Write model.safetensors, config.json and tokenizer.json into a directory.

    A model with GPT-2's architecture is written so that `transformers` reads the
    directory with AutoModelForCausalLM and AutoTokenizer.
    Raises OSError where the disk is full or can't be written, FileExistsError for the
    folder of a run, ValueError for a model made lighter, whose weights are gone, or
    one that `torch.compile` returned.

    Book: 20_runs_that_survive.html#the-module
    """
    if not isinstance(model, GPT):
        raise ValueError(f"save a GPT, not {type(model).__name__}: its own model")
    due = dict(on_paper(model.config).named_parameters())
    if due.keys() != dict(model.named_parameters()).keys():
        raise ValueError("weights are missing: save the model before you lighten it")
    if (Path(directory) / "run.json").exists():
        raise FileExistsError(f"{directory} holds a run: use another directory")
    write_model(Path(directory), model, tokenizer)


def write_model(directory: Path, model: GPT, tokenizer: Any) -> None:
    """What `save` does, once it is known to be right.

    Book: 20_runs_that_survive.html#the-module
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(directory / "tokenizer.json")
    special = "<|endoftext|>"
    end = tokenizer.special_tokens.get(special)
    kind: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    kind["clean_up_tokenization_spaces"] = False
    kind["model_max_length"] = model.config.context
    if end is not None:
        kind |= {"bos_token": special, "eos_token": special}
    write_file(directory / "tokenizer_config.json", json.dumps(kind, indent=1).encode())
    content = _config_to_json(model.config, end)
    write_file(directory / "config.json", json.dumps(content, indent=1).encode())
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    if type(model.config) is GPTConfig:
        parameters = to_gpt2(parameters)
    write_tensors(directory / "model.safetensors", parameters)


def _expected_parameters(config: GPTConfig, layers: int) -> dict[str, Tensor]:
    """The parameters of such a model, as shapes without memory.

    Raises ValueError for a model that can't be that of a file with so many layers.
    """
    if layers != config.layers:
        raise ValueError(f"it has {layers} layers where {config.layers} are due")
    try:
        model = on_paper(config)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"no model can have these sizes: {error}") from None
    tables = sum(table.numel() for table in model.buffers())
    if tables > max(model.parameter_count(), 1 << 24):
        raise ValueError(f"a context of {config.context} is out of proportion")
    return dict(model.named_parameters())


def load_parameters(path: Path, config: GPTConfig) -> GPT:
    """A GPT with the parameters of a file, ours or GPT-2's, after all shapes agree.

    Raises ValueError for a file of another model, before memory is taken for it.

    Book: 20_runs_that_survive.html#the-module
    """
    found = read_shapes(path)
    blocks = (re.search(r"(?:blocks|h)\.(\d+)\.", name) for name in found)
    layers = len({block[1] for block in blocks if block})
    theirs = type(config) is GPTConfig and "tokens.weight" not in found
    prefix = "transformer." if theirs and "wte.weight" in found else ""
    found = {prefix + name: shape for name, shape in found.items()}
    try:
        ours = _expected_parameters(config, layers)
        for name, value in (to_gpt2(ours) if theirs else ours).items():
            if found.get(name) != tuple(value.shape):
                has = found.get(name, "nothing")
                raise ValueError(f"{name} should be {tuple(value.shape)}, it has {has}")
    except ValueError as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from None
    state = {prefix + name: value for name, value in load_file(path).items()}
    with torch.random.fork_rng(devices=[]):  # its start is thrown away
        model = build(config)
    state = from_gpt2(state, list(ours)) if theirs else state
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return model


MODELS = Path(str(files("glassgpt")), "models")  # what comes with the package


def load(name: str | Path) -> tuple[GPT, Any]:
    """The model, ready to generate, and the tokenizer of a name or from a directory.

    name: a folder that `save` or `train` filled, or else "shakespeare", the small model
    that comes with the package.
    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign
    one, before memory is taken for it.

    Book: 20_runs_that_survive.html#the-module
    """
    directory = Path(name)
    shipped = {path.name: path for path in MODELS.glob("*/")}
    if not directory.exists():  # a folder is never hidden by a name
        directory = shipped.get(str(name), directory)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / file).exists():
            raise FileNotFoundError(
                f"{directory} holds no model: {file} is missing. Give a run's folder, "
                f"or a name: {', '.join(shipped)}"
            )
    path = directory / "config.json"
    try:
        config = _config_from_json(json.loads(path.read_text("utf-8")))
    except KeyError as error:
        raise ValueError(
            f"{path} does not describe a GPT: {error} is missing"
        ) from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a GPT: {error}") from None
    tokenizer = load_tokenizer(directory / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{directory} mixes two models: the tokenizer has {tokenizer.vocab_size} "
            f"ids, the model only {config.vocab_size}"
        )
    return load_parameters(directory / "model.safetensors", config).eval(), tokenizer
