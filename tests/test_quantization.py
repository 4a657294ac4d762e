"""Speed: light layers beside heavy ones, the choice of a format, and the allocator."""

import copy
import functools
import subprocess
import sys
from time import sleep

import pytest
import torch

import glassgpt.checks.quantization as checks
import glassgpt.quantization as module
from glassgpt.checkpoints import save
from glassgpt.checks.generation import _small_gpt
from glassgpt.data import TokenData
from glassgpt.generation import generate
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.quantization import (
    FORMATS,
    QuantizedLinear,
    fastest_weights,
    keep_freed_memory,
    quantize,
    quantized_layer,
    round_rows,
)
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, Trainer

LIGHT = FORMATS[1:]


@pytest.mark.parametrize("packed", [False, module.PACKED])
@pytest.mark.parametrize("weights", LIGHT)
def test_a_light_layer_is_near_the_heavy_one(weights, packed, monkeypatch):
    monkeypatch.setattr(module, "PACKED", packed)
    torch.manual_seed(0)
    for bias in (True, False):
        layer = torch.nn.Linear(33, 17, bias=bias)
        light = quantized_layer(layer, weights)
        for shape in ((1, 33), (1, 1, 33), (2, 5, 33)):
            x = torch.randn(shape)
            wanted, found = layer(x), light(x)
            assert found.shape == wanted.shape
            assert found.dtype == torch.float32
            assert (found - wanted).abs().max() < 0.05
    zeros = torch.nn.Linear(4, 3)
    zeros.weight.data.zero_()
    assert torch.equal(
        quantized_layer(zeros, weights)(torch.zeros(1, 4))[0], zeros.bias
    )


def test_int8_rounds_the_vectors_too():
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(33, 17), torch.randn(5, 33)
    (w, w_scale), (v, v_scale) = round_rows(layer.weight.detach()), round_rows(x)
    wanted = v.float() @ w.float().T * v_scale * w_scale.T + layer.bias
    torch.testing.assert_close(QuantizedLinear(layer)(x), wanted)


def same_memory(one, other):
    return one.data_ptr() == other.data_ptr()


@pytest.mark.parametrize("weights", LIGHT)
def test_a_light_model_generates(weights):
    model = _small_gpt().float()
    light = quantize(model, weights)
    assert all(type(layer) is not torch.nn.Linear for layer in light.modules())
    assert same_memory(light.tokens.weight, model.tokens.weight)  # not copied
    assert len(generate(light, [[1], [2, 3]], 12, top_k=1)[1]) == 14


@pytest.mark.parametrize("packed", [False, module.PACKED])
@pytest.mark.parametrize("weights", LIGHT)
def test_the_weights_of_a_light_model_go_into_a_file_and_come_back(
    weights, packed, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "PACKED", packed)
    model, other, ids = _small_gpt().float(), _small_gpt().float(), torch.tensor([[3]])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    light, other = quantize(model, weights), quantize(other, weights)
    wanted = light(ids)
    assert not torch.equal(other(ids), wanted)
    torch.save(light.state_dict(), tmp_path / "light.pt")
    other.load_state_dict(torch.load(tmp_path / "light.pt"))
    assert torch.equal(other(ids), wanted)
    assert torch.equal(copy.deepcopy(light)(ids), wanted)


@pytest.mark.parametrize("packed", [False, module.PACKED])
@pytest.mark.parametrize("weights", LIGHT)
def test_a_light_layer_moves(weights, packed, monkeypatch):
    monkeypatch.setattr(module, "PACKED", packed)
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(33, 17), torch.randn(2, 5, 33)
    wanted = quantized_layer(layer, weights)(x)
    assert torch.equal(quantized_layer(layer, weights).to("cpu")(x), wanted)
    for dtype in (torch.float64, torch.bfloat16):
        moved = quantized_layer(layer, weights).to(dtype)
        found = moved(x.to(dtype))
        assert found.dtype == dtype
        assert (found - wanted).abs().max() < 0.05


def test_int8_stays_whole_numbers_where_its_scales_go():
    moved = QuantizedLinear(torch.nn.Linear(33, 17)).to(torch.bfloat16)
    assert moved.whole.dtype == torch.int8
    assert moved.scale.dtype == moved.bias.dtype == torch.bfloat16
    assert QuantizedLinear(torch.nn.Linear(33, 17)).to("meta").whole.is_meta


def test_without_a_name_one_of_the_formats_is_measured_and_taken(monkeypatch):
    model, ids = _small_gpt().float(), torch.tensor([[1, 2]])
    assert fastest_weights(model.head) in FORMATS
    assert fastest_weights(torch.nn.Linear(4, 3, device="meta")) == "float16"
    for name in FORMATS:
        monkeypatch.setattr(module, "fastest_weights", lambda layer, name=name: name)
        assert torch.equal(quantize(model)(ids), quantize(model, name)(ids))


