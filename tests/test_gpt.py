"""The GPT: parity with transformers, and properties."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from glassgpt.attention import attention
from glassgpt.block import layer_norm
from glassgpt.generation import KeyValueCache
from glassgpt.gpt import GPT, GPTConfig, by_hand, check_ids
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
