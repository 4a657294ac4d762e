"""The GPT: parity with transformers, properties, and checks that name mistakes."""

import copy
import itertools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from glassgpt.attention import attention
from glassgpt.block import Block, layer_norm
from glassgpt.checks import gpt as checks
from glassgpt.generation import KeyValueCache
from glassgpt.gpt import GPT, GPTConfig, by_hand, check_ids
from glassgpt.mlp import gelu
from glassgpt.modern import ModernConfig, ModernGPT
from glassgpt.softmax import cross_entropy

SIZES = {"vocab_size": 97, "context": 32, "layers": 3, "heads": 4, "width": 48}
CONFIG = GPTConfig(**SIZES)


def random_model(config=CONFIG, seed=0):
    """A model in 64 bits, every parameter of which is random."""
    generator = torch.Generator().manual_seed(seed)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25, generator=generator)
    return model


def random_ids(batch, time, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], (batch, time), generator=generator)


def left_padding(starts, time, first=0):
    """Positions (B, T) and mask (B, 1, T, S) for rows that begin at `starts`."""
    keys = torch.arange(first + time)
    queries = keys[first:, None]
    positions = (keys[first:] - starts[:, None]).clamp(min=0)
    begun = (keys >= starts[:, None, None]) | (keys == queries)  # padding sees itself
    return positions, ((keys <= queries) & begun)[:, None]


def logits_of(model, ids, *others):
    """Logits where positions, a mask or caches are given."""
    return model.head(model.hidden_states(ids, *others))


class Cache:
    """Keys and values of one layer, in the simplest way."""

    def __init__(self):
        self.length, self.seen = 0, []

    def append(self, keys, values):
        self.seen.append((keys, values))
        self.length += keys.shape[2]
        return tuple(torch.cat(parts, dim=2) for parts in zip(*self.seen, strict=True))


def test_package_passes_its_checks():
    checks.check_gpt(GPT)
    checks.check_config(GPTConfig)


# GPT-2's names for our layers.
GPT2_NAMES = {
    "tokens": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "attention_norm": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.expand": "mlp.c_fc",
    "mlp.projection": "mlp.c_proj",
}


def gpt2_state(model):
    """Our parameters under GPT-2's names; its linear layers are (in, out)."""
    state = {}
    for name, value in model.named_parameters():
        block, layer = "", name
        if name.startswith("blocks."):
            _, number, layer = name.split(".", 2)
            block = f"h.{number}."
        layer, kind = layer.rsplit(".", 1)
        turn = block and value.dim() == 2
        state[f"transformer.{block}{GPT2_NAMES[layer]}.{kind}"] = (
            value.T if turn else value
        )
    return state


@pytest.fixture(scope="module")
def pair():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4
    )
    model = random_model(GPTConfig(**SIZES))
    theirs = transformers.GPT2LMHeadModel(config).double().eval()
    missing, unexpected = theirs.load_state_dict(gpt2_state(model), strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    return model, theirs


@torch.no_grad()
def test_logits_equal_gpt2_of_transformers(pair):
    model, theirs = pair
    for time in (1, 7, 32):
        ids = random_ids(3, time)
        wanted = theirs(ids).logits
        assert wanted.std() > 0.1
        torch.testing.assert_close(model(ids), wanted, atol=1e-9, rtol=0)


@torch.no_grad()
def test_left_padding_equals_gpt2_of_transformers(pair):
    model, theirs = pair
    ids, starts = random_ids(3, 9), torch.tensor([0, 4, 8])
    positions, mask = left_padding(starts, 9)
    shown = torch.arange(9) >= starts[:, None]
    wanted = theirs(ids, attention_mask=shown.long(), position_ids=positions).logits
    found = logits_of(model, ids, positions, mask)
    torch.testing.assert_close(found[shown], wanted[shown], atol=1e-9, rtol=0)


def test_gradients_equal_gpt2_of_transformers(pair):
    model, theirs = pair
    ids = random_ids(2, 16)
    targets = random_ids(2, 16, seed=2)
    F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).backward()
    logits = theirs(ids).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    state = dict(theirs.named_parameters())
    for name, value in gpt2_state(model).items():
        assert value.shape == state[name].shape
    grads = SimpleNamespace(
        named_parameters=lambda: [(n, p.grad) for n, p in model.named_parameters()]
    )
    for name, gradient in gpt2_state(grads).items():
        torch.testing.assert_close(gradient, state[name].grad, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_shapes_and_causality():
    model, ids = random_model(), random_ids(2, 10)
    before = model(ids)
    assert before.shape == (2, 10, 97)
    for changed in (0, 4, 9):
        other = ids.clone()
        other[:, changed] = (ids[:, changed] + 1) % 97
        after = model(other)
        torch.testing.assert_close(after[:, :changed], before[:, :changed])
        assert ((after - before)[:, changed:].abs().amax(-1) > 1e-9).all()
    torch.testing.assert_close(model(ids[:, :6]), before[:, :6])
    torch.testing.assert_close(model(ids[1:]), before[1:])


@torch.no_grad()
def test_logits_are_the_head_of_the_hidden_states():
    model, ids = random_model(), random_ids(2, 7)
    hidden = model.hidden_states(ids)
    assert hidden.shape == (2, 7, 48)
    assert torch.equal(model(ids), model.head(hidden))
    entering = model.embed(ids, torch.arange(7))
    wanted = model.tokens.weight[ids] + model.positions.weight[:7]
    assert torch.equal(entering, wanted)


@pytest.mark.parametrize("pieces", [[1] * 10, [4, 6], [9, 1], [3, 1, 5, 1]])
@torch.no_grad()
def test_cached_pieces_equal_the_whole(pieces):
    model, ids = random_model(), random_ids(2, 10)
    caches = [Cache() for _ in model.blocks]
    found = [model(piece, caches=caches) for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids))


