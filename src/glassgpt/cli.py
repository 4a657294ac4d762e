# Written by tools/tangle.py from book/23_command_line.ipynb: change it there.
"""The command line: train, resume, generate, chat, serve, publish, ...."""

import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from dis import opname
from functools import cache, partial
from importlib.util import find_spec
from inspect import getsource
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Union

import torch
import tyro
from torch.nn import functional as F
from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes, Positional

import glassgpt
from glassgpt.chat import render, stream_answer, template_of
from glassgpt.checkpoints import write_file
from glassgpt.data import TokenData, read_documents, split_documents
from glassgpt.device import RECIPES, SIZES, Machine, names
from glassgpt.generation import Sampling, stream_text
from glassgpt.gpt import GPT
from glassgpt.hub import read_tokenizer
from glassgpt.modern import ModernConfig, MuonConfig
from glassgpt.runs import CHANGEABLE, Run, refuse_occupied
from glassgpt.scaling import make_trainer, team
from glassgpt.tokens import BPETokenizer, CharTokenizer, Tokenizer


def comments(kind: type) -> dict[str, str]:
    """The comments at the ends of a dataclass's lines, by the field they explain.

    Book: 23_command_line.html#given-or-not-given
    """
    source = "".join(getsource(base) for base in reversed(kind.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))


def options(*kinds: type, usual: Callable[[str, Any], str]) -> dict[str, Any]:
    """An option of the command line for each field of some dataclasses.

    usual: what --help adds to the comment, of a field's name and default.

    Book: 23_command_line.html#given-or-not-given
    """
    found = {}
    for kind in kinds:
        about = comments(kind)
        for f in fields(kind):
            hint = partial(usual, f.name, f.default)
            found[f.name] = option(f.type, about.get(f.name), hint)
    return found


def option(kind: Any, about: str | None, hint: Callable[[], str] = str) -> Any:
    """The type of an option, with its help and what a function adds to that.

    Book: 23_command_line.html#given-or-not-given
    """
    arg = tyro.conf.arg(help=about, help_behavior_hint=lambda _: hint())
    return Annotated[kind, arg]


def given(found: dict[str, Any]) -> Any:
    """Options that end up in a dict if they are given, and nowhere if they aren't.

    Book: 23_command_line.html#given-or-not-given
    """
    return OmitArgPrefixes[TypedDict("Options", found, total=False)]


@cache
def suited() -> dict[str, Any]:
    """What `make_plan` chooses on this machine, where nothing else is said.

    Book: 23_command_line.html#given-or-not-given
    """
    plan = glassgpt.make_plan(1024)
    return {**asdict(plan.model), **asdict(plan.training), **asdict(plan.machine)}


def _here(name: str, default: Any) -> str:
    value, known = suited().get(name, default), name in suited()
    if isinstance(value, bool):
        value = "on" if value else "off"
    return "" if value is None else f"({value} here)" if known else f"(modern: {value})"


def _default(_: str, default: Any) -> str:
    return "" if default is None else f"(default: {default})"


_SIZES = ", ".join(f"{name} {'/'.join(map(str, s))}" for name, s in SIZES.items())
_SAVING = {
    "checkpoint_every": ("steps from one checkpoint to the next", 250),
    "keep": ("how many checkpoints stay", 2),
}
SETTINGS = {
    "size": option(Literal[tuple(SIZES)], f"layers/heads/width: {_SIZES}"),
    "recipe": option(Literal[tuple(RECIPES)], "default: gpt2, which others can read"),
    "optimizer": option(Literal["adamw", "muon"], "default: muon for short runs"),
    **options(ModernConfig, MuonConfig, Machine, usual=_here),
    **{k: option(int, f"{v} (default: {n})") for k, (v, n) in _SAVING.items()},
}
del SETTINGS["vocab_size"]  # it is the tokenizer's
_STAYS = "(default: as before)"
CHANGES = options(MuonConfig, Machine, usual=lambda *_: _STAYS)
CHANGES |= {k: option(int, f"{v} {_STAYS}") for k, (v, _) in _SAVING.items()}
CHANGES = {k: v for k, v in CHANGES.items() if k in CHANGEABLE}


