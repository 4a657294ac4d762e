"""How far the yardstick of chapter 11 depends on which plays are held out.

    python benchmarks/held_out.py

Each play is left out in turn and predicted from the 37 others by the chapter's table of
counts, with k = 40 and with 10. Then its kin is left out, too, or as many plays that
are no histories. It writes book/runs/held_out.json, in half a minute on one core.
"""

import json
from pathlib import Path

import numpy as np

from glassgpt.data import shakespeare

BOOK = Path(__file__).parent.parent / "book"
RECORD = BOOK / "runs" / "held_out.json"
KIN = {
    "henry-vi-part-3": ["henry-vi-part-1", "henry-vi-part-2", "richard-iii"],
    "richard-ii": ["henry-iv-part-1", "henry-iv-part-2"],
}
HISTORIES = ("henry-", "richard-", "king-john", "edward-")


def the_table(alphabet):
    """The names of the chapter's cell that counts."""
    chapter = json.loads((BOOK / "11_data.ipynb").read_text("utf-8"))
    (cell,) = (cell for cell in chapter["cells"] if cell["id"] == "count-model")
    names = {"np": np, "alphabet": alphabet}
    exec("".join(cell["source"]), names)
    return names


def spread(values):
    """Mean, standard deviation, and where the means of four plays lie in 95%."""
    random = np.random.default_rng(0)
    means = [random.choice(values, 4, replace=False).mean() for _ in range(10_000)]
    low, high = np.percentile(means, [2.5, 97.5])
    found = {"mean": np.mean(values), "deviation": np.std(values, ddof=1)}
    found |= {"lowest": min(values), "highest": max(values)}
    found |= {"of four": np.std(means), "2.5%": low, "97.5%": high}
    return {name: round(float(value), 4) for name, value in found.items()}


def main():
    """Measure, and write the record."""
    texts = {play.name: play.text for play in shakespeare()}
    names = the_table(sorted(set("".join(texts.values()))))
    runs = {name: names["grams"](text, 7) for name, text in texts.items()}

    def loss(name, without=(), **settings):
        left = [runs[other] for other in texts if other not in {name, *without}]
        table = np.sort(np.concatenate(left))
        return names["count_model"](table, texts[name], **settings)[-1]

    losses = {name: loss(name) for name in texts}
    changes = [loss(name, k=10.0) - losses[name] for name in texts]
    record = {
        "losses": {name: round(nats, 4) for name, nats in losses.items()},
        "loss": spread(list(losses.values())),
        "k = 10": spread(changes),
        "kin": {},
    }
    others = [name for name in texts if not name.startswith(HISTORIES)]
    for name, kin in KIN.items():
        random = np.random.default_rng(0)
        drawn = [random.choice(others, len(kin), replace=False) for _ in range(4)]
        record["kin"][name] = {
            "all others": round(losses[name], 4),
            "without kin": round(loss(name, kin), 4),
            "without as many": [round(loss(name, out), 4) for out in drawn],
        }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps({**record, "losses": ""}, indent=1))


if __name__ == "__main__":
    main()
