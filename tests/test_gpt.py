"""The GPT: parity with transformers, properties, and checks that name mistakes."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from glassgpt.checks import gpt as checks
from glassgpt.gpt import GPT, GPTConfig

SIZES = {"vocab_size": 97, "context": 32, "layers": 3, "heads": 4, "width": 48}
CONFIGS = [
    GPTConfig(**SIZES),
    GPTConfig(**SIZES, positions="sinusoidal", bias=False, tied=False),
    GPTConfig(**SIZES, positions="rotary", norm="rms"),
    GPTConfig.modern(**SIZES),
]
by_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.positions)


def random_model(config, seed=0):
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
    columns = torch.arange(9)
    places = (columns - starts[:, None]).clamp(min=0)
    shown = (columns >= starts[:, None]).long()
    wanted = theirs(ids, attention_mask=shown, position_ids=places).logits
    found = model(ids, starts=starts)
    keep = shown.bool()
    torch.testing.assert_close(found[keep], wanted[keep], atol=1e-9, rtol=0)


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


def test_parameter_count_of_gpt2_without_memory():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50_257))
        untied = GPT(GPTConfig(vocab_size=50_257, tied=False))
    assert model.parameter_count() == 124_439_808
    assert untied.parameter_count() == 124_439_808 + 50_257 * 768


@by_config
@torch.no_grad()
def test_shapes_and_causality(config):
    model, ids = random_model(config), random_ids(2, 10)
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


@by_config
@pytest.mark.parametrize("pieces", [[1] * 10, [4, 6], [9, 1], [3, 1, 5, 1]])
@torch.no_grad()
def test_cached_pieces_equal_the_whole(config, pieces):
    model, ids = random_model(config), random_ids(2, 10)
    caches = [Cache() for _ in model.blocks]
    found = [model(piece, caches) for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids))


@by_config
@torch.no_grad()
def test_padded_rows_equal_rows_by_themselves(config):
    model, ids = random_model(config), random_ids(3, 10)
    starts = torch.tensor([0, 3, 9])
    padded = model(ids, starts=starts)
    assert padded.isfinite().all()
    caches = [Cache() for _ in model.blocks]
    first = model(ids[:, :9], caches, starts.clamp(max=8))
    stepped = [first, model(ids[:, 9:], caches, starts.clamp(max=8))]
    stepped = torch.cat(stepped, dim=1)
    for row, start in enumerate(starts.tolist()):
        alone = model(ids[row : row + 1, start:])[0]
        torch.testing.assert_close(padded[row, start:], alone)
        begin = min(start, 8)
        alone = model(ids[row : row + 1, begin:])[0]
        torch.testing.assert_close(stepped[row, begin:], alone)


def test_padding_has_no_influence_even_on_gradients():
    model, ids = random_model(GPTConfig(**SIZES)), random_ids(2, 6)
    starts = torch.tensor([0, 4])
    logits = model(ids, starts=starts)
    gradient = torch.autograd.grad(logits[1, 4:].sum(), model.tokens.weight)[0]
    alone = model(ids[1:, 4:])
    wanted = torch.autograd.grad(alone.sum(), model.tokens.weight)[0]
    torch.testing.assert_close(gradient, wanted)


@by_config
def test_initialization(config):
    torch.manual_seed(0)
    big = GPTConfig(**{**vars(config), "width": 128, "vocab_size": 500})
    model = GPT(big)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        elif big.zero_projections and name.endswith(
            ("projection.weight", "head.weight")
        ):
            assert not parameter.any()
        else:
            small = name.endswith("projection.weight")
            wanted = 0.02 / math.sqrt(6) if small else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
    ids = random_ids(4, 32)
    loss = F.cross_entropy(model(ids).flatten(0, 1), random_ids(4, 32, 2).flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)


def test_a_modern_model_starts_as_embedding_and_head():
    model = GPT(GPTConfig.modern(**SIZES))
    x, _ = model.embed(ids := random_ids(1, 5), torch.arange(5))
    for block in model.blocks:
        assert torch.equal(block(x), x)
    assert not model(ids).any()


@by_config
def test_flops_are_those_that_pytorch_counts(config):
    model = GPT(config).double()  # with attention as products that it counts
    with FlopCounterMode(display=False) as counter:
        model(random_ids(2, 32)).sum().backward()
    assert counter.get_total_flops() == 2 * 32 * model.flops_per_token()


# A tied table is one tensor, whatever is done to the model.


def is_tied(model):
    return model.head.weight is model.tokens.weight


def test_the_head_stays_tied():
    model = random_model(GPTConfig(**SIZES))
    assert is_tied(model.double())
    assert is_tied(copy.deepcopy(model))
    other = GPT(GPTConfig(**SIZES)).double()
    other.load_state_dict(model.state_dict())
    assert is_tied(other)
    torch.testing.assert_close(other(random_ids(1, 4)), model(random_ids(1, 4)))
    assert not is_tied(GPT(GPTConfig(**SIZES, tied=False)))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary"])
def test_fixed_tables_are_filled_by_initialize(positions):
    config = GPTConfig(**SIZES, positions=positions)
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    model.initialize()
    for name, table in GPT(config).named_buffers():
        assert torch.equal(model.get_buffer(name), table)
    assert model(random_ids(1, 4)).isfinite().all()


def test_sizes_from_numpy_are_the_same():
    found = GPTConfig(np.int64(11), context=np.int32(6), heads=2, width=np.uint8(8))
    assert found == GPTConfig(11, context=6, heads=2, width=8)
    assert json.dumps(vars(found))
    with pytest.raises(ValueError, match="dropout"):
        GPTConfig(11, dropout=False)


def test_meta_model_becomes_a_tied_one_when_initialized():
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    model.initialize()
    assert is_tied(model)
    assert model(random_ids(1, 4)).isfinite().all()
    assert model.parameter_count() == GPT(GPTConfig(**SIZES)).parameter_count()


# The door.


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0, 97]]), "97"),
        (torch.tensor([[5, -1]]), "-1"),
        (torch.zeros(1, 33, dtype=torch.int64), "33 tokens don't fit .* context of 32"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one id"),
        (torch.zeros(0, 3, dtype=torch.int64), "at least one id"),
        (torch.zeros(3, dtype=torch.int64), r"not torch.int64 \(3,\)"),
        (torch.zeros(1, 3), "not torch.float32"),
        (torch.zeros(1, 3, dtype=torch.bool), "not torch.bool"),
        ([[1, 2]], "not list"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_door(ids, message, compiled):
    model = GPT(GPTConfig(**SIZES))
    if compiled:
        model = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=message):
        model(ids)


def test_the_door_counts_what_a_cache_holds():
    model = GPT(GPTConfig(**SIZES))
    caches = [Cache() for _ in model.blocks]
    model(random_ids(1, 30), caches)
    with pytest.raises(ValueError, match="33 tokens don't fit"):
        model(random_ids(1, 3), caches)


def test_int32_ids_are_ids():
    model, ids = random_model(GPTConfig(**SIZES)), random_ids(2, 5)
    assert torch.equal(model(ids.int()), model(ids))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@by_config
@torch.no_grad()
def test_on_a_gpu(config):
    model, ids = random_model(config), random_ids(3, 10)
    starts = torch.tensor([0, 3, 9])
    wanted, padded = model(ids), model(ids, starts=starts)
    model, ids = model.cuda(), ids.cuda()
    with pytest.raises(ValueError, match="97"):
        model(torch.full_like(ids, 97))
    torch.testing.assert_close(model(ids).cpu(), wanted)
    found = model(ids, starts=starts.cuda()).cpu()
    torch.testing.assert_close(found, padded)
    half = model.bfloat16()(ids, starts=starts.cuda())
    assert half.isfinite().all()


# Compiling and recomputing.


@by_config
def test_logits_compile_whole(config):
    model, ids = random_model(config), random_ids(2, 8)
    compiled = torch.compile(model.logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))
    compiled(ids).sum().backward()
    assert model.tokens.weight.grad.isfinite().all()


@by_config
def test_recomputing_changes_no_gradient(config):
    config = GPTConfig(**{**vars(config), "dropout": 0.1})
    model, ids = random_model(config).train(), random_ids(2, 8)
    gradients = []
    for model.recompute in (False, True):
        torch.manual_seed(0)
        loss = model(ids).square().mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_recomputing_does_not_lose_a_cache():
    model, ids = random_model(GPTConfig(**SIZES)).train(), random_ids(1, 6)
    model.recompute = True
    caches = [Cache() for _ in model.blocks]
    found = [model(ids[:, :3], caches), model(ids[:, 3:], caches)]
    torch.testing.assert_close(torch.cat(found, dim=1), model(ids))


def test_dropout_acts_in_training_only():
    model, ids = GPT(GPTConfig(**SIZES, dropout=0.5)), random_ids(1, 8)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


# The configuration.


def test_defaults_are_those_of_gpt2():
    config = GPTConfig(50_257)
    assert vars(config) == {
        "vocab_size": 50_257,
        "context": 1024,
        "layers": 12,
        "heads": 12,
        "width": 768,
        "dropout": 0.0,
        "positions": "learned",
        "norm": "layer",
        "activation": "gelu",
        "normalize_qk": False,
        "bias": True,
        "tied": True,
        "zero_projections": False,
    }
    assert config.head_width == 64


def test_modern_can_be_overridden():
    config = GPTConfig.modern(65, width=64, heads=4, positions="learned")
    assert config.positions == "learned"
    assert config.norm == "rms"
    assert not config.tied
    with pytest.raises(TypeError, match="colour"):
        GPTConfig.modern(65, colour="red")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 0}, "context must be a whole number from 1 up, not 0"),
        ({"heads": 2.0}, "heads must be a whole number"),
        ({"width": 50}, "width 50 can't be split into 4 heads"),
        ({"dropout": -0.1}, r"dropout must be a number in \[0, 1\), not -0.1"),
        ({"dropout": "0.1"}, "dropout must be a number"),
        ({"positions": "absolute"}, "learned, sinusoidal, rotary, not 'absolute'"),
        ({"norm": None}, "norm must be one of layer, rms, not None"),
        ({"tied": 1}, "tied must be one of False, True, not 1"),
        ({"positions": "rotary", "width": 12}, "heads of even width, not 3"),
        ({"positions": "sinusoidal", "width": 9, "heads": 3}, "even width, not 9"),
    ],
)
def test_config_refuses_the_impossible(values, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SIZES, **values})


# Wrong versions. Each check must notice, and say which mistake it was.


class WithoutPositions(GPT):
    def embed(self, ids, places):
        return self.tokens(ids), None


class SamePosition(GPT):
    def embed(self, ids, places):
        return super().embed(ids, places.flip(-1))


def forward(model, ids, norm=True, blocks=slice(None), mask=None):
    x, _ = model.embed(ids, torch.arange(ids.shape[1]))
    for block in model.blocks[blocks]:
        x = block(x, mask=mask)
    return model.head(model.norm(x) if norm else x)


class WithoutNorm(GPT):
    def logits(self, ids, caches=None, starts=None):
        return forward(self, ids, norm=False)


class WithoutABlock(GPT):
    def logits(self, ids, caches=None, starts=None):
        return forward(self, ids, blocks=slice(1, None))


class Peeking(GPT):
    def logits(self, ids, caches=None, starts=None):
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool)
        return forward(self, ids, mask=mask)


class Blind(GPT):
    def logits(self, ids, caches=None, starts=None):
        return forward(self, ids, mask=torch.eye(ids.shape[1], dtype=torch.bool))


class OnlyTheLast(GPT):
    def logits(self, ids, caches=None, starts=None):
        return super().logits(ids)[:, -1:]


class LoudStart(GPT):
    def initialize(self):
        super().initialize()
        nn.init.normal_(self.tokens.weight)


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


class Untied(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = nn.Parameter(self.tokens.weight.clone())


class Biased(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.head.bias = nn.Parameter(torch.zeros(config.vocab_size))


class OpenDoor(GPT):
    def check(self, ids, before=0):
        ids.clamp_(0, self.config.vocab_size - 1)


class BareDoor(GPT):
    def check(self, ids, before=0):
        if (ids >= self.config.vocab_size).any():
            raise IndexError("index out of range in self")
        super().check(ids, before)


def accepting(**values):
    return SimpleNamespace(**values)


def asserting(**values):
    assert values["vocab_size"] > 0
    return SimpleNamespace(**values)


def silent(**values):
    try:
        return GPTConfig(**values)
    except ValueError:
        raise ValueError("bad value") from None


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


def config_of(**values):
    values = {"vocab_size": 500, "context": 128, "heads": 2, "width": 64, **values}
    return lambda budget: GPTConfig.modern(**values)


WRONG = [
    ("check_gpt", WithoutPositions, "the positions are missing"),
    ("check_gpt", SamePosition, "the logits are head"),
    ("check_gpt", WithoutNorm, "the last norm, before the head"),
    ("check_gpt", WithoutABlock, "the first block is left out"),
    ("check_gpt", OnlyTheLast, "not (B, T, V) = (2, 6, 11)"),
    ("check_gpt", Peeking, "row 0 looks at position 1: the future leaks"),
    ("check_gpt", Blind, "row 1 does not see position 0"),
    ("check_gpt", LoudStart, "start with smaller weights"),
    ("check_gpt", AllZero, "starts with a spread of 0.0000"),
    ("check_gpt", EvenProjections, "projection.weight starts with a spread of 0.02"),
    ("check_gpt", Untied, "the head has a table of its own"),
    ("check_gpt", Biased, "parameters, not"),
    ("check_gpt", OpenDoor, "id 11 is not in a vocabulary of 11"),
    ("check_gpt", BareDoor, "raise a ValueError, not IndexError"),
    ("check_config", accepting, "was accepted, but there must be a token"),
    ("check_config", asserting, "raises AssertionError"),
    ("check_config", silent, "names none of them: bad value"),
    ("check_config", deaf, "layers=2 became 1"),
    ("check_parameter_count", lambda *s: count(*s, tables=2), "counted twice"),
    ("check_parameter_count", lambda *s: count(*s, positions=0), "table of positions"),
    ("check_parameter_count", lambda *s: count(*s, tables=0), "table of tokens"),
    ("check_parameter_count", lambda *s: count(*s, last=0), "the last norm"),
    ("check_parameter_count", lambda *s: count(*s, bias=9), "the two norms of each"),
    ("check_parameter_count", lambda *s: count(*s, bias=4), "biases of the linear"),
    ("check_parameter_count", lambda *s: count(*s, bias=0), "norms of the blocks"),
    (
        "check_parameter_count",
        lambda *s: count(*s, bias=0, last=0),
        "biases and norms are missing",
    ),
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
    ("check_early_logits", lambda *a: early(*a)[0], "logits have shape"),
    ("check_budget", config_of(vocab_size=65), "vocab_size is 65"),
    ("check_budget", config_of(context=64), "context is 64"),
    ("check_budget", config_of(width=128), "heads have width 64"),
    ("check_budget", config_of(layers=1), "of the budget 1e+13 is used"),
    ("check_budget", config_of(layers=90), "overspent"),
    (
        "check_budget",
        lambda budget: GPTConfig(500, context=128, layers=2, heads=2, width=64),
        "not those of GPTConfig.modern",
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