T = TypeVar("T")
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]  # None: not given
Flag = Annotated[Maybe[bool], tyro.conf.FlagCreatePairsOff]  # there is no --no-skip
Shard = Maybe[Literal["nothing", "optimizer", "model"]]
Weights = Literal["auto", "float32", "bfloat16", "float16", "int8"]


@dataclass
class Text:
    """Where text comes from, and its tokenizer: what `train` and `tokenize` share.

    Book: 23_command_line.html#from-text-to-tokens
    """

    data: tuple[str, ...] = ("shakespeare",)  # files, folders, "*.txt"
    tokenizer: Maybe[str] = None  # bpe, char, gpt2 or a tokenizer.json; default: bpe
    vocab_size: Maybe[int] = None  # of bpe; default: 1024
    skip: Flag = False  # leave out what isn't text, and name it

    @property
    def tokens(self) -> Path | None:
        """The folder that `tokenize` made, where --data is one."""
        found = [p for p in map(Path, self.data) if (p / "tokens.json").exists()]
        if found and len(self.data) > 1:
            raise ValueError(f"{found[0]} is tokenized: give it alone as --data")
        return found[0] if found else None

    def ready_tokenizer(self) -> Tokenizer | None:
        """The tokenizer that was asked for, None if it has yet to learn."""
        chosen, sized = self.tokenizer or "bpe", self.vocab_size is not None
        if self.tokens:
            if self.tokenizer or sized:
                wrong = "leave out --tokenizer and --vocab-size"
                raise ValueError(f"{self.tokens} is tokenized: {wrong}")
            return read_tokenizer(self.tokens / "tokenizer.json")
        if sized and chosen != "bpe":
            raise ValueError("--vocab-size is for --tokenizer bpe: leave it out")
        if chosen == "gpt2":
            return BPETokenizer.gpt2()
        if chosen in ("bpe", "char"):
            return None
        path = Path(chosen, "tokenizer.json" if Path(chosen).is_dir() else "")
        if not path.exists():
            known = "neither bpe, char, gpt2 nor a tokenizer.json"
            raise FileNotFoundError(f"--tokenizer {chosen} is {known}")
        return read_tokenizer(path)

    def learn_tokenizer(self) -> Tokenizer:
        """A new tokenizer. What is held out teaches byte pairs nothing."""
        parts = split_documents(read_documents(*self.data, skip=self.skip))
        if self.tokenizer == "char":
            return CharTokenizer.train(piece for _, d in parts for piece in d.pieces())
        learned = (d for split, d in parts if split == "train")
        size = 1024 if self.vocab_size is None else self.vocab_size
        return BPETokenizer.train((p for d in learned for p in d.pieces()), size)

    def encode(self, tokenizer: Tokenizer, folder: str | Path) -> TokenData:
        """The texts in a new folder of token ids."""
        shown = sys.stderr.isatty()
        data = glassgpt.tokenize(self.data, tokenizer, folder, shown, self.skip)
        train, rest, size = len(data.train), len(data.validation), data.vocab_size
        print(f"{folder}: {train:,} tokens, {rest:,} held out, vocabulary {size:,}")
        return data


@dataclass
class Tokenize(Text):
    """Turn texts into a folder of token ids, for `glassgpt train --data`.

    Book: 23_command_line.html#from-text-to-tokens
    """

    out: str = "tokens"  # the new folder

    def run(self) -> int:
        """Learn a tokenizer and encode the texts."""
        if self.tokens:
            raise ValueError(f"{self.tokens} is tokenized already: train on it")
        if os.path.lexists(self.out):  # before the learning
            raise FileExistsError(f"{self.out} exists already: choose another --out")
        self.encode(self.ready_tokenizer() or self.learn_tokenizer(), self.out)
        return 0


def telling(out: Path, tensorboard: bool, shard: str | None) -> dict[str, Any]:
    """How a run tells of itself and is shared: a line for each evaluation, a board.

    Book: 23_command_line.html#a-run-and-going-on-with-it
    """
    if tensorboard and find_spec("tensorboard") is None:
        raise ModuleNotFoundError("tensorboard: pip install 'glassgpt[tensorboard]'")

    said = {
        "train_loss": "training loss {:.3f}",
        "validation_loss": "validation loss {:.3f}",
        "nats_per_character": "{:.3f} nats a character",
        "tokens_per_second": "{:,.0f} tokens/s",
    }

    def on_record(record: dict[str, float]) -> None:
        words = [text.format(record[k]) for k, text in said.items() if k in record]
        tqdm.write(f"step {record['step']}: {', '.join(words)}")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            with SummaryWriter(out) as board:
                for name, value in record.items():
                    board.add_scalar(name, value, int(record["step"]))

    how = {"on_record": on_record, "progress": sys.stderr.isatty()}
    return {**how, "make_trainer": partial(make_trainer, shard=shard)}


