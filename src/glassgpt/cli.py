# Written by tools/tangle.py from book/a3_command_line.ipynb: change it there.
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
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache, partial
from inspect import getdoc, getsource
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Union

import torch
import tyro
from tqdm.auto import tqdm
from tyro.conf import OmitArgPrefixes, Positional, subcommand

import glassgpt
from glassgpt.atomic import write_file
from glassgpt.chat import render, stream_answer, template_of
from glassgpt.checkpoints import reraise_as
from glassgpt.data import TokenData, read_documents, split_documents
from glassgpt.distributed import first_process_first, make_trainer, process_group
from glassgpt.generation import Sampling, stream_text
from glassgpt.gpt import GPT
from glassgpt.huggingface import read_tokenizer
from glassgpt.modern import ModernConfig, MuonConfig, build
from glassgpt.plan import RECIPES, SIZES, Machine, names, take
from glassgpt.runs import CHANGEABLE, Run, Saving, refuse_occupied
from glassgpt.tokens import BPETokenizer, CharTokenizer, Tokenizer

Size = Literal[tuple(SIZES)]


@dataclass
class Choices:
    """What `make_plan` takes beside the fields of configurations.

    Book: a3_command_line.html#given-or-not-given
    """

    size: Size | None = None  # layers/heads/width: 4/4/128, 6/6/384, then GPT-2's
    recipe: Literal[tuple(RECIPES)] = "gpt2"  # gpt2: what others can read, too
    optimizer: Literal["adamw", "muon"] | None = None  # default: muon for short runs


KINDS = (Choices, ModernConfig, MuonConfig, Machine, Saving)


def comments(kind: type) -> dict[str, str]:
    """The comments at the ends of a dataclass's lines, by the field they explain.

    Book: a3_command_line.html#given-or-not-given
    """
    kinds = [k for k in reversed(kind.__mro__[:-1]) if k.__module__ != "__main__"]
    source = "".join(map(getsource, kinds))  # a class of a notebook has none
    return dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))


def given(wanted: set[str], usual: Callable[[], dict[str, Any]]) -> Any:
    """Options for fields of `KINDS`, in a dict that has those that were given.

    usual: makes the defaults, when a help text is shown.

    Book: a3_command_line.html#given-or-not-given
    """

    def default_of(option: Field, _: Any) -> str:
        value = usual().get(option.name, option.default)
        return "" if value is None else f"(default: {value})"

    found = {}
    for kind in KINDS:
        about = comments(kind)
        for option in (each for each in fields(kind) if each.name in wanted):
            words, hint = about.get(option.name), partial(default_of, option)
            arg = tyro.conf.arg(help=words, help_behavior_hint=hint)
            found[option.name] = Annotated[option.type, arg]  # a type and a note
    # --steps, and not --settings.steps:
    return OmitArgPrefixes[TypedDict("Given", found, total=False)]


@cache
def suited() -> dict[str, Any]:
    """What a run has on this machine, where nothing else is said.

    Book: a3_command_line.html#given-or-not-given
    """
    plan = glassgpt.make_plan(1024)
    chosen = {**asdict(plan.model), **asdict(plan.training), **asdict(plan.machine)}
    return {**RECIPES["gpt2"], **chosen}


Settings = given(names(*KINDS) - {"vocab_size"}, suited)  # it is the tokenizer's
Changes = given(CHANGEABLE, lambda: dict.fromkeys(CHANGEABLE, "as before"))


T = TypeVar("T")
Maybe = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]  # None: not given
Flag = Annotated[Maybe[bool], tyro.conf.FlagCreatePairsOff]  # there is no --no-skip
Shard = Maybe[Literal["nothing", "optimizer", "model"]]


def summary(data: TokenData) -> str:
    """A folder of tokens in a line.

    Book: a3_command_line.html#from-text-to-tokens
    """
    train, rest, size = len(data.train), len(data.validation), data.vocab_size
    return f"{data.directory}: {train:,} tokens, {rest:,} held out, vocabulary {size:,}"


