"""Other programs' models in, ours out: parity, packing, names, files that attack."""

import json
import os
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


BOTH = [GPTConfig(270, 24, 2, 4, 16), llama(tied=True, rotary_base=500), llama()]
each = pytest.mark.parametrize("config", BOTH, ids=["gpt2", "tied llama", "llama"])


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(TEXT, 270)


def random_model(config):
    return checks.random_model(config).float()


# The property: the same function in transformers.


@st.composite
def configs(draw):
    heads, shared = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 3)]))
    sizes = {
        "vocab_size": draw(st.integers(2, 40)),
        "context": draw(st.integers(1, 20)),
        "layers": draw(st.integers(1, 3)),
        "heads": heads,
        "width": heads * 2 * draw(st.integers(1, 5)),
        "tied": draw(st.booleans()),
    }
    options = {
        "rotary_base": draw(st.sampled_from([10.0, 1e4, 5e5])),
        "hidden": draw(st.none() | st.integers(1, 30)),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.01])),
        "key_value_heads": shared,
    }
    modern = ModernConfig(**{**LLAMA_CHOICES, **options, **sizes})
    return draw(st.sampled_from([GPTConfig(**sizes), modern]))


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
        {"model_type": "llama"},
        {"model_type": "glassgpt", "glassgpt": {"vocab_size": 5, "tower": 1}},
        {**config_to_json(llama()), "glassgpt": {}, "rope_parameters": "default"},
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

    path = tmp_path / "model.safetensors"
    glassgpt.save(tmp_path, random_model(BOTH[0]), tokenizer)
    state = load_file(path)
    save_file({**state, f"{GPT2.block}.0.attn.masked_bias": torch.ones(1)}, path)
    glassgpt.load(tmp_path)  # old files have this one
    save_file({**state, f"{GPT2.block}.0.q.bias": torch.ones(1)}, path)
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


@pytest.mark.parametrize("allowed", [False, True])
def test_an_old_file_is_read(allowed, tokenizer):
    """Merges as texts, and the special token first, as in files of 2019."""
    content = json.loads(FOREIGN)
    model = content["model"]
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    vocab = {symbol: n + 1 for symbol, n in model["vocab"].items() if n < 269}
    model["vocab"] = {"<|endoftext|>": 0, **vocab}
    content["added_tokens"][0]["id"] = 0
    content["truncation"] = {
        "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    theirs = ForeignTokenizer(json.dumps(content))
    text = "The Eiffel tower\n\n is  1,063 feet<|endoftext|> high \u2615 don't"
    found = theirs.encode(text, allowed)
    assert found == [(n + 1) % 270 for n in tokenizer.encode(text, allowed)]
    assert theirs.special_tokens == {"<|endoftext|>": 0}
    assert theirs.decode(found) == text


@settings(max_examples=20)
@given(st.text(), st.integers(0, 10))
def test_every_text_survives_a_foreign_tokenizer(text, place):
    text = text[:place] + "<|endoftext|>" + text[place:]
    assert THEIRS.decode(THEIRS.encode(text)) == text
    assert THEIRS.special_tokens["<|endoftext|>"] not in THEIRS.encode(text)


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


def test_a_tokenizer_of_ids_with_holes_is_refused():
    content = json.loads(FOREIGN)
    content["model"]["vocab"]["a"] = 10**6
    with pytest.raises(ValueError, match="its ids have holes"):
        ForeignTokenizer(json.dumps(content))


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match="surrogates"):
        THEIRS.encode("\ud800")


ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi \u2615"},
    {"role": "assistant", "content": "A tower."},
    {"role": "user", "content": "More\n\n"},
]


