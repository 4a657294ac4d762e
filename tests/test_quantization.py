"""Speed: light layers beside heavy ones, the choice of a format, and the allocator."""

import copy
import subprocess
import sys
from time import sleep

import pytest
import torch

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
    with pytest.raises(ValueError, match="weights must be float32, bfloat16"):
        quantize(_small_gpt(), "int3")


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
