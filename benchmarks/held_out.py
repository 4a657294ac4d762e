"""How far the yardstick of chapter 11 depends on which plays are held out.

    python benchmarks/held_out.py

Each play is left out in turn and predicted from the 37 others by the chapter's table of
counts, with k = 40 and with 10. Then its kin is left out, too, or as many plays that
are no histories. That takes half a minute on one core.

`python benchmarks/held_out.py gpt` asks what a GPT gains from near-copies of a test.
The Shakespeare model goes on learning for 40 steps, from 50,000 characters it has read
and as many of other plays that it has read (the control), of *Macbeth*, or of *Macbeth*
with words replaced as in the chapter. Its loss there is measured, with three seeds, and
that of the chapter's table on the same characters. Some minutes on one core.

Both write into book/runs/held_out.json.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

import glassgpt
from glassgpt.data import TokenData, shakespeare, split_documents
from glassgpt.training import TrainConfig, Trainer, evaluate, train

BOOK = Path(__file__).parent.parent / "book"
RECORD = BOOK / "runs" / "held_out.json"
KIN = {
    "henry-vi-part-3": ["henry-vi-part-1", "henry-vi-part-2", "richard-iii"],
    "richard-ii": ["henry-iv-part-1", "henry-iv-part-2"],
}
HISTORIES = ("henry-", "richard-", "king-john", "edward-")


def names_of(cell_id, **names):
    """The names of a cell of the chapter."""
    chapter = json.loads((BOOK / "11_data.ipynb").read_text("utf-8"))
    (cell,) = (cell for cell in chapter["cells"] if cell["id"] == cell_id)
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


def left_out():
    """What each play costs the table of counts that has read the others."""
    texts = {play.name: play.text for play in shakespeare()}
    alphabet = sorted(set("".join(texts.values())))
    names = names_of("count-model", np=np, alphabet=alphabet)
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
    return record


def learned(text, test, seed):
    """The Shakespeare model's nats a character on a test, after 40 steps on a text."""
    model, tokenizer = glassgpt.load("shakespeare")
    model.requires_grad_(True)
    ids = tokenizer.encode(test)
    data = TokenData.of(tokenizer.encode(text), ids, tokenizer.vocab_size)
    config = TrainConfig(
        steps=40,
        batch_size=8,
        learning_rate=1e-3,
        warmup=5,
        evaluate_every=100,
        seed=seed,
    )
    train(Trainer(model, data, config), progress=False)
    # As many crops as fit.
    return evaluate(model, data.validation, len(ids)) * len(ids) / len(test)


def leaks_of_a_gpt(characters=50_000, seeds=3):
    """What is left of a copy's leak in near-copies, for a GPT and for the table."""
    torch.set_num_threads(1)
    documents = shakespeare()
    alphabet = sorted(set("".join(play.text for play in documents)))
    parts = [(side, play.text) for side, play in split_documents(documents)]
    training = "".join(text for side, text in parts if side == "train")
    macbeth = next(play.text for play in documents if play.name == "macbeth")
    macbeth = macbeth[:characters]
    cell = names_of("runs-of-words", np=np, re=re, training=training, macbeth=macbeth)
    table = names_of("count-model", np=np, alphabet=alphabet)
    texts = {
        "other plays": training[characters : 2 * characters],
        "a copy": macbeth,
        "10% replaced": cell["spoiled"](0.1),
        "50% replaced": cell["spoiled"](0.5),
    }
    found = {"gpt": {}, "table": {}}
    for name, text in texts.items():
        read = training[:characters] + text
        losses = [learned(read, macbeth, seed) for seed in range(seeds)]
        found["gpt"][name] = [round(loss, 4) for loss in losses]
        counts = table["table_of"](training + text)
        loss = table["count_model"](counts, macbeth)[-1]
        found["table"][name] = round(float(loss), 4)
        print(name, found["gpt"][name], found["table"][name], flush=True)
    return found


def main(parts):
    """Measure, and write what is new into the record."""
    record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    if "plays" in parts:
        record |= left_out()
    if "gpt" in parts:
        record["near-copies"] = leaks_of_a_gpt()
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print(json.dumps({**record, "losses": ""}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:] or ["plays"])