@pytest.mark.parametrize("marks", [ROLES, ["<|im_start|>", "<|im_end|>"]])
@pytest.mark.parametrize("foreign", [False, True])
def test_a_chat_is_saved_with_its_template(marks, foreign, tmp_path):
    tokenizer = BPETokenizer.train(TEXT, 270, ["<|endoftext|>", *marks])
    if foreign:
        tokenizer = ForeignTokenizer(tokenizer.to_json())
    model = random_model(BOTH[0])
    glassgpt.save(tmp_path, model, tokenizer)
    _, again = glassgpt.load(tmp_path)
    assert isinstance(again, BPETokenizer)  # whoever wrote it, it is one of ours
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.special_tokens[marks[-1]]
    config = json.loads((tmp_path / "config.json").read_text())
    assert theirs.eos_token == marks[-1]
    assert config["eos_token_id"] == end
    write_gguf(tmp_path / "m.gguf", model, tokenizer)
    facts = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert facts["tokenizer.ggml.eos_token_id"].contents() == end
    template = facts["tokenizer.chat_template"].contents()
    for talk in (TALK, TALK[1:2]):
        wanted, _ = render(talk, again, reply=True)
        found = theirs.apply_chat_template(talk, add_generation_prompt=True)
        assert found["input_ids"] == wanted
        found = theirs.apply_chat_template(
            talk, chat_template=template, add_generation_prompt=True
        )
        assert found["input_ids"] == wanted


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
    text = "1889 <|user|> \ufdd01 \ufdd0 in 12"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text


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


# Numbers in few bits.


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16"])
def test_unpacked_numbers_equal_those_of_the_library(kind):
    numbers = np.random.default_rng(0).normal(size=(6, 96)).astype(np.float32)
    known = gguf.GGMLQuantizationType[kind]
    packed = gguf.quantize(numbers, known).view(np.uint8)
    assert np.array_equal(unpack(kind, packed), gguf.dequantize(packed, known))


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
    assert facts["general.file_type"] == 1
    assert facts[f"{kind}.block_count"] == 2
    assert facts[f"{kind}.context_length"] == 24
    assert facts[f"{kind}.feed_forward_length"] == (64 if kind == "gpt2" else 20)
    assert len(facts["tokenizer.ggml.tokens"]) == 270
    assert facts["tokenizer.ggml.token_type"].count(3) == 1
    assert facts["tokenizer.ggml.eos_token_id"] == 269
    assert facts["tokenizer.ggml.add_bos_token"] is False
    if kind == "llama":  # a whole number is refused there
        base = reader.fields["llama.rope.freq_base"]
        assert base.types == [gguf.GGUFValueType.FLOAT32]
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


def of_own_class():
    model = random_model(BOTH[0])
    model.__class__ = type("Own", (type(model),), {})
    return model


@pytest.mark.parametrize("size", [200, 300])
def test_a_tokenizer_of_another_model_goes_into_no_gguf(size, tokenizer, tmp_path):
    model = random_model(replace(llama(), vocab_size=size))
    with pytest.raises(ValueError, match=f"has 270 ids, the model {size}: it is the"):
        write_gguf(tmp_path / "m.gguf", model, tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": random_model(replace(llama(), norm="layer"))}, "GPT-2 and Llama"),
        ({"model": of_own_class()}, "only a GPT or a ModernGPT"),
        ({"tokenizer": CharTokenizer(map(chr, range(300, 570)))}, "of byte pairs"),
        ({"dtype": "int8"}, "float16 or float32"),  # whole numbers would be zeros
    ],
)
def test_what_has_no_gguf_is_refused(change, message, tokenizer, tmp_path):
    given = {"model": random_model(BOTH[0]), "tokenizer": tokenizer, **change}
    with pytest.raises(ValueError, match=message):
        write_gguf(tmp_path / "m.gguf", **given)
    assert not list(tmp_path.iterdir())


def test_another_file_is_not_written_over(tokenizer, tmp_path):
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


@pytest.fixture(scope="module")
def good_gguf(tokenizer, tmp_path_factory):
    """The bytes of a whole file."""
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    write_gguf(path, random_model(llama()), tokenizer, "float32")
    return path.read_bytes()


@settings(max_examples=80)
@given(st.dictionaries(st.integers(0, 4000), st.integers(0, 255), max_size=4))
def test_a_damaged_gguf_is_answered_by_one_short_line(
    good_gguf, tmp_path_factory, damages
):
    path = tmp_path_factory.mktemp("damaged") / "m.gguf"
    content = bytearray(good_gguf)
    for place, byte in damages.items():
        content[place] = byte
    path.write_bytes(content)
    try:
        model, _ = load_gguf(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(f"{path} is damaged or foreign: ")
        assert "\n" not in message
        assert len(message) < len(str(path)) + 250
    else:  # some bytes, as in a token's text, still make sense
        assert model.parameter_count() < 50_000


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"llama.block_count", b"llama.block_kount"),
        (b"blk.1.ffn_gate.weight", b"blk.1.ffn_hate.weight"),
        (b"blk.1.ffn_gate.weight", b"blk.7.ffn_gate.weight"),
        (b"gpt-2", b"other"),
    ],
)
def test_a_gguf_with_another_name_in_it_is_refused(old, new, good_gguf, tmp_path):
    assert old in good_gguf
    (tmp_path / "m.gguf").write_bytes(good_gguf.replace(old, new))
    with pytest.raises(ValueError, match="damaged or foreign"):
        glassgpt.load(tmp_path / "m.gguf")


