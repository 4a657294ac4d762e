"""Masks and attention: parity with PyTorch, and properties."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.attention import attention, causal_mask
from glassgpt.checks.attention import check_causal

sizes = st.integers(1, 6)


def random_tensor(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    queries=sizes,
    keys=sizes,
    width=sizes,
    values=sizes,
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_torch_on_random_shapes(
    leading, queries, keys, width, values, masked, seed
):
    q = random_tensor(*leading, queries, width, seed=seed, scale=3)
    k = random_tensor(*leading, keys, width, seed=seed + 1, scale=3)
    v = random_tensor(*leading, keys, values, seed=seed + 2)
    mask = random_tensor(queries, keys, seed=seed + 3) > 0 if masked else None
    if mask is not None:
        mask[:, 0] = True  # somewhere to look
    context, weights = attention(q, k, v, mask)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(context, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_gradients_equal_torch():
    inputs = [random_tensor(2, 5, 4, seed=s).requires_grad_() for s in range(3)]
    mask = causal_mask(5)
    upstream = random_tensor(2, 5, 4, seed=9)
    ours = torch.autograd.grad((attention(*inputs, mask)[0] * upstream).sum(), inputs)
    theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask)
    theirs = torch.autograd.grad((theirs * upstream).sum(), inputs)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@given(st.integers(0, 8))
def test_causal_mask_compares_positions(size):
    mask = causal_mask(size)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[s <= t for s in range(size)] for t in range(size)]


def test_leading_axes_of_inputs_and_mask_broadcast():
    q, k = random_tensor(2, 1, 3, 4), random_tensor(5, 3, 4, seed=1)
    v = random_tensor(3, 2, seed=2)
    mask = random_tensor(2, 1, 1, 3, seed=3) > 0
    context, weights = attention(q, k, v, mask)
    assert (context.shape, weights.shape) == ((2, 5, 3, 2), (2, 5, 3, 3))
    one = attention(q[1, 0], k[4], v, mask[1, 0])[0]
    torch.testing.assert_close(context[1, 4], one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_keeps_its_dtype(dtype):
    x = random_tensor(3, 8).to(dtype)
    context, weights = attention(x, x, x, causal_mask(3))
    assert context.dtype == weights.dtype == dtype
    assert context.isfinite().all()


@pytest.mark.parametrize("x", [1e30, -1e30])
def test_huge_inputs_give_no_nan(x):
    text = torch.tensor([[x], [1.0], [-x]], dtype=torch.float64)
    context, weights = attention(text, text, text, causal_mask(3))
    assert context.isfinite().all()
    assert weights.sum(-1).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("shapes", "mask"),
    [
        ([(3, 4), (3, 5), (3, 4)], None),
        ([(3, 4), (3, 4), (2, 4)], None),
        ([(2, 3, 4), (3, 3, 4), (3, 4)], None),
        ([(3, 4), (0, 4), (0, 4)], None),
        ([(3, 4)] * 3, torch.ones(3, 2).bool()),
        # Other programs mean other things by a mask of numbers: never guess.
        ([(3, 4)] * 3, torch.zeros(3, 3)),
        ([(3, 4)] * 3, torch.ones(3, 3).long()),
    ],
)
def test_bad_input_is_refused(shapes, mask):
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        attention(*(torch.zeros(shape) for shape in shapes), mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_equals_the_cpu():
    x = random_tensor(2, 5, 4)
    mask = causal_mask(5, device="cuda")
    context, _ = attention(x.cuda(), x.cuda(), x.cuda(), mask)
    torch.testing.assert_close(context.cpu(), attention(x, x, x, mask.cpu())[0])


@pytest.mark.parametrize("width", [4, 128, 384, 768, 1024])
def test_causal_check_takes_attention_of_any_width(width):
    check_causal(lambda x: attention(x, x, x, causal_mask(5))[0], width)
    with pytest.raises(AssertionError, match="row 0 looks at position 1"):
        check_causal(lambda x: attention(x, x, x)[0], width)
