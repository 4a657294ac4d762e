"""How well a plan predicts the time of a step: estimates beside measured steps.

    python benchmarks/estimates.py            # print
    python benchmarks/estimates.py --write    # also into README.md

One thread; times are those of the processor, not of the clock, so that other programs
disturb less. A step is a whole one of a `Trainer`: batch, forward, backward, clipping
and the optimizer; the shortest of several counts. The speed of the products, from which
a plan predicts, is measured beside each in the same way.
"""

import argparse
import os
import platform
import re
from datetime import date
from pathlib import Path
from time import process_time

import numpy as np
import torch

from glassgpt.data import TokenData
from glassgpt.device import SIZES, Machine, Plan, measure_flops
from glassgpt.gpt import GPTConfig
from glassgpt.modern import ModernConfig, MuonConfig
from glassgpt.training import TrainConfig

ROOT = Path(__file__).resolve().parent
EAGER = [("micro", 64, 4), ("micro", 64, 16), ("micro", 64, 32), ("micro", 256, 16)]
EAGER += [("mini", 64, 4), ("mini", 64, 16), ("mini", 256, 8)]
RUNS = [
    (*shape, precision, "off", "gpt2", "adamw")
    for precision in ("float32", "bfloat16")
    for shape in EAGER
]
RUNS += [
    ("micro", 64, 16, "bfloat16", "off", "gpt2", "muon"),
    ("micro", 64, 16, "bfloat16", "off", "modern", "muon"),
    ("mini", 256, 8, "float32", "off", "gpt2", "muon"),
    ("mini", 256, 8, "bfloat16", "off", "modern", "adamw"),
    ("micro", 64, 16, "bfloat16", "all", "gpt2", "adamw"),
    ("mini", 256, 8, "bfloat16", "all", "gpt2", "adamw"),
    ("micro", 64, 16, "float32", "all", "gpt2", "adamw"),
    ("micro", 64, 16, "bfloat16", "blocks", "gpt2", "adamw"),
]


def measured(
    size: str, context: int, batch: int, precision: str, scope: str, kind: str, by: str
) -> dict[str, object]:
    """One row: what a plan says of a step, and what it took."""
    torch.compiler.reset()
    layers, heads, width = SIZES[size]
    config = ModernConfig if kind == "modern" else GPTConfig
    model = config(512, context=context, layers=layers, heads=heads, width=width)
    settings = {"steps": 1, "batch_size": batch, "evaluate_every": 2}
    training = MuonConfig(**settings) if by == "muon" else TrainConfig(**settings)
    machine = Machine("cpu", precision, scope)
    ids = np.random.default_rng(0).integers(512, size=50_000)
    data = TokenData.of(ids[:40_000], ids[40_000:], 512)
    peak = measure_flops.__wrapped__(torch.device("cpu"), machine.dtype)
    plan = Plan(model, training, machine, peak)
    trainer, steps = plan.trainer(data), []
    for _ in range(8 if size == "micro" else 5):
        began = process_time()
        trainer.take_step()
        steps.append(process_time() - began)
    how = precision if scope == "off" else f"{precision}, compiled ({scope})"
    name = f"{size}, {batch} x {context}, {how}, {kind}, {by}"
    return {"name": name, "seconds": min(steps[1:]), "estimate": plan.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from glassgpt import device

    device.time.perf_counter = process_time  # products are timed like the steps
    rows = []
    for run in RUNS:
        rows.append(measured(*run))
        seconds, estimate = rows[-1]["seconds"], rows[-1]["estimate"]
        print(f"{rows[-1]['name']:55}{seconds:8.4f} s  x {estimate / seconds:.2f}")
    if not options.write:
        return
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    found = re.search(r"model name\s*: (.*)", text)
    processor = found[1] if found else platform.processor()
    table = [
        f"One thread of an {processor}, {date.today()}, torch "
        f"{torch.__version__}: the shortest of several steps, in processor time, and "
        "the estimate of the plan divided by it.",
        "",
        "| step | milliseconds | estimate |",
        "| --- | ---: | ---: |",
    ]
    for row in rows:
        ratio = row["estimate"] / row["seconds"]
        table.append(f"| {row['name']} | {row['seconds'] * 1e3:.0f} | x {ratio:.2f} |")
    readme = ROOT / "README.md"
    begin, end = "<!-- estimates -->\n", "\n<!-- end of estimates -->"
    before, rest = readme.read_text().split(begin)
    after = rest.split(end)[1] if end in rest else rest.split(end.strip())[1]
    readme.write_text(before + begin + "\n".join(table) + end + after)


if __name__ == "__main__":
    main()
