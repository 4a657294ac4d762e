# Written by tools/tangle.py from book/a3_command_line.ipynb: change it there.
"""The command line: train, resume, generate, chat, serve, publish, ...."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, TypeVar, Union

import torch
import tyro
from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes, Positional

import glassgpt
from glassgpt.chat import fit_history, stream_answer, template_of
from glassgpt.checkpoints import load_config, reraise_as
from glassgpt.data import TokenData, read_documents, split_documents
from glassgpt.distributed import first_process_first, make_trainer, process_group
from glassgpt.evaluation import (
    Score,
    answer_task,
    load_task,
    mean_with_error,
    wilson_interval,
)
from glassgpt.generation import Sampling, stream_text
from glassgpt.gpt import GPT
from glassgpt.huggingface import read_tokenizer
from glassgpt.modern import GPT2_CHOICES, ModernConfig, build
from glassgpt.plan import RECIPES, SIZES, Plan, Precision
from glassgpt.publish import require_page
from glassgpt.runs import Run, Saving, refuse_occupied
from glassgpt.tokens import BPETokenizer, CharTokenizer, Tokenizer
from glassgpt.training import Schedule

T = TypeVar("T")
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]  # None: not given


@dataclass
class Changes:
    """What may be another when a run goes on. None: as before, or what suits.

    Book: a3_command_line.html#options-that-may-be-left-open
    """

    steps: Maybe[int] = None  # how often the optimizer moves the weights
    accumulate: Maybe[int] = None  # micro-batches in a batch: less memory
    learning_rate: Maybe[float] = None  # highest; with muon: of all but matrices
    matrix_learning_rate: Maybe[float] = None  # Muon's, of the blocks' matrices
    evaluate_every: Maybe[int] = None  # steps from one evaluation to the next
    checkpoint_every: Maybe[int] = None  # steps from one checkpoint to the next
    keep: Maybe[int] = None  # how many checkpoints stay
    device: Maybe[str] = None  # cpu, cuda or mps
    precision: Maybe[Precision] = None  # of matrix products
    compile: Maybe[Literal["off", "blocks", "all"]] = None  # torch.compile
    recompute: Maybe[bool] = None  # activation checkpointing: less memory

    def given(self) -> dict[str, Any]:
        """The options that were given."""
        return {name: v for name, v in vars(self).items() if v is not None}


@dataclass
class Settings(Changes):
    """What a new run is like. Finer choices are made in Python, by `make_plan`.

    Book: a3_command_line.html#options-that-may-be-left-open
    """

    size: Maybe[Literal[tuple(SIZES)]] = None  # layers, heads and width by a name
    recipe: Maybe[Literal[tuple(RECIPES)]] = None  # architecture; default: gpt2
    layers: Maybe[int] = None  # number of blocks (n_layer)
    heads: Maybe[int] = None  # attention heads of each block (n_head)
    width: Maybe[int] = None  # numbers in a token's vector (n_embd)
    context: Maybe[int] = None  # longest sequence of tokens (block_size)
    dropout: Maybe[float] = None  # share dropped in training
    optimizer: Maybe[Literal["adamw", "muon"]] = None  # default: muon for short runs
    batch_size: Maybe[int] = None  # sequences that one step learns from
    schedule: Maybe[Schedule] = None  # how the learning rate falls
    warmup: Maybe[int] = None  # steps in which the learning rate rises
    final_rate: Maybe[float] = None  # share of the learning rate left at the end
    weight_decay: Maybe[float] = None  # of matrices and tables
    clip: Maybe[float] = None  # a gradient with a larger norm is scaled to this
    evaluation_crops: Maybe[int] = None  # held-out sequences, always the same
    seed: Maybe[int] = None  # of the batches and dropout, and of new weights


@dataclass(kw_only=True)
class Text:
    """Where text comes from, and its tokenizer: what `train` and `tokenize` share.

    Book: a3_command_line.html#from-text-to-tokens
    """

    data: tuple[str, ...] = ("shakespeare",)  # files, folders, "*.txt"
    tokenizer: Maybe[str] = None  # bpe, char, gpt2, a file or a model; default: bpe
    vocab_size: Maybe[int] = None  # of bpe; default: 1024
    skip: bool = False  # leave out what isn't text, and name it

    def refuse_empty(self) -> None:
        """Raise ValueError for an empty value, such as an unset shell variable's."""
        if not self.data or "" in self.data:
            raise ValueError("--data has an empty value: leave it out")
        for name, value in vars(self).items():
            if value == "":
                option = name.replace("_", "-")
                raise ValueError(f"--{option} has an empty value: leave it out")

    @property
    def tokens(self) -> Path | None:
        """The folder that `tokenize` made, where --data is one."""
        found = [p for p in map(Path, self.data) if (p / "tokens.json").exists()]
        if found and len(self.data) > 1:
            raise ValueError(f"{found[0]} is tokenized: give it alone as --data")
        return found[0] if found else None

    def ready_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was asked for, None if it has yet to learn."""
        kind = self.tokenizer or "bpe"
        if self.tokens:
            if self.tokenizer or self.vocab_size:
                raise ValueError(
                    f"leave out --tokenizer and --vocab-size for {self.tokens}"
                )
            return read_tokenizer(self.tokens / "tokenizer.json")
        if self.vocab_size is not None and kind != "bpe":
            raise ValueError("--vocab-size is for --tokenizer bpe: leave it out")
        if kind in ("bpe", "char"):
            return None
        if kind == "gpt2":
            return BPETokenizer.gpt2()
        path = Path(kind)
        if path.is_dir() and (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
        if path.is_file() and path.suffix != ".gguf":
            return read_tokenizer(path)
        return glassgpt.load(kind)[1]

    def learn_tokenizer(self) -> Tokenizer:
        """A new tokenizer. What is held out teaches byte pairs nothing."""
        parts = split_documents(read_documents(*self.data, skip=self.skip))
        if self.tokenizer == "char":
            return CharTokenizer.train(piece for _, d in parts for piece in d.pieces())
        learned = (document for split, document in parts if split == "train")
        pieces = (piece for document in learned for piece in document.pieces())
        size = 1024 if self.vocab_size is None else self.vocab_size
        return BPETokenizer.train(pieces, size)

    def encode(self, tokenizer: Tokenizer, folder: str | Path) -> TokenData:
        """The texts in a new folder of token ids."""
        shown = sys.stderr.isatty()
        data = glassgpt.tokenize(self.data, tokenizer, folder, shown, self.skip)
        print(
            f"{folder}: {len(data.train):,} tokens, {len(data.validation):,} held out, "
            f"vocabulary {data.vocab_size:,}"
        )
        return data


@dataclass(kw_only=True)
class Tokenize(Text):
    """Turn texts into a folder of token ids, for `glassgpt train --data`.

    Book: a3_command_line.html#from-text-to-tokens
    """

    out: str = "tokens"  # the new folder

    def run(self) -> None:
        """Learn a tokenizer and encode the texts."""
        self.refuse_empty()
        if self.tokens:
            raise ValueError(f"{self.tokens} is tokenized already: train on it")
        if os.path.lexists(self.out):  # before the learning
            raise FileExistsError(f"{self.out} exists already: choose another --out")
        self.encode(self.ready_tokenizer() or self.learn_tokenizer(), self.out)


RECORD_FORMATS = {
    "train_loss": "training loss {:.3f}",
    "validation_loss": "validation loss {:.3f}",
    "nats_per_character": "{:.3f} nats a character",
    "tokens_per_second": "{:,.0f} tokens/s",
}


def print_record(record: dict[str, float]) -> None:
    """Print an evaluation in a line.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """
    shown = [
        form.format(record[k]) for k, form in RECORD_FORMATS.items() if k in record
    ]
    tqdm.write(f"step {record['step']}: {', '.join(shown)}")
    sys.stdout.flush()  # a log file shows it now, not at the end


def finish(run: Run) -> int:
    """Say what to do next. The exit code: 0, or 128 + the signal that stopped it.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """
    name = quote(str(run.directory))
    if run.stopped_by:
        print(f"stopped after step {run.trainer.step}: glassgpt resume {name} goes on")
        return 128 + run.stopped_by
    print(f"write with it: glassgpt generate {name}")
    return 0


Shard = Literal["nothing", "optimizer", "model"]


@dataclass
class Resume:
    """Go on with a run, to the same weights as if it had never stopped.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """

    directory: Positional[str]  # of the run: what `train` called --out
    data: Maybe[str] = None  # where its tokens are now, if they moved
    shard: Maybe[Shard] = None  # what the processes of torchrun divide
    changes: OmitArgPrefixes[Changes] = field(default_factory=Changes)

    def run(self) -> int:
        """Go on to the end; --steps may put it further away."""
        return go_on(self.directory, self.data, self.shard, self.changes)


def go_on(
    directory: str | Path, data: str | None, shard: Shard | None, changes: Changes
) -> int:
    """Resume a run with what has changed; the exit code.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """
    glassgpt.keep_freed_memory()
    run = glassgpt.resume_run(
        directory,
        data,
        on_record=print_record,
        progress=sys.stderr.isatty(),
        make_trainer=partial(make_trainer, shard=shard),
        steps=changes.steps,
        learning_rate=changes.learning_rate,
        matrix_learning_rate=changes.matrix_learning_rate,
        accumulate=changes.accumulate,
        evaluate_every=changes.evaluate_every,
        checkpoint_every=changes.checkpoint_every,
        keep=changes.keep,
        device=changes.device,
        precision=changes.precision,
        compile=changes.compile,
        recompute=changes.recompute,
    )
    return finish(run)


def changed(directory: Path, settings: Settings) -> Changes:
    """Those settings that are others than in the run.json of a folder.

    Raises ValueError for a change of what a run keeps.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """
    path = directory / "run.json"
    with reraise_as(f"{path} is damaged, start a new run"):
        run = json.loads(path.read_text("utf-8"))
        before = GPT2_CHOICES | run["model"] | run["training"]
        before |= run["machine"] | run["saving"]
        muon = "matrix_learning_rate" in run["training"]
    before["optimizer"] = "muon" if muon else "adamw"
    asked = settings.given()
    if settings.recipe:
        # What a recipe leaves open is as in ModernConfig.
        modern = {name: getattr(ModernConfig, name) for name in GPT2_CHOICES}
        asked |= modern | RECIPES[settings.recipe]
    if settings.size:
        layers, heads, width = SIZES[settings.size]
        asked = {"layers": layers, "heads": heads, "width": width, **asked}
    new = {k: v for k, v in asked.items() if k in before and before[k] != v}
    kept = sorted(new.keys() - {option.name for option in fields(Changes)})
    if kept:
        raise ValueError(
            f"{directory} has another {', '.join(kept)}, which a run keeps: "
            "leave it out, or choose another --out"
        )
    return Changes(**new)


def load_start(
    name: str, settings: dict[str, Any], tokenizer: Tokenizer | None
) -> tuple[GPT, Tokenizer]:
    """The model of --init-from, with another dropout or a shorter context if asked.

    tokenizer: that of the tokens, where there are some.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """
    model, own = glassgpt.load(name)
    if tokenizer and tokenizer.to_json() != own.to_json():
        raise ValueError(f"{name} has another tokenizer than the text's tokens")
    fixed = {"size", "recipe", "layers", "heads", "width"}
    wrong = sorted(fixed & settings.keys())
    if wrong:
        raise ValueError(f"{name} brings its own {', '.join(wrong)}: leave it out")
    chosen = {k: settings[k] for k in ("dropout", "context") if k in settings}
    config = replace(model.config, **chosen)
    if config.context > model.config.context:
        raise ValueError(f"context must be at most {model.config.context}, the model's")
    weights = model.state_dict()
    if "positions.weight" in weights:
        weights["positions.weight"] = weights["positions.weight"][: config.context]
    start = build(config)
    start.load_state_dict(weights)
    return start, own


def remove_unused_tokens(out: Path) -> None:
    """Remove the tokens that were made for a run that didn't begin.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """
    if not (out / "run.json").exists():
        shutil.rmtree(out / "data", ignore_errors=True)


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the inner ones first, up to the first that isn't empty.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@dataclass(kw_only=True)
class Train(Text):
    """Train a GPT on a text.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """

    out: Maybe[str] = None  # the run's folder; default: runs/ and the text's name
    resume: bool = False  # go on, if --out holds a run
    init_from: Maybe[str] = None  # start from this model's weights
    shard: Maybe[Shard] = None  # what the processes of torchrun divide
    settings: OmitArgPrefixes[Settings] = field(default_factory=Settings)

    def run(self) -> int:
        """Begin a run; with --resume go on with it, where there is one."""
        self.refuse_empty()
        place = Path(os.path.realpath(self.data[0]))  # links in a circle, too
        name = re.sub(r"[^\w.-]", "", place.stem) or "run"
        out = Path(self.out or f"runs/{name}")
        if self.resume and (out / "run.json").exists():
            if self.tokenizer or self.vocab_size or self.init_from:
                print(f"{out} goes on with its own texts, tokenizer and first weights")
            return go_on(out, None, self.shard, changed(out, self.settings))
        refuse_occupied(out)
        if os.path.lexists(out) and not out.is_dir():  # a file, or a link to nothing
            raise FileExistsError(f"{out} is no folder: choose another --out")
        return self.start(out, self.settings.given())

    def start(self, out: Path, settings: dict[str, Any]) -> int:
        """Plan, tokenize, train. What is wrong is refused before a text is read."""
        saving = Saving(
            settings.pop("checkpoint_every", Saving.checkpoint_every),
            settings.pop("keep", Saving.keep),
        )
        tokens, tokenizer = self.tokens, self.ready_tokenizer()
        if tokens is None and self.resume and (out / "data" / "tokens.json").exists():
            tokens = out / "data"  # of a start that was killed
            tokenizer = read_tokenizer(tokens / "tokenizer.json")
        model = None
        if self.init_from:
            if self.tokenizer or self.vocab_size:
                raise ValueError(f"{self.init_from} brings its own tokenizer")
            model, tokenizer = load_start(self.init_from, settings, tokenizer)
        plan = self.plan(settings, tokenizer, model)
        glassgpt.keep_freed_memory()
        missing = [p for p in (out, *out.parents) if not p.exists()]
        with ExitStack() as at_the_end:
            at_the_end.callback(remove_empty, missing)
            with first_process_first() as rank:
                if tokens is None and rank == 0:
                    self.encode(tokenizer or self.learn_tokenizer(), out / "data")
                    at_the_end.callback(remove_unused_tokens, out)
            data = TokenData.open(tokens or out / "data")
            tokenizer = tokenizer or read_tokenizer(out / "data" / "tokenizer.json")
            if model is None:  # a text may have taught fewer tokens
                shape = replace(plan.model, vocab_size=tokenizer.vocab_size)
                plan = replace(plan, model=shape)
            print(plan.describe(), flush=True)
            run = glassgpt.start_run(
                out,
                plan,
                data,
                tokenizer,
                model,
                checkpoint_every=saving.checkpoint_every,
                keep=saving.keep,
                on_record=print_record,
                progress=sys.stderr.isatty(),
                make_trainer=partial(make_trainer, shard=self.shard),
            )
            return finish(run)

    def plan(
        self, settings: dict[str, Any], tokenizer: Tokenizer | None, model: GPT | None
    ) -> Plan:
        """The plan of a run; that of --init-from keeps the model's architecture."""
        gpus = int(os.environ.get("WORLD_SIZE", 1))  # torchrun says it
        if model is None:
            size = tokenizer.vocab_size if tokenizer else self.vocab_size or 1024
            return glassgpt.make_plan(size, gpus=gpus, **settings)
        # A tenth of the usual rate: what was learned should stay.
        usual = {"optimizer": "adamw", "learning_rate": 0.04 / model.config.width}
        shape = asdict(model.config)
        return glassgpt.make_plan(gpus=gpus, **{**usual, **settings, **shape})