@dataclass
class Text:
    """Where text comes from, and its tokenizer: what `train` and `tokenize` share.

    Book: a3_command_line.html#from-text-to-tokens
    """

    data: tuple[str, ...] = ("shakespeare",)  # files, folders, "*.txt"
    tokenizer: Maybe[str] = None  # bpe, char, gpt2, a file or a model; default: bpe
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
        place, kind = self.tokens, self.tokenizer or "bpe"
        if place and (self.tokenizer or self.vocab_size):
            raise ValueError(f"leave out --tokenizer and --vocab-size for {place}")
        if self.vocab_size and kind != "bpe":
            raise ValueError("--vocab-size is for --tokenizer bpe: leave it out")
        if kind == "gpt2":
            return BPETokenizer.gpt2()
        if kind in ("bpe", "char") and not place:
            return None
        path = place or Path(kind)
        path = path / "tokenizer.json" if path.is_dir() else path
        if place or (path.is_file() and path.suffix != ".gguf"):
            return read_tokenizer(path)
        try:
            return glassgpt.load(kind)[1]
        except FileNotFoundError as error:
            known = "bpe, char, gpt2, a tokenizer.json or a model"
            raise FileNotFoundError(f"--tokenizer is {known}: {error}") from None

    def learn_tokenizer(self) -> Tokenizer:
        """A new tokenizer. What is held out teaches byte pairs nothing."""
        parts = split_documents(read_documents(*self.data, skip=self.skip))
        if self.tokenizer == "char":
            return CharTokenizer.train(piece for _, d in parts for piece in d.pieces())
        pieces = (p for split, d in parts if split == "train" for p in d.pieces())
        size = 1024 if self.vocab_size is None else self.vocab_size
        return BPETokenizer.train(pieces, size)

    def encode(self, tokenizer: Tokenizer, folder: str | Path) -> TokenData:
        """The texts in a new folder of token ids."""
        shown = sys.stderr.isatty()
        return glassgpt.tokenize(self.data, tokenizer, folder, shown, self.skip)


@dataclass
class Tokenize(Text):
    """Turn texts into a folder of token ids, for `glassgpt train --data`.

    Book: a3_command_line.html#from-text-to-tokens
    """

    out: str = "tokens"  # the new folder

    def run(self) -> None:
        """Learn a tokenizer and encode the texts."""
        if self.tokens:
            raise ValueError(f"{self.tokens} is tokenized already: train on it")
        if os.path.lexists(self.out):  # before the learning
            raise FileExistsError(f"{self.out} exists already: choose another --out")
        tokenizer = self.ready_tokenizer() or self.learn_tokenizer()
        print(summary(self.encode(tokenizer, self.out)))


SAID = {
    "train_loss": "training loss {:.3f}",
    "validation_loss": "validation loss {:.3f}",
    "nats_per_character": "{:.3f} nats a character",
    "tokens_per_second": "{:,.0f} tokens/s",
}


def telling(shard: str | None) -> dict[str, Any]:
    """What `start_run` needs: prints of each evaluation, and how a run is shared.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """

    def on_record(record: dict[str, float]) -> None:
        words = [text.format(record[k]) for k, text in SAID.items() if k in record]
        tqdm.write(f"step {record['step']}: {', '.join(words)}")
        print(end="", flush=True)  # a log file shows it now, not at the end

    how = {"on_record": on_record, "progress": sys.stderr.isatty()}
    return {**how, "make_trainer": partial(make_trainer, shard=shard)}


def ended(run: Run) -> int:
    """Say what to do next. The exit code: 0, or 128 + the signal that stopped it.

    Book: a3_command_line.html#a-run-and-going-on-with-it
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

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """

    directory: Positional[str]  # of the run: what `train` called --out
    data: Maybe[str] = None  # where its tokens are now, if they moved
    shard: Shard = None  # what the processes of torchrun divide
    changes: Changes = field(default_factory=dict)

    def run(self) -> int:
        """Go on to the end; --steps may put it further away."""
        glassgpt.keep_freed_memory()
        how = telling(self.shard) | self.changes
        return ended(glassgpt.resume_run(self.directory, self.data, **how))


def began(out: Path) -> dict[str, Any]:
    """What was asked of the `train` that began in a folder, {} if nobody knows.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """
    file = out / ".command.json"
    with reraise_as(f"{file} is damaged: try `glassgpt resume {out}`"):
        return dict(json.loads(file.read_bytes())) if file.exists() else {}


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in sorted(names))


