# Written by tools/tangle.py from book/23_command_line.ipynb: change it there.


"""Glass GPT: a GPT you can see through.

Every line of this package comes from a chapter of the book of the same name, and every
docstring ends in the page and section that explain it.
"""

from importlib import import_module
from typing import Any

from glassgpt.attention import attention, causal_mask
from glassgpt.block import Block, layer_norm
from glassgpt.chat import (
    Template,
    add_roles,
    chat_loss,
    pack_data,
    render,
    stream_answer,
)
from glassgpt.checkpoints import load, save
from glassgpt.data import TokenData, tokenize, write_tokens
from glassgpt.device import Machine, Plan, make_plan, pick_device
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
from glassgpt.heads import MultiHeadAttention, merge_heads, split_heads
from glassgpt.hub import ForeignTokenizer, write_card, write_gguf
from glassgpt.inspection import (
    attribute,
    fit_lens,
    induction_scores,
    ledger,
    logit_lens,
    trace,
    watch,
    without,
)
from glassgpt.laws import Law, fit_law
from glassgpt.mlp import MLP, gelu
from glassgpt.modern import (
    ModernConfig,
    ModernGPT,
    MuonConfig,
    apply_rotary,
    build,
    rotary_tables,
    squared_relu,
)
from glassgpt.positions import sinusoidal_positions
from glassgpt.publish import publish
from glassgpt.runs import Run, resume_run, start_run
from glassgpt.scaling import (
    DDPTrainer,
    FSDPTrainer,
    ParallelTrainer,
    ShardedOptimizerTrainer,
    StreamedTokens,
    make_trainer,
    run_processes,
    team,
)
from glassgpt.softmax import cross_entropy, log_softmax, softmax
from glassgpt.speed import keep_freed_memory, lighten
from glassgpt.tokens import BPETokenizer, CharTokenizer, Tokenizer
from glassgpt.training import TrainConfig, Trainer, evaluate, train

__version__ = "0.1.0"


__all__ = [
    "attention",
    "causal_mask",
    "Block",
    "layer_norm",
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
    "write_tokens",
    "Machine",
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
    "merge_heads",
    "split_heads",
    "ForeignTokenizer",
    "write_card",
    "write_gguf",
    "attribute",
    "fit_lens",
    "induction_scores",
    "ledger",
    "logit_lens",
    "trace",
    "watch",
    "without",
    "MLP",
    "gelu",
    "ModernConfig",
    "ModernGPT",
    "MuonConfig",
    "build",
    "apply_rotary",
    "rotary_tables",
    "squared_relu",
    "sinusoidal_positions",
    "publish",
    "cross_entropy",
    "log_softmax",
    "softmax",
    "keep_freed_memory",
    "lighten",
    "BPETokenizer",
    "CharTokenizer",
    "Tokenizer",
    "Run",
    "resume_run",
    "start_run",
    "DDPTrainer",
    "FSDPTrainer",
    "Law",
    "ParallelTrainer",
    "ShardedOptimizerTrainer",
    "StreamedTokens",
    "fit_law",
    "make_trainer",
    "run_processes",
    "team",
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


# At home in their modules, as the rest of a chapter is; here for what imports them.
_LESS_USED = {
    "DDPTrainer",
    "FSDPTrainer",
    "ForeignTokenizer",
    "Law",
    "Machine",
    "ParallelTrainer",
    "ShardedOptimizerTrainer",
    "StreamedTokens",
    "apply_rotary",
    "attribute",
    "fit_law",
    "fit_lens",
    "gelu",
    "induction_scores",
    "keep_freed_memory",
    "layer_norm",
    "ledger",
    "logit_lens",
    "make_trainer",
    "merge_heads",
    "rotary_tables",
    "run_processes",
    "split_heads",
    "squared_relu",
    "team",
    "trace",
    "watch",
    "without",
    "write_card",
    "write_tokens",
}


def __dir__() -> list[str]:
    """The names that a program needs most, for `dir` and tab completion."""
    return sorted({"__version__", "checks", *__all__} - _LESS_USED)
