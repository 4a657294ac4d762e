"""Generation with one prompt against transformers, side by side in one run.

    python benchmarks/generation.py
    python benchmarks/generation.py --rounds 5 --tokens 256 --threads 2

Needs `pip install transformers`. All models have GPT-2's size (124 M) and random
weights; each continues the same prompt greedily, with its cache. In every round every
candidate runs once, so that a slow moment of the machine hits all of them. The table
has medians. "Share of the limit" compares the weights that a token reads with what this
machine's memory delivered in a plain read in the same run; caches and activations are
not counted. "Share of the products" compares a token's time with that of its linear
layers alone, one after the other: the rest is Python and small operations. Peak memory
is that of a process that runs this candidate alone, with what it needs to load and
build the model. Writes benchmarks/generation.md.
"""

import argparse
import platform
import re
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch

from glassgpt.generation import generate
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.quantization import quantize, quantized_layer

PROMPT = [64, 29350, 412, 733, 417, 10580, 318, 257]
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
MATRICES = 12 * 12 * 768 * 768 + 50_257 * 768  # numbers that one token reads


def make_ours(weights: str, tokens: int) -> Callable[[], int]:
    """A function that generates with glassgpt and returns the number of tokens."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(50_257)).eval()
    if weights != "float32":
        model = quantize(model, weights)
    return lambda: len(generate(model, PROMPT, tokens, top_k=1)) - len(PROMPT)


def make_theirs(weights: str, tokens: int, cache: str | None) -> Callable[[], int]:
    """The same with `transformers`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(getattr(torch, weights))
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0}
    settings |= {"max_new_tokens": tokens, "min_new_tokens": tokens}
    if cache:
        settings["cache_implementation"] = cache
    ids = torch.tensor([PROMPT])
    mask = torch.ones_like(ids)

    @torch.inference_mode()
    def run() -> int:
        found = model.generate(ids, attention_mask=mask, **settings)
        return found.shape[1] - len(PROMPT)

    return run


def make(name: str, tokens: int) -> Callable[[], int]:
    """The candidate of this name, such as "glassgpt int8"."""
    library, weights, *cache = name.split()
    if library == "glassgpt":
        return make_ours(weights, tokens)
    return make_theirs(weights, tokens, cache[0] if cache else None)


STATIC = "transformers float32 static"
NAMES = [
    "transformers float32",
    "transformers bfloat16",
    "transformers float16",
    "glassgpt float32",
    "glassgpt bfloat16",
    "glassgpt float16",
    "glassgpt int8",
]


def read_speed() -> float:
    """Bytes a second that a plain read of half a gigabyte delivers."""
    block = torch.ones(1 << 27)
    times = []
    for _ in range(7):
        start = perf_counter()
        block.sum()
        times.append(perf_counter() - start)
    return block.numel() * 4 / statistics.median(times)


@torch.inference_mode()
def products(weights: str, rounds: int) -> float:
    """Median seconds that all linear layers of one token take, and nothing else."""
    sizes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)] * 12 + [(768, 50_257)]
    layers = [torch.nn.Linear(*size, bias=False) for size in sizes]
    if weights != "float32":
        layers = [quantized_layer(layer, weights) for layer in layers]
    rows = [torch.ones(1, width) for width, _ in sizes]
    times = []
    for _ in range(rounds):
        start = perf_counter()
        for layer, row in zip(layers, rows, strict=True):
            layer(row)
        times.append(perf_counter() - start)
    return statistics.median(times)


def peak_memory(name: str, options: argparse.Namespace) -> float:
    """Peak memory in MB of a process of its own that generates 32 tokens."""
    command = [sys.executable, __file__, "--alone", name, "--tokens", "32"]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def processor() -> str:
    """The name of the processor, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def measure(
    options: argparse.Namespace,
) -> tuple[dict[str, list[float]], list[float], dict[str, list[float]]]:
    """Tokens a second of each candidate in each round, and two limits.

    The speed of memory, and the seconds that a token's products take.
    """
    names = NAMES + [STATIC] * options.static
    candidates = {name: make(name, options.tokens) for name in names}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    reads, alone = [], {weights: [] for weights in DTYPES}
    for name in names:
        make(name, 4)()  # the first call of each kind warms up
    for number in range(options.rounds):
        reads.append(read_speed())
        for weights, seconds in alone.items():
            seconds.append(products(weights, 20))
        for name, run in candidates.items():
            start = perf_counter()
            count = run()
            speeds[name].append(count / (perf_counter() - start))
            if count != options.tokens:
                sys.exit(f"{name} wrote {count} tokens, not {options.tokens}")
            print(f"round {number} {name}: {speeds[name][-1]:.1f}", file=sys.stderr)
    return speeds, reads, alone


def report(options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    speeds, reads, alone = measure(options)
    median = {name: statistics.median(values) for name, values in speeds.items()}
    theirs = {name: value for name, value in median.items() if name.startswith("tr")}
    exact = {
        name: value for name, value in theirs.items() if "float16" not in name.split()
    }
    best, plain = max(theirs.values()), max(exact.values())
    read = statistics.median(reads)
    lines = [
        "# Generation, one prompt, GPT-2's size (124 M)",
        "",
        f"Written by `benchmarks/generation.py`. {processor()}, {options.threads} "
        f"threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {version('transformers')}. {options.tokens} tokens, greedy, "
        f"medians of {options.rounds} rounds; memory read at {read / 1e9:.1f} GB/s. "
        '"Without float16" compares with the best of transformers\' float32 and '
        "bfloat16 rows.",
        "",
        "| | tokens/s | slowest to fastest | to transformers' best | without float16 "
        "| share of the limit | share of the products | peak memory |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, value in median.items():
        library, weights = name.split()[:2]
        share = value * MATRICES * DTYPES[weights] / read
        ours = library == "glassgpt"  # transformers' products are other calls
        of_products = f"{value * statistics.median(alone[weights]):.0%}" if ours else ""
        spread = f"{min(speeds[name]):.1f} to {max(speeds[name]):.1f}"
        lines.append(
            f"| {name} | {value:.1f} | {spread} | x {value / best:.2f} "
            f"| x {value / plain:.2f} | {share:.0%} | {of_products} "
            f"| {peak_memory(name, options):.0f} MB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Read the command line, measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--static", action="store_true", help="also transformers' static cache"
    )
    parser.add_argument(
        "--alone", choices=[*NAMES, STATIC], help="run one and print its peak MB"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.alone:
        make(options.alone, options.tokens)()
        # Not getrusage: on Linux it counts the process that started this one, too.
        status = Path("/proc/self/status").read_text()
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
        return
    table = report(options)
    print(table)
    Path(__file__).with_suffix(".md").write_text(table)


if __name__ == "__main__":
    main()
