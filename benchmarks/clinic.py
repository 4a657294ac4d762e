"""Chapter 22's runs: every fault of the clinic, trained and examined.

    python benchmarks/clinic.py --write      # everything, about half an hour
    python benchmarks/clinic.py --jobs 2     # on two cores

Each run is a file in --folder, and one that is there is not made again. All faults are
trained with the seeds 3 and 4, on which the ranges of the examinations were chosen.
With 5 and 6, which nobody has tuned on, they are only examined, and the record says how
many of how many are diagnosed. `--write` puts all of it into
src/glassgpt/records/clinic.json.
"""

import argparse
import json
import math
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from time import process_time
from typing import Any

import torch

from glassgpt.clinic import (
    BEDS,
    EXAMINATIONS,
    FAULTS,
    NOTHING_FOUND,
    Patient,
    bed,
    chart,
    diagnose,
    examine,
    library,
    loss_of_counts,
)
from glassgpt.figures import fnv1a

TRAINED, UNTOUCHED = (3, 4), (5, 6)
BAND = tuple(range(10))  # healthy seeds
EDGE = tuple(range(6))  # healthy seeds at a rate of 0.01
SHOWN = ("healthy", "no_mask", "view_split", "view_both", "frozen_block")  # on the page
LONG = ("healthy", "view_both", "frozen_block", "no_positions")
RECIPE = [
    "width", "heads", "layers", "context", "rows", "steps", "peak", "warmup", "decay",
    "clip", "dropout",
]  # fmt: skip


# What the page says of each examination: its question, the unit of its number, what a
# number outside of the healthy range says, and how many digits are shown.
QUESTIONS = {
    "targets": (
        "Are the targets the inputs, one on?",
        "share equal",
        "targets are not the next tokens",
        2,
    ),
    "own_inputs": (
        "Are the targets the inputs themselves?",
        "share equal",
        "the model only has to copy",
        2,
    ),
    "distinct_rows": (
        "Are the rows of six batches all different?",
        "share different",
        "the same rows come again",
        2,
    ),
    "plays_seen": (
        "From how many plays do six batches come?",
        "plays",
        "batches are not drawn from all of the text",
        0,
    ),
    "known_lines": (
        "Do held-out lines stand in the training text?",
        "share found",
        "the held-out text leaks",
        2,
    ),
    "known_passages": (
        "Do whole held-out passages?",
        "share found",
        "held out and training text are one",
        2,
    ),
    "left_out": (
        "How many tensors has the optimizer not got?",
        "tensors",
        "a part is never trained",
        0,
    ),
    "tied_head": (
        "Is the head the table?",
        "1 if yes",
        "two tables where one is meant",
        0,
    ),
    "decaying_vectors": (
        "How many vectors decay?",
        "tensors",
        "biases and norms decay",
        0,
    ),
    "strongest_decay": ("How strong is the decay?", "", "weights are pulled to 0", 1),
    "highest_rate": (
        "Which rate is the highest?",
        "",
        "too high or too low to learn",
        5,
    ),
    "first_rate": ("How large is the first rate beside it?", "share", "no warm-up", 2),
    "first_loss": (
        "How far from ln V is the loss at step 0?",
        "nats",
        "it starts surer than it can be",
        2,
    ),
    "cut_future": (
        "Cut the future off: does the past change?",
        "of a deviation",
        "the model looks ahead",
        3,
    ),
    "changed_future": (
        "Change the future: does the past change?",
        "of a deviation",
        "the model reads ahead",
        3,
    ),
    "row_sums": (
        "To what do the rows of attention sum?",
        "farthest from 1",
        "the softmax runs over other things",
        2,
    ),
    "above_diagonal": (
        "How much weight lies above the diagonal?",
        "of a row",
        "the mask hides other things",
        2,
    ),
    "block_ledger": (
        "Is what leaves a block the sum of its parts?",
        "share missing",
        "something isn't added",
        3,
    ),
    "entering_size": (
        "What size has a number that enters attention?",
        "root mean square",
        "what enters isn't normalized",
        2,
    ),
    "score_slope": (
        "How do log weights grow with q k?",
        "slope",
        "scores are not divided by the root of D",
        2,
    ),
    "moved_text": (
        "Move the text by 7 places: does anything change?",
        "of a deviation",
        "the model knows no positions",
        2,
    ),
    "gradient_ratio": (
        "How long is the gradient beside our own?",
        "times",
        "another loss is learned from",
        4,
    ),
    "second_gradient": (
        "The same batch again: how long is the second gradient?",
        "times",
        "gradients of earlier steps stay",
        2,
    ),
    "float16_share": (
        "Which share of the gradient fits float16?",
        "share",
        "small gradients are lost",
        2,
    ),
    "clipped_norm": (
        "How long is the gradient after clipping?",
        "norm",
        "nearly nothing is left",
        4,
    ),
    "judged_twice": ("Judge twice: do the losses differ?", "nats", "dropout is on", 5),
    "mode_after": (
        "Is it in training mode after judging?",
        "1 if yes",
        "dropout stays off",
        0,
    ),
    "decoded": (
        "Does the sampler decode what the trainer encoded?",
        "share equal",
        "ids mean other letters",
        2,
    ),
    "cold_texts": (
        "How many texts come of six seeds, in the cold?",
        "texts",
        "the temperature does nothing",
        0,
    ),
    "cached_logits": (
        "Are logits from a cache those of one pass?",
        "of a deviation",
        "the cache remembers other things",
        3,
    ),
    "greedy_text": (
        "Does it write what it finds likeliest?",
        "share",
        "the wrong logits are read",
        2,
    ),
    "overfit": (
        "Can it learn eight crops by heart?",
        "nats",
        "the steps lead nowhere",
        2,
    ),
}

