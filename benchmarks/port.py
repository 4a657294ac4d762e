"""What a loss says about a port: appendix A4's wrong versions, on the book's model.

    python benchmarks/port.py

The right script and six wrong ones predict 2,040 tokens of a play that the model was
not trained on, in V8; the loss is compared with PyTorch's in float64. It writes
book/runs/port.json, in two minutes on one core, and needs the package mini-racer.
"""

import json
import re
from pathlib import Path

import torch
from py_mini_racer import MiniRacer

import glassgpt
from glassgpt.data import HELD_OUT_PLAYS, shakespeare
from glassgpt.publish import page_model

BOOK = Path(__file__).parent.parent / "book"
RECORD = BOOK / "runs" / "port.json"


def sources():
    """The chapter's cells by their ids."""
    chapter = json.loads((BOOK / "a4_publishing.ipynb").read_text("utf-8"))
    return {cell["id"]: "".join(cell["source"]) for cell in chapter["cells"]}


def main():
    """Measure, and write the record."""
    torch.set_num_threads(1)
    cells = sources()
    browser = re.search(r'BROWSER = r"""(.*?)"""', cells["engine"], re.DOTALL)[1]
    script = "\n".join(
        cell.partition("\n")[2]
        for cell in cells.values()
        if cell.startswith("%%javascript\n//| export page/gpt.js")
    )
    model, tokenizer = glassgpt.load("shakespeare")
    (play,) = (play for play in shakespeare() if play.name == HELD_OUT_PLAYS[0])
    ids = torch.tensor(tokenizer.encode(play.text[:12_000])[: 8 * 257]).view(8, 257)
    targets = ids[:, 1:-1, None]  # one place is left for positions that count from 1
    stored = json.dumps(page_model(model, tokenizer, "float32"))
    with torch.no_grad():
        single = model(ids[:, :-2]).double()
        exact = model.double()(ids[:, :-2])

    def losses(logits):
        return -logits.log_softmax(-1).gather(-1, targets)

    def differs(logits):
        off = logits - exact
        return {
            "rms": off.square().mean().sqrt().item(),
            "most": off.abs().max().item(),
        }

    namespace = {}
    exec(cells["wrong-versions"], namespace)
    edits = {"right": ("", ""), **namespace["EDITS"]}
    record = {"tokens": targets.numel(), "loss": losses(exact).mean().item()}
    record |= {"PyTorch in float32": differs(single), "versions": {}}
    each = "(id) => [...logits(model, gpt(model, id, cache))]"
    for name, (old, new) in edits.items():
        assert old in script
        engine = MiniRacer()
        engine.eval(browser + script.replace(old, new, 1 if old else 0))
        engine.eval(f"var model = openModel({stored}), cache")
        rows = []
        for row in ids[:, :-2].tolist():
            engine.eval("cache = newCache(model.config)")
            found = engine.eval(f"JSON.stringify({row}.map({each}))")
            rows.append(json.loads(found.replace("null", "NaN")))
        logits = torch.tensor(rows, dtype=torch.float64)
        change = losses(logits) - losses(exact)
        likeliest = logits.argmax(-1) != exact.argmax(-1)
        record["versions"][name] = {
            "change": change.mean().item(),
            "error": change.std().item() / change.numel() ** 0.5,
            "likeliest differs": likeliest.double().mean().item(),
            **differs(logits),
        }
        print(name, record["versions"][name], flush=True)
    record = json.loads(
        json.dumps(record), parse_float=lambda x: float(f"{float(x):.3g}")
    )
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
