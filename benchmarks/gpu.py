"""GPT-2's smallest size on a GPU: glassgpt beside nanoGPT, tokens a second and MFU.

    python benchmarks/gpu.py --nanogpt DIR --peak 989e12      # karpathy/nanoGPT
    python benchmarks/gpu.py --nanogpt DIR --peak 989e12 --write
    python benchmarks/gpu.py --nanogpt DIR --peak 1e11 --device cpu --size micro \\
        --context 64 --batch-size 4 --steps 2          # tries the script without a GPU

A step is all that a step of a real run does, batch and clipping included, and every
tenth step the loss is read, as both programs do. Everything is compiled and in the
precision that suits the card. Each candidate has a process and the card to itself;
nanoGPT comes first and last, so that a card that slows down shows. Ten windows of
`--steps` steps are timed after a warm-up, the device waited for at both ends, and the
median counts. nanoGPT's vocabulary is 50,304, as in its train.py. The MFU divides
6 N + 12 L C T FLOPs a token, the same for all of GPT-2's architecture, by the data
sheet's `--peak` (989e12 for an H100). `--write` puts the table into README.md beside
this file and the numbers into book/runs/gpu.json.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from training import machine, write_section

from glassgpt.data import TokenData
from glassgpt.modern import GPT2_CHOICES, ModernConfig, MuonConfig
from glassgpt.plan import (
    SIZES,
    Machine,
    Plan,
    count,
    pick_device,
    pick_precision,
)
from glassgpt.training import TrainConfig

GPT2, ROUND = 50_257, 50_304  # GPT-2's vocabulary, and the next multiple of 64
PLAIN = {**GPT2_CHOICES, "bias": False}  # as nanoGPT has it
OURS = {
    "glassgpt GPT-2": (PLAIN, GPT2, TrainConfig),
    "glassgpt GPT-2, vocabulary 50,304": (PLAIN, ROUND, TrainConfig),
    "glassgpt modern, AdamW": ({}, ROUND, TrainConfig),
    "glassgpt modern, Muon": ({}, ROUND, MuonConfig),
}
NANOGPT = ("nanoGPT", "nanoGPT, again")
Step = Callable[[], float | None]


def config_of(name: str, options: argparse.Namespace) -> ModernConfig:
    """The model of a candidate; nanoGPT's counts as GPT-2."""
    choices, vocabulary, _ = OURS.get(name, (PLAIN, ROUND, TrainConfig))
    layers, heads, width = SIZES[options.size]
    sizes = {"layers": layers, "heads": heads, "width": width}
    return ModernConfig(vocabulary, context=options.context, **sizes, **choices)


def machine_of(options: argparse.Namespace) -> Machine:
    """The device, and the precision that suits it."""
    device = pick_device(options.device)
    return Machine(str(device), pick_precision(device), "all")


def our_step(name: str, options: argparse.Namespace, ids: np.ndarray) -> Step:
    """A step of glassgpt, as `train` makes it."""
    training = OURS[name][2](batch_size=options.batch_size, learning_rate=6e-4)
    plan = Plan(config_of(name, options), training, machine_of(options))
    trainer = plan.trainer(TokenData.of(ids, ids[:5000], GPT2))

    def step() -> float | None:
        trainer.take_step()
        return trainer.read_losses() if len(trainer.unread) == 10 else None

    return step


def nanogpt_step(options: argparse.Namespace, ids: np.ndarray) -> Step:
    """A step of nanoGPT, as its train.py makes it."""
    from model import GPT as NanoGPT
    from model import GPTConfig as NanoConfig

    device = pick_device(options.device)
    c, T = config_of("nanoGPT", options), options.context
    model = NanoGPT(NanoConfig(T, ROUND, c.layers, c.heads, c.width, 0.0, False))
    model.to(device)
    kind = getattr(torch, pick_precision(device))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    half = device.type == "cuda" and kind == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=half)
    net, done = torch.compile(model), [0]

    def batch() -> list[torch.Tensor]:
        places = torch.randint(len(ids) - T, (options.batch_size,)).tolist()
        parts = [
            torch.stack([torch.from_numpy(ids[i : i + T].astype(np.int64)) for i in at])
            for at in (places, [place + 1 for place in places])
        ]
        if device.type != "cuda":
            return parts
        return [x.pin_memory().to(device, non_blocking=True) for x in parts]

    def step() -> float | None:
        with torch.autocast(device.type, kind, enabled=kind != torch.float32):
            _, loss = net(*batch())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        done[0] += 1
        return loss.item() if done[0] % 10 == 0 else None

    return step


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def serve(pipe, name: str, options: argparse.Namespace) -> None:
    """A process that times one candidate: seconds of each window, peak memory."""
    sys.path.insert(0, options.nanogpt)
    device = pick_device(options.device)
    torch.manual_seed(0)
    ids = np.random.default_rng(0).integers(GPT2, size=2_000_000).astype(np.uint16)
    began = perf_counter()
    step = (
        nanogpt_step(options, ids) if name in NANOGPT else our_step(name, options, ids)
    )
    for _ in range(max(3, options.steps)):
        step()
    wait(device)
    print(f"{name}: ready in {perf_counter() - began:.0f} s", file=sys.stderr)
    seconds = []
    for _ in range(10):
        began = perf_counter()
        for _ in range(options.steps):
            step()
        wait(device)
        seconds.append(perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    pipe.send((seconds, peak / 1e9))


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second (median, slowest, fastest), MFU and peak memory."""
    context = get_context("spawn")
    pipe, end = context.Pipe()
    process = context.Process(target=serve, args=(end, name, options))
    process.start()
    end.close()
    seconds, memory = pipe.recv()
    process.join()
    tokens = options.steps * options.batch_size * options.context
    speed = tokens / statistics.median(seconds)
    _, flops = count(config_of(name, options))
    return {
        "tokens/s": speed,
        "slowest": tokens / max(seconds),
        "fastest": tokens / min(seconds),
        "MFU": speed * flops / options.peak,
        "GB": memory,
    }


def table(here: dict[str, object], rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table."""
    base = rows[NANOGPT[0]]["tokens/s"]
    lines = [
        f"Measured {here['date']} on {here['card']}, {here['precision']}, torch "
        f"{here['torch']}: {here['size']}, context {here['context']}, batch "
        f"{here['batch size']}, compiled.",
        "",
        "| | tokens/s | slowest to fastest | to nanoGPT | MFU | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['tokens/s']:,.0f} | {row['slowest']:,.0f} to "
            f"{row['fastest']:,.0f} | x {row['tokens/s'] / base:.2f} | "
            f"{row['MFU']:.0%} | {row['GB']:.1f} GB |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", required=True, help="a checkout of nanoGPT")
    parser.add_argument("--peak", type=float, required=True, help="FLOP a second")
    parser.add_argument("--device", help="default: the best one here")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="in a window")
    parser.add_argument("--write", action="store_true", help="README.md, gpu.json")
    options = parser.parse_args()
    device = pick_device(options.device)
    gpu = device.type == "cuda"
    here = machine() | {
        "card": torch.cuda.get_device_name(device) if gpu else "a CPU",
        "precision": pick_precision(device),
        "size": options.size,
        "context": options.context,
        "batch size": options.batch_size,
    }
    rows = {name: measure(name, options) for name in (NANOGPT[0], *OURS, NANOGPT[1])}
    text = table(here, rows)
    print(text)
    if options.write:
        write_section("gpu", text)
        path = Path(__file__).resolve().parent.parent / "book/runs/gpu.json"
        content = {"machine": here, "candidates": rows}
        path.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