@pytest.mark.parametrize("slow", [("float32",), ("float32", "int8")])
def test_the_fastest_is_not_a_slow_one(slow, monkeypatch):
    class Slow(torch.nn.Linear):
        def forward(self, x):
            sleep(0.01)
            return super().forward(x)

    def layer_of(linear, name):
        return Slow(4, 3) if name in slow else torch.nn.Linear(4, 3)

    monkeypatch.setattr(module, "quantized_layer", layer_of)
    assert fastest_weights(Slow(4, 3)) not in slow


def test_as_they_are():
    model = _small_gpt().train()
    same = quantize(model, "float32")
    assert same_memory(same.head.weight, model.head.weight)
    assert same.state_dict().keys() == model.state_dict().keys()  # it can be saved
    assert model.training
    assert not same.training


def by_scale(x, rounding=torch.round, least=0.0, more=1e-30):
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=least) + more
    return rounding(x / scale).to(torch.int8), scale


def test_the_check_of_rounding_takes_scales_in_double():
    checks.check_round_rows(lambda x: (round_rows(x)[0], round_rows(x)[1].double()))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: (round_rows(x)[0].float(), round_rows(x)[1]), "stored as"),
        (lambda x: (round_rows(x)[0] // 2, 2 * round_rows(x)[1]), "not 127"),
        (lambda x: by_scale(x, torch.floor), "half its scale"),
        (lambda x: by_scale(x, least=1 / 127), "not 127"),
        (lambda x: by_scale(x, more=1e-6), "not 127"),
    ],
)
def test_the_check_of_rounding_names_the_mistake(wrong, message):
    with pytest.raises(AssertionError, match=message):
        checks.check_round_rows(wrong)


def in_groups(x, size):
    scale = x.reshape(-1, size).abs().amax(1, True) / 7 + 1e-30
    whole = (x.reshape(-1, size) / scale).round().to(torch.int8)
    return whole.view(x.shape), scale.view(len(x), -1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, size: in_groups(x, 2), "groups of 3: scales"),
        (
            lambda x, size: (in_groups(x, size)[0], in_groups(x, size)[1] + 1e-3),
            "over 7",
        ),
    ],
)
def test_the_check_of_groups_names_the_mistake(wrong, message):
    with pytest.raises(AssertionError, match=message):
        checks.check_groups(wrong)


def product_of(weight, bias):
    return lambda x: x @ weight.T + bias


def in_int8(change):
    """`quantize`, with int8 layers that multiply by what `change` makes of weights."""

    def worse(model, weights):
        light = quantize(model, weights)
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and weights == "int8":
                used = change(name, layer.weight.detach())
                bias = 0 if layer.bias is None else layer.bias.detach()
                light.get_submodule(name).forward = product_of(used, bias)
        return light

    return worse


def back(weight, largest, rounding=torch.round):
    scale = weight.abs().amax(1, True) / largest
    return rounding(weight / scale) * scale


def one_scale(name, weight):
    return back(weight.reshape(1, -1), 127).view_as(weight)


def head_left_out(name, weight):
    return weight if name == "head" else back(weight, 127)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _, weight: back(weight, 15), "half its row's scale"),
        (lambda _, weight: back(weight, 127, torch.trunc), "half its row's scale"),
        (one_scale, "half its row's scale"),
        (head_left_out, "nothing was rounded to int8"),
        (lambda _, weight: back(weight, 127), "still in torch.float32"),
    ],
)
def test_check_names_the_mistake(change, message):
    with pytest.raises(AssertionError, match=message):
        checks.check_light(in_int8(change))


def rounded_in_float32(model, weights):
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            used = layer.weight.detach()
            dtype = getattr(torch, weights)
            used = back(used, 127) if weights == "int8" else used.to(dtype).float()
            layer.weight = torch.nn.Parameter(used)
    return model


def with_vectors(largest, rounding=torch.round, dim=-1):
    """`quantize`, with int8 layers that round what comes in in another way."""

    def product(x, whole, scale, bias):
        x_scale = x.abs().amax(dim, keepdim=True) / largest + 1e-30
        return rounding(x / x_scale) * x_scale @ whole.float().T * scale[:, 0] + bias

    def worse(model, weights):
        light = quantize(model, weights)
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and weights == "int8":
                whole, scale = round_rows(layer.weight.detach())
                bias = 0 if layer.bias is None else layer.bias.detach()
                light.get_submodule(name).forward = functools.partial(
                    product, whole=whole, scale=scale, bias=bias
                )
        return light

    return worse


def test_check_takes_weights_alone_and_vectors_rounded_in_other_code():
    checks.check_light(with_vectors(127))
    checks.check_light(with_vectors(127, lambda x: x))


