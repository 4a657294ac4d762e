# Written by tools/tangle.py from book/23_runs_that_survive.ipynb: change it there.
"""Models on disk, as safetensors and JSON, which other programs can read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glassgpt import gguf, huggingface
from glassgpt.atomic import atomic_write, flush, write_file
from glassgpt.chat import tokenizer_files
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernGPT
from glassgpt.plan import meta_model
from glassgpt.tokens import Tokenizer


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as a safetensors file that others may read. Raises OSError.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # the library makes it private
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # the disk is full
        raise OSError(error) from error
    path.chmod(mode)


@contextmanager
def reraise_as(message: str) -> Iterator[None]:
    """Turn an error into a ValueError with a message that names the file at fault.

    A MemoryError comes out as it is, and so does an OSError, but for a missing file:
    the machine is to blame, not the file.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{message}: {error}") from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a forged file can raise anything
        raise ValueError(f"{message}: {error}") from error


TEXTS = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
# What `save` writes: where nothing else is, it may write again.
FILES = [*TEXTS, "model.safetensors"]


def save(directory: str | Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write model.safetensors, config.json and tokenizer.json into a directory.

    `transformers` reads the directory of a GPT-2 or a Llama with AutoModelForCausalLM
    and AutoTokenizer.
    Raises OSError where the disk is full or can't be written, FileExistsError for a
    folder with anything in it but an older model, ValueError for a model of a class of
    your own, for a tokenizer that is another model's, for weights that are nan or
    infinite, for a model made lighter, whose weights are gone, or what `torch.compile`
    returned.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    directory = Path(directory)
    if isinstance(model, GPT) and type(model) not in (GPT, ModernGPT):
        raise ValueError(
            f"a {type(model).__name__} would be read back as another model: "
            "only a GPT or a ModernGPT can be saved"
        )
    wanted = dict(meta_model(model.config).named_parameters())
    if wanted.keys() != dict(model.named_parameters()).keys():
        raise ValueError(
            "weights are missing or have other names: "
            "save the model before you quantize it or compile it"
        )
    ours, theirs = tokenizer.vocab_size, model.config.vocab_size
    # Others pad their tables to a round number, so a few ids may have no token.
    if not 0.9 * theirs <= ours <= theirs:
        raise ValueError(
            f"the tokenizer has {ours} ids, the model {theirs}: it is another model's"
        )
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("the model has weights that are nan or infinite")
    names = {p.name for p in directory.glob("[!.]*") if p.suffix != ".partial"}
    others = sorted(names - {*FILES})
    if others:
        raise FileExistsError(
            f"{directory} is not empty, {others[0]} is in it: use another folder"
        )
    write_model(directory, model, tokenizer)


def write_model(directory: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """What `save` does, once it is known to be right.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    end = huggingface.end_of(tokenizer)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "model_max_length": model.config.context,
        "clean_up_tokenization_spaces": False,
    }
    config = huggingface.config_to_json(
        model.config, tokenizer.special_tokens.get(end or "")
    )
    texts = tokenizer_files(tokenizer)
    texts["tokenizer_config.json"] = json.dumps(about, indent=1)
    texts["config.json"] = json.dumps(config, indent=1)
    new = {name: text.encode() for name, text in texts.items()}
    weights = directory / "model.safetensors"
    with atomic_write(weights) as partial:
        save_tensors(
            partial, huggingface.to_theirs(model, huggingface.format_of(model.config))
        )
        paths = [directory / name for name in TEXTS if (directory / name).exists()]
        old = {path.name: path.read_bytes() for path in paths}
        if old != new:
            for path in (weights, *paths):
                path.unlink(missing_ok=True)
            flush(directory)
            for name, content in new.items():
                write_file(directory / name, content)


def load_parameters(directory: Path, config: GPTConfig) -> GPT:
    """A GPT with the parameters of a folder's safetensors, after all shapes agree.

    They are in one file, or in several with numbers. Draws no random numbers. Raises
    ValueError for a damaged file, and for one of another model before memory is taken
    for it.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    state: dict[str, Tensor] = {}
    parts = sorted(directory.glob("model-*-of-*.safetensors"))
    for path in parts or [directory / "model.safetensors"]:
        with reraise_as(f"{path} is missing, damaged or no safetensors file"):
            state |= load_file(path)  # mapped into memory, not read
    if "wte.weight" in state:  # so in the file in which OpenAI's weights are shared
        for name in state.keys() - {"lm_head.weight"}:
            state[f"transformer.{name}"] = state.pop(name)
    theirs = (
        huggingface.OURS if "tokens.weight" in state else huggingface.format_of(config)
    )
    with reraise_as(f"{directory} does not fit its config.json"):
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        model = huggingface.fit(config, shapes, theirs)
    with reraise_as(f"{directory} can't be used"):
        return huggingface.fill(model, state.__getitem__, theirs)


MODELS = Path(str(files("glassgpt")), "models")  # what comes with the package


def _find(name: str | Path) -> Path:
    """The folder or the GGUF file of a model. Raises FileNotFoundError."""
    place = Path(name)
    shipped = {path.name: path for path in MODELS.glob("*/")}
    if not place.exists():  # a folder is never hidden by a name
        place = shipped.get(str(name)) or huggingface.find_model(str(name)) or place
    if place.suffix == ".gguf" or (place / "config.json").exists():
        return place
    if (place / "run.json").exists():
        raise FileNotFoundError(
            f"{place} is a run without an evaluation: "
            "resume it, or name a checkpoint in it"
        )
    names = ", ".join([*shipped, *huggingface.NAMES])
    raise FileNotFoundError(
        f"{place} holds no model: config.json is missing. "
        f"Give a run's folder, or a name: {names}"
    )


def load_config(name: str | Path) -> GPTConfig:
    """The configuration of the model that `load` would load; no weight is read.

    Raises what `load` raises.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    place = _find(name)
    if place.suffix == ".gguf":
        return gguf.gguf_config(place)
    path = place / "config.json"
    with reraise_as(f"{path} does not describe a GPT"):
        return huggingface.config_from_json(json.loads(path.read_text("utf-8")))


def load(name: str | Path) -> tuple[GPT, Tokenizer]:
    """The model, ready to generate, and the tokenizer of a name or from a directory.

    name: a folder that `save`, `train` or `transformers` filled, or a GGUF file; else
    "shakespeare", the small model that comes with the package, or a name that
    `find_model` knows, such as "gpt2" or "smollm2".
    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign
    one, before memory is taken for it, ModuleNotFoundError for a missing package.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    directory = _find(name)
    if directory.suffix == ".gguf":
        return gguf.load_gguf(directory)
    config = load_config(directory)
    tokenizer = huggingface.read_tokenizer(directory / "tokenizer.json")
    with reraise_as(f"{directory} mixes two models"):
        huggingface.require_fit(tokenizer, config)
    return load_parameters(directory, config).eval(), tokenizer