@dataclass
class Train(Text):
    """Train a GPT on a text.

    Book: a3_command_line.html#a-run-and-going-on-with-it
    """

    out: Maybe[str] = None  # the run's folder; default: runs/ and the text's name
    resume: Flag = False  # go on, if --out holds the run that these options began
    init_from: Maybe[str] = None  # start from this model's weights
    shard: Shard = None  # what the processes of torchrun divide
    settings: Settings = field(default_factory=dict)

    def run(self) -> int:
        """Begin a run; with --resume go on with it, where there is one."""
        place = os.path.realpath(Path(*self.data[:1]))  # links in a circle, too
        name = re.sub(r"[^\w.-]", "", Path(place).stem)
        out = Path(self.out or Path("runs", name or "run"))
        asked = {"data": [*self.data], **self.settings}
        others = ("tokenizer", "vocab_size", "skip", "init_from")
        asked |= {name: v for name in others if (v := getattr(self, name))}
        if self.resume and (out / "run.json").exists():
            return self.go_on(out, asked)
        return self.start(out, asked)

    def go_on(self, out: Path, asked: dict[str, Any]) -> int:
        """Resume the run that these options began, with what may change."""
        begun = began(out)
        other = {k for k, v in asked.items() if begun.get(k) != v}
        if kept := _flags(other - CHANGEABLE):
            advice = f"type what began it, or use `glassgpt resume {quote(str(out))}`"
            raise ValueError(f"{out} did not begin with this {kept}: {advice}")
        changes = {k: v for k, v in asked.items() if k in CHANGEABLE}
        return Resume(str(out), None, self.shard, changes).run()

    def start(self, out: Path, asked: dict[str, Any]) -> int:
        """Plan, tokenize, train. Where no run begins, nothing is left behind."""
        refuse_occupied(out)
        new_folders = [p for p in (out, *out.parents) if not p.exists()]
        if os.path.lexists(out) and not out.is_dir():  # a file, or a link to nothing
            raise FileExistsError(f"{out} is no folder: choose another --out")
        saving = take(Saving, self.settings)  # refuses what is wrong, before any work
        values = {k: v for k, v in self.settings.items() if k not in names(Saving)}
        model, tokenizer, place = None, self.ready_tokenizer(), self.tokens
        new, killed = out / "data", self.resume and began(out) == asked
        if killed and not place:  # that start had got so far
            place, tokenizer = new, read_tokenizer(new / "tokenizer.json")
        if self.init_from:
            model, tokenizer, usual = self.origin(tokenizer, asked)
            values = usual | values
        size = (model.config if model else tokenizer or self).vocab_size or 1024
        cards = int(os.environ.get("WORLD_SIZE", 1))  # torchrun says it
        plan = glassgpt.make_plan(size, cards=cards, **values)  # refuses, too
        glassgpt.keep_freed_memory()
        ours = False  # what is in the folder
        try:
            with first_process_first() as rank:
                if not place and rank == 0:
                    self.encode(tokenizer or self.learn_tokenizer(), new)
            ours = not killed and rank == 0
            data = TokenData.open(place or new)
            tokenizer = tokenizer or read_tokenizer(new / "tokenizer.json")
            size = (model.config if model else tokenizer).vocab_size
            plan = replace(plan, model=replace(plan.model, vocab_size=size))
            print(summary(data))
            print(plan.describe(), flush=True)
            if rank == 0:
                out.mkdir(parents=True, exist_ok=True)
                write_file(out / ".command.json", json.dumps(asked).encode())
            how = telling(self.shard) | vars(saving)
            return ended(glassgpt.start_run(out, plan, data, tokenizer, model, **how))
        finally:
            if ours and not (out / "run.json").exists():
                (out / ".command.json").unlink(missing_ok=True)
                if not self.tokens:
                    shutil.rmtree(new)
            with suppress(OSError):  # one of them isn't empty
                for folder in new_folders:
                    folder.rmdir()

    def origin(
        self, tokenizer: Tokenizer | None, asked: dict[str, Any]
    ) -> tuple[GPT, Tokenizer, dict[str, Any]]:
        """The model and tokenizer of --init-from, and the values of its plan.

        tokenizer: of the tokens, where there are some; it must be the model's.
        """
        model, theirs = glassgpt.load(str(self.init_from))
        free = {"dropout", "context"}  # what may be another here
        own = {*names(ModernConfig), "size", "recipe", "tokenizer"} - free
        if wrong := _flags(own & asked.keys()):
            raise ValueError(f"{self.init_from} brings its own: leave out {wrong}")
        both = (tokenizer or theirs, theirs)
        one, two = ([t.decode_bytes([n]) for n in range(t.vocab_size)] for t in both)
        if one != two:
            raise ValueError(f"{self.tokens}: another tokenizer than {self.init_from}")
        if changed := {name: asked[name] for name in free & asked.keys()}:
            config, weights = replace(model.config, **changed), model.state_dict()
            if config.context > (longest := model.config.context):
                raise ValueError(f"context must be at most {longest}, the model's own")
            if (table := weights.get("positions.weight")) is not None:
                weights["positions.weight"] = table[: config.context]
            model = build(config)
            model.load_state_dict(weights)
        config = asdict(model.config)
        del config["vocab_size"]
        # A tenth of the usual rate: what was learned should stay.
        usual = {"optimizer": "adamw", "learning_rate": 0.04 / model.config.width}
        return model, theirs, {**usual, **config}


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
        return glassgpt.lighten(model.to(device), weights), tokenizer


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
        stop = tokenizer.special_tokens.values()
        settings = {"stop": stop, **vars(self.sampling)}
        for number in range(self.samples):
            pieces = stream_text(model, tokenizer, prompt, self.tokens, **settings)
            # What is wrong was refused before.
            print("---\n" if number else "", prompt, sep="", end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
            print()
            if settings["seed"] is not None:
                settings["seed"] += 1


# How a chat draws where nothing is said: the likeliest token. With the 0.2 and 0.9 of
# its card, SmolLM2 misses the capital of France two times in five.
CAREFUL = Sampling(temperature=0.01)


def fit_history(
    conversation: list[dict[str, str]], tokenizer: Any, room: int
) -> list[dict[str, str]]:
    """A conversation without its oldest turns, so that it takes at most `room` tokens.

    Questions go with their answers. A system line at the beginning stays, and so does
    the last question. Raises ValueError where that isn't enough.

    Book: a3_command_line.html#writing-and-measuring
    """
    turns = list(conversation)
    first = int(turns[0]["role"] == "system")
    while (size := len(render(turns, tokenizer, reply=True)[0])) > room:
        if len(turns) == first + 1:
            what = f"the last message (system line included) takes {size} tokens"
            raise ValueError(f"{what}, more than the {room} there are: shorten it")
        del turns[first : first + 2]
    return turns


@dataclass(kw_only=True)
class Chat(Model):
    """Talk with a GPT that was taught to answer.

    In the talk, /system TEXT sets the system line, and /reset starts over.

    Book: a3_command_line.html#writing-and-measuring
    """

    weights: Weights = "auto"  # lighter ones: faster for large models
    system: Maybe[str] = None  # a line that says how to behave
    tokens: int = 200  # of an answer, at most
    sampling: OmitArgPrefixes[Sampling] = CAREFUL  # how a token is drawn

    def run(self) -> None:
        """Answer line after line, until there are no more."""
        if self.tokens < 1:
            raise ValueError(f"--tokens must be at least 1, not {self.tokens}")
        model, tokenizer = self.load()
        template_of(tokenizer)
        room = model.config.context - min(self.tokens, model.config.context // 2)
        by_hand, line, talk = sys.stdin.isatty(), self.system, []
        if by_hand:
            print("(/system TEXT sets the system line, /reset starts over)")
        for said in self.lines(by_hand):
            word, _, rest = said.partition(" ")
            if word == "/reset":
                talk = []
            elif word == "/system":
                line = rest.strip()
            elif said.strip():
                head = [{"role": "system", "content": line}] if line else []
                asked = [*head, *talk, {"role": "user", "content": said}]
                try:
                    kept = fit_history(asked, tokenizer, room)
                except ValueError as error:
                    if not by_hand:
                        raise
                    print(f"({error})", file=sys.stderr)
                    continue
                if lost := len(asked) - len(kept):
                    told = f"the context is full: {lost} oldest turns are forgotten"
                    print(f"({told})", file=sys.stderr)
                settings = vars(self.sampling)
                pieces = stream_answer(model, tokenizer, kept, self.tokens, **settings)
                answer = self.show(pieces, by_hand)
                talk = [*kept[len(head) :], {"role": "assistant", "content": answer}]

    def lines(self, by_hand: bool) -> Iterator[str]:
        """What is typed or piped in, line by line."""
        while by_hand:
            try:
                yield input("> ")
            except KeyboardInterrupt:
                print("\n(Ctrl-D ends)", file=sys.stderr)
            except EOFError:
                print()
                return
        for line in sys.stdin:
            yield line.rstrip("\n")

    def show(self, pieces: Iterable[str], by_hand: bool) -> str:
        """Print an answer as it comes, and return it, or what there is at Ctrl-C."""
        said = ""
        try:
            for piece in pieces:
                said += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not by_hand:  # what feeds a pipe is stopped as a whole
                raise
        print(flush=True)
        return said


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
            total -= found.gather(1, targets[first:last, None]).double().sum().item()
    return total


@dataclass(kw_only=True)
class Evaluate(Model):
    """Measure how well a GPT predicts a text.

    Book: a3_command_line.html#writing-and-measuring
    """

    text: Positional[str]  # a file, a folder, or a pattern such as "*.txt"
    more: Positional[tuple[str, ...]] = ()  # more of them
    skip: Flag = False  # leave out what isn't text, and name it
    limit: Maybe[int] = None  # read this many tokens at most; default: all

    def read(self, tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
        """Ids, piece by piece, and of how many characters they are."""
        end = tokenizer.special_tokens.get("<|endoftext|>")
        for document in read_documents(self.text, *self.more, skip=self.skip):
            for piece in document.pieces():
                yield tokenizer.encode(piece), len(piece)
            if end is not None:
                yield [end], 0

    def run(self) -> None:
        """Print the mean loss over the text, each token predicted once."""
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
        loss, each = total / (count - 1), total / characters
        said = f"loss {loss:.4f} nats a token, {each:.4f} nats a character, perplexity"
        size = f"{count:,} tokens, {characters:,} characters"
        print(f"{said} {math.exp(loss):.2f}: {size}")


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
            threading.Event().wait()


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
        model, tokenizer = glassgpt.load(self.model)
        title = self.title or Path(self.model).resolve().name
        glassgpt.publish(model, tokenizer, self.out, title, self.weights, self.prompt)
        size = Path(self.out).stat().st_size
        print(f"wrote {self.out}, {size / 1e6:.1f} MB: open it in any browser")


COMMANDS = (Train, Resume, Generate, Chat, Evaluate, Tokenize, Serve, Publish)
# What `glassgpt --help` begins with.
ABOUT = """Train a GPT on a text, then write with it:
  glassgpt train --data my.txt
  glassgpt generate runs/my

glassgpt train --help lists its options. Book: https://glassgpt.github.io/glassgpt/"""


def in_a_sentence(box: str, words: Sequence[str]) -> str:
    """What tyro's box says of words that it refused, and the options it suggests.

    In a frame, in a terminal with colors, and with lines (of ─ or -) between, it has a
    title, what is wrong, what is near it, and where the help is.

    Book: a3_command_line.html#mistakes-get-a-sentence
    """
    text = re.sub(r"[│╭╮╰╯]|\x1b\[[\d;]*m", "", box)
    parts = (" ".join(part.split()) for part in re.split("[─-]{9,}", text))
    _, wrong, *more, _ = filter(None, parts)
    number = r"Error parsing (--[\w-]+): .*('.*').*"  # Python's words about int()
    wrong = re.sub(number, r"\1 can't be \2", wrong).rstrip(".")
    wrong = re.sub("Error parsing sampling: |'None', |, 'None'", "", wrong)
    choices = r"(?<=one of \().*(?=\))"  # in another order each time
    wrong = re.sub(choices, lambda m: ", ".join(sorted(m[0].split(", "))), wrong)
    typed, near = (re.findall(r"--[\w-]+", " ".join(each)) for each in (words, more))
    meant = " or ".join(sorted({*near} - {*typed}))
    return f"{wrong}. Do you mean {meant}?" if meant else f"{wrong}."


def parse(words: Sequence[str]) -> Any:
    """The command that words ask for, as an object of its class.

    Raises ValueError for words that make no sense. Leaves with SystemExit after --help,
    and where there are no words.

    Book: a3_command_line.html#mistakes-get-a-sentence
    """
    about = {kind: str(getdoc(kind)).partition("\n\nBook:")[0] for kind in COMMANDS}
    commands = {kind.__name__.lower(): kind for kind in COMMANDS}
    every = [Annotated[k, subcommand(description=text)] for k, text in about.items()]
    kind: Any = Union[tuple(every)]  # noqa: UP007
    if [*words[:1]] == ["help"]:
        words = [*words[1:2], "--help"]
    name, args = "glassgpt", words or ["--help"]
    if args[0] in commands:
        name, args, kind = f"glassgpt {args[0]}", args[1:], commands[args[0]]
    elif not args[0].startswith("-"):
        near = " or ".join(get_close_matches(args[0], commands, 1) or commands)
        what = f"There is no command {args[0]}. Do you mean {near}?"
        raise ValueError(f"{what} See glassgpt --help")
    if sum(word.partition("=")[0] == "--data" for word in args) > 1:
        raise ValueError("--data is there twice: name all texts behind one --data")
    texts = ("--prompt", "--system", "--title")
    apart = [x for w in args for x in (w.split("=", 1) if w[:2] == "--" else [w])]
    if empty := [o for o, v in pairwise(["", *apart]) if not v and o not in texts]:
        what = empty[0] if empty[0][:2] == "--" else "a word"
        raise ValueError(f"{what} has an empty value: leave it out")
    config = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    how = {"prog": name, "description": about.get(kind, ABOUT), "config": config}
    try:
        with redirect_stderr(box := io.StringIO()):
            return tyro.cli(kind, args=args, **how)
    except SystemExit as leaving:
        if leaving.code != 2:
            raise
    said = in_a_sentence(box.getvalue(), words)
    if kind in (Train, Tokenize) and args[0][:1] != "-":
        said += f" Do you mean --data {quote(args[0])}?"
    raise ValueError(f"{said} See {name} --help")


def is_mistake(error: BaseException) -> bool:
    """Whether a user can mend it: the system's answer, or a `raise` of this package.

    What isn't UTF-8, read or written, counts, too. Everything else, such as a
    ValueError that some library raised, is a fault of ours.

    Book: a3_command_line.html#mistakes-get-a-sentence
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(glassgpt.__file__).parent in Path(last.filename).parents
    refused = ours and str(last.line).startswith("raise ")
    kinds = (ValueError, FloatingPointError, ModuleNotFoundError)
    system = isinstance(error, (OSError, MemoryError, UnicodeError))
    return system or (refused and isinstance(error, kinds))


def as_a_process(main: Callable[[Sequence[str]], int]) -> int:
    """Run this process's command line, and die of the signal that stopped it.

    A shell ends its loop when a command dies of Ctrl-C, not when one exits with 130.

    Book: a3_command_line.html#when-a-signal-ends-it
    """
    streams: dict[str, dict[str, Any]] = {
        "stdin": {"encoding": "utf-8"},
        # Line by line, so what is wrong with the output is known in time.
        "stdout": {"errors": "replace", "line_buffering": True},
        "stderr": {},
    }
    for name, changes in streams.items():
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, open(os.devnull, "r+"))  # noqa: SIM115
        with suppress(AttributeError):  # what others put there may lack it
            getattr(sys, name).reconfigure(**changes)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            code = main(sys.argv[1:])
        except SystemExit as leaving:  # after --help, and at SIGTERM
            code = int(leaving.code or 0)
        if code > 128:  # a second Ctrl-C finds nobody
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:  # it came while another signal was dealt with
        code = 130
    try:
        print(end="", flush=True)
    except OSError:  # nobody reads it, or the disk is full: all is said by now
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if code > 128 and os.name == "posix":
        signal.signal(code - 128, signal.SIG_DFL)
        os.kill(os.getpid(), code - 128)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 2, and a sentence, for a mistake.

    arguments: if None, those of this process, as `as_a_process` runs them; else it
    leaves with SystemExit after --help.

    Book: a3_command_line.html#when-a-signal-ends-it
    """

    @cache  # nothing is said twice
    def tell(message: str) -> None:
        print(f"glassgpt: {message}", file=sys.stderr)

    if arguments is None:
        return as_a_process(main)
    try:
        if [*arguments] == ["--version"]:
            print(glassgpt.__version__)
            return 0
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = lambda message, *_: tell(str(message))
            with process_group():
                return parse(arguments).run() or 0
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        return 141
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not is_mistake(error):
            raise
        # An option's name as it is typed: --batch-size, not batch_size.
        options = names(*KINDS, Sampling)
        known, long = ("|".join(o for o in options if part in o) for part in ("", "_"))
        first = rf"^({known})(?= must | can't | \d)"
        pattern, said = rf"{first}|(?<!\S)({long})(?![\w./=])", str(error)
        if not isinstance(error, OSError):  # which begins with the name of a file
            said = re.sub(pattern, lambda name: _flags([name[0]]), said)
        tell(said or type(error).__name__)
        return 2
