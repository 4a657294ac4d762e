# Written by tools/tangle.py from book/23_command_line.ipynb: change it there.
"""The command line: glassgpt train, generate and tokenize."""

import argparse
import io
import json
import os
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from tqdm.auto import tqdm

from glassgpt.checkpoints import build, checkpoints_in, load, save, write_file
from glassgpt.data import TokenData, read_documents, split_documents, tokenize
from glassgpt.device import (
    SIZES,
    Plan,
    make_plan,
    peak_flops,
    pick_device,
)
from glassgpt.generation import stream_text
from glassgpt.gpt import GPTConfig
from glassgpt.modern import ModernConfig
from glassgpt.speed import keep_freed_memory, lighten
from glassgpt.tokens import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer
from glassgpt.training import TrainConfig, lock_folder, train

HELP = {
    "context": "longest text it sees, in tokens",
    "layers": "number of blocks",
    "heads": "in each block; divides the width",
    "width": "numbers in the vector of a token",
    "dropout": "share that is dropped in training",
    "positions": "learned or rotary",
    "norm": "layer or rms",
    "activation": "gelu or squared_relu",
    "normalize_qk": "normalize queries and keys",
    "bias": "in linear layers and norms",
    "tied": "the head shares the token table",
    "zero_projections": "projections start at zero",
}


HELP |= {
    "steps": "how often the optimizer moves the weights",
    "batch_size": "texts in a batch",
    "accumulate": "batches in a step",
    "optimizer": "adamw, or muon for the matrices",
    "learning_rate": "the highest, of AdamW",
    "matrix_learning_rate": "the highest, of Muon",
    "schedule": "cosine, linear or stable",
    "warmup": "steps in which the rate rises",
    "final_rate": "share of the rate that is left at the end",
    "weight_decay": "of matrices",
    "clip": "a longer gradient is cut to this length",
    "precision": "float32, tf32, bfloat16 or float16",
    "compile": "off, blocks or all, for faster steps",
    "recompute": "less memory, more time",
    "evaluate_every": "steps from one look at the held-out text to the next",
    "evaluation_batches": "of held-out text, at each look",
    "checkpoint_every": "steps from one checkpoint to the next",
    "keep": "how many checkpoints stay",
    "seed": "of weights, batches and dropout",
}


def add_fields(parser: argparse.ArgumentParser, kind: type, without: set[str]) -> None:
    """An option for every field of a dataclass, absent from the result unless given.

    Book: 23_command_line.html#options-that-can-t-be-forgotten
    """
    for field in fields(kind):
        if field.name in without:
            continue
        settings: dict[str, Any] = {"default": argparse.SUPPRESS}
        settings["help"] = HELP[field.name]
        if field.type is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {
                "type": field.type,
                "metavar": field.name.split("_")[-1].upper(),
            }
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)


VOCABULARY = 1024  # of byte pairs, where nobody chooses


def make_tokenizer(name: str, vocab_size: int | None, source: str) -> Tokenizer:
    """The tokenizer called "char", "bpe" or "gpt2", or the one saved at a path.

    The first two learn from the part of the source that is trained on. Raises
    ValueError for a vocab_size where the tokenizer decides it by itself.

    Book: 23_command_line.html#which-tokenizer
    """
    if name != "bpe" and vocab_size is not None:
        raise ValueError("--vocab-size goes with --tokenizer bpe only: leave it out")
    if name == "gpt2":
        return BPETokenizer.gpt2()
    if name not in ("char", "bpe"):
        return load_tokenizer(name)
    documents = split_documents(read_documents(source))
    if name == "char":
        return CharTokenizer.train(p for _, d in documents for p in d.pieces())
    learned = (d for split, d in documents if split == "train")
    pieces = (piece for document in learned for piece in document.pieces())
    return BPETokenizer.train(pieces, VOCABULARY if vocab_size is None else vocab_size)


