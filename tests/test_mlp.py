"""The MLP and its activation: equal to PyTorch's and to GPT-2's."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from glassgpt.mlp import MLP, gelu, pytorch_gelu

tanh_gelu = partial(F.gelu, approximate="tanh")


@given(st.lists(st.floats(-1e3, 1e3), min_size=1))
def test_gelu_equals_torch(values):
    x = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(gelu(x), tanh_gelu(x), atol=1e-12, rtol=1e-12)
    assert torch.equal(pytorch_gelu(x), tanh_gelu(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gelu_keeps_shape_and_dtype(dtype):
    x = torch.linspace(-3, 3, 6, dtype=dtype).view(2, 3)
    before = x.clone()
    assert (gelu(x).dtype, gelu(x).shape) == (dtype, x.shape)
    assert torch.equal(x, before)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_equals_torch_sequential(width, T, seed):
    torch.manual_seed(seed)
    module, x = MLP(width).double(), 3 * torch.randn(2, T, width, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "expand.weight": (4 * width, width),
        "expand.bias": (4 * width,),
        "projection.weight": (width, 4 * width),
        "projection.bias": (width,),
    }
    theirs = nn.Sequential(module.expand, nn.GELU("tanh"), module.projection)
    torch.testing.assert_close(module(x), theirs(x), atol=1e-12, rtol=0)
    module.activation = gelu
    torch.testing.assert_close(module(x), theirs(x), atol=1e-12, rtol=0)


def test_equals_the_mlp_of_gpt2_in_transformers():
    gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_gpt2")
    config = gpt2.GPT2Config(n_embd=6, activation_function="gelu_new", resid_pdrop=0.0)
    ours, theirs = MLP(6).double(), gpt2.GPT2MLP(24, config).double()
    names = {"expand": "c_fc", "projection": "c_proj"}
    state = {}
    for name, value in ours.state_dict().items():  # their matrices are transposed
        layer, kind = name.split(".")
        state[f"{names[layer]}.{kind}"] = value.T
    theirs.load_state_dict(state)
    x = 3 * torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-12, rtol=0)


def test_gradients():
    x = torch.randn(10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu, x)
    assert torch.autograd.gradcheck(MLP(5).double(), x.view(2, 5))


def test_compiles_whole():
    compiled = torch.compile(module := MLP(4), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_same_on_a_gpu():
    module, x = MLP(4).double(), torch.randn(2, 3, 4, dtype=torch.float64)
    wanted = module(x)
    torch.testing.assert_close(
        module.cuda()(x.cuda()).cpu(), wanted, atol=1e-12, rtol=0
    )