def ended(run: Run) -> int:
    """Say what to do next. The exit code: 0, or 128 + the signal that stopped it.

    Book: 23_command_line.html#a-run-and-going-on-with-it
    """
    name = quote(str(run.directory))
    if run.stopped_by:
        print(f"stopped after step {run.trainer.step}: glassgpt resume {name} goes on")
        return 128 + run.stopped_by
    print(f"write with it: glassgpt generate {name}")
    return 0


@dataclass
class Resume:
    """Go on with a run, to the same weights as if it had never stopped.

    Book: 23_command_line.html#a-run-and-going-on-with-it
    """

    directory: Positional[str]  # of the run: what `train` called --out
    data: Maybe[str] = None  # where its tokens are now, if they moved
    tensorboard: Flag = False  # draw the curves for TensorBoard, too
    shard: Shard = None  # what the processes of torchrun divide
    changes: given(CHANGES) = field(default_factory=dict)

    def run(self) -> int:
        """Go on to the end; --steps may put it further away."""
        glassgpt.keep_freed_memory()
        how = telling(Path(self.directory), self.tensorboard, self.shard)
        how |= self.changes
        return ended(glassgpt.resume_run(self.directory, self.data, **how))


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


@dataclass
class Train(Text):
    """Train a GPT on a text.

    Book: 23_command_line.html#a-run-and-going-on-with-it
    """

    out: Maybe[str] = None  # the run's folder; default: runs/ and the text's name
    resume: Flag = False  # go on, if --out holds the run that these options began
    init_from: Maybe[str] = None  # start from this model's weights
    tensorboard: Flag = False  # draw the curves for TensorBoard, too
    shard: Shard = None  # what the processes of torchrun divide
    settings: given(SETTINGS) = field(default_factory=dict)

    def run(self) -> int:
        """Begin a run; with --resume go on with it, where there is one."""
        name = re.sub(r"[^\w.-]", "", Path(*self.data[:1]).resolve().stem).strip(".")
        out = Path("runs", name or "run") if self.out is None else Path(self.out)
        own = ("out", "resume", "tensorboard", "shard", "settings")
        asked = {k: v for k, v in vars(self).items() if v and k not in own}
        asked = json.loads(json.dumps(asked | self.settings, sort_keys=True))
        path = out / ".command.json"
        if not (self.resume and (out / "run.json").exists()):
            return self.start(out, path, asked)
        use = f"use `glassgpt resume {quote(str(out))}`"
        if not path.exists():  # made in Python, or copied without its hidden files
            raise ValueError(f"{out} was not begun by this command: {use}")
        try:
            begun = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{path} is damaged: {use}") from None
        other = {k for k, v in asked.items() if begun.get(k) != v}
        if kept := _flags(other - CHANGEABLE):
            raise ValueError(f"{out} did not begin with this {kept}: leave it out")
        changes = {k: v for k, v in asked.items() if k in CHANGEABLE}
        return Resume(str(out), None, self.tensorboard, self.shard, changes).run()

    def start(self, out: Path, path: Path, asked: dict[str, Any]) -> int:
        """Plan, tokenize, train. Where no run begins, nothing is left behind."""
        refuse_occupied(out)
        if os.path.lexists(out) and not out.is_dir():  # a file, or a link to nothing
            raise FileExistsError(f"{out} is no folder: choose another --out")
        how, values = telling(out, self.tensorboard, self.shard), dict(self.settings)
        how |= {name: values.pop(name) for name in _SAVING if name in values}
        if wrong := _flags(name for name in _SAVING if how.get(name, 1) < 1):
            raise ValueError(f"{wrong} must be at least 1")
        model, tokenizer, place = None, self.ready_tokenizer(), self.tokens
        new = out / "data"
        line = json.dumps(asked).encode()
        ours = self.resume and path.exists() and path.read_bytes() == line
        if ours and not place:  # a start that was killed had got so far
            place, tokenizer = new, read_tokenizer(new / "tokenizer.json")
        if self.init_from:
            model, tokenizer, values = self.origin(tokenizer, values, asked)
        size = (model.config if model else tokenizer or self).vocab_size
        # Refuses before any work.
        cards = int(os.environ.get("WORLD_SIZE", 1))  # torchrun says it
        plan = glassgpt.make_plan(1024 if size is None else size, cards=cards, **values)
        glassgpt.keep_freed_memory()
        try:
            tokenizer = tokenizer or self.learn_tokenizer()
            size = (model.config if model else tokenizer).vocab_size
            plan = replace(plan, model=replace(plan.model, vocab_size=size))
            data = TokenData.open(place) if place else self.encode(tokenizer, new)
            ours = True
            data.check_context(plan.model.context)
            print(plan.describe(), flush=True)
            if cards > 1:
                print(f"{cards} processes share every batch; the time is that of one")
            out.mkdir(parents=True, exist_ok=True)
            write_file(path, line)
            return ended(glassgpt.start_run(out, plan, data, tokenizer, model, **how))
        except (KeyboardInterrupt, SystemExit):
            if not (out / "run.json").exists():
                said = "glassgpt: stopped before the first step: nothing was begun"
                print(said, file=sys.stderr)
            ours = ours and not (self.resume and path.exists())  # a queue goes on
            raise
        finally:
            if ours and not (out / "run.json").exists():
                path.unlink(missing_ok=True)
                if not self.tokens:
                    shutil.rmtree(new)
            with suppress(OSError):
                out.rmdir()  # where it is empty

    def origin(
        self, tokenizer: Tokenizer | None, values: dict[str, Any], asked: dict[str, Any]
    ) -> tuple[GPT, Tokenizer, dict[str, Any]]:
        """The model and tokenizer of --init-from, and the values of its plan."""
        model, theirs = glassgpt.load(str(self.init_from))
        config = asdict(model.config)
        sizes = {*names(ModernConfig), "size", "recipe", "tokenizer"}
        if wrong := _flags(sizes & asked.keys()):
            raise ValueError(f"{self.init_from} brings its own: leave out {wrong}")
        both = (tokenizer or theirs, theirs)
        one, two = ([t.decode_bytes([n]) for n in range(t.vocab_size)] for t in both)
        if one != two:
            made = f"{self.tokens} was made by another tokenizer"
            raise ValueError(f"{made} than that of {self.init_from}")
        recipe = "modern" if isinstance(model.config, ModernConfig) else "gpt2"
        # A tenth of the usual rate: what was learned should stay.
        usual = {"optimizer": "adamw", "learning_rate": 0.04 / model.config.width}
        del config["vocab_size"]
        return model, theirs, {**usual, "recipe": recipe, **config, **values}