def refuse_occupied(out: Path) -> None:
    """Raise FileExistsError for anything but a new folder or an empty one.

    Book: 23_command_line.html#starting-a-run-or-going-on-with-one
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another --out")
    if checkpoints_in(out):
        raise FileExistsError(
            f"{out} holds a run: add --resume, or choose another --out"
        )
    if (out / "run.json").exists():
        raise FileExistsError(
            f"{out} holds a run that has no checkpoint yet: let it go on, begin it "
            "again with --resume, or, if it failed, delete the folder"
        )
    if names := sorted(path.name for path in out.glob("[!.]*")):
        raise FileExistsError(
            f"{out} is not empty, {names[0]} is in it: choose another --out"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder if there is none, and remove it again when what follows fails.

    Raises FileExistsError while another command fills it.

    Book: 23_command_line.html#starting-a-run-or-going-on-with-one
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder, f"another command is filling {folder}")
    try:
        yield
    except BaseException:
        lock.release()
        if made:
            shutil.rmtree(folder)
        raise
    lock.release()


@contextmanager
def size_advice() -> Iterator[None]:
    """Turn PyTorch's refusal of a far too large model into advice, a MemoryError.

    Book: 23_command_line.html#starting-a-run-or-going-on-with-one
    """
    try:
        yield
    except torch.AcceleratorError:  # of a driver or a kernel, about no size
        raise
    except (RuntimeError, TypeError, OverflowError) as error:
        raise MemoryError(
            "such a model does not fit into memory: choose a smaller --size, or less "
            "of --layers, --width and --context"
        ) from error


def _values(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of the two configurations that were given."""
    names = {
        field.name for kind in (ModernConfig, TrainConfig) for field in fields(kind)
    }
    return {k: v for k, v in vars(options).items() if k in names - {"vocab_size"}}


def _plan(vocab_size: int, options: argparse.Namespace) -> Plan:
    """What the options ask for, refused before any work if no memory could hold it."""
    with size_advice():
        given = (options.size, options.recipe, options.device)
        plan = make_plan(vocab_size, *given, **_values(options))
        with torch.device("meta"):
            build(plan.model)
    return plan


def _tokenized(data: str) -> bool:
    """Whether this is a folder that `tokenize` made."""
    names = ("header.json", "tokenizer.json")
    return all((Path(data) / name).exists() for name in names)


def _tokens(options: argparse.Namespace) -> Path | None:
    """The folder of --data if it is tokenized already. Raises ValueError."""
    if not _tokenized(options.data):
        return None
    usual = make_parser().parse_args(["train"]).tokenizer
    if options.tokenizer != usual or options.vocab_size is not None:
        raise ValueError(
            f"{options.data} is tokenized: leave out --tokenizer and --vocab-size"
        )
    return Path(options.data)


def start_run(options: argparse.Namespace) -> tuple[Plan, TokenData, Path]:
    """Plan a new run, its tokens and their folder; leaves nothing when it fails.

    Book: 23_command_line.html#starting-a-run-or-going-on-with-one
    """
    out, place = Path(options.out), _tokens(options)
    refuse_occupied(out)
    _plan(max(options.vocab_size or VOCABULARY, 1), options)
    with new_folder(out):
        refuse_occupied(out)  # again, now that it is locked
        if place:
            tokenizer = load_tokenizer(place / "tokenizer.json")
            plan = _plan(tokenizer.vocab_size, options)
            data = TokenData.open(place)
            data.check_context(plan.model.context)
        else:
            tokenizer = make_tokenizer(
                options.tokenizer, options.vocab_size, options.data
            )
            plan = _plan(tokenizer.vocab_size, options)
            shown = sys.stderr.isatty()
            tokenize(options.data, tokenizer, out / "data", progress=shown)
            try:
                data = TokenData.open(out / "data")
                data.check_context(plan.model.context)
            except BaseException:
                shutil.rmtree(out / "data")
                raise
        content = {
            "data": str(place.resolve()) if place else "data",
            "device": str(plan.device),
            "model": asdict(plan.model),
            "training": asdict(plan.training),
        }
        write_file(out / "run.json", json.dumps(content, indent=1).encode())
    return plan, data, place or out / "data"


def _tokens_of_run(options: argparse.Namespace, data: str, usual: str) -> Path:
    """Where the tokens of a run are now. Raises FileNotFoundError."""
    out = Path(options.out)
    if data != "data" and options.data != usual:
        return Path(options.data)  # moved
    if not (out / data).exists():
        raise FileNotFoundError(
            f"{out / data}, where the tokens of this run were, is gone: give the "
            "folder they are in now with --data"
        )
    return out / data


def resume_run(options: argparse.Namespace) -> tuple[Plan, TokenData, Path]:
    """The plan, the tokens and their folder of a run that goes on.

    Book: 23_command_line.html#starting-a-run-or-going-on-with-one
    """
    out, usual = Path(options.out), vars(make_parser().parse_args(["train"]))
    path = out / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{out} holds no run to resume: {path.name}, which `glassgpt train` "
            "writes, is missing. Name the folder of the run with --out"
        )
    try:
        content = json.loads(path.read_text("utf-8"))
        known = {**content["model"], **content["training"], "device": content["device"]}
        kind = ModernConfig if "norm" in content["model"] else GPTConfig
        model = kind(**content["model"])
        training = TrainConfig(**content["training"])
        device = pick_device(content["device"])
        place = _tokens_of_run(options, content["data"], usual["data"])
        data = TokenData.open(place)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): start a new run") from None
    free = ["out", "resume", "tensorboard"]
    free += ["data"] if place.parent != out else []
    given = {k: v for k, v in vars(options).items() if k not in free}
    other = [k for k, v in given.items() if v not in (usual.get(k), known.get(k))]
    if other:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(other))
        raise ValueError(f"a resumed run keeps its settings: leave out {names}")
    last = [checkpoint.name for checkpoint in checkpoints_in(out)][-1:]
    print("going on from", *(last or ["the start: there is no checkpoint yet"]))
    if last and int(last[0].split("-")[1]) == training.steps:
        print(f"that is its end: all {training.steps} steps are done")
    peak = peak_flops(device, training.precision)
    return Plan(model, training, device, peak), data, place


