# Written by tools/tangle.py from book/20_runs_that_survive.ipynb: change it there.


"""Models on disk, as safetensors and JSON, which other programs can read."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from glassgpt.chat import tokenizer_files
from glassgpt.device import on_paper
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.hub import (
    NAMES,
    OURS,
    config_from_json,
    config_to_json,
    end_of,
    fill,
    find_model,
    fit,
    format_of,
    load_gguf,
    read_tokenizer,
    to_theirs,
)
from glassgpt.tokens import Tokenizer


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


def make_folder(directory: Path) -> None:
    """Make a folder and those above it, if they aren't there. Raises OSError.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    if os.path.lexists(directory) and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file or a broken link, no folder")
    directory.mkdir(parents=True, exist_ok=True)


def save(directory: str | Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write model.safetensors, config.json and tokenizer.json into a directory.

    `transformers` reads the directory of a GPT-2 or a Llama with AutoModelForCausalLM
    and AutoTokenizer.
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
    for name, content in tokenizer_files(tokenizer).items():
        write_file(directory / name, content.encode())
    end = end_of(tokenizer)
    kind: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    kind |= {"clean_up_tokenization_spaces": False}
    kind |= {"model_max_length": model.config.context}
    if end:
        kind |= dict.fromkeys(("bos_token", "eos_token"), end)
    write_json(directory / "tokenizer_config.json", kind)
    config = config_to_json(model.config, tokenizer.special_tokens.get(end or ""))
    write_json(directory / "config.json", config)
    state = to_theirs(model, format_of(model.config))
    write_tensors(directory / "model.safetensors", state)


def load_parameters(path: Path, config: GPTConfig) -> GPT:
    """A GPT with the parameters of a file, after all shapes agree.

    Draws no random numbers. Raises ValueError for a file of another model, before
    memory is taken for it.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    found = read_shapes(path)
    theirs = OURS if "tokens.weight" in found else format_of(config)
    # The file in which OpenAI's weights are shared says wte, not transformer.wte.
    prefix = "transformer." if "wte.weight" in found else ""
    try:
        model = fit(config, {prefix + n: s for n, s in found.items()}, theirs)
    except (ValueError, RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{path} does not fit its config.json: {error}") from None
    state = load_file(path)
    head, table = "lm_head.weight", theirs.names("tokens.weight")[0]
    own = config.tied and head in state
    if own and not torch.equal(state[head], state[table.removeprefix(prefix)]):
        raise ValueError(f"{path} has a head of its own, its config.json says tied")
    return fill(model, lambda name: state[name.removeprefix(prefix)], theirs)


MODELS = Path(str(files("glassgpt")), "models")  # what comes with the package


def load(name: str | Path) -> tuple[GPT, Tokenizer]:
    """The model, ready to generate, and the tokenizer of a name or from a directory.

    name: a folder that `save`, `train` or `transformers` filled, or a GGUF file; else
    "shakespeare", the small model that comes with the package, or a name that
    `find_model` knows, such as "gpt2" or "smollm2".
    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign
    one, before memory is taken for it, ModuleNotFoundError for a missing package.

    Book: 20_runs_that_survive.html#a-model-on-disk
    """
    directory = Path(name)
    shipped = {path.name: path for path in MODELS.glob("*/")}
    if not directory.exists():  # a folder is never hidden by a name
        directory = shipped.get(str(name)) or find_model(str(name)) or directory
    if directory.suffix == ".gguf":
        return load_gguf(directory)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (directory / file).exists():
            if (directory / f"{file}.index.json").exists():  # written by `transformers`
                what = f"{directory} has its weights in several files (sharded)"
                raise ValueError(f"{what}: save them in one")
            names = ", ".join([*shipped, *NAMES])
            what = f"{directory} holds no model: {file} is missing"
            raise FileNotFoundError(f"{what}. Give a run's folder, or a name: {names}")
    path = directory / "config.json"
    try:
        config = config_from_json(json.loads(path.read_text("utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a GPT: {error}") from None
    tokenizer = read_tokenizer(directory / "tokenizer.json")
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} ids, the model only {config.vocab_size}"
        raise ValueError(f"{directory} mixes two models: the tokenizer has {sizes}")
    return load_parameters(directory / "model.safetensors", config).eval(), tokenizer
