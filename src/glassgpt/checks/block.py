# Written by tools/tangle.py from book/09_block.ipynb: change it there.


"""Checks of normalization and of the block that name the mistake they find."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.checks.attention import check_causal
from glassgpt.checks.expect import expect_same


def _random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def check_layer_norm(layer_norm: Callable[..., Tensor]) -> None:
    """Mean 0 and variance 1 for each vector, then weight and bias; equal to PyTorch's.

    layer_norm: called as layer_norm(x, weight, bias), with eps = 1e-5.

    Book: 09_block.html#the-equation-of-layernorm
    """

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias)

    def sample(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        spread = (x.var(-1, keepdim=True) + 1e-5).sqrt()
        return (x - x.mean(-1, keepdim=True)) / spread * weight + bias

    def outside(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        spread = x.std(-1, correction=0, keepdim=True) + 1e-5
        return (x - x.mean(-1, keepdim=True)) / spread * weight + bias

    def along_words(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        spread = (x.var(-2, correction=0, keepdim=True) + 1e-5).sqrt()
        return (x - x.mean(-2, keepdim=True)) / spread * weight + bias

    mistakes = {
        "the variance was divided by C - 1: divide by C (correction=0)": sample,
        "eps stands outside the root": outside,
        "normalized along the words: it runs along the width": along_words,
    }
    hint = (
        "subtract each vector's own mean, divide by the root of its variance + eps,"
        " then multiply by the weight and add the bias"
    )
    x, few = 0.01 + 0.01 * _random(2, 3, 4), 0.01 * _random(3, 5)
    weight, bias = _random(2, 4)
    expect_same(layer_norm, reference, x, weight, bias, mistakes=mistakes, hint=hint)
    expect_same(layer_norm, reference, few, *_random(2, 5), hint=f"with C = 5: {hint}")
    far = 1000 + _random(2, 3, 4).float()
    given = (far, torch.ones(4), torch.zeros(4))
    found, wanted = layer_norm(*given), reference(*given)
    assert torch.allclose(found, wanted, atol=0.01), (
        "wrong for numbers near 1000: subtract the mean before you square"
    )


@torch.no_grad()
def _check_stream(layer: nn.Module, x: Tensor) -> None:
    """When both parts add nothing, the stream passes unchanged."""
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            for parameter in part.parameters():
                parameter.zero_()
    passed = layer(x)
    layer.load_state_dict(before)
    assert passed.shape == x.shape, f"{tuple(x.shape)} became {tuple(passed.shape)}"
    assert passed.any(), "the parts replace x: add what they return to it"
    assert torch.equal(passed, x), (
        "the stream itself is normalized, or changed: with all linear layers zero a"
        " block hands x on; normalize only what each part reads"
    )


def check_block(block: Callable[..., nn.Module]) -> None:
    """Two parts that read through a norm and add to the stream, in order and causal.

    block: called as block(width, heads) or block(width, heads, dropout). The layer maps
    (B, T, C) to (B, T, C); its parts are called attention_norm, attention, mlp_norm and
    mlp.

    Book: 09_block.html#the-check-of-the-block
    """
    with torch.random.fork_rng(devices=[]):
        layer = block(8, 2).double().eval()
        dropping = block(8, 2, 1 - 1e-9).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator=generator)

    def attend(x: Tensor) -> Tensor:
        return layer.attention(layer.attention_norm(x))

    def think(x: Tensor) -> Tensor:
        return layer.mlp(layer.mlp_norm(x))

    def reference(x: Tensor) -> Tensor:
        x = x + attend(x)
        return x + think(x)

    def without_second_norm(x: Tensor) -> Tensor:
        x = x + attend(x)
        return x + layer.mlp(x)

    def mlp_first(x: Tensor) -> Tensor:
        x = x + think(x)
        return x + attend(x)

    mistakes = {
        "the MLP doesn't see what attention added: one after the other": (
            lambda x: x + attend(x) + think(x)
        ),
        "the MLP reads the stream itself: it needs a norm before it": (
            without_second_norm
        ),
        "the MLP comes before attention": mlp_first,
    }
    x = 2 * _random(2, 5, 8)
    _check_stream(layer, x)
    with torch.no_grad():
        check_causal(lambda vectors: layer(vectors.double()), width=8)
    expect_same(
        layer,
        reference,
        x,
        mistakes=mistakes,
        parameters=dict(layer.named_parameters()),
        hint="add attention of its norm of x, then the MLP of its own norm, each once",
    )
    with torch.random.fork_rng(devices=[]):
        dropped = dropping.train()(x)
    assert torch.allclose(dropped, x), (
        "dropout must act on what each part adds, and on nothing else"
    )
    assert not torch.allclose(dropping.eval()(x), x), (
        "dropout acts after eval(), too: it belongs to training"
    )


def check_additions(additions: Callable[..., list[Tensor]]) -> None:
    """What each part adds to a pre-norm stream: all together, its end minus its start.

    additions: called as additions(x, parts, norm), all of them functions.

    Book: 09_block.html#exercises
    """
    parts = [lambda x: 2 * x, lambda x: x * x, lambda x: 1 - x]

    def norm(x: Tensor) -> Tensor:
        return x / 2 + 1

    def bare(x: Tensor) -> Tensor:
        return x

    def run(x: Tensor, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """What each part adds, and the stream after each."""
        added, streams = [], []
        for part in parts:
            added.append(part(norm(x)))
            x = x + added[-1]
            streams.append(x)
        return torch.stack(added), torch.stack(streams)

    expect_same(
        lambda x: torch.stack(list(additions(x, parts, norm))),
        lambda x: run(x, norm)[0],
        torch.tensor([1.0, 3.0]),
        mistakes={
            "every part read the start, not the stream": (
                lambda x: torch.stack([part(norm(x)) for part in parts])
            ),
            "these are the streams after each part: give what was added": (
                lambda x: run(x, norm)[1]
            ),
            "a part must read the norm of the stream": lambda x: run(x, bare)[0],
        },
        hint="part after part reads norm(stream), and what it returns is added",
    )


def check_post_norm(post_norm: Callable[..., Tensor]) -> None:
    """The block of 2017: add, then normalize the stream, twice.

    post_norm: called as post_norm(x, attention, mlp, norm_1, norm_2).

    Book: 09_block.html#exercises
    """

    def attention(x: Tensor) -> Tensor:
        return 2 * x

    def mlp(x: Tensor) -> Tensor:
        return x**3

    def norm_1(x: Tensor) -> Tensor:
        return x * x

    def norm_2(x: Tensor) -> Tensor:
        return x / 2 - 1

    def reference(x: Tensor) -> Tensor:
        x = norm_1(x + attention(x))
        return norm_2(x + mlp(x))

    def pre_norm(x: Tensor) -> Tensor:
        x = x + attention(norm_1(x))
        return x + mlp(norm_2(x))

    def inside(x: Tensor) -> Tensor:
        x = x + norm_1(attention(x))
        return x + norm_2(mlp(x))

    expect_same(
        lambda x: post_norm(x, attention, mlp, norm_1, norm_2),
        reference,
        torch.tensor([3.0, 5.0], dtype=torch.float64),
        mistakes={
            "this is pre-norm: the norm goes outside": pre_norm,
            "only what a part returns is normalized, not x": inside,
            "nothing is added: x + attention(x)": (
                lambda x: norm_2(mlp(norm_1(attention(x))))
            ),
        },
        hint="take norm_1(x + attention(x)), and from that norm_2(x + mlp(x))",
    )


def check_layer_norm_gradient(gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The gradient of LayerNorm with respect to x, mean and variance included.

    Book: 09_block.html#exercises
    """
    x, u = _random(2, 3, 5)
    x = (x / 10).requires_grad_()  # small, or eps would hardly show
    normal = F.layer_norm(x, (5,), eps=0.0)
    (wanted,) = torch.autograd.grad(normal, x, u)
    x, normal = x.detach(), normal.detach()
    spread = x.std(-1, correction=0, keepdim=True)
    mean = u.mean(-1, keepdim=True)
    along = (u * normal).mean(-1, keepdim=True) * normal
    found = gradient(x.clone(), u.clone())  # it may write into them
    assert found.shape == x.shape, f"the shape is {tuple(found.shape)}, not (3, 5)"
    mistakes = {
        "the mean and the variance depend on x too": u / spread,
        "the variance depends on x too": (u - mean) / spread,
        "the mean of u and of u times n, not their sums": (
            (u - 5 * mean - 5 * along) / spread
        ),
    }
    for mistake, wrong in mistakes.items():
        assert not torch.allclose(found.double(), wrong, atol=1e-4), mistake
    gap = (found - wanted).abs().max().item()
    assert gap < 1e-4, (
        f"differs from autograd by {gap:.1e}: subtract from u its mean and n times the"
        " mean of u times n, of each row, and divide by the spread (eps is 0)"
    )