def tensorboard(out: Path) -> Callable[[dict[str, float]], None]:
    """A function that hands every record to TensorBoard.

    Book: 23_command_line.html#starting-a-run-or-going-on-with-one
    """
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out)

    def write(record: dict[str, float]) -> None:
        for name, value in record.items():
            writer.add_scalar(name, value, int(record["step"]))
        writer.flush()

    return write


def _describe(plan: Plan, data: TokenData) -> None:
    """Print what is going to happen."""
    print(plan.describe())
    print(f"data    {len(data.train):,} tokens, {len(data.validation):,} held out")
    if len(data.train) < len(data.validation):
        print("note    more is held out than trained on: of few files it is the last")
    training = plan.training
    if training.warmup >= training.steps:
        print(f"note    the learning rate only rises: warmup {training.warmup} steps")


def _folder_of_run(options: argparse.Namespace) -> Path:
    """The folder in --out, or runs/ and the name of the text. Raises ValueError."""
    if options.out == "":
        raise ValueError("--out is empty: name a folder, or leave it out")
    if options.out is None:
        options.out = str(Path("runs", Path(options.data).resolve().stem))
        if options.resume:  # it has told us where the run is
            options.data = make_parser().parse_args(["train"]).data
    return Path(options.out)


def _reporter(board: Callable | None) -> Callable[[dict[str, float]], None]:
    """A function that prints a record and hands it to a board, if there is one."""

    def report(record: dict[str, float]) -> None:
        tqdm.write(
            f"step {record['step']}: validation loss {record['validation_loss']:.3f} "
            f"nats a token, {record['nats_per_character']:.3f} a character"
        )
        if board:
            board(record)

    return report


def train_command(options: argparse.Namespace) -> int:
    """Tokenize, plan, train, and say where the model is. Returns the exit code.

    Book: 23_command_line.html#the-three-commands
    """
    if options.tensorboard and find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            "--tensorboard needs: pip install 'glassgpt[tensorboard]'"
        )
    keep_freed_memory()
    out = _folder_of_run(options)
    start = resume_run if options.resume else start_run
    plan, data, place = start(options)
    tokenizer = load_tokenizer(place / "tokenizer.json")
    _describe(plan, data)
    torch.manual_seed(plan.training.seed)
    with size_advice():
        model = build(plan.model).to(plan.device)
    run = train(
        model,
        data,
        plan.training,
        out,
        tokenizer,
        resume=options.resume,
        progress=sys.stderr.isatty(),
        peak_flops=plan.peak_flops,
        on_record=_reporter(tensorboard(out) if options.tensorboard else None),
    )
    if run.stopped:
        print(f"stopped; go on with: glassgpt train --out {quote(str(out))} --resume")
        return 130
    if not (out / "model.safetensors").exists():  # somebody took it away
        save(out, model, tokenizer)
    print(f"write with it: glassgpt generate {quote(str(out))}")
    return 0


def _first_prompt(tokenizer: Tokenizer) -> str:
    """A prompt for who gave none."""
    with suppress(ValueError):
        tokenizer.encode("\n")
        return "\n"
    return tokenizer.decode([0])


def generate_command(options: argparse.Namespace) -> int:
    """Write on from a prompt, piece by piece. Returns the exit code.

    Book: 23_command_line.html#the-three-commands
    """
    device = pick_device(options.device)
    model, tokenizer = load(options.model)
    model = model.to(device)
    if options.weights != "float32":
        model = lighten(model, options.weights)
    prompt = _first_prompt(tokenizer) if options.prompt is None else options.prompt
    pieces = stream_text(
        model,
        tokenizer,
        prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        stop=tuple(tokenizer.special_tokens.values()),
    )
    first = next(pieces, "")  # raises what the settings deserve, before the prompt
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def tokenize_command(options: argparse.Namespace) -> int:
    """Write token files that `glassgpt train --data` takes. Returns the exit code.

    Book: 23_command_line.html#the-three-commands
    """
    if _tokenized(options.data):
        raise ValueError(f"{options.data} is tokenized already: train on it")
    if Path(options.out).exists():  # `tokenize` asks too, but after the learning
        raise FileExistsError(f"{options.out} exists already: choose another --out")
    tokenizer = make_tokenizer(options.tokenizer, options.vocab_size, options.data)
    data = tokenize(
        options.data,
        tokenizer,
        options.out,
        progress=sys.stderr.isatty(),
    )
    print(
        f"{len(data.train):,} tokens to train on, {len(data.validation):,} held out, "
        f"a vocabulary of {data.vocab_size:,}: {options.out}"
    )
    return 0