@torch.no_grad()
def test_padded_rows_equal_rows_by_themselves():
    model, ids = random_model(), random_ids(3, 10)
    starts = torch.tensor([0, 3, 8])
    padded = logits_of(model, ids, *left_padding(starts, 10))
    assert padded.isfinite().all()
    caches = [Cache() for _ in model.blocks]
    stepped = [
        logits_of(model, ids[:, :9], *left_padding(starts, 9), caches),
        logits_of(model, ids[:, 9:], *left_padding(starts, 1, first=9), caches),
    ]
    stepped = torch.cat(stepped, dim=1)
    for row, start in enumerate(starts.tolist()):
        alone = model(ids[row : row + 1, start:])[0]
        torch.testing.assert_close(padded[row, start:], alone)
        torch.testing.assert_close(stepped[row, start:], alone)


def test_padding_has_no_influence_even_on_gradients():
    model, ids = random_model(), random_ids(2, 6)
    logits = logits_of(model, ids, *left_padding(torch.tensor([0, 4]), 6))
    gradient = torch.autograd.grad(logits[1, 4:].sum(), model.tokens.weight)[0]
    alone = model(ids[1:, 4:])
    wanted = torch.autograd.grad(alone.sum(), model.tokens.weight)[0]
    torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_without_positions_only_the_mask_tells_the_order(layers):
    model = random_model(replace(CONFIG, layers=layers))
    ids = random_ids(1, 4)
    exchanged = ids[:, [1, 0, 2, 3]]
    assert not torch.allclose(model(ids)[:, -1], model(exchanged)[:, -1])
    model.positions.weight.zero_()
    same = torch.allclose(model(ids)[:, -1], model(exchanged)[:, -1])
    assert same == (layers == 1)


# The start.


def test_initialization():
    torch.manual_seed(0)
    model = GPT(replace(CONFIG, width=128, vocab_size=500))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            small = name.endswith("projection.weight")
            wanted = 0.02 / math.sqrt(6) if small else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=wanted / 10), name
    ids = random_ids(4, 32)
    loss = F.cross_entropy(model(ids).flatten(0, 1), random_ids(4, 32, 2).flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)


def test_random_logits_cost_half_their_variance():
    torch.manual_seed(0)
    model = GPT(GPTConfig(5000, context=32, layers=1))
    with torch.no_grad():
        logits = model(torch.randint(5000, (2, 32)))
    loss = (logits.logsumexp(dim=-1) - logits.mean(dim=-1)).mean().item()
    assert loss == pytest.approx(math.log(5000) + 0.02**2 * 768 / 2, abs=0.01)


def test_initialize_fills_every_parameter():
    model = GPT(CONFIG)
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    model.initialize()
    assert model(random_ids(1, 4)).isfinite().all()


# What is counted.


def test_parameter_count_of_gpt2_without_memory():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50_257))
        untied = GPT(GPTConfig(vocab_size=50_257, tied=False))
    assert model.parameter_count() == 124_439_808
    assert untied.parameter_count() == 124_439_808 + 50_257 * 768


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_pytorch_counts(tied):
    model = GPT(replace(CONFIG, tied=tied))
    # Attention as products that it counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(random_ids(2, 32)).sum().backward()
    assert counter.get_total_flops() == 2 * 32 * model.flops_per_token()


# A tied table is one tensor, whatever is done to the model.


def is_tied(model):
    return model.head.weight is model.tokens.weight


def test_the_head_stays_tied():
    model = random_model()
    assert is_tied(model.double())
    assert is_tied(copy.deepcopy(model))
    other = GPT(CONFIG).double()
    other.load_state_dict(model.state_dict())
    assert is_tied(other)
    torch.testing.assert_close(other(random_ids(1, 4)), model(random_ids(1, 4)))
    assert not is_tied(GPT(replace(CONFIG, tied=False)))


