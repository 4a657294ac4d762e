"""Speed: light layers beside heavy ones, the choice of a format, and the allocator."""

import copy
import pickle
import subprocess
import sys
import threading

import pytest
import torch

import glassgpt.checks.generation as small
import glassgpt.checks.speed as checks
import glassgpt.speed as module
from glassgpt.checkpoints import save
from glassgpt.data import TokenData
from glassgpt.generation import generate
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.speed import (
    FORMATS,
    LightLinear,
    fastest_weights,
    keep_freed_memory,
    lighten,
    round_rows,
)
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, Trainer


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8"])
def test_a_light_layer_is_near_the_heavy_one(weights):
    torch.manual_seed(0)
    for bias in (True, False):
        layer = torch.nn.Linear(33, 17, bias=bias)
        light = LightLinear(layer, weights)
        for shape in ((1, 33), (1, 1, 33), (2, 5, 33)):
            x = torch.randn(shape)
            wanted, found = layer(x), light(x)
            assert found.shape == wanted.shape
            assert found.dtype == torch.float32
            assert (found - wanted).abs().max() < 0.05
    zeros = torch.nn.Linear(4, 3)
    zeros.weight.data.zero_()
    assert torch.equal(LightLinear(zeros, weights)(torch.zeros(1, 4))[0], zeros.bias)


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8"])
def test_a_light_model_generates(weights):
    model = checks._small_gpt().float()
    light = lighten(model, weights)
    assert all(type(layer) is not torch.nn.Linear for layer in light.modules())
    assert light.tokens.weight is model.tokens.weight  # not copied: half the memory
    assert len(generate(light, [[1], [2, 3]], 12, top_k=1)[1]) == 14


@pytest.mark.parametrize("weights", ["int4", "", 8])
def test_unknown_weights(weights):
    with pytest.raises(ValueError, match="weights must be"):
        lighten(small._small_gpt(), weights)


def test_the_fastest_is_chosen_by_measuring(monkeypatch):
    model = small._small_gpt().float()
    assert fastest_weights([model.head]) in FORMATS
    for name in FORMATS:
        monkeypatch.setattr(module, "fastest_weights", lambda layers, name=name: name)
        light = lighten(model)
        wanted = lighten(model, name)
        assert type(light.head) is type(wanted.head)
        same = [type(getattr(m.head, "product", None)) for m in (light, wanted)]
        assert same[0] is same[1]
        assert not light.training


def test_as_they_are():
    model = small._small_gpt().train()
    same = lighten(model, "float32")
    assert same.head.weight is model.head.weight
    assert same.state_dict().keys() == model.state_dict().keys()  # it can be saved
    assert model.training
    assert not same.training