def _add_train(commands: Any, text: argparse.ArgumentParser) -> None:
    """The command `train` and its options."""
    part = commands.add_parser("train", parents=[text], help="train a GPT on a text")
    part.add_argument("--out", help="folder of the run; default: runs/ and --data")
    part.add_argument(
        "--resume", action="store_true", help="go on with the run in --out"
    )
    part.add_argument("--size", choices=SIZES, help="default: what suits this machine")
    part.add_argument(
        "--recipe",
        choices=("gpt2", "modern"),
        default="gpt2",
        help="default: gpt2, which other programs can read",
    )
    part.add_argument("--device", help="cpu, cuda, ...; default: the best one here")
    part.add_argument(
        "--tensorboard", action="store_true", help="write its curves into --out, too"
    )
    more = part.add_argument_group(
        "any of these overrides what the size and machine suggest"
    )
    add_fields(more, ModernConfig, {"vocab_size"})
    add_fields(more, TrainConfig, set())
    part.set_defaults(run=train_command)


def _count(text: str) -> int:
    """A whole number from 0 up, or the parser's own kind of error."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


def _add_generate(commands: Any) -> None:
    """The command `generate` and its options."""
    part = commands.add_parser("generate", help="write with a trained GPT")
    part.add_argument("model", help="folder of a run or a saved model")
    part.add_argument("--prompt", help="default: a new line")
    part.add_argument(
        "--tokens", type=_count, default=200, help="at most; default: 200"
    )
    part.add_argument("--temperature", type=float, default=0.8, help="default: 0.8")
    part.add_argument("--top-k", type=int, help="draw from the k likeliest; 1: greedy")
    part.add_argument(
        "--top-p", type=float, help="draw from the likeliest whose shares reach p"
    )
    part.add_argument("--seed", type=_count, help="the same text every time")
    part.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "float16", "int8"),
        default="float32",
        help="lighter ones are faster where the model is large",
    )
    part.add_argument("--device", help="cpu, cuda, ...; default: the best one here")
    part.set_defaults(run=generate_command)


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands.

    Book: 23_command_line.html#the-three-commands
    """
    parser = argparse.ArgumentParser("glassgpt", description="Train a GPT, and write.")
    parser.add_argument("--version", action="version", version=version("glassgpt"))
    commands = parser.add_subparsers(dest="command", required=True)
    text = argparse.ArgumentParser(add_help=False)
    text.add_argument(
        "--data",
        default="shakespeare",
        help="a text file, a folder of them, or shakespeare, the default; train: also "
        "a tokenized one",
    )
    text.add_argument(
        "--tokenizer",
        default="bpe",
        help="bpe, char, gpt2, or a tokenizer.json; default: bpe",
    )
    text.add_argument("--vocab-size", type=int, help=f"of bpe; default: {VOCABULARY}")

    _add_train(commands, text)
    _add_generate(commands)
    part = commands.add_parser(
        "tokenize", parents=[text], help="turn a text into token files"
    )
    part.add_argument("--out", required=True, help="new folder for them")
    part.add_argument("--workers", type=int, default=1, help="processes; default: 1")
    part.set_defaults(run=tokenize_command)
    return parser


MISTAKES = (ValueError, OSError, ModuleNotFoundError, FloatingPointError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. A user's mistake gives one line and exit code 2.

    Book: 23_command_line.html#mistakes-get-a-sentence
    """
    options = make_parser().parse_args(arguments)

    def show_warning(message: Warning | str, *_: Any) -> None:
        print(f"glassgpt: {message}", file=sys.stderr)

    def on_end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    main_thread = threading.current_thread() is threading.main_thread()
    if main_thread:  # no other may handle signals
        before = signal.signal(signal.SIGTERM, on_end)
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            return options.run(options)
        except BrokenPipeError:  # whoever read the output has gone, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except MISTAKES as error:
            print(f"glassgpt: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130
        finally:
            if main_thread:  # a program that called us has its own way back
                signal.signal(signal.SIGTERM, before)
