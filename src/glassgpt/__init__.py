# Written by tools/tangle.py from book/a3_command_line.ipynb: change it there.


"""Glass GPT: a GPT you can see through.

Every line of this package comes from a chapter of the book of the same name, and every
docstring ends in the page and section that explain it.
"""

from importlib import import_module
from typing import Any

from glassgpt.attention import attention, causal_mask
from glassgpt.block import Block
from glassgpt.chat import (
    Template,
    add_roles,
    chat_loss,
    pack_data,
    render,
    stream_answer,
)
from glassgpt.checkpoints import load, save
from glassgpt.data import TokenData, tokenize
from glassgpt.embeddings import Embedding, cosine_similarity, nearest_neighbors
from glassgpt.generation import (
    KeyValueCache,
    Sampling,
    generate,
    generate_text,
    log_probabilities,
    sample,
    stream,
    stream_text,
)
from glassgpt.gpt import GPT, GPTConfig, by_hand
from glassgpt.heads import MultiHeadAttention
from glassgpt.huggingface import write_gguf
from glassgpt.inspection import trace
from glassgpt.mlp import MLP
from glassgpt.modern import ModernConfig, ModernGPT, MuonConfig, build
from glassgpt.plan import Plan, make_plan, pick_device
from glassgpt.positions import sinusoidal_positions
from glassgpt.publish import publish
from glassgpt.quantization import keep_freed_memory, lighten
from glassgpt.runs import Run, resume_run, start_run
from glassgpt.softmax import cross_entropy, log_softmax, softmax
from glassgpt.tokens import BPETokenizer, CharTokenizer, Tokenizer
from glassgpt.training import TrainConfig, Trainer, evaluate, train

__version__ = "0.1.0"


__all__ = [
    "attention",
    "causal_mask",
    "Block",
    "Template",
    "add_roles",
    "chat_loss",
    "pack_data",
    "render",
    "stream_answer",
    "load",
    "save",
    "TokenData",
    "tokenize",
    "Plan",
    "make_plan",
    "pick_device",
    "Embedding",
    "cosine_similarity",
    "nearest_neighbors",
    "KeyValueCache",
    "Sampling",
    "generate",
    "generate_text",
    "log_probabilities",
    "sample",
    "stream",
    "stream_text",
    "GPT",
    "GPTConfig",
    "by_hand",
    "MultiHeadAttention",
    "write_gguf",
    "MLP",
    "ModernConfig",
    "ModernGPT",
    "MuonConfig",
    "build",
    "sinusoidal_positions",
    "keep_freed_memory",
    "trace",
    "publish",
    "cross_entropy",
    "log_softmax",
    "softmax",
    "lighten",
    "BPETokenizer",
    "CharTokenizer",
    "Tokenizer",
    "Run",
    "resume_run",
    "start_run",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "train",
]


def __getattr__(name: str) -> Any:
    """The module `checks`, loaded when it is asked for."""
    if name == "checks":
        return import_module("glassgpt.checks")
    raise AttributeError(f"module 'glassgpt' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names that a program needs most, for `dir` and tab completion."""
    return ["__version__", "checks", *__all__]