def test_checks_pass():
    checks.check_light(lighten)
    checks.check_round_rows(round_rows)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: round_rows(x.view(1, -1)), "1 scales for 3 rows"),
        (lambda x: (round_rows(x)[0].float(), round_rows(x)[1]), "stored as"),
        (lambda x: (x / (x.abs().amax(1, True) / 127), x.abs().amax(1)), "stored as"),
        (lambda x: (round_rows(x)[0] // 2, 2 * round_rows(x)[1]), "not 127"),
        (lambda x: ((x / round_rows(x)[1]).char(), round_rows(x)[1]), "to the nearest"),
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
        (lambda x, size: in_groups(x, x.shape[1] // size), "groups of 2: scales"),
        (lambda x, size: in_groups(x, 2), "groups of 3: scales"),
        (
            lambda x, size: (in_groups(x, 6)[0], in_groups(x, size)[1]),
            "a row has one scale",
        ),
        (lambda x, size: (in_groups(x, size)[0], in_groups(x, size)[1] * 2), "half"),
    ],
)
def test_the_check_of_groups_names_the_mistake(wrong, message):
    checks.check_groups(in_groups)
    with pytest.raises(AssertionError, match=message):
        checks.check_groups(wrong)


def changed_layers(change):
    """`lighten` with something done to its int8 layers."""

    def worse(model, weights):
        light = lighten(model, weights)
        for name, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and weights == "int8":
                change(name, light.get_submodule(name), layer.weight.detach())
        return light

    return worse


def one_scale(name, light, weight):
    scale = weight.abs().max() / 127
    light.product.scale = scale * torch.ones(len(weight))
    light.product.whole = (weight / scale).round().to(torch.int8).t()


def five_bits(name, light, weight):
    scale = weight.abs().amax(1) / 15
    light.product.scale = scale
    light.product.whole = (weight / scale[:, None]).round().to(torch.int8).t()


def truncated(name, light, weight):
    scale = light.product.scale[:, None]
    light.product.whole = (weight / scale).trunc().to(torch.int8).t()


def head_left_out(name, light, weight):
    if name == "head":
        light.product = lambda x: x @ weight.T


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (changed_layers(five_bits), "half its row's scale"),
        (changed_layers(truncated), "half its row's scale"),
        (changed_layers(head_left_out), "nothing was rounded to int8"),
        (changed_layers(one_scale), "half its row's scale"),
        (lambda model, weights: lighten(model, "int8"), "nearest numbers in bfloat16"),
    ],
)
def test_check_names_the_mistake(wrong, message):
    with pytest.raises(AssertionError) as caught:
        checks.check_light(wrong)
    assert message in str(caught.value)


def test_a_light_model_is_not_saved_over_a_good_one(tmp_path):
    model = GPT(GPTConfig(50, context=8, layers=1, heads=1, width=8)).eval()
    tokenizer = CharTokenizer.train("abc")
    save(tmp_path, model, tokenizer)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="before you lighten it"):
        save(tmp_path, lighten(model, "int8"), tokenizer)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_light_model_is_neither_trained_nor_made_lighter():
    light = lighten(GPT(GPTConfig(11, 4, 1, 1, 8)), "int8")
    data = TokenData.of([1, 2, 3] * 9, [1, 2, 3] * 9, 11)
    with pytest.raises(ValueError, match="train"):
        Trainer(light, data, TrainConfig(steps=1))
    with pytest.raises(ValueError, match="is light already"):
        lighten(light, "bfloat16")


@pytest.mark.parametrize("weights", FORMATS[1:])
def test_a_light_model_has_no_state_dict_but_can_be_copied(weights):
    light = lighten(small._small_gpt().float(), weights)
    with pytest.raises(ValueError, match="save the one it comes from"):
        light.state_dict()
    ids = generate(light, [1, 2], 5, top_k=1)
    assert generate(copy.deepcopy(light), [1, 2], 5, top_k=1) == ids
    assert generate(pickle.loads(pickle.dumps(light)), [1, 2], 5, top_k=1) == ids


@pytest.mark.parametrize("weights", FORMATS[1:])
def test_no_switch_of_the_process_is_touched(weights, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a switch was flipped")

    light = lighten(small._small_gpt().float(), weights)
    monkeypatch.setattr(torch._C, "_set_mkldnn_enabled", never)
    alone = generate(light, [1], 6, top_k=1)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(generate(light, [1], 6, top_k=1)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone, alone]
    with pytest.raises(RuntimeError):
        light.head(torch.zeros(1, 7))
    assert torch.backends.mkldnn.enabled


def test_keep_freed_memory_elsewhere(monkeypatch):
    monkeypatch.setattr(module.platform, "libc_ver", lambda: ("", ""))

    def never(name):
        raise AssertionError("another C library was touched")

    monkeypatch.setattr(module.ctypes, "CDLL", never)
    assert keep_freed_memory() is False


@pytest.mark.skipif(module.platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_keep_freed_memory_here():
    program = "from glassgpt.speed import keep_freed_memory as k; print(k())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.stdout == b"True\n", done.stderr


KEPT = """
import torch
from pathlib import Path
from glassgpt.speed import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

keep_freed_memory()
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
def test_memory_goes_back_once_after_the_first_step():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert done.stdout == "True\nFalse\n", done.stderr
