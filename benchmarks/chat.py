"""Answers only, or everything? Fine-tune the small model both ways, three seeds each.

    python benchmarks/chat.py [STEPS]        writes book/runs/chat.json

Both are judged alike, by the mean surprise at held-out answers. Ten minutes on two
cores. It needs `pip install 'glassgpt[chat]'`.
"""

import json
import sys
from pathlib import Path

import torch

import glassgpt
from glassgpt.chat import Packed, chat_loss, chatterbot, chitchat, pack, render
from glassgpt.data import TokenData

SEEDS, EVERY = 3, 20


def length(talk):
    """The characters of a conversation."""
    return sum(len(turn["content"]) for turn in talk)


def rows(talks, tokenizer, everything=False):
    """Packed conversations, of which answers are learned, or everything."""
    rendered = [render(talk, tokenizer) for talk in talks]
    if everything:
        rendered = [(ids, [True] * len(ids)) for ids, _ in rendered]
    return Packed(*pack(rendered, 256, tokenizer.special_tokens["<|endoftext|>"]))


def main():
    """Train each way with each seed and write down the losses."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 120
    model, tokenizer = glassgpt.add_roles(*glassgpt.load("shakespeare"))
    short = [talk for talk in chatterbot() if length(talk) <= 400]
    openings = [talk[:4] for talk in chitchat() if 40 < length(talk[:4]) <= 200][:300]
    taught = [talk for n, talk in enumerate(short) if n % 10 != 9] + openings
    held_out = rows(short[9::10], tokenizer)
    record = {"steps": list(range(0, steps + 1, EVERY)), "torch": torch.__version__}
    for name in ("answers", "everything"):
        data = rows(taught, tokenizer, name == "everything")
        data = TokenData(data, held_out, tokenizer.vocab_size, "")
        record[name] = []
        for seed in range(SEEDS):
            student, _ = glassgpt.add_roles(model, tokenizer)
            config = glassgpt.TrainConfig(
                steps=steps,
                batch_size=16,
                learning_rate=2e-3,
                warmup=10,
                evaluate_every=EVERY,
                seed=seed,
            )
            loss = chat_loss(student, tokenizer.special_tokens["<|endoftext|>"])
            trainer = glassgpt.Trainer(student, data, config, loss=loss)
            trainer.evaluate()
            losses = [r["validation_loss"] for r in glassgpt.train(trainer)]
            record[name].append(
                {"seed": seed, "answers": [round(x, 4) for x in losses]}
            )
            print(name, seed, losses)
    path = Path(__file__).parent.parent / "book" / "runs" / "chat.json"
    path.write_text(json.dumps({"masks": record}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