# What is refused.

BAD_IDS = [
    (torch.tensor([[0, 97]]), "id 97 is out of range: ids are 0 to 96"),
    (torch.tensor([[5, -1]]), "id -1 is out of range"),
    (
        torch.zeros(1, 33, dtype=torch.int64),
        "33 tokens, but the context has room for 32",
    ),
    (torch.zeros(1, 0, dtype=torch.int64), "at least one id"),
    (torch.zeros(0, 3, dtype=torch.int64), "at least one id"),
    (torch.zeros(3, dtype=torch.int64), r"\(B, T\), not torch.int64 \(3,\)"),
    (torch.zeros(1, 3), "must be an int64 tensor"),
    (torch.zeros(1, 3, dtype=torch.bool), "must be an int64 tensor"),
    ([[1, 2]], "not <class 'list'>"),
]


@pytest.mark.parametrize(("ids", "message"), BAD_IDS)
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_ids_are_refused(ids, message, compiled):
    model = GPT(CONFIG)
    if compiled:
        model = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=message):
        model(ids)


@pytest.mark.parametrize(("ids", "message"), BAD_IDS)
def test_bad_ids_are_refused_before_the_model_runs(ids, message):
    model = GPT(CONFIG)
    for module in model.children():
        module.register_forward_pre_hook(lambda *_: pytest.fail("the model runs"))
    with pytest.raises(ValueError, match=message):
        model(ids)


def test_ids_are_looked_at_once(monkeypatch):
    looks = []
    monkeypatch.setattr("glassgpt.gpt.check_ids", lambda *a: looks.append(a))
    model, ids = GPT(CONFIG), random_ids(1, 4)
    model(ids)
    assert len(looks) == 1
    model.hidden_states(ids)
    assert len(looks) == 1


def test_the_highest_ids_and_the_longest_text_are_read():
    check_ids(torch.tensor([[0, 96]]), 97, 2)
    assert GPT(CONFIG)(torch.full((1, 32), 96)).shape == (1, 32, 97)


def test_the_room_counts_what_a_cache_holds():
    model = GPT(CONFIG)
    caches = [Cache() for _ in model.blocks]
    model(random_ids(1, 30), caches=caches)
    with pytest.raises(ValueError, match="3 tokens, but the context has room for 2"):
        model(random_ids(1, 3), caches=caches)
    assert model(random_ids(1, 2), caches=caches).shape == (1, 2, 97)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_on_a_gpu():
    model, ids = random_model(), random_ids(3, 10)
    positions, mask = left_padding(torch.tensor([0, 3, 9]), 10)
    wanted, padded = model(ids), logits_of(model, ids, positions, mask)
    model, ids = model.cuda(), ids.cuda()
    positions, mask = positions.cuda(), mask.cuda()
    with pytest.raises(ValueError, match="97"):
        model(torch.full_like(ids, 97))
    torch.testing.assert_close(model(ids).cpu(), wanted)
    found = logits_of(model, ids, positions, mask)
    torch.testing.assert_close(found.cpu(), padded)
    assert logits_of(model.bfloat16(), ids, positions, mask).isfinite().all()


def test_hidden_states_compile_whole():
    model, ids = random_model(), random_ids(2, 8)

    def logits(ids):
        return model.head(model.hidden_states(ids))

    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))
    compiled(ids).sum().backward()
    assert model.tokens.weight.grad.isfinite().all()


def test_dropout_acts_in_training_only():
    model, ids = GPT(replace(CONFIG, dropout=0.5)), random_ids(1, 8)
    assert not torch.equal(model(ids), model(ids))
    entering = model.embed(ids, torch.arange(8))
    assert not entering.all()
    assert {block.dropout.p for block in model.blocks} == {0.5}
    assert {block.attention.dropout for block in model.blocks} == {0.5}
    model.eval()
    assert torch.equal(model(ids), model(ids))


# The same model, computed by the functions of the chapters.


