"""From GPT-2 to a recipe of today, one change at a time, at equal steps.

    python benchmarks/ladder.py            # about an hour on one thread; goes on where
    python benchmarks/ladder.py --write    # it stopped, from the file in --folder

Every rung trains the same sizes on the plays, characters, with the same batches and
number of steps, in 32 bits and without compiling. Its learning rate is its own: rates
that double from one to the next are tried with the first seed until the best one has a
worse one on both sides, and the other seeds are run with the best. A branch starts from
one rung and is left. `--write` puts the numbers into
book/runs/ladder.json, from which chapter 14 draws, and a table into README.md.
"""

import argparse
import json
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from training import machine, write_section

from glassgpt.data import TokenData, shakespeare, tokenize
from glassgpt.modern import (
    GPT2_CHOICES,
    LLAMA_CHOICES,
    ModernConfig,
    ModernGPT,
    MuonConfig,
    muon_optimizers,
)
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, Trainer, train

SIZES = {"context": 64, "layers": 4, "heads": 4, "width": 128}
BATCH, SEEDS = 16, (0, 1, 2)
CHANGES: dict[str, dict[str, Any]] = {  # each rung keeps those above it
    "GPT-2, AdamW": {},
    "rotary positions": {"positions": "rotary"},
    "RMS norm, no biases": {"norm": "rms", "norm_weight": False, "bias": False},
    "normalized queries and keys": {"normalize_qk": True},
    "squared ReLU": {"activation": "squared_relu"},
    "zero projections": {"zero_projections": True},
    "untied head": {"tied": False},
    "Muon": {"optimizer": "muon"},
}
BRANCHES: dict[str, tuple[str, dict[str, Any]]] = {  # from a rung, changed
    "SwiGLU": ("squared ReLU", {"activation": "swiglu"}),
    "2 key-value heads of 4": ("squared ReLU", {"key_value_heads": 2}),
    "Llama, AdamW": ("GPT-2, AdamW", {**LLAMA_CHOICES, **{
        "positions": "rotary", "norm": "rms", "bias": False, "tied": False}}),
    "GPT-2, Muon": ("GPT-2, AdamW", {"optimizer": "muon"}),
    "Muon, tied head": ("Muon", {"tied": True}),
    "1 key-value head of 4": ("squared ReLU", {"key_value_heads": 1}),
    "untied head, random start": ("zero projections", {
        "tied": False, "random_head": True}),
    "Muon, random start": ("Muon", {"zero_projections": False}),
}  # fmt: skip


def rungs() -> dict[str, tuple[str | None, dict[str, Any]]]:
    """The rung that each one starts from, and all its choices."""
    found: dict[str, tuple[str | None, dict[str, Any]]] = {}
    before, choices = None, dict(GPT2_CHOICES)
    for name, change in CHANGES.items():
        choices = choices | change
        found[name] = (before, choices)
        before = name
    for name, (start, change) in BRANCHES.items():
        found[name] = (start, found[start][1] | change)
    return found


def one_run(
    data: TokenData, choices: dict[str, Any], rate: float, steps: int, seed: int
) -> dict[str, Any]:
    """Train once. rate: of AdamW; Muon's own is 3.2 times as high."""
    model_values = dict(choices)
    muon = model_values.pop("optimizer", "adamw") == "muon"
    random_head = model_values.pop("random_head", False)
    torch.manual_seed(seed)
    model = ModernGPT(ModernConfig(data.vocab_size, **SIZES, **model_values))
    if random_head:
        torch.nn.init.normal_(model.head.weight, std=0.02)
    values = {
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": rate,
        "schedule": "linear",
        "warmup": steps // 10,
        "final_rate": 0.0,
        "evaluate_every": steps,
        "evaluation_crops": 640,
        "seed": seed,
    }
    if muon:
        config: TrainConfig = MuonConfig(**values, matrix_learning_rate=3.2 * rate)
        optimizers = muon_optimizers(model, config)
    else:
        config, optimizers = TrainConfig(**values), None
    began = perf_counter()
    trainer = Trainer(model, data, config, optimizers)
    try:
        loss = round(train(trainer, progress=False)[-1]["validation_loss"], 4)
    except FloatingPointError:  # it diverged
        loss = float("inf")
    return {
        "rate": rate,
        "seed": seed,
        "loss": loss,
        "seconds": round(perf_counter() - began),
        "parameters": model.parameter_count(),
    }


