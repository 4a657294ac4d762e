"""From GPT-2 to a recipe of today, one change at a time, at equal steps.

    python benchmarks/ladder.py --write

Every rung trains the same sizes on the plays, characters, with the same batches,
learning rate and number of steps, in bfloat16 and without compiling. One seed a rung:
small differences mean nothing. `--write` puts the numbers into book/runs/ladder.json,
from which chapter 15 draws, and a table into README.md beside this file.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from training import machine, write_section

from glassgpt.data import TokenData, shakespeare, tokenize
from glassgpt.modern import GPT2_CHOICES, ModernConfig, ModernGPT
from glassgpt.speed import keep_freed_memory
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, train

# Each rung adds to those above it: changes of the model, and of the training.
RUNGS = {
    "GPT-2, AdamW": ({}, {}),
    "rotary positions": ({"positions": "rotary"}, {}),
    "RMS norm, no biases": ({"norm": "rms", "bias": False}, {}),
    "normalized queries and keys": ({"normalize_qk": True}, {}),
    "squared ReLU": ({"activation": "squared_relu"}, {}),
    "projections start at zero, own head": (
        {"zero_projections": True, "tied": False},
        {},
    ),
    "Muon": ({}, {"optimizer": "muon"}),
}
SIZES = {"context": 128, "layers": 4, "heads": 4, "width": 128}


def climb(data: TokenData, steps: int, seed: int) -> list[dict[str, object]]:
    """Train every rung and return its losses in nats a character."""
    model_values, training_values, rungs = dict(GPT2_CHOICES), {}, []
    for name, (model_change, training_change) in RUNGS.items():
        model_values |= model_change
        training_values |= training_change
        torch.manual_seed(seed)
        model = ModernGPT(ModernConfig(data.vocab_size, **SIZES, **model_values))
        config = TrainConfig(
            steps=steps,
            batch_size=16,
            schedule="linear",
            final_rate=0.0,
            precision="bfloat16",
            evaluate_every=steps // 4,
            evaluation_batches=40,
            seed=seed,
            **training_values,
        )
        run = train(model, data, config, progress=False)
        rungs.append(
            {
                "name": name,
                "steps": [r["step"] for r in run.records],
                "losses": [round(r["validation_loss"], 4) for r in run.records],
            }
        )
        print(
            f"{name:40}{rungs[-1]['losses'][-1]:7.3f}{run.seconds:7.0f} s", flush=True
        )
    return rungs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    here = machine() | {
        "command": f"python benchmarks/ladder.py --steps {options.steps}"
    }
    tokenizer = CharTokenizer.train("".join(p.text) for p in shakespeare())
    with tempfile.TemporaryDirectory() as folder:
        data = tokenize("shakespeare", tokenizer, Path(folder) / "data")
        rungs = climb(data, options.steps, options.seed)
    if not options.write:
        return
    runs = Path(__file__).resolve().parent.parent / "book" / "runs"
    runs.mkdir(exist_ok=True)
    content = {"machine": here, "sizes": SIZES, "batch_size": 16, "rungs": rungs}
    (runs / "ladder.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    rows = [
        f"Validation loss in nats a character after {options.steps} steps of 16 x 128 "
        f"characters of the plays, one seed, {here['date']}, {here['processor']}, "
        f"torch {here['torch']}. Each rung adds to those above it.",
        "",
        "| added | loss |",
        "| --- | ---: |",
    ]
    rows += [f"| {r['name']} | {r['losses'][-1]:.3f} |" for r in rungs]
    write_section("ladder", "\n".join(rows))


if __name__ == "__main__":
    main()
