"""Models on disk: parity with transformers, files that survive, files that attack."""

import errno
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from failing import FULL, Killed, failing_from
from safetensors.torch import load_file, save_file

from glassgpt import huggingface
from glassgpt.atomic import atomic_write, flush, write_file
from glassgpt.chat import GLASS
from glassgpt.checkpoints import load, load_config, save, save_tensors, write_model
from glassgpt.gguf import write_gguf
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, build
from glassgpt.publish import publish
from glassgpt.tokens import BPETokenizer, CharTokenizer

transformers = pytest.importorskip("transformers")
CONFIG = GPTConfig(97, context=32, layers=3, heads=4, width=48)
MODERN = ModernConfig(97, context=32, layers=3, heads=4, width=48)
IDS = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(0))


def random_weights(model, seed=0):
    """The model with weights that are large enough for a mistake to show."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.25)
    return model.eval()


def random_gpt(config=CONFIG, seed=0):
    return random_weights(build(config), seed)


def their_gpt2(**options):
    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 48}
    sizes |= {"n_layer": 3, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**sizes, **options)
    return random_weights(transformers.GPT2LMHeadModel(config))


def their_reading(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def tokenizer_of(size=97):
    return CharTokenizer([chr(33 + i) for i in range(size)])


def assert_same_logits(ours, theirs, ids=IDS):
    torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nobody pulls the plug here: the flush itself need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture
def saved(tmp_path):
    """The folder of a saved model."""
    save(tmp_path / "model", random_gpt(), tokenizer_of())
    return tmp_path / "model"


# Theirs and ours.


def test_a_saved_directory_is_read_by_transformers(tmp_path):
    tokenizer = BPETokenizer.train("a miniature Eiffel tower, in miniature. " * 20, 270)
    ours = random_gpt(replace(CONFIG, vocab_size=270))
    place = tmp_path / "new" / "folder"
    save(place, ours, tokenizer)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    about = json.loads((place / "tokenizer_config.json").read_text())
    assert about["clean_up_tokenization_spaces"] is False  # older ones default to True
    ids = tokenizer.encode("the tower, a miniature\n Eiffel ☕")
    assert their_tokenizer.encode("the tower, a miniature\n Eiffel ☕") == ids
    assert their_tokenizer.decode(ids) == tokenizer.decode(ids)
    assert their_tokenizer.eos_token_id == tokenizer.special_tokens["<|endoftext|>"]
    assert_same_logits(ours, their_reading(place), torch.tensor([ids[:32]]))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_gpt2_saved_by_transformers_is_read(tmp_path, prefix):
    theirs = their_gpt2()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    if not prefix:  # as in the file that OpenAI's weights are shared in
        state = load_file(path)
        bare = {n.removeprefix("transformer."): t for n, t in state.items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
        save_tensors(path, bare)
    tokenizer_of().save(tmp_path / "tokenizer.json")
    ours, _ = load(tmp_path)
    assert ours.config == CONFIG
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"activation_function": "relu"}, "activation_function"),
        ({"n_inner": 100}, "c_fc.weight should be"),
    ],
)
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, option, message):
    their_gpt2(**option).save_pretrained(tmp_path)
    tokenizer_of().save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_model_that_transformers_enlarged(saved):
    theirs = their_reading(saved)
    theirs.resize_token_embeddings(102)
    theirs.save_pretrained(saved)
    larger, _ = load(saved)
    assert larger.config == replace(CONFIG, vocab_size=102)
    assert_same_logits(larger, theirs)


def test_weights_in_several_files_are_read(saved):
    their_reading(saved).save_pretrained(saved, max_shard_size="20KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    parts = sorted(saved.glob("model-*-of-*.safetensors"))
    assert len(parts) > 3
    assert torch.equal(load(saved)[0](IDS), random_gpt()(IDS))
    parts[-1].unlink()
    with pytest.raises(ValueError, match="does not fit its config.json"):
        load(saved)


def test_what_was_changed_in_their_keys_is_what_transformers_reads(saved):
    content = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**content, "n_head": 2}))
    ours, _ = load(saved)
    assert ours.config.heads == 2
    assert_same_logits(ours, their_reading(saved))


# There and back.


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, tied=False, dropout=0.1),
        MODERN,
        replace(MODERN, positions="learned", norm="layer", tied=True),
    ],
)
def test_there_and_back_is_exact(tmp_path, config):
    model = random_gpt(config)
    save(tmp_path, model, tokenizer_of())
    before = torch.get_rng_state()
    again, tokenizer = load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.config == load_config(tmp_path) == config
    assert not again.training
    assert tokenizer.vocab_size == 97
    assert (again.head.weight is again.tokens.weight) == config.tied
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # the library would make the weights private
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))  # nothing is shared with the file
    assert torch.equal(again(IDS), model(IDS))
    again(IDS).sum().backward()  # ready to be trained on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_real_numbers_are_read(tmp_path, dtype):
    model = random_gpt().to(dtype)
    save(tmp_path, model, tokenizer_of())
    found = load(tmp_path)[0].tokens.weight
    assert found.dtype == torch.float32
    assert torch.equal(found, model.tokens.weight.float())


def test_a_tokenizer_may_have_a_few_ids_less_than_the_model(tmp_path, saved):
    save(tmp_path / "padded", random_gpt(), tokenizer_of(90))
    assert load(tmp_path / "padded")[1].vocab_size == 90
    for number in (50, 98):
        with pytest.raises(ValueError, match=f"has {number} ids, the model 97"):
            save(tmp_path / "another", random_gpt(), tokenizer_of(number))
    tokenizer_of(98).save(saved / "tokenizer.json")
    with pytest.raises(ValueError, match="mixes two models"):
        load(saved)


def test_a_model_is_saved_over_an_older_one(tmp_path):
    """After a kill, too, and with nothing of the older one left."""
    speaking = BPETokenizer([], [GLASS.stop, *GLASS.before.values()])
    save(tmp_path, random_gpt(replace(CONFIG, vocab_size=len(speaking))), speaking)
    assert (tmp_path / "chat_template.jinja").exists()
    for name in (".gitattributes", "config.json.partial"):
        (tmp_path / name).write_text("{}")
    newer = random_gpt(seed=1)
    save(tmp_path, newer, tokenizer_of())
    assert torch.equal(load(tmp_path)[0](IDS), newer(IDS))
    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize("name", ["run.json", "notes"])
def test_a_model_is_not_saved_among_other_things(saved, name):
    (saved / name).write_text("{}")
    before = {path: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match="not empty, .*: use another folder"):
        save(saved, random_gpt(seed=1), tokenizer_of())
    assert {path: path.read_bytes() for path in saved.iterdir()} == before


class Doubled(GPT):
    def forward(self, *arguments):
        return 2 * super().forward(*arguments)


def with_a_weight_of(value):
    model = random_gpt()
    model.blocks[1].mlp.expand.weight.data[3, 2] = value
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Doubled(CONFIG), "a Doubled would be read back as another"),
        (lambda: torch.compile(random_gpt()), "before you quantize it or compile it"),
        (lambda: with_a_weight_of(math.nan), "weights that are nan or infinite"),
        (lambda: with_a_weight_of(-math.inf), "weights that are nan or infinite"),
    ],
)
def test_what_would_not_come_back_is_not_saved(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "model", make(), tokenizer_of())
    assert not (tmp_path / "model").exists()


# Names.


def test_a_name_hides_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("shakespeare", random_gpt(), tokenizer_of())
    assert load("shakespeare")[0].config == CONFIG


def test_the_configuration_is_read_without_weights(saved):
    (saved / "model.safetensors").unlink()
    assert load_config(saved) == CONFIG
    assert load_config("shakespeare") == load("shakespeare")[0].config


def test_what_is_missing_is_named(tmp_path):
    hint = "Give a run's folder, or a name: shakespeare, smollm2, gpt2"
    for read in (load, load_config):
        with pytest.raises(FileNotFoundError, match=f"holds no model.*{hint}"):
            read(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="without an evaluation: resume it, or"):
        load(tmp_path)


# Files that attack. Nothing may be allocated or run for them.


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def header(shape, offsets):
    about = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps({"tokens.weight": about}).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda content: pickle.dumps(Bomb()), id="pickle"),
        pytest.param(lambda content: content[:-1], id="truncated"),
        pytest.param(lambda content: b"\xff" * 8 + b"{}", id="header of 16 million TB"),
        pytest.param(lambda content: header([1 << 50], [0, 1 << 52]), id="4 PB"),
        pytest.param(lambda content: header([1 << 40], [0, 0]), id="no bytes"),
    ],
)
def test_a_file_made_to_attack_is_refused(saved, monkeypatch, forge):
    monkeypatch.setenv("BOMB", str(saved / "bomb"))
    path = saved / "model.safetensors"
    path.write_bytes(forge(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load(saved)
    assert not (saved / "bomb").exists()


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (MODERN, {"vocab_size": 10**12}, "should be"),
        (MODERN, {"vocab_size": 10**30}, "does not fit its config.json"),
        (MODERN, {"layers": 10**12}, "3 layers where 1000000000000 are due"),
        (MODERN, {"heads": 0}, "heads must be a whole number"),
        (MODERN, {"dropout": "a lot"}, "does not describe a GPT"),
        (MODERN, {"attack": 1}, "attack"),
        (CONFIG, {"n_positions": 10**12}, "should be"),
        (CONFIG, {"n_layer": 6}, "does not fit its config.json"),
        (CONFIG, {"n_embd": "48"}, "width must be a whole number"),
        (CONFIG, {"tie_word_embeddings": False}, "does not fit its config.json"),
    ],
)
def test_a_config_of_another_model_is_refused(tmp_path, config, change, message):
    """Before memory is taken for it."""
    save(tmp_path, build(config), tokenizer_of())
    content = json.loads((tmp_path / "config.json").read_text())
    part = content["glassgpt"] if config is MODERN else content
    part.update(change)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with (
        patch.object(huggingface, "fill", side_effect=AssertionError("was read")),
        pytest.raises(ValueError, match=message),
    ):
        load(tmp_path)


@pytest.mark.parametrize("text", [b"", b'{"model_type": "gpt2"}', b"[" * 100_000])
def test_a_strange_config_is_refused(saved, text):
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="does not describe a GPT"):
        load(saved)


def test_weights_that_are_no_numbers_are_refused(saved):
    write_model(saved, with_a_weight_of(math.nan), tokenizer_of())
    with pytest.raises(ValueError, match="has weights that are nan or infinite"):
        load(saved)
    path = saved / "model.safetensors"
    save_file({name: t.bool() for name, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="has torch.bool, no floating-point numbers"):
        load(saved)


MEASURED = """
import sys
import glassgpt

