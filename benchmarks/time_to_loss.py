"""Loss at equal time: nanoGPT's CPU recipe and ours, on characters.

    python benchmarks/time_to_loss.py --text input.txt --nanogpt DIR
    python benchmarks/time_to_loss.py --text input.txt --nanogpt DIR --write

Two texts: tiny shakespeare, the 1.1 MB file of karpathy/char-rnn, of which the first
90 % trains; and the plays of this book, of which four are held out. DIR is a checkout
of karpathy/nanoGPT; neither it nor the file is part of this repository.
nanoGPT trains as its README says for a CPU (4 layers, width 128, context 64, batch 12,
eager float32): on the first text once for the 2,000 steps that it names, and on both
for `--seconds`, over which its learning rate falls. Ours is the modern recipe with Muon
in the precision that suits the processor, 4 layers, width 128, context 128, batch 16:
for a sixth of the time that nanoGPT took for its 2,000 steps, on their text, and on
both texts for `--short` seconds and for `--seconds`. The short runs don't compile, the
long one compiles the whole model; the clock starts before the compiler does.
The evaluation doesn't count on either clock, and both use the same text.
`--write` puts a table into README.md beside this file.
"""

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from training import machine, write_section

from glassgpt.data import TokenData, read_documents, split_documents
from glassgpt.modern import ModernConfig, MuonConfig
from glassgpt.plan import Machine, Plan, pick_precision
from glassgpt.quantization import keep_freed_memory
from glassgpt.tokens import CharTokenizer

Result = tuple[float, int, float]  # seconds, steps, validation loss in nats


@torch.no_grad()
def judge(loss_of: Callable, data: TokenData, context: int, tokens: int) -> float:
    """The mean loss on so many tokens of held-out text, always the same ones."""
    total, count = 0.0, 0
    batches = data.validation.fixed_batches(tokens // context, context, 128)
    for ids, targets in batches:
        total += float(loss_of(ids, targets)) * len(ids)
        count += len(ids)
    return total / count


def follow(
    step: Callable[[float], bool], loss_of: Callable, data: TokenData, context: int
) -> Result:
    """Call `step` with the seconds spent until it returns False; then judge."""
    spent, count, more = 0.0, 0, True
    while more:
        began = perf_counter()
        more = step(spent)
        spent += perf_counter() - began
        count += 1
    return spent, count, judge(loss_of, data, context, 1 << 18)


def ours(data: TokenData, seconds: float, compile: str) -> Result:
    """Train for so many seconds, compiling included."""
    keep_freed_memory()
    # What an earlier run compiled would spare this one the time.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
    config = ModernConfig(data.vocab_size, context=128, layers=4, heads=4, width=128)
    training = MuonConfig(
        steps=100_000,
        batch_size=16,
        learning_rate=0.8 / 128,  # that of a plan
        warmup=min(50, int(seconds)),
    )
    machine = Machine(precision=pick_precision(torch.device("cpu")), compile=compile)
    trainer, first = Plan(config, training, machine).trainer(data), []

    def step(spent: float) -> bool:
        trainer.take_step()
        trainer.unread.clear()
        done = trainer.step
        if done == 10:
            first.append(spent)  # compiled, and warm
        if done > max(training.warmup, 10):
            # The rate falls with the steps: how many does the rest of the time hold?
            each = (spent - first[0]) / (done - 10)
            rest = int((seconds - spent) / each)
            trainer.config = replace(training, steps=done + max(rest, 1))
        return spent < seconds

    return follow(step, trainer.loss, data, 128)


def nanogpt(data: TokenData, steps: int | None, seconds: float | None) -> Result:
    """nanoGPT's CPU recipe for so many steps, or so many seconds."""
    from model import GPT as NanoGPT
    from model import GPTConfig as NanoConfig

    torch.manual_seed(1337)
    sizes = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
    config = NanoConfig(vocab_size=data.vocab_size, dropout=0.0, bias=False, **sizes)
    model, count = NanoGPT(config), iter(range(1 << 30))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")

    def loss_of(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model(ids, targets.contiguous())[1]  # it calls view

    def step(spent: float) -> bool:
        number = next(count)
        done = number / steps if steps else spent / seconds
        cosine = 1e-4 + 0.5 * (1 + math.cos(math.pi * min(done, 1))) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = min(cosine, 1e-3 * (number + 1) / 101)
        loss_of(*data.train.random_batch(12, 64, (1, number))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return number + 1 < steps if steps else spent < seconds

    return follow(step, loss_of, data, 64)


def tiny(path: Path) -> TokenData:
    """The characters of a text: the first 90 % to train on."""
    text = path.read_text("utf-8")
    ids = CharTokenizer.train(text).encode(text)
    cut = int(0.9 * len(ids))
    return TokenData.of(ids[:cut], ids[cut:], len(set(text)))


def plays() -> TokenData:
    """The characters of the plays, four of which are held out."""
    texts = {"train": "", "validation": ""}
    for split, play in split_documents(read_documents("shakespeare")):
        texts[split] += play.text
    tokenizer = CharTokenizer.train("".join(texts.values()))
    ids = [tokenizer.encode(text) for text in texts.values()]
    return TokenData.of(*ids, tokenizer.vocab_size)


def run_all(options: argparse.Namespace) -> dict[str, dict[str, Result]]:
    """All results by text and name."""
    texts = {"tiny shakespeare": tiny(options.text), "the plays": plays()}
    results: dict[str, dict[str, Result]] = {name: {} for name in texts}
    long, short = options.seconds, options.short

    def note(text: str, name: str, result: Result) -> None:
        results[text][name] = result
        print(f"{text}, {name}: {result}", file=sys.stderr, flush=True)

    def race(text: str, seconds: float, compile: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as pool:  # a process of its own
            result = pool.submit(ours, texts[text], seconds, compile).result()
        note(text, f"glassgpt, {seconds:.0f} s", result)

    first, data = next(iter(texts.items()))
    note(first, "nanoGPT, 2,000 steps", nanogpt(data, 2000, None))
    for text, data in texts.items():
        note(text, f"nanoGPT, {long:.0f} s", nanogpt(data, None, long))
    race(first, results[first]["nanoGPT, 2,000 steps"][0] / 6, "off")
    for text in texts:
        race(text, short, "off")
        race(text, long, "all")
    return results


def table(here: dict[str, object], results: dict[str, dict[str, Result]]) -> str:
    """A Markdown table."""
    rows = [
        f"Validation loss in nats a character, one seed, {here['date']}, "
        f"{here['processor']}, {here['threads']} threads, torch {here['torch']}.",
        "",
        "| text | run | seconds | steps | loss |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for text, runs in results.items():
        for name, (seconds, steps, loss) in runs.items():
            rows.append(f"| {text} | {name} | {seconds:.0f} | {steps:,} | {loss:.3f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="tiny shakespeare")
    parser.add_argument(
        "--nanogpt", required=True, help="a checkout of karpathy/nanoGPT"
    )
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--short", type=float, default=60)
    parser.add_argument("--write", action="store_true", help="into README.md")
    options = parser.parse_args()
    sys.path.insert(0, options.nanogpt)
    here = machine()
    results = run_all(options)
    text = table(here, results)
    print(text)
    if options.write:
        write_section("time to loss", text)


if __name__ == "__main__":
    main()
