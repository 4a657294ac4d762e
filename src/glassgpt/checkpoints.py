# Written by tools/tangle.py from book/23_runs_that_survive.ipynb: change it there.
"""Models on disk, as safetensors and JSON, which other programs can read."""

import filecmp
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from glassgpt import huggingface
from glassgpt.atomic import all_or_nothing, flush, write_file, write_json
from glassgpt.chat import tokenizer_files
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernGPT
from glassgpt.plan import on_paper
from glassgpt.tokens import Tokenizer


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors as a safetensors file, whole or not at all. Raises OSError.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with all_or_nothing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # the library makes it private
        try:
            save_file(tensors, partial, metadata={"format": "pt"})
        except SafetensorError as error:  # the disk is full
            raise OSError(error) from error
        partial.chmod(mode)


@contextmanager
def blaming(path: Path, what: str) -> Iterator[None]:
    """Turn an error into a ValueError that says what is wrong with a file.

    A MemoryError comes out as it is, and so does an OSError, but for a missing file:
    the machine is to blame, not the file.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} {what}: {error}") from error
    except (MemoryError, OSError):
        raise
    except Exception as error:  # a forged file can raise anything
        raise ValueError(f"{path} {what}: {error}") from error


# What `save` writes, and a model's card: where nothing else is, it may write again.
FILES = {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
}


def save(directory: str | Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Write model.safetensors, config.json and tokenizer.json into a directory.

    `transformers` reads the directory of a GPT-2 or a Llama with AutoModelForCausalLM
    and AutoTokenizer.
    Raises OSError where the disk is full or can't be written, FileExistsError for a
    folder with anything in it but an older model, ValueError for a model of a class of
    your own, for a tokenizer with more ids than the model, for weights that are nan or
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
    wanted = dict(on_paper(model.config).named_parameters())
    if wanted.keys() != dict(model.named_parameters()).keys():
        raise ValueError(
            "weights are missing or have other names: "
            "save the model before you lighten it or compile it"
        )
    huggingface.require_fit(tokenizer, model.config)
    if not all(p.isfinite().all() for p in model.parameters()):
        raise ValueError("the model has weights that are nan or infinite")
    names = {p.name for p in directory.glob("[!.]*") if p.suffix != ".partial"}
    if others := sorted(names - FILES):
        raise FileExistsError(
            f"{directory} is not empty, {others[0]} is in it: use another folder"
        )
    write_model(directory, model, tokenizer)


def write_model(directory: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """What `save` does, once it is known to be right.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    new = directory / ".new"  # a disk that gets full changes nothing of an older model
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        parts, end = tokenizer_files(tokenizer), huggingface.end_of(tokenizer)
        for name, content in parts.items():
            write_file(new / name, content.encode())
        about = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "model_max_length": model.config.context,
            "clean_up_tokenization_spaces": False,
        }
        write_json(new / "tokenizer_config.json", about)
        ends = tokenizer.special_tokens.get(end or "")
        write_json(new / "config.json", huggingface.config_to_json(model.config, ends))
        state = huggingface.to_theirs(model, huggingface.format_of(model.config))
        write_tensors(new / "model.safetensors", state)
        weights = directory / "model.safetensors"
        others = {path.name for path in new.iterdir()} - {weights.name}
        same, *_ = filecmp.cmpfiles(new, directory, others, shallow=False)
        if others - {*same}:  # a kill from here on leaves no mixture
            weights.unlink(missing_ok=True)
        if "chat_template.jinja" not in parts:  # of an older model
            (directory / "chat_template.jinja").unlink(missing_ok=True)
        for name in (*others, weights.name):
            (new / name).replace(directory / name)
        flush(directory)
    finally:
        shutil.rmtree(new, ignore_errors=True)


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
        with blaming(path, "is missing, damaged or no safetensors file"):
            state |= load_file(path)  # mapped into memory, not read
    if "wte.weight" in state:  # so in the file in which OpenAI's weights are shared
        body = state.keys() - {"lm_head.weight"}
        state |= {f"transformer.{name}": state.pop(name) for name in body}
    theirs = (
        huggingface.OURS if "tokens.weight" in state else huggingface.format_of(config)
    )
    with blaming(directory, "does not fit its config.json"):
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        model = huggingface.fit(config, shapes, theirs)
    with blaming(directory, "can't be used"):
        return huggingface.fill(model, state.__getitem__, theirs)


MODELS = Path(str(files("glassgpt")), "models")  # what comes with the package


def load(name: str | Path) -> tuple[GPT, Tokenizer]:
    """The model, ready to generate, and the tokenizer of a name or from a directory.

    name: a folder that `save`, `train` or `transformers` filled, or a GGUF file; else
    "shakespeare", the small model that comes with the package, or a name that
    `find_model` knows, such as "gpt2" or "smollm2".
    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign
    one, before memory is taken for it, ModuleNotFoundError for a missing package.

    Book: 23_runs_that_survive.html#a-model-on-disk
    """
    directory = Path(name)
    shipped = {path.name: path for path in MODELS.glob("*/")}
    if not directory.exists():  # a folder is never hidden by a name
        directory = (
            shipped.get(str(name)) or huggingface.find_model(str(name)) or directory
        )
    if directory.suffix == ".gguf":
        return huggingface.load_gguf(directory)
    path = directory / "config.json"
    if not path.exists():
        if (directory / "run.json").exists():
            raise FileNotFoundError(
                f"{directory} is a run without an evaluation: "
                "resume it, or name a checkpoint in it"
            )
        names = ", ".join([*shipped, *huggingface.NAMES])
        raise FileNotFoundError(
            f"{directory} holds no model: config.json is missing. "
            f"Give a run's folder, or a name: {names}"
        )
    with blaming(path, "does not describe a GPT"):
        config = huggingface.config_from_json(json.loads(path.read_text("utf-8")))
    tokenizer = huggingface.read_tokenizer(directory / "tokenizer.json")
    with blaming(directory, "mixes two models"):
        huggingface.require_fit(tokenizer, config)
    return load_parameters(directory, config).eval(), tokenizer
