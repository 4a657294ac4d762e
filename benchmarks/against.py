"""The speed of this checkout beside that of another one, in one interleaved run.

    git worktree add /tmp/before COMMIT
    python benchmarks/against.py /tmp/before
    python benchmarks/against.py /tmp/before --cpu    # where others use the machine too

One process for each checkout sets everything up; then they work in turn, round by
round. Printed are the medians and the ratio before / now: 1.05 is five percent faster.
With --cpu each process has one thread, and its processor time counts.
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

# What each checkout runs. Old and new names differ; the sizes and the work do not.
WORKER = """
import sys, time, torch
from functools import partial
import glassgpt
from glassgpt import BPETokenizer, GPT, GPTConfig, ModernConfig, ModernGPT, TokenData
from glassgpt import TrainConfig, generate
from glassgpt.modern import MuonConfig
try:
    from glassgpt.plan import Machine, Plan
except ImportError:
    from glassgpt.device import Machine, Plan
    Plan = partial(Plan, peak_flops=1e12)
lighter = getattr(glassgpt, "quantize", None) or glassgpt.lighten
glassgpt.keep_freed_memory()
torch.set_num_threads(THREADS)
clock = time.perf_counter if THREADS > 1 else time.process_time
MICRO = dict(context=64, layers=4, heads=4, width=128)
MINI = dict(context=256, layers=6, heads=6, width=384)

def steps(make, config, sizes, count, **settings):
    torch.manual_seed(0)
    ids = torch.randint(1024, (100_000,)).tolist()
    data = TokenData.of(ids, ids[:5000], 1024)
    kind = {"muon": MuonConfig}.get(settings.pop("optimizer", ""), TrainConfig)
    training = kind(steps=10**6, batch_size=settings.pop("batch_size"))
    plan = Plan(config(1024, **sizes), training, Machine(**settings))
    trainer = plan.trainer(data)
    def run():
        for _ in range(count):
            trainer.take_step()
        trainer.unread.clear()
    return run

def writing(make, config, sizes, count, weights=None):
    torch.manual_seed(0)
    model = make(config(1024, **sizes)).eval()
    model = lighter(model, weights) if weights else model
    return lambda: generate(model, [1, 2, 3], count, top_k=1)

def bpe(work):
    text = " ".join(f"{n * n % 9973} word{n % 700} and" for n in range(60_000))
    if work == "train":
        return lambda: BPETokenizer.train([text], 1024)
    tokenizer = BPETokenizer.train([text], 1024)
    fresh = lambda: BPETokenizer(tokenizer.merges)
    return lambda: fresh().encode(text)

compiled = dict(compile="all", batch_size=16)
narrow = dict(compile="all", precision="bfloat16", optimizer="muon", batch_size=16)
mini = dict(compile="all", precision="bfloat16", batch_size=8)
gpt2, modern = (GPT, GPTConfig), (ModernGPT, ModernConfig)
CASES = {
    "train micro float32": lambda: steps(*gpt2, MICRO, 20, batch_size=16),
    "train micro float32 compiled": lambda: steps(*gpt2, MICRO, 20, **compiled),
    "train micro bfloat16 compiled Muon": lambda: steps(*gpt2, MICRO, 40, **narrow),
    "train modern micro, the same": lambda: steps(*modern, MICRO, 40, **narrow),
    "train mini bfloat16 compiled": lambda: steps(*gpt2, MINI, 3, **mini),
    "generate micro float32": lambda: writing(*gpt2, MICRO, 150),
    "generate modern micro float32": lambda: writing(*modern, MICRO, 150),
    "generate mini float32": lambda: writing(*gpt2, MINI, 100),
    "generate mini bfloat16": lambda: writing(*gpt2, MINI, 100, "bfloat16"),
    "generate mini int8": lambda: writing(*gpt2, MINI, 100, "int8"),
    "byte pairs train": lambda: bpe("train"),
    "byte pairs encode": lambda: bpe("encode"),
}
for line in sys.stdin:
    word, _, name = line.strip().partition(" ")
    if word == "make":
        run = CASES[name]()
        run(), run()
        print("made", flush=True)
    else:
        began = clock()
        run()
        print(clock() - began, flush=True)
"""


def worker(checkout: Path, threads: int) -> subprocess.Popen[str]:
    """A process that runs the package of a checkout with so many threads."""
    environment = os.environ | {"PYTHONPATH": str(checkout / "src")}
    return subprocess.Popen(
        [sys.executable, "-c", f"THREADS = {threads}\n{WORKER}"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str], word: str) -> str:
    """Send a worker a line and return its answer."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(word + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--only", default="", help="cases that hold this word")
    parser.add_argument("--cpu", action="store_true", help="one thread, its time")
    options = parser.parse_args()
    threads = 1 if options.cpu else 2
    here = Path(__file__).resolve().parent.parent
    places = {"before": options.before.resolve(), "now": here}
    workers = {key: worker(place, threads) for key, place in places.items()}
    names = [line.split('"')[1] for line in WORKER.splitlines() if line[:5] == '    "']
    print("| case | before, s | now, s | before / now |\n| --- | ---: | ---: | ---: |")
    for name in (name for name in names if options.only in name):
        for process in workers.values():
            assert ask(process, f"make {name}") == "made", name
        seconds: dict[str, list[float]] = {key: [] for key in workers}
        for _ in range(options.rounds):
            for key, process in workers.items():
                seconds[key].append(float(ask(process, "go")))
        before, now = (statistics.median(seconds[key]) for key in workers)
        print(f"| {name} | {before:.3f} | {now:.3f} | {before / now:.2f} |", flush=True)


if __name__ == "__main__":
    main()