@dataclass
class Generate:
    """Write with a trained GPT.

    Book: 23_command_line.html#writing-and-measuring
    """

    model: Positional[str]  # a run's folder, a checkpoint, or a name: shakespeare
    prompt: Maybe[str] = None  # the text to go on with; default: a new line
    prompt_file: Maybe[str] = None  # a file that holds it; -: what is piped in
    tokens: int = 200  # at most
    samples: int = 1  # how many texts
    weights: Weights = "float32"  # lighter ones: faster for large models; or auto
    device: Maybe[str] = None  # cpu, cuda or mps; default: the best one here
    sampling: given(options(Sampling, usual=_default)) = field(default_factory=dict)

    def read_prompt(self, tokenizer: Tokenizer) -> str:
        """The prompt, as UTF-8 whatever the terminal has; by default a new line."""
        if None not in (self.prompt, self.prompt_file):
            raise ValueError("--prompt and --prompt-file contradict: leave one out")
        letters = isinstance(tokenizer, CharTokenizer)
        usual = tokenizer.decode([0]) if letters else "\n"
        raw = os.fsencode(usual if self.prompt is None else self.prompt)
        if self.prompt_file == "-":
            raw = sys.stdin.buffer.read()
        elif self.prompt_file is not None:
            raw = Path(self.prompt_file).read_bytes()
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("the prompt is not UTF-8 text") from None

    def run(self) -> int:
        """Write on from the prompt, piece by piece."""
        for name, least in (("tokens", 0), ("samples", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"--{name} must be {least} or more, not {value}")
        device = glassgpt.pick_device(self.device)
        model, tokenizer = glassgpt.load(self.model)
        model, prompt = model.to(device), self.read_prompt(tokenizer)
        if self.weights != "float32":
            weights = None if self.weights == "auto" else self.weights
            model = glassgpt.lighten(model, weights)
        ends = tuple(tokenizer.special_tokens.values())
        drawing: dict[str, Any] = {"stop": ends, **self.sampling}
        for number in range(self.samples):
            if number:
                print("---")
                drawing |= {"seed": drawing["seed"] + 1} if "seed" in drawing else {}
            pieces = stream_text(model, tokenizer, prompt, self.tokens, **drawing)
            first = next(pieces, "")  # settings are refused before the prompt is shown
            print(prompt + first, end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
        return 0


# How a chat draws where nothing is said: as SmolLM2's makers advise.
CAREFUL = {"temperature": 0.2, "top_p": 0.9}


def _careful(name: str, default: Any) -> str:
    return _default(name, CAREFUL.get(name, default))


def fit_history(
    conversation: list[dict[str, str]], tokenizer: Any, room: int
) -> list[dict[str, str]]:
    """A conversation without its oldest turns, so that it takes at most `room` tokens.

    A system line at the beginning stays, and so does the last turn. What is dropped
    ends where a user begins. Raises ValueError where that isn't enough.

    Book: 23_command_line.html#writing-and-measuring
    """
    turns = list(conversation)
    while (size := len(render(turns, tokenizer, reply=True)[0])) > room:
        first = int(turns[0]["role"] == "system")
        users = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
        later = [n for n in users if n > first]
        if not later:
            what = f"the last message (system line included) takes {size} tokens"
            raise ValueError(f"{what}, more than the {room} there are: shorten it")
        del turns[first : later[0]]
    return turns


@dataclass
class Chat:
    """Talk with a GPT that was taught to answer.

    Book: 23_command_line.html#writing-and-measuring
    """

    model: Positional[str]  # a run's folder, a checkpoint, or a name
    system: Maybe[str] = None  # a line that says how to behave
    tokens: int = 200  # of an answer, at most
    weights: Weights = "float32"  # lighter ones: faster for large models; or auto
    device: Maybe[str] = None  # cpu, cuda or mps; default: the best one here
    sampling: given(options(Sampling, usual=_careful)) = field(default_factory=dict)

    def run(self) -> int:
        """Answer line after line, until there are no more."""
        if self.tokens < 1:
            raise ValueError(f"--tokens must be 1 or more, not {self.tokens}")
        self.sampling = CAREFUL | self.sampling
        Sampling(**self.sampling)  # refuses before the first question
        device = glassgpt.pick_device(self.device)
        model, tokenizer = glassgpt.load(self.model)
        template_of(tokenizer)
        model = model.to(device)
        if self.weights != "float32":
            weights = None if self.weights == "auto" else self.weights
            model = glassgpt.lighten(model, weights)
        by_hand, line, talk = sys.stdin.isatty(), self.system, []
        if by_hand:
            self.say("/system TEXT sets the system line, /reset starts over")
        for said in self.lines(by_hand):
            word, _, rest = said.partition(" ")
            if word == "/reset":
                talk = []
            elif word == "/system":
                line = rest.strip() or None
            elif said.strip():
                head = [] if line is None else [{"role": "system", "content": line}]
                asked = [*head, *talk, {"role": "user", "content": said}]
                try:
                    talk = self.answer(model, tokenizer, asked, by_hand)[len(head) :]
                except ValueError as error:  # a question longer than the context
                    if not by_hand:
                        raise
                    self.say(str(error))
        return 0

    def say(self, what: str) -> None:
        """A word to whoever sits there, which is no part of an answer."""
        print(f"({what})", file=sys.stderr, flush=True)

    def lines(self, by_hand: bool) -> Iterator[str]:
        """What is typed or piped in, line by line."""
        while by_hand:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                print(file=sys.stderr)
                self.say("Ctrl-D ends")
            except EOFError:
                print()
                return
        for raw in sys.stdin.buffer:
            try:
                yield raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise ValueError("a line that was piped in is not UTF-8") from None

    def answer(
        self, model: GPT, tokenizer: Any, asked: list[dict[str, str]], by_hand: bool
    ) -> list[dict[str, str]]:
        """Print an answer as it comes; the conversation as far as it fits, with it."""
        context = model.config.context
        room = context - min(self.tokens, context // 2)
        kept = fit_history(asked, tokenizer, room)
        if lost := len(asked) - len(kept):
            self.say(f"the context is full: the {lost} oldest turns are forgotten")
        said = ""
        try:
            for piece in stream_answer(
                model, tokenizer, kept, self.tokens, **self.sampling
            ):
                said += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not by_hand:  # what feeds a pipe is stopped as a whole
                raise
        print(flush=True)
        return [*kept, {"role": "assistant", "content": said}]


@dataclass
class Evaluate:
    """Measure how well a GPT predicts a text.

    Book: 23_command_line.html#writing-and-measuring
    """

    model: Positional[str]  # a run's folder, a checkpoint, or a name: shakespeare
    text: Positional[str]  # a file, a folder, or a pattern such as "*.txt"
    more: Positional[tuple[str, ...]] = ()  # more of them
    skip: Flag = False  # leave out what isn't text, and name it
    device: Maybe[str] = None  # cpu, cuda or mps; default: the best one here

    def run(self) -> int:
        """Print the mean loss over the whole text, each token predicted once."""
        device = glassgpt.pick_device(self.device)
        model, tokenizer = glassgpt.load(self.model)
        ids, characters = [], 0
        end = [i for s, i in tokenizer.special_tokens.items() if s == "<|endoftext|>"]
        for document in read_documents(self.text, *self.more, skip=self.skip):
            for piece in document.pieces():
                ids += tokenizer.encode(piece)
                characters += len(piece)
            ids += end
        if len(ids) < 2:
            raise ValueError("a text of one token leaves nothing to predict")
        row, context = torch.tensor(ids, device=device), model.config.context
        fill = (0, -(len(ids) - 1) % context)  # the last window is filled up
        inputs = F.pad(row[:-1], fill).view(-1, context).split(32)
        targets = F.pad(row[1:], fill, value=-100).view(-1, context).split(32)
        model, total = model.to(device).eval(), 0.0
        with torch.inference_mode():
            for x, y in zip(inputs, targets, strict=True):
                logits = model(x).flatten(0, 1)  # -100 counts for nothing
                total += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
        loss = total / (len(ids) - 1)
        print(
            f"loss {loss:.4f} nats a token, {total / characters:.4f} nats a "
            f"character, perplexity {math.exp(loss):.2f}: {len(ids):,} tokens, "
            f"{characters:,} characters"
        )
        return 0


@dataclass
class Serve:
    """Serve a GPT on this machine, as OpenAI's clients expect it.

    Book: 23_command_line.html#writing-and-measuring
    """

    model: Positional[str]  # a run's folder, a checkpoint, or a name: smollm2
    port: int = 8000  # 0: any that is free
    weights: Weights = "float32"  # lighter ones: faster for large models; or auto
    device: Maybe[str] = None  # cpu, cuda or mps; default: the best one here

    def run(self) -> int:
        """Serve until Ctrl-C."""
        from glassgpt.server import make_app, running  # its libraries are an extra

        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must lie in 0 to 65535, not {self.port}")
        device = glassgpt.pick_device(self.device)
        model, tokenizer = glassgpt.load(self.model)
        model = model.to(device)
        if self.weights != "float32":
            weights = None if self.weights == "auto" else self.weights
            model = glassgpt.lighten(model, weights)
        name = Path(self.model).resolve().name
        with running(make_app(model, tokenizer, name), self.port) as address:
            print(f"{name} answers at {address} until Ctrl-C", flush=True)
            threading.Event().wait()
        return 0


@dataclass
class Publish:
    """Write a GPT into one HTML file that any browser runs, without a network.

    Book: 23_command_line.html#writing-and-measuring
    """

    model: Positional[str]  # a run's folder, a checkpoint, or a name: shakespeare
    out: str = "model.html"  # the file
    title: Maybe[str] = None  # above the model; default: its name
    prompt: str = ""  # what stands there at the start
    weights: Literal["int8", "float32"] = "int8"  # one byte for each, or four

    def run(self) -> int:
        """Write the file, and say how large it is."""
        model, tokenizer = glassgpt.load(self.model)
        title = self.title or Path(self.model).resolve().name
        glassgpt.publish(model, tokenizer, self.out, title, self.weights, self.prompt)
        size = Path(self.out).stat().st_size
        print(f"wrote {self.out}, {size / 1e6:.1f} MB: open it in any browser")
        return 0


COMMANDS = (Train, Resume, Generate, Chat, Evaluate, Tokenize, Serve, Publish)


def parse(words: Sequence[str]) -> Any:
    """The command that words ask for, as an object of its class.

    Raises ValueError for words that make no sense. --help, which no words at all mean
    too, leaves with SystemExit.

    Book: 23_command_line.html#mistakes-get-a-sentence
    """
    commands = {kind.__name__.lower(): kind for kind in COMMANDS}
    if words and words[0] not in commands and not words[0].startswith("-"):
        near = get_close_matches(words[0], commands, 1) or commands
        raise ValueError(f"no command {words[0]}: do you mean {' or '.join(near)}?")
    if "resume" in words[:1]:
        named = {n for w in words for n in re.findall(r"^--(?:no-)?([\w-]+)", w)}
        named = {name.replace("-", "_") for name in named}
        if kept := sorted(named & (SETTINGS.keys() - CHANGES.keys())):
            raise ValueError(f"a resumed run keeps its {', '.join(kept)}")
    kinds = []
    for name, kind in commands.items():
        about = str(kind.__doc__).split("\n")[0]
        kinds.append(Annotated[kind, tyro.conf.subcommand(name, description=about)])
    settings = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    errors, words = io.StringIO(), words or ["--help"]
    try:
        with redirect_stderr(errors):
            every: Any = Union[tuple(kinds)]  # noqa: UP007
            return tyro.cli(every, prog="glassgpt", args=words, config=settings)
    except SystemExit as leaving:
        if leaving.code != 2:
            raise
    # A box with a title, then parts: what is wrong, what may be meant, where to look.
    rows = [row.strip("│╭╮╰╯─|+ ") for row in errors.getvalue().splitlines()]
    rows = [re.sub("[─-]{3,}", "", row) for row in rows]
    parts = "\n".join(rows[1:]).split("\n\n")
    wrong, *near = [" ".join(part.split()) for part in parts]
    if not near or "--help" not in near.pop():  # a later tyro draws it otherwise
        raise ValueError(" ".join(" ".join(rows).split()))
    meant = {*re.findall(r"--[\w-]+", " ".join(near))}
    meant -= {"--help", *(word.split("=")[0] for word in words)}
    near = [f"Do you mean {' or '.join(sorted(meant))}?"] if meant else []
    at = f"{words[0]} " if words[0] in commands else ""
    see = f"See glassgpt {at}--help"
    raise ValueError(" ".join([wrong.rstrip(".") + ".", *near, see]))


def is_mistake(error: BaseException) -> bool:
    """Whether a user can mend it: the system's answer, or a `raise` of this package.

    Everything else, such as a ValueError that some library raised, is a fault of ours.

    Book: 23_command_line.html#mistakes-get-a-sentence
    """
    if isinstance(error, (OSError, MemoryError)):
        return True
    at: Any = error.__traceback__
    while at.tb_next:
        at = at.tb_next
    ours = str(at.tb_frame.f_globals.get("__name__")).startswith("glassgpt.")
    raised = opname[at.tb_frame.f_code.co_code[at.tb_lasti]] == "RAISE_VARARGS"
    kinds = (ValueError, FloatingPointError, ModuleNotFoundError)
    return isinstance(error, kinds) and ours and raised


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2, and a sentence, for a mistake.

    Book: 23_command_line.html#mistakes-get-a-sentence
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    told: set[str] = set()

    def tell(message: object, *_: Any) -> None:
        if str(message) not in told:
            print(f"glassgpt: {message}", file=sys.stderr)
        told.add(str(message))

    def on_end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if main_thread := threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, on_end)  # no other thread may do this
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = tell
            if words == ["--version"]:
                print(glassgpt.__version__)
                return 0
            with team() as first:
                return parse(words).run() if first else 0
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_mistake(error):
            raise
        tell(error if str(error) else type(error).__name__)
        return 2
    finally:
        if main_thread:  # a program that called us has its own way to end
            signal.signal(signal.SIGTERM, before)