@st.composite
def models_with_ids(draw):
    """A model of any small sizes, its weights at random, and ids that it can read."""
    sizes = st.integers(1, 8)
    heads, context = draw(sizes), draw(sizes)
    config = GPTConfig(
        vocab_size=draw(st.integers(2, 20)),
        context=context,
        layers=draw(st.integers(1, 3)),
        heads=heads,
        width=heads * draw(st.integers(1, 5)),
        tied=draw(st.booleans()),
    )
    model = random_model(config, seed=draw(st.integers(0, 1000)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = draw(st.integers(1, 3)), draw(st.integers(1, context))
    return model, torch.randint(config.vocab_size, shape, generator=generator)


def gradients(model, ids):
    cross_entropy(model(ids), ids).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@settings(deadline=None, max_examples=50)
@given(models_with_ids(), st.integers(1, 8))
def test_by_hand_is_the_same_model(drawn, piece):
    model, ids = drawn
    made, wanted = by_hand(model), model(ids)
    close = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(made(ids), wanted, **close)
    torch.testing.assert_close(made.state_dict(), model.state_dict(), **close)
    caches = [KeyValueCache(model.config.context) for _ in model.blocks]
    pieces = [made(part, caches=caches) for part in ids.split(piece, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), wanted, **close)
    torch.testing.assert_close(gradients(made, ids), gradients(model, ids), **close)


@torch.no_grad()
def test_by_hand_takes_a_mask_as_the_model_does():
    model, ids = random_model(), random_ids(3, 10)
    padding = left_padding(torch.tensor([0, 3, 8]), 10)
    wanted = logits_of(model, ids, *padding)
    torch.testing.assert_close(logits_of(by_hand(model), ids, *padding), wanted)


def test_by_hand_calls_none_of_the_kernels_that_it_replaces():
    called = set()

    class Listening(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.add(function)
            return function(*args, **(kwargs or {}))

    kernels = {F.scaled_dot_product_attention, F.gelu, F.layer_norm}
    model, ids = random_model(), random_ids(1, 5)
    with Listening():
        model(ids)
    assert kernels <= called
    called.clear()
    with Listening():
        by_hand(model)(ids)
    assert not kernels & called


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention": lambda q, k, v, mask: attention(q, k, v)},
        {"attention": lambda q, k, v, mask: attention(2 * q, k, v, mask)},
        {"gelu": F.gelu},
        {"gelu": F.relu},
        {"layer_norm": lambda x, weight, bias: layer_norm(x, weight, 0 * bias)},
        {"layer_norm": lambda x, weight, bias: layer_norm(x, weight, bias, 1e-3)},
    ],
)
@torch.no_grad()
def test_by_hand_computes_with_what_it_is_given(wrong):
    model, ids = random_model(), random_ids(2, 10)
    assert (by_hand(model, **wrong)(ids) - model(ids)).abs().max() > 1e-6


def test_by_hand_replaces_every_norm():
    made = by_hand(random_model(), layer_norm=lambda x, weight, bias: 7 * x)
    x = torch.randn(2, 48, dtype=torch.float64)
    norms = [made.norm]
    for block in made.blocks:
        norms += [block.attention_norm, block.mlp_norm]
    for norm in norms:
        assert torch.equal(norm(x), 7 * x)


def test_by_hand_learns_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model, ids = GPT(CONFIG), random_ids(4, 32)
    before = copy.deepcopy(model.state_dict())
    learner = by_hand(model)
    assert is_tied(learner)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = cross_entropy(learner(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > math.log(97) - 0.2
    assert losses[-1] < 0.5 * losses[0]
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )


def test_by_hand_refuses_a_model_of_other_parts():
    modern = ModernGPT(ModernConfig(97, context=32, layers=1, heads=4, width=48))
    with pytest.raises(TypeError, match="by_hand takes a plain GPT, not a ModernGPT"):
        by_hand(modern)


def test_by_hand_drops_in_training_only():
    model, ids = GPT(replace(CONFIG, dropout=0.3)), random_ids(1, 8)
    made = by_hand(model)
    block = made.blocks[0].attention
    x = torch.randn(1, 8, 48)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(made.eval()(ids), made(ids))
    torch.testing.assert_close(made(ids), model.eval()(ids))


# The configuration.


def test_defaults_are_those_of_gpt2():
    assert vars(GPTConfig(50_257)) == {
        "vocab_size": 50_257,
        "context": 1024,
        "layers": 12,
        "heads": 12,
        "width": 768,
        "dropout": 0.0,
        "tied": True,
    }


def test_a_configuration_does_not_change():
    with pytest.raises(AttributeError):
        CONFIG.layers = 5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 0}, "context must be a whole number from 1 up, not 0"),
        ({"heads": 2.0}, "heads must be a whole number"),
        ({"layers": "3"}, "layers must be a whole number from 1 up, not '3'"),
        ({"width": np.int64(48)}, r"width must be .* not np.int64\(48\)"),
        ({"width": 50}, "width 50 is no multiple of 4 heads"),
        ({"dropout": -0.1}, r"dropout must lie in \[0, 1\), not -0.1"),
        ({"dropout": 1}, "dropout must lie in"),
        ({"dropout": math.nan}, "dropout must lie in"),
        ({"dropout": "a"}, r"dropout must lie in \[0, 1\), not 'a'"),
        ({"vocab_size": True}, "vocab_size must be a whole number from 1 up, not True"),
    ],
)
def test_config_refuses_the_impossible(values, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SIZES, **values})