@pytest.mark.parametrize("size", [0, 8, 5000, -4])
def test_a_cut_gguf_is_refused(size, good_gguf, tmp_path):
    (tmp_path / "m.gguf").write_bytes(good_gguf[:size])
    with pytest.raises(ValueError, match="damaged or foreign"):
        glassgpt.load(tmp_path / "m.gguf")


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


def with_field(good, key, kind, value, filler=b"x"):
    """A file with one more field before its own, and another that keeps the places."""
    (count,) = struct.unpack("<Q", good[16:24])
    field = struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value
    start = struct.pack("<Q", len(filler)) + filler + struct.pack("<I", 8)
    text = bytes(-(len(field) + len(start) + 8) % 32)
    added = field + start + struct.pack("<Q", len(text)) + text
    return good[:16] + struct.pack("<Q", count + 2) + added + good[24:]


@pytest.mark.parametrize(
    ("key", "kind", "value", "message"),
    [
        (b"general.architecture", 8, struct.pack("<Q5s", 5, b"llama"), "there twice"),
        (b"general.alignment", 4, struct.pack("<I", 3), "no power of two"),
        (b"llama.rope.dimension_count", 4, struct.pack("<I", 2), "dimension_count is"),
        (b"llama.rope.scaling.factor", 6, struct.pack("<f", 4), "scaling.factor is"),
        (b"llama.rope.scaling.type", 8, struct.pack("<Q4s", 4, b"yarn"), "is 'yarn'"),
    ],
)
def test_a_gguf_field_that_cannot_be_right(key, kind, value, message, llama_gguf):
    good = llama_gguf.read_bytes()
    llama_gguf.write_bytes(with_field(good, key, kind, value))
    with pytest.raises(ValueError, match=message):
        glassgpt.load(llama_gguf)


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        (b"llama.glassgpt", 9, struct.pack("<IQ", 8, 0)),  # of ours, in a config.json
        (b"llama.rope.dimension_count", 4, struct.pack("<I", 6)),
        (b"llama.rope.scaling.factor", 6, struct.pack("<f", 1)),
        (b"llama.rope.scaling.type", 8, struct.pack("<Q4s", 4, b"none")),
    ],
)
def test_a_gguf_field_that_changes_nothing(key, kind, value, llama_gguf):
    model, _ = glassgpt.load(llama_gguf)
    good = llama_gguf.read_bytes()
    llama_gguf.write_bytes(with_field(good, key, kind, value))
    assert torch.equal(glassgpt.load(llama_gguf)[0](IDS), model(IDS))


@pytest.fixture
def llama_gguf(good_gguf, tmp_path):
    (tmp_path / "m.gguf").write_bytes(good_gguf)
    return tmp_path / "m.gguf"


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


def test_a_gguf_with_more_tokens_than_rows_is_refused(good_gguf, llama_gguf):
    fields, content = gguf.GGUFReader(llama_gguf).fields, good_gguf
    more = {"tokens": "tower", "token_type": 1}
    for name, extra in more.items():
        key = f"tokenizer.ggml.{name}".encode()
        values = [*fields[key.decode()].contents(), extra]
        content = content.replace(key, key[:-1] + b"_")
        if name == "tokens":
            texts = [value.encode() for value in values]
            packed = b"".join(struct.pack("<Q", len(t)) + t for t in texts)
            value = struct.pack("<IQ", 8, 271) + packed
        else:
            value = struct.pack("<IQ271i", 5, 271, *values)
        content = with_field(content, key, 9, value, filler=name.encode())
    llama_gguf.write_bytes(content)
    with pytest.raises(ValueError, match="the tokenizer has 271 ids, the model 270"):
        glassgpt.load(llama_gguf)


def test_without_the_library_a_good_gguf_is_not_called_damaged(llama_gguf, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"tokenizers is missing: pip inst"):
        glassgpt.load(llama_gguf)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(BOTH[0], "float16"), (llama(tied=True, hidden=96), "float32")],
)
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