# And of each fault: its group and its title.
TITLES = {
    "healthy": ("none", "healthy"),
    "not_shifted": ("data", "targets are the inputs themselves"),
    "shifted_twice": ("data", "targets are shifted twice"),
    "same_batch": ("data", "every batch is the same"),
    "unshuffled": ("data", "batches in the order of text"),
    "near_copies": ("data", "held out, but copied"),
    "judged_on_training": ("data", "judged on training text"),
    "no_mask": ("attention", "no causal mask"),
    "mask_inverted": ("attention", "triu in place of tril"),
    "mask_after_softmax": ("attention", "masked after softmax"),
    "wrong_axis": ("attention", "softmax over the queries"),
    "no_scale": ("attention", "scores are not scaled"),
    "view_split": ("attention", "heads split by view"),
    "view_both": ("attention", "heads split and merged by view"),
    "no_residual": ("model", "attention isn't added"),
    "no_norm": ("model", "no layer norm"),
    "no_positions": ("model", "no positions"),
    "weights_x10": ("model", "weights start ten times larger"),
    "table_std_1": ("model", "table starts at 1"),
    "untied": ("model", "the head is not the table"),
    "frozen_block": ("step", "a block isn't trained"),
    "head_left_out": ("step", "head isn't trained"),
    "decay_everywhere": ("step", "biases and norms decay"),
    "decay_x1000": ("step", "decay of 100, not 0.1"),
    "not_cleared": ("step", "gradients are not cleared"),
    "loss_summed": ("step", "summed loss, not its mean"),
    "double_softmax": ("step", "softmax before the loss"),
    "half_gradients": ("step", "gradients in float16"),
    "clip_1e-3": ("step", "clipped at 0.001"),
    "rate_x100": ("step", "rate a hundred times too high"),
    "rate_div100": ("step", "rate a hundred times too low"),
    "rate_stuck_at_0": ("step", "rate stuck at 0"),
    "no_warmup_high": ("step", "no warm-up at 0.03"),
    "dropout_on": ("judging", "judged with dropout"),
    "never_train_again": ("judging", "no train() again"),
    "wrong_tokenizer": ("writing", "another tokenizer"),
    "cache_off_by_one": ("writing", "cache off by one"),
    "temperature_after": ("writing", "temperature after softmax"),
    "wrong_position": ("writing", "read at the wrong position"),
}


def jobs() -> list[tuple[str, int, str, dict[str, Any]]]:
    """(fault, seed, what is done, other parts) of every run."""
    found = [("healthy", s, "edge", {"peak": 1e-2}) for s in EDGE]
    found += [(name, seed, "train", {}) for seed in TRAINED for name in FAULTS]
    found += [("healthy", s, "train", {}) for s in BAND if s not in TRAINED]
    found += [(name, s, "examine", {}) for s in UNTOUCHED for name in FAULTS]
    found += [(name, 3, "long", {"steps": 1500}) for name in LONG]
    return found


def run(job: tuple[str, int, str, dict[str, Any]], folder: Path) -> None:
    """One run: its chart, its examinations, its diagnosis, and its seconds."""
    name, seed, what, more = job
    file = folder / f"{what}-{name}-{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    patient = Patient(seed, **FAULTS[name], **more)
    began, found = process_time(), {}
    if what != "examine":
        found["chart"] = chart(patient.train())
        found["seconds"] = round(process_time() - began, 1)
        text = patient.write("ROMEO:\n", 1000, seed=2)
        ids = torch.tensor(library().tokenizer.encode(text))
        found["fluency"] = round(loss_of_counts(4, ids), 3)
    if what != "long":
        asked: dict[str, float] = {}
        found["diagnosis"], found["asked"] = diagnose(patient, asked), list(asked)
        found["results"] = examine(patient)
    file.write_text(json.dumps(found), "utf-8")
    print(file.name, found.get("diagnosis"), flush=True)