# Right versions. A check must let them pass.


class AsOpenAI(GPT):
    def initialize(self):
        super().initialize()
        nn.init.normal_(self.positions.weight, std=0.01)


class ByHand(nn.Module):
    def __init__(self, config):
        super().__init__()
        ours = GPT(config)
        self.config, self.tokens, self.positions = config, ours.tokens, ours.positions
        self.blocks, self.norm, self.head = ours.blocks, ours.norm, ours.head
        self.dropout = ours.dropout

    def forward(self, ids):
        V, T = self.config.vocab_size, self.config.context
        if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[1] > T:
            raise ValueError("ids")
        if not ids.numel() or ids.min() < 0 or ids.max() >= V:
            raise ValueError("none, or out of range")
        x = self.tokens.weight[ids] + self.positions.weight[: ids.shape[1]]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.head.weight.T


class InThirtyTwoBits(GPT):
    def forward(self, ids):
        return super().forward(ids).float().double()


class OneByOne(GPT):
    def forward(self, ids):
        return torch.cat([super(OneByOne, self).forward(row[None]) for row in ids])


@pytest.mark.parametrize("right", [GPT, AsOpenAI, ByHand, InThirtyTwoBits, OneByOne])
def test_check_lets_a_right_version_pass(right):
    checks.check_gpt(right)


def test_check_lets_a_right_budget_pass():
    checks.check_budget(largest)


# Wrong versions. Each check must notice, and say which mistake it was.


class WithoutPositions(GPT):
    def embed(self, ids, positions):
        return self.tokens(ids)


class Backwards(GPT):
    def embed(self, ids, positions):
        return super().embed(ids, positions.flip(-1))


class WithoutNorm(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.Identity()


class WithoutABlock(GPT):
    def hidden_states(self, ids, positions=None, mask=None, caches=None):
        x = self.embed(ids, torch.arange(ids.shape[1]))
        for block in self.blocks[1:]:
            x = block(x)
        return self.norm(x)


class PostNormBlock(Block):
    def forward(self, x, mask=None, cache=None):
        x = self.attention_norm(x + self.attention(x, mask, cache))
        return self.mlp_norm(x + self.mlp(x))


class PostNorm(GPT):
    def __init__(self, config):
        super().__init__(config)
        blocks = (PostNormBlock(config.width, config.heads) for _ in self.blocks)
        self.blocks = nn.ModuleList(blocks)
        self.initialize()


class Masked(GPT):
    def hidden_states(self, ids, positions=None, mask=None, caches=None):
        T = ids.shape[1]
        return super().hidden_states(ids, positions, self.sight(T, T, dtype=torch.bool))


def ones(T, S, dtype):
    return torch.ones(T, S, dtype=dtype)


def eye(T, S, dtype):
    return torch.eye(T, S, dtype=dtype)


class Peeking(Masked):
    sight = staticmethod(ones)


class UnmaskedInTraining(Peeking):
    def hidden_states(self, *given, **named):
        kind = Peeking if self.training else GPT
        return kind.hidden_states(self, *given, **named)


class Blind(Masked):
    sight = staticmethod(eye)


class OnlyTheLast(GPT):
    def forward(self, ids):
        return super().forward(ids)[:, -1:]


class LoudStart(GPT):
    def initialize(self):
        super().initialize()
        nn.init.normal_(self.tokens.weight)


def started(spread):
    """A GPT whose projections start with this standard deviation for so many layers."""

    class Started(GPT):
        def initialize(self):
            super().initialize()
            for name, weight in self.named_parameters():
                if name.endswith("projection.weight"):
                    nn.init.normal_(weight, std=spread(len(self.blocks)))

    return Started


class AllZero(GPT):
    def initialize(self):
        super().initialize()
        for parameter in self.parameters():
            parameter.data.zero_()


class EvenProjections(GPT):
    def initialize(self):
        super().initialize()
        for name, parameter in self.named_parameters():
            if name.endswith("projection.weight"):
                parameter.data.mul_(math.sqrt(2 * self.config.layers))


class LoudBiases(GPT):
    def initialize(self):
        super().initialize()
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.02)


class QuietNorms(GPT):
    def initialize(self):
        super().initialize()
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.data.fill_(0.9)


class NeverDropping(GPT):
    def __init__(self, config):
        super().__init__(replace(config, dropout=0.0))


class DroppingInBlocksOnly(GPT):
    def embed(self, ids, positions):
        return self.tokens(ids) + self.positions(positions)


class DroppingAtTheStartOnly(NeverDropping):
    def __init__(self, config):
        super().__init__(config)
        self.dropout.p = config.dropout