Weights = Literal["auto", "float32", "bfloat16", "float16", "int8"]


@dataclass(kw_only=True)
class Model:
    """A model that is here to be used: what four commands share.

    Book: a3_command_line.html#writing-and-measuring
    """

    model: Positional[str]  # a run's folder, a checkpoint, or a name: shakespeare
    weights: Weights = "float32"  # lighter ones: faster for large models; or auto
    device: Maybe[str] = None  # cpu, cuda or mps; default: the best one here

    def load(self) -> tuple[GPT, Tokenizer]:
        """The model, as light as was asked and on its device, and its tokenizer."""
        device = glassgpt.pick_device(self.device)  # refuses before the loading
        model, tokenizer = glassgpt.load(self.model)
        weights = None if self.weights == "auto" else self.weights
        return glassgpt.quantize(model.to(device), weights), tokenizer


@dataclass(kw_only=True)
class Generate(Model):
    """Write with a trained GPT.

    Book: a3_command_line.html#writing-and-measuring
    """

    prompt: Maybe[str] = None  # to go on with; -: what is piped in; default: a new line
    tokens: int = 200  # at most
    samples: int = 1  # how many texts
    sampling: OmitArgPrefixes[Sampling] = Sampling()  # how a token is drawn

    def run(self) -> None:
        """Write on from the prompt, piece by piece."""
        if self.samples < 1 or self.tokens < 0:
            raise ValueError("--samples must be at least 1, and --tokens at least 0")
        model, tokenizer = self.load()
        prompt = sys.stdin.read() if self.prompt == "-" else self.prompt
        if prompt is None:  # a tokenizer of characters may lack the new line
            characters = isinstance(tokenizer, CharTokenizer)
            prompt = tokenizer.decode([0]) if characters else "\n"
        how, seed = self.sampling, self.sampling.seed
        for number in range(self.samples):
            pieces = stream_text(
                model,
                tokenizer,
                prompt,
                self.tokens,
                stop=tokenizer.special_tokens.values(),
                temperature=how.temperature,
                top_k=how.top_k,
                top_p=how.top_p,
                seed=None if seed is None else seed + number,
            )
            if number:
                print("---")
            print(prompt, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()


@dataclass(kw_only=True)
class Chat(Model):
    """Talk with a GPT that was taught to answer.

    In the talk, /system TEXT sets the system line, and /reset starts over.

    Book: a3_command_line.html#writing-and-measuring
    """

    weights: Weights = "auto"  # lighter ones: faster for large models
    system: Maybe[str] = None  # a line that says how to behave
    tokens: int = 200  # of an answer, at most
    sampling: OmitArgPrefixes[Sampling] = Sampling(temperature=0.0)

    def run(self) -> None:
        """Answer line after line, until there are no more."""
        if self.tokens < 1:
            raise ValueError(f"--tokens must be at least 1, not {self.tokens}")
        model, tokenizer = self.load()
        template_of(tokenizer)  # refuses a model without roles
        room = model.config.context - min(self.tokens, model.config.context // 2)
        typed, system, talk = sys.stdin.isatty(), self.system, []
        for line in read_lines(typed):
            word, _, rest = line.partition(" ")
            if word == "/reset":
                talk = []
            elif word == "/system":
                system = rest.strip()
            elif line.strip():
                head = [{"role": "system", "content": system}] if system else []
                asked = [*head, *talk, {"role": "user", "content": line}]
                try:
                    turns = fit_history(asked, tokenizer, room)
                except ValueError as error:
                    if not typed:
                        raise
                    print(f"({error})", file=sys.stderr)
                    continue
                if len(turns) < len(asked):
                    lost = len(asked) - len(turns)
                    print(
                        f"(the context is full: {lost} oldest turns are forgotten)",
                        file=sys.stderr,
                    )
                pieces = stream_answer(
                    model, tokenizer, turns, self.tokens, **vars(self.sampling)
                )
                answer = {"role": "assistant", "content": show(pieces, typed)}
                talk = [*turns[len(head) :], answer]


def read_lines(typed: bool) -> Iterator[str]:
    """What is typed or piped in, line by line.

    Book: a3_command_line.html#writing-and-measuring
    """
    if not typed:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    print("(/system TEXT sets the system line, /reset starts over)")
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)", file=sys.stderr)
        except EOFError:
            print()
            return


def show(pieces: Iterable[str], typed: bool) -> str:
    """Print an answer as it comes, and return it, or what there is at Ctrl-C.

    Book: a3_command_line.html#writing-and-measuring
    """
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not typed:  # what feeds a pipe is stopped as a whole
            raise
    print(flush=True)
    return answer


@torch.inference_mode()
def summed_loss(model: GPT, ids: list[int]) -> float:
    """The losses of all ids but the first, summed, in nats.

    Windows of the model's context are computed as one batch; a shorter rest follows.

    Book: a3_command_line.html#writing-and-measuring
    """
    device, context = next(model.parameters()).device, model.config.context
    inputs = torch.tensor(ids[:-1], device=device)
    targets = torch.tensor(ids[1:], device=device)
    whole = len(inputs) // context * context
    total = 0.0
    for first, last in ((0, whole), (whole, len(inputs))):
        if first < last:
            rows = inputs[first:last].view(-1, min(context, last - first))
            logits = model(rows).flatten(0, 1)
            found = glassgpt.log_softmax(logits.float())
            losses = -found.gather(1, targets[first:last, None]).cpu()
            total += losses.double().sum().item()
    return total


@dataclass(kw_only=True)
class Evaluate(Model):
    """Measure how well a GPT predicts a text, or answers questions.

    Book: a3_command_line.html#writing-and-measuring
    """

    text: Positional[tuple[str, ...]] = ()  # files, folders, patterns such as "*.txt"
    task: Maybe[str] = None  # endings, speakers, capitals, sums, a file of questions
    by: Score = "character"  # how the endings of a question are compared
    examples: int = 0  # solved questions in front of each
    answers: Maybe[Path] = None  # write each answer into this new file, as JSON lines
    skip: bool = False  # leave out what isn't text, and name it
    limit: Maybe[int] = None  # read this many tokens at most; default: all

    def read(self, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
        """Ids, piece by piece, and of how many characters they are."""
        end = tokenizer.special_tokens.get("<|endoftext|>")
        for document in read_documents(*self.text, skip=self.skip):
            for piece in document.pieces():
                yield tokenizer.encode(piece), len(piece)
            if end is not None:
                yield [end], 0

    def ask(self, name: str) -> None:
        """Print the share of right answers with its errors, and chance."""
        if self.answers and self.answers.exists():
            raise ValueError(f"{self.answers} exists already: name a new file")
        task = load_task(name, self.examples)
        right = answer_task(*self.load(), task, self.by)
        if self.answers:
            rows = zip(task.questions, right, strict=True)
            lines = [json.dumps(asdict(one) | {"right": good}) for one, good in rows]
            self.answers.write_text("\n".join(lines) + "\n", "utf-8")
        accuracy, error = mean_with_error(right)
        low, high = wilson_interval(right)
        way = f"by {self.by}" if task.chance else "by exact match"
        print(
            f"accuracy {accuracy:.3f} ± {error:.3f} (95 %: {low:.2f} to {high:.2f}) "
            f"{way}, chance {task.chance:.3f}: questions {len(right)}, "
            f"examples {self.examples}, fingerprint {task.fingerprint}"
        )

    def run(self) -> None:
        """Print the accuracy of a task, or the mean loss over all tokens of a text."""
        if bool(self.text) == bool(self.task):
            raise ValueError("name a text to predict, or questions with --task")
        if self.task:
            if self.limit is not None or self.skip:
                raise ValueError("--limit and --skip are for texts: leave them out")
            return self.ask(self.task)
        if self.examples:
            raise ValueError("--examples is for --task: leave it out")
        if self.answers:
            raise ValueError("--answers is for --task: leave it out")
        if self.limit is not None and self.limit < 2:
            raise ValueError(f"--limit must be at least 2, not {self.limit}")
        model, tokenizer = self.load()
        model.eval()
        context, size = model.config.context, model.config.vocab_size
        windows = max(1, min(32, 2**25 // (context * size)))  # logits: 128 MiB at most
        step = windows * context
        total, count, characters, waiting = 0.0, 0, 0, []
        with tqdm(unit=" tokens", disable=not sys.stderr.isatty()) as bar:
            for ids, length in self.read(tokenizer):
                if self.limit is not None and count + len(ids) > self.limit:
                    ids = ids[: self.limit - count]
                    length = len(tokenizer.decode(ids))
                count += len(ids)
                characters += length
                waiting += ids
                while len(waiting) > step:
                    total += summed_loss(model, waiting[: step + 1])
                    del waiting[:step]  # the last one begins the next window
                    bar.update(step)
                if count == self.limit:
                    break
            if count < 2:
                raise ValueError("a text of one token leaves nothing to predict")
            total += summed_loss(model, waiting)
        loss = total / (count - 1)
        print(
            f"loss {loss:.4f} nats a token, {total / characters:.4f} nats a character, "
            f"perplexity {math.exp(loss):.2f}: {count:,} tokens, "
            f"{characters:,} characters"
        )


@dataclass(kw_only=True)
class Serve(Model):
    """Serve a GPT on this machine, as OpenAI's clients expect it.

    Book: a3_command_line.html#writing-and-measuring
    """

    port: int = 8000  # 0: any that is free

    def run(self) -> None:
        """Serve until Ctrl-C."""
        from glassgpt.serving import make_app, running  # its libraries are an extra

        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must lie in 0 to 65535, not {self.port}")
        name = Path(self.model).resolve().name
        with running(make_app(*self.load(), name), self.port) as address:
            print(f"{name} answers at {address} until Ctrl-C", flush=True)
            while True:
                time.sleep(1)


@dataclass
class Publish:
    """Write a GPT into one HTML file that any browser runs, without a network.

    Book: a3_command_line.html#writing-and-measuring
    """

    model: Positional[str]  # a run's folder, a checkpoint, or a name: shakespeare
    out: str = "model.html"  # the file
    title: Maybe[str] = None  # above the model; default: its name
    prompt: str = ""  # what stands there at the start
    weights: Literal["int8", "float32"] = "int8"  # one byte for each, or four

    def run(self) -> None:
        """Write the file, and say how large it is."""
        require_page(load_config(self.model), self.weights)  # before a gigabyte is read
        model, tokenizer = glassgpt.load(self.model)
        title = self.title or Path(self.model).resolve().name
        glassgpt.publish(model, tokenizer, self.out, title, self.weights, self.prompt)
        size = Path(self.out).stat().st_size
        print(f"wrote {self.out}, {size / 1e6:.1f} MB: open it in any browser")


# What a user can mend. Anything else is a fault of ours, and shows its traceback.
MISTAKES = (OSError, MemoryError, ValueError, FloatingPointError, ModuleNotFoundError)


def complain(sentence: str) -> int:
    """Say what is wrong, in at most 500 characters; the exit code of a mistake.

    Book: a3_command_line.html#mistakes-get-a-sentence
    """
    short = sentence if len(sentence) <= 500 else f"{sentence[:500]} ..."
    print(f"glassgpt: {short}", file=sys.stderr)
    return 2


def prepare_process() -> None:
    """Let SIGTERM end this process by an exception; read UTF-8, write what can be.

    Book: a3_command_line.html#mistakes-get-a-sentence
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
    with suppress(AttributeError):  # what others put there may lack it
        sys.stdin.reconfigure(encoding="utf-8")
    with suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")


def drop_output() -> None:
    """Let what still waits to be printed go nowhere: nobody can read it.

    Book: a3_command_line.html#mistakes-get-a-sentence
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMANDS = (Train, Resume, Generate, Chat, Evaluate, Tokenize, Serve, Publish)
ABOUT = """Train a GPT on a text, then write with it:
  glassgpt train --data my.txt
  glassgpt generate runs/my

glassgpt train --help lists its options; glassgpt --traceback COMMAND shows where a
mistake came up. Book: https://glassgpt.github.io/glassgpt/"""


def run_command(words: Sequence[str]) -> int:
    """Run the command that words ask for; its exit code.

    Raises SystemExit after --help, and for words that make no sense.

    Book: a3_command_line.html#mistakes-get-a-sentence
    """
    if [*words] == ["--version"]:
        print(glassgpt.__version__)
        return 0
    options = [word.partition("=")[0] for word in words]
    if options.count("--data") > 1:
        raise ValueError("--data is there twice: name all texts behind one --data")
    config = (
        tyro.conf.DisallowNone,
        tyro.conf.FlagCreatePairsOff,
        tyro.conf.PositionalMetavarFromFieldName,
    )
    with process_group():  # of torchrun, where it started this
        try:
            command: Any = tyro.cli(
                Union[COMMANDS],  # noqa: UP007
                prog="glassgpt",
                description=ABOUT,
                args=words or ["--help"],
                config=config,
            )
        finally:
            sys.stdout.flush()  # the help, too, may meet a full disk
        return command.run() or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2, and a sentence, for a mistake.

    arguments: if None, those of this process.

    Book: a3_command_line.html#mistakes-get-a-sentence
    """
    if arguments is None:
        prepare_process()
        arguments = sys.argv[1:]
    words = [word for word in arguments if word != "--traceback"]
    told: set[str] = set()  # nothing is said twice

    def tell(message: Warning | str, *_: Any) -> None:
        if str(message) not in told:
            told.add(str(message))
            print(f"glassgpt: {message}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = tell
            code = run_command(words)
        sys.stdout.flush()  # a full disk is noticed here
        return code
    except SystemExit as leaving:  # after --help, for mistyped words, at SIGTERM
        return int(leaving.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        drop_output()
        return 141
    except MISTAKES as error:
        if len(words) < len(arguments):
            raise
        code = complain(str(error) or type(error).__name__)
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
    return code