def finite(value: Any) -> Any:
    """None in place of what JSON has no number for; few digits."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def ranges(rows: list[list[float]]) -> list[list[float]]:
    """The lowest and the highest of every column."""
    return [[min(column), max(column)] for column in zip(*rows, strict=True)]


def band(charts: list[dict[str, Any]]) -> dict[str, Any]:
    first = charts[0]
    found = {"steps": first["steps"], "held out steps": first["held out steps"]}
    for name in ("training", "held out", "positions", "entropy", "spread"):
        found[name] = ranges([each[name] for each in charts])
    found["norm"] = ranges([each["norm"]["all"] for each in charts])
    return found


def is_right(fault: str, diagnosis: str) -> bool:
    return diagnosis == (NOTHING_FOUND if fault == "healthy" else fault)


def put_together(folder: Path) -> dict[str, Any]:
    runs = {
        file.stem: json.loads(file.read_text("utf-8"))
        for file in sorted(folder.glob("*.json"))
    }
    examined: dict[str, dict[str, list[float]]] = {}
    diagnosed: dict[str, list[int]] = {}
    taken: list[str] = []
    asked: list[int] = []
    for name in FAULTS:
        for what, seeds in (("train", TRAINED), ("examine", UNTOUCHED)):
            for seed in seeds:
                found = runs[f"{what}-{name}-{seed}"]
                good = is_right(name, found["diagnosis"])
                count = diagnosed.setdefault(str(seed), [0, 0])
                count[0], count[1] = count[0] + good, count[1] + 1
                if not good:
                    taken.append(f"{name} with seed {seed}: {found['diagnosis']}")
                if seed in UNTOUCHED:
                    asked.append(len(found["asked"]))
                for each, value in found["results"].items():
                    examined.setdefault(name, {}).setdefault(each, []).append(value)
    for seed in BAND:
        for each, value in (
            runs.get(f"train-healthy-{seed}", {}).get("results", {}).items()
        ):
            examined["healthy"][each].append(value)
    expected = {
        name: {each: known_range(values) for each, values in numbers.items()}
        for name, numbers in examined.items()
    }
    patients = []
    for number in range(1, BEDS + 1):
        name, seed, parts = bed(number)
        what = "edge" if parts.get("peak") == 1e-2 else "train"
        found = runs[f"{what}-{name}-{seed}"]
        price = sum(EXAMINATIONS[each].price for each in found["asked"])
        patients.append(
            {
                "number": number,
                "seed": seed,
                "answer": fnv1a(f"{number}:{name}"),
                "price": price,
                "chart": found["chart"],
                "results": found["results"],
            }
        )
    healthy_seeds = [runs[f"train-healthy-{seed}"]["chart"] for seed in BAND]
    seconds = sum(found.get("seconds", 0) for found in runs.values())
    return {
        "about": {
            "command": "python benchmarks/clinic.py --write",
            "minutes": round(seconds / 60),
            "torch": torch.__version__.split("+")[0],
            "recipe": {name: getattr(Patient, name) for name in RECIPE},
        },
        "lines": {
            "ln V": math.log(library().tokenizer.vocab_size),
            **{
                name: loss_of_counts(length)
                for length, name in enumerate(("letters", "pairs", "triples"), 1)
            },
        },
        "band": band(healthy_seeds),
        "seeds": {
            "0.004": [each["held out"][-1] for each in healthy_seeds],
            "0.01": [runs[f"edge-healthy-{s}"]["chart"]["held out"][-1] for s in EDGE],
        },
        "examinations": [
            {
                "name": name,
                "title": QUESTIONS[name][0],
                "price": each.price,
                "healthy": [
                    limit if math.isfinite(limit) else None for limit in each.healthy
                ],
                "digits": QUESTIONS[name][3],
                "unit": QUESTIONS[name][1],
                "finds": QUESTIONS[name][2],
            }
            for name, each in EXAMINATIONS.items()
        ],
        "faults": [
            {
                "name": name,
                "group": TITLES[name][0],
                "title": TITLES[name][1],
                **{
                    key: [
                        runs[f"train-{name}-{seed}"]["chart"][key][-1]
                        for seed in TRAINED
                    ]
                    for key in ("training", "held out")
                },
                "fluency": [
                    runs[f"train-{name}-{seed}"]["fluency"] for seed in TRAINED
                ],
            }
            for name in FAULTS
        ],
        "expected": expected,
        "diagnosed": diagnosed,
        "taken": taken,
        "asked": {"mean": sum(asked) / len(asked), "most": max(asked)},
        "long": {
            name: {
                "fluency": runs[f"long-{name}-3"]["fluency"],
                "held out": runs[f"long-{name}-3"]["chart"]["held out"],
            }
            for name in LONG
        },
        "shown": {name: runs[f"train-{name}-3"]["chart"] for name in SHOWN},
        "patients": patients,
        "hard": [],
    }


def known_range(values: list[float]) -> list[float] | None:
    """The range of the numbers, a little wider unless they are all the same."""
    numbers = [value for value in values if math.isfinite(value)]
    if not numbers:
        return None
    low, high = min(numbers), max(numbers)
    more = 0.5 * (high - low)
    least = 0.0 if low >= 0 else -math.inf
    return [max(low - more, least), high + more]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "clinic"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--write", action="store_true", help="write the record")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs) as pool:
        for _ in pool.map(run, jobs(), [options.folder] * len(jobs())):
            pass
    record = finite(put_together(options.folder))
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False) + "\n"
    print({key: len(json.dumps(value)) for key, value in record.items()})
    print(record["diagnosed"], record["taken"], record["asked"], record["seeds"])
    if options.write:
        package = Path(__file__).parent.parent / "src" / "glassgpt"
        (package / "records" / "clinic.json").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