class Ladder:
    """The runs so far, kept in a file after each of them."""

    def __init__(self, path: Path, data: TokenData, steps: int):
        self.path, self.data, self.steps = path, data, steps
        self.runs = json.loads(path.read_text()) if path.exists() else {}

    def loss(self, name: str, choices: dict[str, Any], rate: float, seed: int) -> float:
        """The loss of a run, which is made unless it was made before."""
        runs = self.runs.setdefault(name, [])
        for run in runs:
            if (run["rate"], run["seed"]) == (rate, seed):
                return run["loss"]
        run = one_run(self.data, choices, rate, self.steps, seed)
        runs.append(run)
        self.path.write_text(json.dumps(self.runs))
        print(f"{name:32} rate {rate:.5f} seed {seed} {run['loss']:.4f}"
              f" {run['seconds']:4} s", flush=True)  # fmt: skip
        return run["loss"]

    def climb(self, name: str, choices: dict[str, Any], start: float) -> float:
        """Find the best rate of a rung, run the other seeds with it, and return it."""
        tried = {
            r: self.loss(name, choices, r, 0) for r in (start / 2, start, start * 2)
        }
        while (best := min(tried, key=tried.get)) in (min(tried), max(tried)):
            further = best / 2 if best == min(tried) else best * 2
            tried[further] = self.loss(name, choices, further, 0)
        for seed in SEEDS[1:]:
            self.loss(name, choices, best, seed)
        return best

    def result(self) -> list[dict[str, Any]]:
        """One entry for each rung: its best rate, the losses of its seeds, all runs."""
        entries = []
        for name, (before, choices) in rungs().items():
            runs = sorted(self.runs[name], key=lambda run: (run["rate"], run["seed"]))
            best = min((r for r in runs if r["seed"] == 0), key=lambda r: r["loss"])
            losses = [r["loss"] for r in runs if r["rate"] == best["rate"]]
            cache = choices.get("key_value_heads", SIZES["heads"]) / SIZES["heads"]
            entries.append(
                {
                    "name": name,
                    "from": before,
                    "branch": name in BRANCHES,
                    "parameters": best["parameters"],
                    "cache": cache,
                    "rate": best["rate"],
                    "losses": losses,
                    "tried": {r["rate"]: r["loss"] for r in runs if r["seed"] == 0},
                }
            )
        return entries


def write(ladder: Ladder, steps: int) -> None:
    """book/runs/ladder.json and the table in README.md.

    What was made later, on another day, has its date and engine added by hand.
    """
    here = machine() | {"command": f"python benchmarks/ladder.py --steps {steps}"}
    here = {key: value for key, value in here.items() if "GFLOP" not in key}
    entries = ladder.result()
    runs = Path(__file__).resolve().parent.parent / "book" / "runs"
    content = {
        "machine": here,
        "sizes": SIZES,
        "batch_size": BATCH,
        "steps": steps,
        "rungs": entries,
    }
    (runs / "ladder.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    rows = [
        f"Validation loss in nats a character after {steps} steps of {BATCH} x "
        f"{SIZES['context']} characters of the plays: the mean of {len(SEEDS)} seeds "
        "at the best of at least three learning rates, and the lowest and highest of "
        f"them. {here['date']}, {here['processor']}, one thread, torch "
        f"{here['torch']}. Each rung keeps the changes above it; a branch starts from "
        "the rung it names.",
        "",
        "| change | best rate | loss | lowest to highest |",
        "| --- | ---: | ---: | ---: |",
    ]
    for e in entries:
        name = f"{e['name']} (from: {e['from']})" if e["branch"] else e["name"]
        low, high = min(e["losses"]), max(e["losses"])
        mean = statistics.mean(e["losses"])
        rows.append(
            f"| {name} | {e['rate']:.4g} | {mean:.3f} | {low:.3f} to {high:.3f} |"
        )
    write_section("ladder", "\n".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=Path("ladder"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    tokenizer = CharTokenizer.train("".join(p.text for p in shakespeare()))
    folder = options.folder / "tokens"
    if not folder.exists():
        tokenize("shakespeare", tokenizer, folder)
    data = TokenData.open(folder)
    ladder = Ladder(options.folder / "runs.json", data, options.steps)
    best: dict[str | None, float] = {None: 0.008}
    for name, (before, choices) in rungs().items():
        best[name] = ladder.climb(name, choices, best[before])
    if options.write:
        write(ladder, options.steps)


if __name__ == "__main__":
    main()
