# Written by tools/tangle.py from book/09_block.ipynb: change it there.


"""Checks of normalization and of the block that name the mistake they find."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glassgpt.block import Block as Reference
from glassgpt.checks.attention import check_causal


def _layer_norm_mistakes(x: Tensor, eps: float) -> list[tuple[Tensor, str]]:
    """What the usual mistakes make of x, and their names."""
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    square = x.square().mean(-1, keepdim=True)
    along_words = x.var(-2, correction=0, keepdim=True)
    return [
        (
            centered / (x.var(-1, keepdim=True) + eps).sqrt(),
            "the variance was divided by C - 1: divide by C (correction=0)",
        ),
        (centered / (variance.sqrt() + eps), "eps stands outside the root"),
        (centered / variance.sqrt(), "eps is missing under the root"),
        (centered / (variance + eps), "divided by the variance: take its root"),
        (centered, "the spread was not divided out"),
        (x / (square + eps).sqrt(), "the mean was not subtracted"),
        (x / (variance + eps).sqrt(), "the mean was not subtracted"),
        (
            (x - x.mean()) / (x.var(correction=0) + eps).sqrt(),
            "one mean for everything: each vector has its own",
        ),
        (
            (x - x.mean(-2, keepdim=True)) / (along_words + eps).sqrt(),
            "normalized along the words: it runs along the width",
        ),
    ]


def check_layer_norm(layer_norm: Callable[..., Tensor]) -> None:
    """Mean 0 and variance 1 for each vector, then weight and bias; equal to PyTorch's.

    layer_norm: called as layer_norm(x, weight, bias), with eps = 1e-5.

    Book: 09_block.html#the-equation-of-layernorm
    """
    random = torch.Generator().manual_seed(0)
    x = 0.01 + 0.01 * torch.randn(2, 3, 4, generator=random, dtype=torch.float64)
    one, zero = torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0])
    before = x.clone()
    plain = layer_norm(x, one, zero)
    assert torch.equal(x, before), "the caller's x was changed: x - mean, not x -= mean"
    assert plain.shape == x.shape, f"the shape changed to {tuple(plain.shape)}"
    for wrong, mistake in _layer_norm_mistakes(x, 1e-5):
        assert not torch.allclose(plain, wrong, rtol=1e-8, atol=1e-10), mistake
    weight, bias = torch.randn(2, 4, generator=random, dtype=torch.float64)
    full = layer_norm(x, weight, bias)
    assert not torch.allclose(full, plain + bias), "the weight was ignored"
    assert not torch.allclose(full, plain * weight), "the bias was ignored"
    assert not torch.allclose(full, (plain + bias) * weight), (
        "the bias was added before the weight: multiply first"
    )
    gap = (full - F.layer_norm(x, (4,), weight, bias)).abs().max().item()
    assert gap < 1e-12, f"differs from torch.nn.functional.layer_norm by {gap:.1e}"
    x = (1e4 + torch.randn(3, 5, generator=random)).repeat(2, 1, 1).requires_grad_()
    weight, bias = torch.randn(2, 5, generator=random)
    found = layer_norm(x[0], weight, bias)
    assert found.dtype == x.dtype, f"float32 became {found.dtype}"
    wanted = F.layer_norm(x[1], (5,), weight, bias)
    assert torch.allclose(found, wanted, atol=0.02), (
        "wrong for 5 numbers near 10,000: divide by C, and subtract before you square"
    )
    (found.square() + wanted.square()).sum().backward()
    assert torch.allclose(*x.grad, atol=0.02), (
        "x gets another gradient than in PyTorch: the mean and the variance move, too"
    )


def _without(layer: nn.Module, *parts: str) -> nn.Module:
    """A copy of the layer in which these parts add nothing."""
    copy = deepcopy(layer)
    for part in parts:
        for parameter in getattr(copy, part).projection.parameters():
            nn.init.zeros_(parameter)
    return copy


def _check_stream(layer: nn.Module, x: Tensor) -> None:
    """When both parts add nothing, the stream passes unchanged."""
    idle = _without(layer, "attention", "mlp")
    passed = idle(x)
    assert passed.shape == x.shape, f"{tuple(x.shape)} became {tuple(passed.shape)}"
    assert passed.any(), "the parts replace x: add what they return to it"
    assert not torch.allclose(passed, 2 * x), "x was added twice"
    assert not torch.allclose(idle(3 * x), passed, atol=1e-3), (
        "the stream itself is normalized: normalize only what each part reads"
    )
    assert torch.equal(passed, x), (
        "with both projections zero a block must hand x on unchanged"
    )


def _check_dropout(layer: nn.Module, dropping: nn.Module, x: Tensor) -> None:
    """dropping: drops nearly everything in training, which leaves the stream."""
    dropping.double().load_state_dict(layer.state_dict())
    assert torch.allclose(dropping.eval()(x), layer(x)), (
        "dropout acts after eval(), too: it belongs to training"
    )
    assert torch.allclose(dropping.train()(x), x), (
        "dropout must act on what each part adds, and on nothing else"
    )


def _check_parts(dropping: nn.Module, share: float, x: Tensor) -> None:
    """Attention gets the share of dropout, mask and cache, and no part reads less."""
    assert dropping.attention.dropout == share, (
        "no attention weights are dropped: hand dropout to attention, too"
    )
    sent, found = {"mask": torch.ones(5, 5, dtype=torch.bool), "cache": object()}, {}

    def look(part: nn.Module, given: tuple, named: dict[str, Any]) -> tuple:
        found.update(zip(("attention", "mask", "cache"), given, strict=False))
        found.update({"attention" if k == "x" else k: v for k, v in named.items()})
        return (found["attention"], None, None), {}  # what was sent is no real mask

    # Attention is x; dropout of what it adds may stand in it, as in nanoGPT.
    dropping.attention.register_forward_pre_hook(look, with_kwargs=True)
    dropping.attention.projection.forward = lambda contexts: found["attention"]
    dropping.mlp.forward = lambda x: found.setdefault("mlp", x)
    dropping(x, **sent)
    for name in sent:
        assert found.get(name) is sent[name], (
            f"attention must get the {name} as its {name}"
        )
    for name in ("attention", "mlp"):
        assert torch.allclose(found[name], getattr(dropping, f"{name}_norm")(x)), (
            f"{name} reads other vectors in training: drop what a part adds, at once"
        )


def _check_reads(layer: nn.Module, x: Tensor) -> None:
    """Each part reads normalized vectors, and attention comes first."""
    attend = _without(layer, "mlp")
    think = _without(layer, "attention")
    for name, part in (("attention", attend), ("the MLP", think)):
        once, thrice = part(x) - x, part(3 * x) - 3 * x
        assert torch.allclose(once, thrice, atol=1e-3), (
            f"{name} adds more when the stream is larger: it needs a norm before it"
        )
    found = layer(x)
    both = attend(x) + think(x) - x
    assert not torch.allclose(found, both), (
        "the MLP doesn't see what attention added: one after the other"
    )
    assert not torch.allclose(found, attend(think(x))), "the MLP comes before attention"


@torch.enable_grad()
def _check_same(layer: nn.Module, x: Tensor) -> None:
    """The parameters of `Block`, and in training its numbers and its gradient."""
    ours = Reference(8, 2).double()
    parts = [dict(part.named_parameters()) for part in (layer, ours)]
    sizes, due = ({(name, p.shape) for name, p in part.items()} for part in parts)
    odd = sorted({name for name, _ in sizes ^ due})
    assert not odd, f"missing, shared or not as in Block: {', '.join(odd)}"
    ours.load_state_dict(layer.state_dict(), strict=False)
    x = torch.stack((x, x)).requires_grad_()
    found, y = layer.train()(x[0]), x[1] + ours.attention(ours.attention_norm(x[1]))
    wanted = y + ours.mlp(ours.mlp_norm(y))  # not ours(x): this may be a check of Block
    (found.square() + wanted.square()).sum().backward()
    idle = [name for name, value in layer.named_parameters() if value.grad is None]
    assert not idle, f"never used: {', '.join(idle)}"
    assert torch.allclose(found, wanted, rtol=1e-8), (
        "with its weights Block gives other numbers: attention, added, then the MLP,"
        " added: each once, through its norm (eps 1e-5), with all heads"
    )
    assert torch.allclose(*x.grad), (
        "x gets another gradient than in Block: is something detached?"
    )


@torch.no_grad()
def check_block(block: Callable[[int, int], nn.Module]) -> None:
    """Two parts that read through a norm and add to the stream, in order and causal.

    block: called as block(width, heads) or block(width, heads, dropout). The layer maps
    (B, T, C) to (B, T, C) and has the parts and the parameters of `Block`.

    Book: 09_block.html#the-check-of-the-block
    """
    random = torch.Generator().manual_seed(0)
    layer = block(8, 2).double().eval()
    for parameter in layer.parameters():
        parameter.normal_(0.0, 0.3, generator=random)
    x = 2 * torch.randn(2, 5, 8, generator=random, dtype=torch.float64)
    before = x.clone()
    layer(x)
    assert torch.equal(x, before), "the caller's x was changed: x = x + y, not x += y"
    _check_stream(layer, x)
    _check_reads(layer, x)
    check_causal(lambda vectors: layer(vectors.double()), width=8)
    _check_same(layer, x)
    share = 1 - 1e-9
    dropping = block(8, 2, share)
    _check_dropout(layer, dropping, x)
    _check_parts(dropping, share, x)


def check_additions(additions: Callable[..., list[Tensor]]) -> None:
    """What each part adds to a pre-norm stream: all together, its end minus its start.

    additions: called as additions(x, parts, norm), all of them functions.

    Book: 09_block.html#exercises
    """
    x = torch.tensor([1.0, 3.0])
    parts = [lambda x: 2 * x, lambda x: x * x, lambda x: 1 - x]

    def norm(x: Tensor) -> Tensor:
        return x / 2 + 1

    def run(read: Callable, keep: Callable) -> tuple[list[Tensor], list[Tensor]]:
        stream, added, after = x, [], []
        for part in parts:
            added.append(part(read(stream)))
            stream = keep(stream, added[-1])
            after.append(stream)
        return added, after

    before = x.clone()
    found = additions(x, parts, norm)
    one = isinstance(found, Tensor) and found.shape == x.shape
    assert not one, "one tensor came back: return a list, a tensor for each part"
    found = list(found)
    assert torch.equal(x, before), "the caller's x was changed: x = x + y, not x += y"
    assert len(found) == 3, f"{len(found)} tensors for 3 parts: one for each part"
    wanted, streams = run(norm, torch.add)
    mistakes = [
        (streams, "these are the streams after each part: give what was added"),
        (
            [part(norm(x)) for part in parts],
            "every part read the start, not the stream",
        ),
        (run(lambda x: x, torch.add)[0], "a part must read the norm of the stream"),
        (run(norm, lambda _, new: new)[0], "the stream was replaced: add to it"),
        (
            run(norm, lambda stream, new: norm(stream) + new)[0],
            "the stream itself was normalized: only what a part reads is",
        ),
        (
            list(torch.stack(wanted).cumsum(0)),
            "this is all that was added up to here: give each part's own",
        ),
    ]
    together = torch.stack(found)
    for wrong, mistake in mistakes:
        assert not torch.allclose(together, torch.stack(wrong)), mistake
    assert torch.allclose(together, torch.stack(wanted)), (
        "part after part: it reads norm(stream), and what it returns is added"
    )


def check_post_norm(post_norm: Callable[..., Tensor]) -> None:
    """The block of 2017: add, then normalize the stream, twice.

    post_norm: called as post_norm(x, attention, mlp, norm_1, norm_2).

    Book: 09_block.html#exercises
    """
    x = torch.tensor([3.0, 5.0])
    double, cube = (lambda x: 2 * x), (lambda x: x**3)
    square, halve = (lambda x: x * x), (lambda x: x / 2 - 1)
    before = x.clone()
    found = post_norm(x, double, cube, square, halve)
    assert torch.equal(x, before), "the caller's x was changed: x = x + y, not x += y"
    once, branch = x + double(square(x)), x + square(double(x))
    bare, stream, other = x + double(x), square(x + double(x)), halve(x + double(x))
    mistakes = [
        (once + cube(halve(once)), "this is pre-norm: the norm goes outside"),
        (halve(cube(square(double(x)))), "nothing is added: x + attention(x)"),
        (branch + halve(cube(branch)), "only what a part returns is normalized, not x"),
        (stream, "the MLP is missing"),
        (stream + cube(stream), "norm_2 is missing"),
        (halve(bare + cube(bare)), "norm_1 is missing"),
        (square(stream + cube(stream)), "norm_1 stands in both lines"),
        (square(other + cube(other)), "norm_1 and norm_2 are exchanged"),
        (halve(stream + cube(x)), "the MLP read x: let it read what norm_1 returned"),
        (halve(x + cube(stream)), "the second addition starts from x, not norm_1's"),
        (halve(cube(stream)), "the second addition is missing"),
    ]
    for wrong, mistake in mistakes:
        assert not torch.equal(found, wrong), mistake
    assert torch.equal(found, halve(stream + cube(stream))), (
        "take norm_1(x + attention(x)), and from that norm_2(x + mlp(x))"
    )


def check_layer_norm_gradient(gradient: Callable[[Tensor, Tensor], Tensor]) -> None:
    """The gradient of LayerNorm with respect to x, mean and variance included.

    Book: 09_block.html#exercises
    """
    random = torch.Generator().manual_seed(0)
    x, u = torch.randn(2, 3, 5, generator=random, dtype=torch.float64)
    x = (x / 10).requires_grad_()  # small, or eps would hardly show
    normal = F.layer_norm(x, (5,), eps=0.0)
    (wanted,) = torch.autograd.grad(normal, x, u)
    (with_eps,) = torch.autograd.grad(F.layer_norm(x, (5,), eps=1e-5), x, u)
    x, normal = x.detach(), normal.detach()
    spread = x.std(-1, correction=0, keepdim=True)
    found = gradient(x.clone(), u.clone())  # it may write into them
    assert found.shape == x.shape, f"the shape is {tuple(found.shape)}, not (3, 5)"
    mean, product = u.mean(-1, keepdim=True), u * normal
    along = product.mean(-1, keepdim=True) * normal
    sample = (4 / 5) ** 0.5  # n and 1 / spread, when the spread is taken with C - 1
    mistakes = [
        (u / spread, "the mean and the variance depend on x too"),
        ((u - mean) / spread, "the variance depends on x too"),
        ((u - along) / spread, "the mean depends on x too"),
        (
            (u - mean + along) / spread,
            "the path through v is subtracted, not added",
        ),
        (with_eps, "eps is 0 in this exercise"),
        (wanted * spread, "divide by the spread"),
        ((u - u / 5 - along) / spread, "m moves every n_k: sum over k"),
        ((u - mean - product * normal / 5) / spread, "v moves every n_k: sum over k"),
        (
            (u - u / 5 - product * normal / 5) / spread,
            "m and v move every n_k: sum over k",
        ),
        ((u - mean - along / 2) / spread, "v is a mean of squares: the 2 is missing"),
        ((u - mean - 2 * along) / spread, "n_k / (2 v): the 2 is missing"),
        (
            (u - mean - spread**2 * along) / spread,
            "n, not x - m: divide by the spread once more",
        ),
        (
            (u - mean - (u * x).mean(-1, keepdim=True) * normal) / spread,
            "the mean of u times n, not of u times x",
        ),
        ((u - 5 * mean - along) / spread, "the mean of u, not its sum"),
        ((u - mean - 5 * along) / spread, "the mean of u times n, not its sum"),
        ((u - 5 * mean - 5 * along) / spread, "means over the width, not sums"),
        (
            sample * (u - mean - sample**2 * along) / spread,
            "the spread was taken with C - 1: divide by C (correction=0)",
        ),
        ((u - u.mean() - along) / spread, "one mean for all rows: each has its own"),
        (
            (u - mean - product.mean() * normal) / spread,
            "one mean of u times n for all rows: each has its own",
        ),
        (
            (u - u.mean() - product.mean() * normal) / spread,
            "one mean for all rows: each has its own",
        ),
    ]
    for wrong, mistake in mistakes:
        assert not torch.allclose(found.double(), wrong, atol=1e-4), mistake
    gap = (found - wanted).abs().max().item()
    assert gap < 1e-4, f"differs from autograd by {gap:.1e}"
