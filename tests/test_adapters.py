"""The checks take other programs' functions, as they are or through two lines."""

import math

import torch
import torch.nn.functional as F

from glassgpt.checks.attention import check_causal
from glassgpt.checks.gpt import check_own_parts
from glassgpt.checks.mlp import check_gelu
from glassgpt.checks.softmax import (
    check_cross_entropy,
    check_log_softmax,
    check_softmax,
)


def test_softmax_of_pytorch():
    check_softmax(torch.softmax)
    check_log_softmax(torch.log_softmax)


def test_cross_entropy_of_pytorch_wants_the_classes_on_the_second_axis():
    check_cross_entropy(lambda x, ids: F.cross_entropy(x.flatten(0, -2), ids.flatten()))


def test_gelu_of_pytorch():
    check_gelu(lambda x: F.gelu(x, approximate="tanh"))


def test_the_causal_attention_of_pytorch():
    check_causal(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True))


def test_a_gpt_of_pytorchs_parts():
    def attention(queries, keys, values, mask):
        scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
        weights = torch.softmax(scores.masked_fill(~mask, -math.inf), dim=-1)
        return weights @ values, weights

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    def layer_norm(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias)

    check_own_parts(lambda: (attention, gelu, layer_norm))