def peak():  # its own: what getrusage says begins with that of the parent
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

glassgpt.load("shakespeare")
before = peak()
model, _ = glassgpt.load(sys.argv[1])
print(peak() - before, 4 * model.parameter_count() / 2**20)
assert "torch._dynamo" not in sys.modules, "it waits for the compiler"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_loading_takes_the_memory_of_the_model_and_its_file(tmp_path):
    config = GPTConfig(97, context=32, layers=4, heads=4, width=512)
    save(tmp_path, GPT(config), tokenizer_of())
    command = [sys.executable, "-c", MEASURED, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken, size = map(float, done.stdout.split())
    assert size > 45
    assert taken < 2.2 * size  # the mapped file counts, too


# Kills, and disks that get full.

OLD = random_gpt(), tokenizer_of()
SAME_TEXTS = random_gpt(seed=1), tokenizer_of()
OTHER_TEXTS = random_gpt(seed=1), CharTokenizer([chr(200 + i) for i in range(97)])


def write_a_file(place, model, tokenizer):
    write_file(place / "file", model.tokens.weight.detach().numpy().tobytes())


def write_a_page(place, model, tokenizer):
    publish(model, tokenizer, place / "page.html")


def write_a_gguf(place, model, tokenizer):
    """Of another model, since the format takes byte pairs only."""
    seed = 0 if model is OLD[0] else 1
    other = random_gpt(replace(CONFIG, vocab_size=256, layers=1), seed)
    write_gguf(place / "model.gguf", other, BPETokenizer([], []))


def content(place):
    """What is there under real names: not what a kill left under others."""
    files = (path for path in sorted(place.iterdir()) if path.suffix != ".partial")
    return {path.name: path.read_bytes() for path in files}


def model_in(place):
    """The tokenizer's text and the numbers of the model in a folder, None without."""
    try:
        model, tokenizer = load(place)
    except (FileNotFoundError, ValueError):
        return None
    return tokenizer.decode(range(5)), model(IDS).sum().item()


@pytest.mark.parametrize("error", [Killed(), FULL], ids=["killed", "full"])
@pytest.mark.parametrize(
    ("write", "newer", "read", "may_be_gone"),
    [
        (save, SAME_TEXTS, model_in, False),
        (save, OTHER_TEXTS, model_in, True),
        (write_a_file, OTHER_TEXTS, content, False),
        (write_a_page, OTHER_TEXTS, content, False),
        (write_a_gguf, OTHER_TEXTS, content, False),
    ],
)
def test_a_failure_leaves_the_old_or_the_new(
    tmp_path, error, write, newer, read, may_be_gone
):
    """At each call that changes files; and what is left is no obstacle."""
    (tmp_path / "end").mkdir()
    write(tmp_path / "end", *newer)
    new, ended, number = read(tmp_path / "end"), False, 0
    while not ended:
        number += 1
        place = tmp_path / str(number)
        place.mkdir()
        write(place, *OLD)
        old = read(place)
        with failing_from(number, error):
            write(place, *newer)
        found = read(place)
        assert found in (old, new) or (found is None and may_be_gone), number
        ended = found == new and not list(place.glob("*.partial"))
        write(place, *newer)
        assert read(place) == new
        assert number < 100
    assert number > 3


def test_a_disk_that_gets_full_leaves_the_older_model(saved, monkeypatch):
    """Its weights would get the newer one's tokenizer."""

    def full(*_, **__):
        raise FULL

    before = content(saved)
    monkeypatch.setattr("glassgpt.checkpoints.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save(saved, *OTHER_TEXTS)
    assert content(saved) == before


def test_two_who_write_one_file_have_names_of_their_own(tmp_path):
    path = tmp_path / "note.json"
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert one.read_text() == "one"
    assert path.read_text() == "one"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    with pytest.raises(OSError, match="is a folder, a device or a pipe"):
        write_file(tmp_path, b"new")


def test_a_file_system_that_flushes_no_folder_is_no_error(tmp_path):
    refused = OSError(errno.EINVAL, "Invalid argument")
    with patch("os.fsync", side_effect=refused):
        flush(tmp_path)
        (tmp_path / "file").write_text("x")
        with pytest.raises(OSError, match="Invalid"):
            flush(tmp_path / "file")
