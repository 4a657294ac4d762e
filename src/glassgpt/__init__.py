# Written by tools/tangle.py from book/a3_command_line.ipynb: change it there.


"""Glass GPT: a GPT you can see through.

Every line of this package comes from a chapter of the book of the same name, and every
docstring ends in the page and section that explain it.
"""

from types import ModuleType as _ModuleType

from glassgpt.attention import attention as attention
from glassgpt.attention import causal_mask as causal_mask
from glassgpt.block import Block as Block
from glassgpt.chat import Template as Template
from glassgpt.chat import add_roles as add_roles
from glassgpt.chat import chat_loss as chat_loss
from glassgpt.chat import pack_data as pack_data
from glassgpt.chat import render as render
from glassgpt.chat import stream_answer as stream_answer
from glassgpt.checkpoints import load as load
from glassgpt.checkpoints import save as save
from glassgpt.data import TokenData as TokenData
from glassgpt.data import tokenize as tokenize
from glassgpt.embeddings import Embedding as Embedding
from glassgpt.embeddings import cosine_similarity as cosine_similarity
from glassgpt.embeddings import nearest_neighbors as nearest_neighbors
from glassgpt.generation import KeyValueCache as KeyValueCache
from glassgpt.generation import Sampling as Sampling
from glassgpt.generation import generate as generate
from glassgpt.generation import generate_text as generate_text
from glassgpt.generation import log_probabilities as log_probabilities
from glassgpt.generation import sample as sample
from glassgpt.generation import stream as stream
from glassgpt.generation import stream_text as stream_text
from glassgpt.gguf import write_gguf as write_gguf
from glassgpt.gpt import GPT as GPT
from glassgpt.gpt import GPTConfig as GPTConfig
from glassgpt.gpt import by_hand as by_hand
from glassgpt.heads import MultiHeadAttention as MultiHeadAttention
from glassgpt.inspection import trace as trace
from glassgpt.mlp import MLP as MLP
from glassgpt.modern import ModernConfig as ModernConfig
from glassgpt.modern import ModernGPT as ModernGPT
from glassgpt.modern import MuonConfig as MuonConfig
from glassgpt.modern import build as build
from glassgpt.plan import Plan as Plan
from glassgpt.plan import make_plan as make_plan
from glassgpt.plan import pick_device as pick_device
from glassgpt.positions import sinusoidal_positions as sinusoidal_positions
from glassgpt.publish import publish as publish
from glassgpt.quantization import keep_freed_memory as keep_freed_memory
from glassgpt.quantization import quantize as quantize
from glassgpt.runs import Run as Run
from glassgpt.runs import resume_run as resume_run
from glassgpt.runs import start_run as start_run
from glassgpt.softmax import cross_entropy as cross_entropy
from glassgpt.softmax import log_softmax as log_softmax
from glassgpt.softmax import softmax as softmax
from glassgpt.tokens import BPETokenizer as BPETokenizer
from glassgpt.tokens import CharTokenizer as CharTokenizer
from glassgpt.tokens import Tokenizer as Tokenizer
from glassgpt.training import TrainConfig as TrainConfig
from glassgpt.training import Trainer as Trainer
from glassgpt.training import evaluate as evaluate
from glassgpt.training import train as train

__version__ = "0.1.0"


__all__ = [
    name
    for name, value in globals().items()
    if not name.startswith("_") and not isinstance(value, _ModuleType)
]


def __dir__() -> list[str]:
    """The names that a program needs most, for `dir` and tab completion."""
    return ["__version__", *__all__]
