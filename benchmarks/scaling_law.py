"""Losses of small GPTs by size and tokens, at four budgets of FLOPs and a fifth.

    python benchmarks/scaling_law.py --write    # about fourteen minutes on one thread

Every run trains a GPT of chapter 14's recipe on the plays, characters, in 32 bits and
without compiling, through a schedule that ends at zero. At each budget five sizes are
trained on as many tokens as the budget pays for, and three runs are made with more
seeds. `--write` puts the runs into book/runs/scaling.json. A run that is in --folder
already is not made again.
"""

import argparse
import json
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import torch
from training import machine

from glassgpt.data import TokenData, shakespeare, tokenize
from glassgpt.modern import ModernConfig, ModernGPT, MuonConfig, muon_optimizers
from glassgpt.plan import Machine, make_loss
from glassgpt.quantization import keep_freed_memory
from glassgpt.tokens import CharTokenizer
from glassgpt.training import Trainer, train

CONTEXT, BATCH = 128, 16
SIZES = [(2, 2, 24), (2, 2, 32), (3, 3, 48), (4, 4, 64)]  # layers, heads, width
SIZES += [(4, 4, 96), (4, 4, 128), (6, 6, 192)]
BUDGETS = {1e11: SIZES[:5], 3e11: SIZES[:5], 1e12: SIZES[1:6], 3e12: SIZES[2:7]}
BUDGETS[1e13] = SIZES[4:5]  # not fitted
# Runs that are made with more seeds: how much is chance?
AGAIN = [(1e11, SIZES[0], seed) for seed in range(1, 5)]
AGAIN += [(1e11, SIZES[1], seed) for seed in range(1, 9)] + [(1e12, SIZES[3], 1)]


def config_of(vocab_size: int, layers: int, heads: int, width: int) -> ModernConfig:
    """The recipe at one size."""
    return ModernConfig(vocab_size, CONTEXT, layers, heads, width)


def steps_for(flops: float, flops_per_token: int) -> int:
    """How many steps a budget pays for."""
    return round(flops / flops_per_token / (BATCH * CONTEXT))


def one_run(
    data: TokenData, size: tuple[int, int, int], flops: float, seed: int = 0
) -> dict[str, Any]:
    """Train one size with one budget."""
    torch.manual_seed(seed)
    model = ModernGPT(config_of(data.vocab_size, *size))
    steps = steps_for(flops, model.flops_per_token())
    config = MuonConfig(
        steps=steps,
        batch_size=BATCH,
        learning_rate=0.8 / model.config.width,
        warmup=min(50, steps // 10),
        evaluate_every=steps,
        evaluation_crops=256,
        seed=seed,
    )
    began = process_time()
    optimizers = muon_optimizers(model, config)
    trainer = Trainer(model, data, config, optimizers, make_loss(model, Machine()))
    loss = train(trainer, progress=False)[-1]["validation_loss"]
    layers, heads, width = size
    return {
        "budget": flops,
        "layers": layers,
        "heads": heads,
        "width": width,
        "seed": seed,
        "steps": steps,
        "tokens": steps * BATCH * CONTEXT,
        "parameters": model.parameter_count(),
        "in_blocks": sum(p.numel() for p in model.blocks.parameters()),
        "flops_per_token": model.flops_per_token(),
        "loss": round(loss, 4),
        "seconds": round(process_time() - began, 1),
    }


def main() -> None:
    """Make the runs that are missing, and write all of them down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", default=Path(tempfile.gettempdir(), "scaling-law"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    keep_freed_memory()
    plays = shakespeare()
    tokenizer = CharTokenizer.train(play.text for play in plays)
    with tempfile.TemporaryDirectory() as place:
        data = tokenize("shakespeare", tokenizer, Path(place, "tokens"), progress=False)
        path = folder / "runs.json"
        runs = json.loads(path.read_text()) if path.exists() else []
        made = {(run["budget"], run["width"], run["seed"]) for run in runs}
        once = [(flops, size, 0) for flops in BUDGETS for size in BUDGETS[flops]]
        for flops, size, seed in once + AGAIN:
            if (flops, size[-1], seed) not in made:
                runs.append(run := one_run(data, size, flops, seed))
                path.write_text(json.dumps(runs))
                print(run, flush=True)
        facts = {"vocab_size": data.vocab_size, "context": CONTEXT, "batch_size": BATCH}
        facts |= {"train_tokens": len(data.train), "fingerprint": data.fingerprint}
    if arguments.write:
        here = {k: v for k, v in machine().items() if "GFLOP" not in k}
        here |= {"threads": 1, "command": "python benchmarks/scaling_law.py --write"}
        target = Path(__file__).resolve().parents[1] / "book/runs/scaling.json"
        content = {"machine": here, **facts}
        content["runs"] = [run for run in runs if run["seed"] == 0]
        content["other_seeds"] = {"runs": [run for run in runs if run["seed"]]}
        target.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