class KeepingAttention(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.attention.dropout = 0.0


class AlwaysTied(GPT):
    def __init__(self, config):
        super().__init__(replace(config, tied=True))


class AnyWholeNumber(GPT):
    def forward(self, ids):
        return super().forward(ids if ids.is_floating_point() else ids.long())


class ReadingNothing(GPT):
    def forward(self, ids):
        return super().forward(ids) if ids.numel() else ids.new_zeros(*ids.shape, 11)


class AlwaysDropping(GPT):
    def embed(self, ids, positions):
        return F.dropout(super().embed(ids, positions), self.dropout.p)


class Untied(GPT):
    def __init__(self, config):
        super().__init__(replace(config, tied=False))


class Biased(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.head.bias = nn.Parameter(torch.zeros(config.vocab_size))


class OneHead(GPT):
    def __init__(self, config):
        super().__init__(replace(config, heads=1))


class ExactGELU(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.mlp.forward = partial(self.exact, block.mlp)

    @staticmethod
    def exact(mlp, x):
        return mlp.projection(F.gelu(mlp.expand(x)))


class LargeEpsilon(GPT):
    def __init__(self, config):
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-2


class DetachedStream(GPT):
    def hidden_states(self, ids, positions=None, mask=None, caches=None):
        x = self.embed(ids, torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x.detach())
        return self.norm(x)


class DetachedHead(GPT):
    def forward(self, ids):
        check_ids(ids, self.config.vocab_size, self.config.context)
        return F.linear(self.hidden_states(ids), self.head.weight.detach())


class WithoutGradients(GPT):
    forward = torch.no_grad()(GPT.forward)


class OtherNames(GPT):
    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.mlp = nn.Sequential(block.mlp)


class Squeezed(GPT):
    def forward(self, ids):
        return super().forward(ids).squeeze()


class ReadByTheTable(GPT):
    """The table of tokens is the head, whatever `tied` says."""

    def forward(self, ids):
        check_ids(ids, self.config.vocab_size, self.config.context)
        return self.hidden_states(ids) @ self.tokens.weight.T


class LoudHead(GPT):
    """An untied head starts as nn.Linear does."""

    def initialize(self):
        super().initialize()
        if not self.config.tied:
            self.head.reset_parameters()


class BiasedHead(GPT):
    def __init__(self, config):
        super().__init__(config)
        if not config.tied:
            self.head.bias = nn.Parameter(torch.zeros(config.vocab_size))


class TwoHeads(GPT):
    def __init__(self, config):
        super().__init__(replace(config, heads=2))


class Forgiving(GPT):
    def forward(self, ids):
        return self.head(self.hidden_states(ids.clamp(0, self.config.vocab_size - 1)))


class Brusque(GPT):
    def forward(self, ids):
        if (ids >= self.config.vocab_size).any():
            raise IndexError("index out of range in self")
        return super().forward(ids)


def accepting(**values):
    return SimpleNamespace(**values)


def asserting(**values):
    assert values["vocab_size"] > 0
    return SimpleNamespace(**values)


def vague(**values):
    try:
        return GPTConfig(**values)
    except ValueError:
        raise ValueError("bad value") from None


def changeable(**values):
    return SimpleNamespace(**vars(GPTConfig(**values)))


def shorter(**values):
    return GPTConfig(**{"context": 512, **values})


def lenient(allowed, *names):
    """Sizes that `allowed` accepts pass, under these names."""

    def config(**values):
        odd = any(allowed(values[name]) for name in names if name in values)
        return SimpleNamespace(**values) if odd else GPTConfig(**values)

    return config


def deaf(**values):
    return GPTConfig(**{**values, "layers": 1})


def count(V, T, L, C, tables=1, positions=1, bias=13, last=2):
    return tables * V * C + positions * T * C + L * (12 * C * C + bias * C) + last * C


def early(model, ids, layers, norm=True, positions=True):
    x = model.tokens(ids)
    x = x + model.positions(torch.arange(ids.shape[1])) if positions else x
    for block in model.blocks[:layers]:
        x = block(x)
    return model.head(model.norm(x) if norm else x)


def early_by_the_table(model, ids, layers):
    x = model.embed(ids, torch.arange(ids.shape[1]))
    for block in model.blocks[:layers]:
        x = block(x)
    return model.norm(x) @ model.tokens.weight.T


def early_of_four(model, ids, layers):
    x = model.embed(ids, torch.arange(4))
    for block in model.blocks[:layers]:
        x = block(x)
    return model.head(model.norm(x))


def early_by_hook(model, ids, layers):
    """Right logits, but the hook stays."""
    seen = {}
    read = model.blocks[layers] if layers < len(model.blocks) else model.norm
    read.register_forward_pre_hook(lambda part, inputs: seen.update(x=inputs[0]))
    model(ids)
    return model.head(model.norm(seen["x"]))


def early_by_zeroing(model, ids, layers):
    for block in model.blocks[layers:]:
        for part in (block.attention, block.mlp):
            part.projection.weight.zero_()
            part.projection.bias.zero_()
    return model(ids)


def unmasked(queries, keys, values, mask):
    return attention(queries, keys, values)


def by_the_root(x, weight, bias):
    return x / x.square().mean(-1, keepdim=True).sqrt() * weight + bias


def detached(x):
    return gelu(x.detach())


def config_of(**values):
    values = {"vocab_size": 500, "context": 128, "heads": 2, "width": 64, **values}
    return lambda budget: GPTConfig(**values)


def largest(budget, layers=range(1, 9), heads=range(1, 17)):
    """The costliest that fits, by the formulas of the chapter."""
    costs = {}
    for L, C in itertools.product(layers, (32 * number for number in heads)):
        weights = 12 * L * C**2 + 500 * C
        parameters = weights + 13 * L * C + 128 * C + 2 * C
        costs[20 * parameters * (6 * weights + 12 * L * C * 128)] = L, C
    L, C = costs[max(cost for cost in costs if cost <= budget)]
    return config_of(layers=L, heads=C // 32, width=C)(budget)


WRONG = [
    ("check_gpt", WithoutPositions, "the positions are missing"),
    ("check_gpt", Backwards, "the logits are not head"),
    ("check_gpt", WithoutNorm, "the last norm, before the head"),
    ("check_gpt", WithoutABlock, "the first block is left out"),
    ("check_gpt", PostNorm, "the blocks normalize after adding"),
    ("check_gpt", OnlyTheLast, "not (B, T, V) = (2, 6, 11)"),
    ("check_gpt", Peeking, "position 0 sees position 1: the future leaks"),
    ("check_gpt", Blind, "position 1 doesn't see position 0"),
    ("check_gpt", LoudStart, "start with smaller weights"),
    ("check_gpt", started(lambda layers: 0.02 / layers), "not 0.0082"),
    ("check_gpt", started(lambda layers: 0.01), "not 0.0082"),
    ("check_gpt", UnmaskedInTraining, "position 0 sees position 1: the future leaks"),
    ("check_gpt", AllZero, "starts with a standard deviation of 0.0000"),
    ("check_gpt", EvenProjections, "projection.weight starts with a standard dev"),
    ("check_gpt", LoudBiases, "attention_norm.bias must start at 0"),
    ("check_gpt", QuietNorms, "attention_norm.weight must start at 1"),
    ("check_gpt", NeverDropping, "dropout must act on tokens + positions"),
    ("check_gpt", DroppingInBlocksOnly, "dropout must act on tokens + positions"),
    ("check_gpt", DroppingAtTheStartOnly, "dropout must act on tokens + positions"),
    ("check_gpt", KeepingAttention, "on the weights of attention, too"),
    ("check_gpt", AlwaysTied, "tied=False was ignored"),
    ("check_gpt", AnyWholeNumber, "64 bits, not 32, but it was accepted"),
    ("check_gpt", ReadingNothing, "there must be an id, but it was accepted"),
    ("check_gpt", AlwaysDropping, "dropout acts after eval(), too"),
    ("check_gpt", Untied, "the head has a table of its own"),
    ("check_gpt", Biased, "parameters, not"),
    ("check_gpt", OneHead, "look at the heads, the GELU, the norms"),
    ("check_gpt", ExactGELU, "look at the heads, the GELU, the norms"),
    ("check_gpt", LargeEpsilon, "look at the heads, the GELU, the norms"),
    ("check_gpt", DetachedStream, "tokens.weight gets another gradient"),
    ("check_gpt", DetachedHead, "tokens.weight gets another gradient"),
    ("check_gpt", WithoutGradients, "no gradient flows through the model"),
    ("check_gpt", OtherNames, "nothing in the model is called blocks.0.mlp.expand"),
    ("check_gpt", Squeezed, "logits (3, 11), not (B, T, V) = (1, 3, 11)"),
    ("check_gpt", ReadByTheTable, "with 4 heads and tied=False the same weights"),
    ("check_gpt", LoudHead, "the untrained loss is 6.36"),
    ("check_gpt", BiasedHead, "parameters, not"),
    ("check_gpt", TwoHeads, "with 4 heads and tied=False the same weights"),
    ("check_gpt", Forgiving, "id 11 is not in a vocabulary of 11"),
    ("check_gpt", Brusque, "raise a ValueError, not IndexError"),
    ("check_config", accepting, "from 1 up, not 0, but it was accepted"),
    ("check_config", asserting, "not AssertionError"),
    ("check_config", vague, "names none of them: bad value"),
    ("check_config", changeable, "can be changed: make it frozen"),
    ("check_config", shorter, "by default context is 512, not 1024"),
    *(
        ("check_config", lenient(allowed, name), f"{name} is a whole number from 1 up")
        for name in ("vocab_size", "context", "layers", "heads", "width")
        for allowed in (
            lambda size: size == 0,
            lambda size: size < 0,
            lambda size: type(size) is float,
            lambda size: type(size) is bool,
        )
    ),
    ("check_config", deaf, "layers=2 became 1"),
    ("check_parameter_count", lambda *s: count(*s, tables=2), "counted twice"),
    ("check_parameter_count", lambda *s: count(*s, positions=0), "table of positions"),
    ("check_parameter_count", lambda *s: count(*s, tables=0), "table of tokens"),
    ("check_parameter_count", lambda *s: count(*s, last=0), "the last norm"),
    ("check_parameter_count", lambda *s: count(*s, bias=9), "the biases of attention"),
    ("check_parameter_count", lambda *s: count(*s, bias=8), "the biases of the MLP"),
    ("check_parameter_count", lambda *s: count(*s, last=1), "the last norm has a bias"),
    ("check_parameter_count", lambda *s: count(*s, bias=11), "a block has two norms"),
    ("check_parameter_count", lambda *s: count(*s, bias=4), "biases of the linear"),
    ("check_parameter_count", lambda *s: count(*s, bias=10), "biases of qkv"),
    ("check_parameter_count", lambda *s: count(*s, bias=11, last=1), "norms have a"),
    ("check_parameter_count", lambda *s: count(*s, bias=0), "norms of the blocks"),
    (
        "check_parameter_count",
        lambda *s: count(*s, bias=0, last=0),
        "biases and norms are missing",
    ),
    ("check_parameter_count", lambda *s: count(*s) + s[0], "the head has no bias"),
    ("check_parameter_count", lambda *s: count(*s) + 5, "off by 5"),
    (
        "check_parameter_count",
        lambda V, T, L, C: min(count(V, T, L, C), 1_000_000),
        "GPT-2 has 124,439,808",
    ),
    (
        "check_early_logits",
        lambda m, ids, n: m(ids),
        "all three blocks still took part",
    ),
    ("check_early_logits", lambda *a: early(*a, norm=False), "last norm is missing"),
    ("check_early_logits", lambda *a: early(*a, positions=False), "were the positions"),
    ("check_early_logits", lambda *a: early(*a[:2], 0), "was thrown away"),
    ("check_early_logits", lambda *a: early(*a[:2], a[2] + 1), "one block too many"),
    ("check_early_logits", early_by_the_table, "and `head` asked?"),
    ("check_early_logits", lambda *a: early(*a)[0], "logits have shape"),
    ("check_early_logits", lambda *a: early(*a).softmax(-1), "return the logits"),
    ("check_early_logits", early_of_four, "(2, 4, 11), not (2, 1, 11)"),
    ("check_early_logits", lambda m, *a: early(m.train(), *a), "leave it as it is"),
    ("check_early_logits", early_by_hook, "hooks of the model changed"),
    ("check_early_logits", early_by_zeroing, "weights, requires_grad"),
    (
        "check_early_logits",
        lambda m, *a: early(m.requires_grad_(False), *a),
        "leave it as it is",
    ),
    ("check_own_parts", lambda: (unmasked, gelu, layer_norm), "with your attention"),
    ("check_own_parts", lambda: (attention, F.gelu, layer_norm), "with your GELU"),
    ("check_own_parts", lambda: (attention, gelu, by_the_root), "your layer norm"),
    ("check_own_parts", lambda: (attention, detached, layer_norm), "is something det"),
    ("check_budget", lambda budget: None, "return a GPTConfig"),
    ("check_budget", config_of(vocab_size=65), "vocab_size is 65"),
    ("check_budget", config_of(context=64), "context is 64"),
    ("check_budget", config_of(width=128), "heads have width 64"),
    ("check_budget", config_of(layers=1), "1e+13 is used: at least 50% are"),
    ("check_budget", config_of(layers=40), "budget 1e+13 would be spent"),
    ("check_budget", config_of(tied=False), "a GPT-2 ties its head"),
    ("check_budget", lambda budget: largest(budget, layers=(3,)), "2e+13 is used"),
    ("check_budget", lambda budget: largest(budget, heads=(4,)), "2e+13 is used"),
    (
        "check_budget",
        lambda budget: largest(budget, layers=range(1, 2000), heads=(1,)),
        "layers: at most 48 are wanted",
    ),
    (
        "check_budget",
        lambda budget: config_of(
            layers=3 if budget < 1e14 else 6,
            heads=2 if budget < 1e14 else 5 if budget < 1e16 else 16,
            width=64 if budget < 1e14 else 160 if budget < 1e16 else 512,
        )(budget),
        "budget",
    ),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)
