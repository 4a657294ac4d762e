"""The questions of chapter 20 through EleutherAI's lm-evaluation-harness.

    python benchmarks/harness.py

The shipped model on lines of the plays, as transformers loads what glassgpt.save
writes: `acc` and `acc_norm` of the harness must be the accuracies of
`evaluate_choices` by "sum" and by "character". A minute on one core. They
go into src/glassgpt/records/evaluation.json. It needs `pip install lm-eval`, which the
book doesn't, beside glassgpt[hub,shakespeare].
"""

import json
import tempfile
from pathlib import Path

import lm_eval
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

import glassgpt
from glassgpt.evaluation import TASKS, evaluate_choices

RECORD = Path(glassgpt.__file__).parent / "records" / "evaluation.json"


def by_harness(folder, questions):
    """acc and acc_norm of a saved model."""
    rows = folder / "questions.jsonl"
    texts = [
        {"prompt": q.prompt, "choices": [choice.strip() for choice in q.choices]}
        for q in questions
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts), "utf-8")
    task = {
        "task": "glass",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    found = simple_evaluate(model, tasks=[task], bootstrap_iters=0)["results"]["glass"]
    return {name: found[f"{name},none"] for name in ("acc", "acc_norm")}


def main():
    """Compare, and write the numbers into the record."""
    torch.set_num_threads(1)
    model, tokenizer = glassgpt.load("shakespeare")
    questions = TASKS["endings"]().questions
    found = {"version": lm_eval.__version__}
    with tempfile.TemporaryDirectory() as folder:
        glassgpt.save(folder, model, tokenizer)
        theirs = by_harness(Path(folder), questions)
    for name, way in (("acc", "sum"), ("acc_norm", "character")):
        ours = sum(evaluate_choices(model, tokenizer, questions, way)) / 300
        found[name] = {"ours": round(ours, 4), "harness": round(theirs[name], 4)}
    print(found, flush=True)
    record = json.loads(RECORD.read_text("utf-8"))
    record["harness"] = found
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
