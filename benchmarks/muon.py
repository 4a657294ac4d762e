"""A step of Muon: PyTorch's own and chapter 14's, in bfloat16 and in float32.

    python benchmarks/muon.py
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/muon.py  # as if there were no more units

Each step moves the matrices of all blocks of a GPT; the gradients are random. All
candidates take turns, and the table shows the median milliseconds of a step.
"""

import json
import statistics
from time import perf_counter

import torch
from training import machine

from glassgpt.modern import ModernConfig, ModernGPT, Muon
from glassgpt.quantization import keep_freed_memory

SIZES = {
    "4 blocks of width 128": {"layers": 4, "heads": 4, "width": 128},
    "6 blocks of width 384": {"layers": 6, "heads": 6, "width": 384},
}
CANDIDATES = {
    "`torch.optim.Muon`": lambda matrices: torch.optim.Muon(matrices, ns_steps=4),
    "ours, bfloat16": lambda matrices: Muon(matrices, 1e-3, 0.1, torch.bfloat16),
    "ours, float32": lambda matrices: Muon(matrices, 1e-3, 0.1, torch.float32),
}
ROUNDS = 9


def matrices_of(sizes: dict[str, int]) -> list[torch.nn.Parameter]:
    """The matrices of a model's blocks, with random gradients."""
    model = ModernGPT(ModernConfig(65, context=64, **sizes))
    matrices = [p for p in model.blocks.parameters() if p.dim() > 1]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    return matrices


def main() -> None:
    keep_freed_memory()
    torch.manual_seed(0)
    print(json.dumps(machine(), indent=1))
    print("| matrices |", " | ".join(CANDIDATES), "|")
    print("| --- |" + " ---: |" * len(CANDIDATES))
    for size, sizes in SIZES.items():
        made = [make(matrices_of(sizes)) for make in CANDIDATES.values()]
        times: list[list[float]] = [[] for _ in made]
        for _ in range(ROUNDS):
            for optimizer, spent in zip(made, times, strict=True):
                began = perf_counter()
                optimizer.step()
                spent.append(perf_counter() - began)
        cells = [f"{1000 * statistics.median(spent):.0f}" for spent in times]
        print("|", " | ".join([size, *cells]), "|")


if __name__ == "__main__":
    main()