def without_bias(model, weights):
    light = quantize(model, weights)
    for layer in light.modules():
        if isinstance(layer, QuantizedLinear | module.HalfLinear):
            layer.bias.zero_()
        if isinstance(layer, module.PackedLinear):
            weight, bias = layer.get_extra_state()
            layer.pack(weight, torch.zeros_like(bias))
    return light


def frozen(model, weights):
    return quantize(model.requires_grad_(False), weights)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (with_vectors(7), "rounded too roughly"),
        (with_vectors(127, torch.trunc), "rounded too roughly"),
        (with_vectors(127, dim=(0, 1)), "rounded too roughly"),
        (without_bias, "the bias is not added"),
        (frozen, "eval mode, or frozen"),
        (
            lambda model, weights: quantize(model.eval(), weights),
            "eval mode, or frozen",
        ),
        (lambda model, weights: quantize(model, weights).train(), r"call eval\(\)"),
    ],
)
def test_check_names_other_mistakes(wrong, message):
    with pytest.raises(AssertionError, match=message):
        checks.check_light(wrong)


def test_check_refuses_what_is_rounded_but_not_lighter():
    def wrong(model, weights):
        return rounded_in_float32(copy.deepcopy(model), weights)

    with pytest.raises(AssertionError, match="still in torch.float32"):
        checks.check_light(wrong)
    with pytest.raises(AssertionError, match="the model itself was changed"):
        checks.check_light(rounded_in_float32)


def right_anywhere(guess, own):
    return own[: 1 + sum(a == b for a, b in zip(guess, own, strict=False))]


def one_after_a_wrong_last_token(guess, own):
    kept = []
    for drafted, token in zip(guess, own, strict=False):
        kept.append(token)
        if drafted != token:
            break
    return kept + own[-1:] if len(kept) == len(guess) else kept


def up_to(wrong):
    """What is kept where `wrong(guess, own, place)` says which token is wrong."""

    def accept(guess, own):
        places = (i for i in range(len(guess)) if wrong(guess, own, i))
        return own[: next(places, len(guess)) + 1]

    return accept


def by_value(guess, own):
    pairs = zip(guess, own, strict=False)
    return own[: own.index(next((b for a, b in pairs if a != b), own[-1])) + 1]


def appended(guess, own):
    right = [a == b for a, b in zip([*guess, None], own, strict=True)].index(False)
    guess[right:] = own[right : right + 1]
    return guess


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda guess, own: own, "in place of a wrong token"),
        (lambda guess, own: own[: len(guess)], "without a draft"),
        (lambda guess, own: own[: max(1, len(guess) - 1)], "the token after a right"),
        (right_anywhere, "what follows a wrong token is dropped"),
        (appended, "was changed"),
        (one_after_a_wrong_last_token, "what follows a wrong token is dropped"),
        (by_value, "the token after a right draft"),
        (up_to(lambda guess, own, i: guess[i] not in own), "in place of a wrong"),
        (up_to(lambda guess, own, i: i < 2 and guess[i] != own[i]), "last token"),
        (up_to(lambda guess, own, i: guess[i] and guess[i] != own[i]), "is dropped"),
        (up_to(lambda guess, own, i: guess[i] != own[i] and guess[i + 1 :]), "dropped"),
    ],
)
def test_the_check_of_a_draft_names_the_mistake(wrong, message):
    with pytest.raises(AssertionError, match=message):
        checks.check_accept(wrong)


def test_a_light_model_is_neither_trained_nor_saved_nor_made_lighter(tmp_path):
    light = quantize(GPT(GPTConfig(11, 4, 1, 1, 8)), "int8")
    data = TokenData.of([1, 2, 3] * 9, [1, 2, 3] * 9, 11)
    with pytest.raises(ValueError, match="train"):
        Trainer(light, data, TrainConfig(steps=1))
    with pytest.raises(ValueError, match="before you quantize it"):
        save(tmp_path, light, CharTokenizer.train("abc"))
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is light already"):
        quantize(light, "bfloat16")


def test_keep_freed_memory_elsewhere(monkeypatch):
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(module.ctypes, "CDLL", None)  # no C library is touched
    assert keep_freed_memory() is False


KEPT = """
import torch
from pathlib import Path
from glassgpt.quantization import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

assert keep_freed_memory()
weight = torch.zeros(2, requires_grad=True)
optimizer = torch.optim.SGD([weight])
for _ in range(2):
    block = torch.ones(50_000_000)  # 200 MB
    del block
    before = resident()
    weight.sum().backward()
    optimizer.step()
    print(before - resident() > 150)
"""


@pytest.mark.skipif(module.platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_goes_back_once_after_the_first_step_and_is_kept_from_then_on():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert done.stdout == "True\nFalse\n", done.stderr
