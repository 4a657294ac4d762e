"""Training steps a second: glassgpt beside nanoGPT and transformers.

    python benchmarks/training.py --nanogpt DIR        # a checkout of karpathy/nanoGPT
    python benchmarks/training.py --nanogpt DIR --write

A step is all that a step of a real run does: it cuts a random batch from the data,
goes forward and backward, clips the gradient and lets the optimizer move the weights.
Ours is `Trainer.take_step`. Every candidate runs in two processes: one
with the C library's allocator as it is, and one in which `keep_freed_memory` was called
first. Each round runs all of them, one after the other, so that a slow moment of the
machine hits all alike; the tables show medians. Dropout is 0 and the data random ids:
only the time counts here. Linear layers have no bias, as nanoGPT's don't by default.
Peak memory is that of three steps in a process of its own, in the state that a user
gets: a peer's allocator as it comes, ours keeping memory. `--write` puts the tables
into README.md beside this file and the numbers into book/runs/speed.json, from which
chapter 15 draws.
"""

import argparse
import compileall
import contextlib
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

VOCABULARY = 65
SIZES = {
    "small": ({"layers": 4, "heads": 4, "width": 128, "context": 64}, 12, 30),
    "larger": ({"layers": 6, "heads": 6, "width": 384, "context": 256}, 8, 4),
}
_FAST = {"precision": "bfloat16", "compile": "all"}
OURS = {
    "glassgpt GPT-2, eager float32": ("gpt2", "adamw", {}),
    "glassgpt GPT-2, eager bfloat16": ("gpt2", "adamw", {"precision": "bfloat16"}),
    "glassgpt GPT-2, compiled float32": ("gpt2", "adamw", {"compile": "all"}),
    "glassgpt GPT-2, compiled bfloat16": ("gpt2", "adamw", _FAST),
    "glassgpt modern, compiled bfloat16, AdamW": ("modern", "adamw", _FAST),
    "glassgpt modern, compiled bfloat16, Muon": ("modern", "muon", _FAST),
}
PEERS = {
    "nanoGPT, its CPU recipe (eager float32)": ("nanogpt", False),
    "nanoGPT, compiled bfloat16, fused AdamW": ("nanogpt", True),
    "transformers GPT-2, eager float32": ("transformers", False),
    "transformers GPT-2, compiled bfloat16": ("transformers", True),
}
ROOT = Path(__file__).resolve().parent


def our_step(size: str, name: str) -> Callable[[], None]:
    """One step of glassgpt, imported here: a peer's memory is counted without it."""
    from glassgpt.data import TokenData
    from glassgpt.modern import GPT2_CHOICES, ModernConfig, MuonConfig
    from glassgpt.plan import Machine, Plan
    from glassgpt.training import TrainConfig

    sizes, batch_size, _ = SIZES[size]
    recipe, kind, machine = OURS[name]
    choices = {} if recipe == "modern" else {**GPT2_CHOICES, "bias": False}
    config = ModernConfig(VOCABULARY, **sizes, **choices)
    ids = np.random.default_rng(0).integers(VOCABULARY, size=200_000)
    data = TokenData.of(ids[:180_000], ids[180_000:], VOCABULARY)
    training = (MuonConfig if kind == "muon" else TrainConfig)(batch_size=batch_size)
    trainer = Plan(config, training, Machine(**machine)).trainer(data)

    def step() -> None:
        trainer.take_step()
        trainer.unread.clear()  # `train` reads them every tenth step

    return step


def peer_loss(peer: str, sizes: dict[str, int]) -> tuple[torch.nn.Module, Callable]:
    """A peer's model and its loss of (inputs, targets)."""
    layers, heads, width = sizes["layers"], sizes["heads"], sizes["width"]
    if peer == "nanogpt":
        from model import GPT as NanoGPT
        from model import GPTConfig as NanoConfig

        config = NanoConfig(
            block_size=sizes["context"],
            vocab_size=VOCABULARY,
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            dropout=0.0,
            bias=False,
        )
        model = NanoGPT(config)
        return model, lambda net, x, y: net(x, y)[1]
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=sizes["context"],
        n_layer=layers,
        n_head=heads,
        n_embd=width,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )

    def loss(net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = net(x).logits.float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())

    return GPT2LMHeadModel(config), loss


