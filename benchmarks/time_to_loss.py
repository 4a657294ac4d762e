"""Loss at equal time on tiny shakespeare: nanoGPT's CPU recipe and ours.

    python benchmarks/time_to_loss.py --text input.txt --nanogpt DIR
    python benchmarks/time_to_loss.py --text input.txt --nanogpt DIR --write

The text is the 1.1 MB file of karpathy/char-rnn, DIR a checkout of karpathy/nanoGPT;
neither is part of this repository. Characters are the tokens, the first 90 % trains.
nanoGPT trains as its README says for a CPU (4 layers, width 128, context 64, batch 12,
eager float32): once for the 2,000 steps that it names, and with `--seconds` also for a
time, over which its learning rate falls. Ours is the modern recipe with Muon, compiled
in bfloat16, 4 layers, width 128, context 128, batch 16. Its clock starts before the
compiler does. Evaluations don't count on either clock, and use the same text.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from training import machine, write_section

from glassgpt.data import TokenData
from glassgpt.device import keep_freed_memory
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.training import TrainConfig, Trainer, make_loss, take_step

Curve = list[tuple[float, int, float]]  # seconds, steps, validation loss in nats


@torch.no_grad()
def judge(loss_of, data: TokenData, context: int) -> float:
    """The mean loss on 4,096 crops of 64 tokens, or half as many twice as long."""
    total, count = 0.0, 0
    rows = 4096 * 64 // context
    for ids, targets in data.validation.fixed_batches(128, context, rows // 128):
        total += float(loss_of(ids, targets)) * len(ids)
        count += len(ids)
    return total / count


def ours(data: TokenData, seconds: float) -> Curve:
    """Train for so many seconds, compiling included. The last point is the result."""
    torch.manual_seed(0)
    model = GPT(
        GPTConfig.modern(data.vocab_size, context=128, layers=4, heads=4, width=128)
    )
    config = TrainConfig(
        steps=10_000,
        batch_size=16,
        optimizer="muon",
        schedule="linear",
        final_rate=0.0,
        precision="bfloat16",
        compile=True,
    )
    trainer, curve, spent = Trainer(model, data, config), [], 0.0
    loss_of, marks = make_loss(model, config), iter(range(10, int(seconds) + 1, 10))
    mark = next(marks)
    while trainer.run.step < config.steps:
        began = perf_counter()
        take_step(trainer)
        trainer.losses.clear()
        spent += perf_counter() - began
        if trainer.run.step == 1:
            compiling = spent
        if trainer.run.step % 20 == 0:
            # Warm-up is over when this matters: how many steps the rest of time holds.
            each = (spent - compiling) / (trainer.run.step - 1)
            rest = max(int((seconds - spent) / each), 0)
            config.steps = max(trainer.run.step + rest, config.warmup + 1)
        if spent >= mark:
            curve.append((spent, trainer.run.step, judge(loss_of, data, 128)))
            mark = next(marks, math.inf)
    return [*curve, (spent, trainer.run.step, judge(loss_of, data, 128))]


def nanogpt(data: TokenData, steps: int | None, seconds: float | None) -> Curve:
    """nanoGPT's CPU recipe for so many steps, or so many seconds."""
    from model import GPT as NanoGPT
    from model import GPTConfig as NanoConfig

    torch.manual_seed(1337)
    sizes = {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128}
    config = NanoConfig(vocab_size=data.vocab_size, dropout=0.0, bias=False, **sizes)
    model, curve, spent, step, mark = NanoGPT(config), [], 0.0, 0, 10.0
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    while (done := step / steps if steps else spent / seconds) < 1:
        began = perf_counter()
        for group in optimizer.param_groups:
            cosine = 1e-4 + 0.5 * (1 + math.cos(math.pi * done)) * 9e-4
            group["lr"] = min(cosine, 1e-3 * (step + 1) / 101)
        ids, targets = data.train.random_batch(12, 64, (1, step))
        model(ids, targets.contiguous())[1].backward()  # its loss calls view
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        spent += perf_counter() - began
        if spent >= mark:
            curve.append(
                (spent, step, judge(lambda x, y: model(x, y.contiguous())[1], data, 64))
            )
            mark += 10
    return [
        *curve,
        (spent, step, judge(lambda x, y: model(x, y.contiguous())[1], data, 64)),
    ]


def read(path: Path) -> TokenData:
    """The characters of a text: the first 90 % to train on."""
    text = path.read_text("utf-8")
    ids_of = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([ids_of[character] for character in text])
    cut = int(0.9 * len(ids))
    return TokenData.of(ids[:cut], ids[cut:], len(ids_of))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--nanogpt", required=True, help="a checkout of karpathy/nanoGPT"
    )
    parser.add_argument("--steps", type=int, default=2000, help="of nanoGPT")
    parser.add_argument("--seconds", type=float, help="train nanoGPT so long, too")
    parser.add_argument("--ours", type=float, default=60, help="seconds of ours")
    parser.add_argument(
        "--write", action="store_true", help="README.md, time_to_loss.json"
    )
    options = parser.parse_args()
    sys.path.insert(0, options.nanogpt)
    here, data, curves = machine(), read(options.text), {}
    # nanoGPT first: it gets the allocator as it comes.
    curves[f"nanoGPT, {options.steps:,} steps"] = nanogpt(data, options.steps, None)
    if options.seconds:
        name = f"nanoGPT, {options.seconds:.0f} s"
        curves[name] = nanogpt(data, None, options.seconds)
    keep_freed_memory()
    curves[f"glassgpt modern, {options.ours:.0f} s"] = ours(data, options.ours)
    rows = [
        f"Validation loss in nats a character, one seed, {here['date']}, "
        f"{here['processor']}, {here['threads']} threads, torch {here['torch']}.",
        "",
        "| run | seconds | steps | loss |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, curve in curves.items():
        seconds, steps, loss = curve[-1]
        rows.append(f"| {name} | {seconds:.0f} | {steps:,} | {loss:.3f} |")
    print("\n".join(rows))
    if options.write:
        write_section("time to loss", "\n".join(rows))
        path = Path(__file__).resolve().parent.parent / "book/runs/time_to_loss.json"
        content = {"machine": here, "curves": curves}
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