def peer_step(size: str, name: str) -> Callable[[], None]:
    """One step of a peer, as nanoGPT's train.py makes it."""
    sizes, batch_size, _ = SIZES[size]
    peer, best = PEERS[name]
    model, loss_of = peer_loss(peer, sizes)
    rate, betas = 1e-3, (0.9, 0.99)
    if peer == "nanogpt" and not best:
        optimizer = model.configure_optimizers(0.1, rate, betas, "cpu")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas, fused=best)
    net = torch.compile(model) if best else model
    ids = np.random.default_rng(0).integers(VOCABULARY, size=180_000)
    context = sizes["context"]

    def step() -> None:
        places = torch.randint(len(ids) - context, (batch_size,))
        x = torch.stack([torch.from_numpy(ids[i : i + context]) for i in places])
        y = torch.stack(
            [torch.from_numpy(ids[i + 1 : i + 1 + context]) for i in places]
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=best):
            loss = loss_of(net, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def prepare(
    size: str, names: list[str], kept: bool, nanogpt: str | None
) -> dict[str, Callable[[], None]]:
    """A step of each candidate, compiled and ready."""
    if kept:
        from glassgpt.quantization import keep_freed_memory

        if not keep_freed_memory():
            raise SystemExit("this C library can't be told to keep memory")
    if nanogpt:
        sys.path.insert(0, nanogpt)
    torch.manual_seed(0)
    steps = {}
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        for name in names:
            make = our_step if name in OURS else peer_step
            steps[name] = make(size, name)
            began = perf_counter()
            for _ in range(3):  # compiles, and fills the optimizer's moments
                steps[name]()
            print(f"{name}: ready in {perf_counter() - began:.0f} s", file=sys.stderr)
    return steps


def memory_of(pipe, size: str, name: str, nanogpt: str | None) -> None:
    """A process that runs one candidate alone and sends its peak memory in MB."""
    (step,) = prepare(size, [name], name in OURS, nanogpt).values()
    Path("/proc/self/clear_refs").write_text("5")  # compiling doesn't count
    for _ in range(3):
        step()
    status = Path("/proc/self/status").read_text()
    pipe.send(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def serve(pipe, size: str, names: list[str], kept: bool, nanogpt: str | None) -> None:
    """A process that makes every candidate and times those that it is asked for."""
    steps = prepare(size, names, kept, nanogpt)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        name, count = order
        began = perf_counter()
        for _ in range(count):
            steps[name]()
        pipe.send((perf_counter() - began) / count)


def measure(
    size: str, names: list[str], rounds: int, steps: int | None, nanogpt: str | None
) -> dict[str, dict[str, float]]:
    """Median tokens a second of each candidate, with both allocators."""
    sizes, batch_size, count = SIZES[size]
    count = steps or count
    context, workers = get_context("spawn"), {}
    for kept in (False, True):
        pipe, end = context.Pipe()
        process = context.Process(target=serve, args=(end, size, names, kept, nanogpt))
        process.start()
        end.close()
        pipe.recv()  # one process compiles at a time
        workers["kept" if kept else "given back"] = (process, pipe)
    seconds = {name: {memory: [] for memory in workers} for name in names}
    for _ in range(rounds):
        for name in names:
            for memory, (_, pipe) in workers.items():
                pipe.send((name, count))
                seconds[name][memory].append(pipe.recv())
    for process, pipe in workers.values():
        pipe.send(None)
        process.join()
    tokens = batch_size * sizes["context"]
    result = {
        name: {memory: tokens / statistics.median(s) for memory, s in times.items()}
        for name, times in seconds.items()
    }
    for name in names:
        pipe, end = context.Pipe()
        process = context.Process(target=memory_of, args=(end, size, name, nanogpt))
        process.start()
        result[name]["MB"] = pipe.recv()
        process.join()
    return result


def matrix_flops(dtype: torch.dtype) -> float:
    """FLOP a second of a product of 2048 x 384 and 384 x 1536, the best of 20."""
    a, b = torch.ones(2048, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    times = []
    for _ in range(20):
        began = perf_counter()
        a @ b
        times.append(perf_counter() - began)
    return 2 * 2048 * 384 * 1536 / min(times)


def anonymous(word: str) -> str:
    """A word of the command line, without the paths of this machine."""
    return ("FILE" if Path(word).is_file() else "DIR") if "/" in word else word


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines()
        if sys.platform == "linux"
        else []
    )
    named = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    return {
        "processor": named[0] if named else platform.processor(),
        "threads": torch.get_num_threads(),
        "16-bit units": [f for f in ("avx512_bf16", "amx_bf16") if f in flags],
        "GFLOP/s float32": round(matrix_flops(torch.float32) / 1e9),
        "GFLOP/s bfloat16": round(matrix_flops(torch.bfloat16) / 1e9),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": f"python benchmarks/{Path(sys.argv[0]).name} "
        + " ".join(map(anonymous, sys.argv[1:])),
    }


def table(size: str, result: dict[str, dict[str, float]]) -> str:
    """A Markdown table, with ratios to the first candidate as it comes."""
    sizes, batch_size, _ = SIZES[size]
    base = next(iter(result.values()))["given back"]
    rows = [
        f"**{size}**: {sizes['layers']} layers, {sizes['heads']} heads, width "
        f"{sizes['width']}, context {sizes['context']}, batch {batch_size}",
        "",
        "| tokens/s | allocator as it comes | memory kept | peak memory |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, numbers in result.items():
        speeds = [numbers["given back"], numbers["kept"]]
        cells = [f"{v:,.0f} (x {v / base:.2f})" for v in speeds]
        rows.append(f"| {name} | {' | '.join(cells)} | {numbers['MB']:,.0f} MB |")
    return "\n".join(rows)


def write_section(name: str, text: str) -> None:
    """Put a text between the markers of this name in README.md."""
    path = ROOT / "README.md"
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = path.read_text("utf-8").split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--transformers", action="store_true", help="time it too")
    parser.add_argument("--size", choices=SIZES, nargs="*", default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="of a candidate in a round")
    parser.add_argument("--only", help="candidates whose names match this expression")
    parser.add_argument(
        "--write", action="store_true", help="write README.md, speed.json"
    )
    options = parser.parse_args()
    wanted = {"nanogpt": options.nanogpt, "transformers": options.transformers}
    names = [name for name, (peer, _) in PEERS.items() if wanted[peer]] + list(OURS)
    if options.only:
        names = [name for name in names if re.search(options.only, name)]
    # As an installation leaves it: compiling our modules isn't part of training.
    compileall.compile_dir(find_spec("glassgpt").submodule_search_locations[0], quiet=1)
    here, results = machine(), {}
    print(json.dumps(here, indent=1))
    for size in options.size:
        results[size] = measure(
            size, names, options.rounds, options.steps, options.nanogpt
        )
        print(table(size, results[size]), flush=True)
    if options.write:
        text = [
            f"Measured {here['date']} on {here['processor']}, {here['threads']} "
            f"threads, torch {here['torch']}: products of 2048 x 384 x 1536 at "
            f"{here['GFLOP/s float32']} GFLOP/s in float32 and "
            f"{here['GFLOP/s bfloat16']} in bfloat16."
        ]
        text += [table(size, result) for size, result in results.items()]
        write_section("training", "\n\n".join(text))
        runs = ROOT.parent / "book" / "runs"
        runs.mkdir(exist_ok=True)
        content = json.dumps({"machine": here, "tokens per second": results}, indent=1)
        (runs / "speed.json").write_text(content + "\n", "utf-8")


if __name__ == "__main__":
    main()
