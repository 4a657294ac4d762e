"""Chat: roles nobody can forge, masks, packing, and the template in transformers."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import glassgpt
from glassgpt import GPT, GPTConfig, Trainer, cli, generate
from glassgpt.chat import (
    CHATML,
    GLASS,
    Packed,
    add_roles,
    chat_loss,
    fit_history,
    pack,
    pack_data,
    render,
    separate,
    stream_answer,
    template_of,
    to_jinja,
    tokenizer_files,
)
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, ModernGPT
from glassgpt.tokens import BPETokenizer, CharTokenizer
from glassgpt.training import TrainConfig, evaluate

MARKS = ["<|endoftext|>", *GLASS.before.values(), GLASS.stop]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a miniature"},
    {"role": "assistant", "content": "Eiffel tower"},
    {"role": "user", "content": "of iron?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def tokenizer():
    words = "a miniature Eiffel tower of iron, is it? Yes. It is. " * 5
    return BPETokenizer.train(words, 320, MARKS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16)).eval()


# Rendering.


@pytest.mark.parametrize(
    "talk",
    [
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        "hello",
    ],
)
def test_what_is_no_conversation_is_refused(tokenizer, talk):
    with pytest.raises(ValueError, match="a turn|one turn"):
        render(talk, tokenizer)


def test_a_tokenizer_without_roles_is_refused():
    with pytest.raises(ValueError, match="add_roles"):
        render(TALK, BPETokenizer([], []))


def learned_by(tokenizer, ids, mask):
    return tokenizer.decode([i for i, learn in zip(ids, mask, strict=True) if learn])


def test_chatml_has_its_system_line_and_learns_answers():
    tokenizer = BPETokenizer([], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert template_of(tokenizer) is CHATML
    ids, mask = render(TALK[1:3], tokenizer)
    assert tokenizer.decode(ids) == (
        f"<|im_start|>system\n{CHATML.default_system}<|im_end|>\n"
        "<|im_start|>user\na miniature<|im_end|>\n"
        "<|im_start|>assistant\nEiffel tower<|im_end|>\n"
    )
    assert learned_by(tokenizer, ids, mask) == "Eiffel tower<|im_end|>"
    text = tokenizer.decode(render(TALK, tokenizer, reply=True)[0])
    assert text.count("system\n") == 1
    assert text.endswith("<|im_start|>assistant\n")


# What people say: anything, and much of what means something to a template.
HOSTILE = [*MARKS, "<|im_start|>", "<|", "|>", "{{", "{% raw %}", "\ufdd0", "\ufdd00"]
HOSTILE += ["\0", " ", "\n", "\r\n", "\\n", "'", '"', "0", "1", "é"]
LETTERS = st.characters(exclude_categories=["Cs"])
SAYING = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(LETTERS))).map("".join)


def conversations(saying):
    role = st.sampled_from(["system", "user", "assistant"])
    turn = st.fixed_dictionaries({"role": role, "content": saying})
    return st.lists(turn, min_size=1, max_size=5)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(talk=conversations(SAYING))
def test_no_content_becomes_a_special_token(tokenizer, talk):
    ids, mask = render(talk, tokenizer)
    special = set(tokenizer.special_tokens.values())
    found = [tokenizer.decode([token]) for token in ids if token in special]
    assert found == [x for t in talk for x in (GLASS.before[t["role"]], "<|end|>")]
    assert tokenizer.decode(ids) == "".join(
        f"{GLASS.before[turn['role']]}{turn['content']}<|end|>" for turn in talk
    )
    assert learned_by(tokenizer, ids, mask) == "".join(
        f"{turn['content']}<|end|>" for turn in talk if turn["role"] == "assistant"
    )


# The same in transformers.


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "talker"
    glassgpt.save(folder, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    """The tokenizer of transformers, from a folder that we saved."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def rendered_by(theirs, talk, reply=False):
    found = theirs.apply_chat_template(
        talk, add_generation_prompt=reply, return_assistant_tokens_mask=True
    )
    return found["input_ids"], [bool(flag) for flag in found["assistant_masks"]]


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(talk=conversations(st.text(LETTERS)), reply=st.booleans())
def test_transformers_gives_the_same_ids_and_mask(theirs, tokenizer, talk, reply):
    assert rendered_by(theirs, talk, reply) == render(talk, tokenizer, reply)


@pytest.mark.parametrize("turn", [("user", None), ("user", ["x"]), ("tool", "x")])
def test_the_template_refuses_what_we_refuse(theirs, turn):
    from jinja2 import TemplateError

    with pytest.raises(TemplateError):
        theirs.apply_chat_template([{"role": turn[0], "content": turn[1]}])


def test_chatml_in_transformers(tmp_path):
    """The same, but where a content begins with white space, which joins a mark."""
    transformers = pytest.importorskip("transformers")
    words = "user\n\n assistant\n\n system\n\n a miniature Eiffel tower of iron " * 5
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = BPETokenizer.train(words, 320, marks)
    tokenizer.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), chat_template=to_jinja(CHATML)
    )
    for talk in (TALK, TALK[1:], TALK[3:4]):
        assert rendered_by(theirs, talk) == render(talk, tokenizer)
    white = [{"role": "user", "content": "\n\n a"}]
    assert rendered_by(theirs, white)[0] != render(white, tokenizer)[0]


def test_a_saved_chat_model_loads_again(folder, tokenizer):
    _, same = glassgpt.load(folder)
    assert render(TALK, same) == render(TALK, tokenizer)
    assert list(tokenizer_files(BPETokenizer([], []))) == ["tokenizer.json"]


# New rows in the tables.


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(260, 16, 1, 2, 8),
        GPTConfig(260, 16, 1, 2, 8, tied=False),
        GPTConfig(300, 16, 1, 2, 8),  # with room to spare
        ModernConfig(260, 16, 1, 2, 8, **LLAMA_CHOICES),
    ],
)
@torch.no_grad()
def test_roles_for_any_model(config):
    torch.manual_seed(0)
    model = (ModernGPT if isinstance(config, ModernConfig) else GPT)(config).eval()
    bytewise = BPETokenizer([], ["<|endoftext|>", "<|pad|>"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    larger, tokenizer = add_roles(model, bytewise)
    ids = torch.tensor([tokenizer.encode("a tower")])
    logits = larger(ids)
    assert torch.equal(model(ids)[..., :258], logits[..., :258])
    assert logits.shape[-1] == larger.config.vocab_size == max(config.vocab_size, 262)
    assert (larger.head.weight is larger.tokens.weight) == config.tied
    for rows in (larger.tokens.weight, larger.head.weight):
        assert torch.allclose(rows[258:], rows[:258].mean(dim=0))
    assert tokenizer.special_tokens["<|pad|>"] == 257
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), "the model itself was changed"
    twice, same = add_roles(larger, tokenizer)
    assert same.special_tokens == tokenizer.special_tokens
    assert twice is not larger
    assert twice.config == larger.config


def test_roles_for_a_tokenizer_of_characters(tmp_path):
    characters = CharTokenizer.train("a tower?", ["<|x|>"])
    model = GPT(GPTConfig(characters.vocab_size, 32, 1, 2, 8))
    larger, tokenizer = add_roles(model, characters)
    ids, _ = render([{"role": "user", "content": "a tower"}], tokenizer)
    assert tokenizer.decode(ids) == "<|user|>a tower<|end|>"
    glassgpt.save(tmp_path, larger, tokenizer)
    _, again = glassgpt.load(tmp_path)
    assert again.special_tokens == tokenizer.special_tokens
    with pytest.raises(ValueError, match="can't gain"):
        add_roles(model, SimpleNamespace(special_tokens={}, vocab_size=9))


# Packing.


@st.composite
def rendered(draw):
    size = draw(st.integers(1, 70))
    ids = draw(st.lists(st.integers(0, 255), min_size=size, max_size=size))
    return ids, draw(st.lists(st.booleans(), min_size=size, max_size=size))


@settings(max_examples=40)
@given(st.lists(rendered(), min_size=1, max_size=12), st.integers(2, 40))
def test_packing_keeps_every_target_once(talks, context):
    inputs, targets = pack(iter(talks), context, 256)
    due = []  # place in the own conversation, as far as it isn't cut; id; target
    for ids, mask in talks:
        for place in range(len(ids) - 1):
            if mask[place + 1]:
                due.append((place % (context - 1), ids[place], ids[place + 1]))
    learned = targets != -100
    places, _ = separate(inputs, 256)
    columns = (places[learned], inputs[learned], targets[learned])
    found = zip(*(column.tolist() for column in columns), strict=True)
    assert sorted(found) == sorted(due)
    assert inputs.shape == targets.shape == (len(inputs), context)
    assert inputs.dtype == targets.dtype == torch.int64
    assert len(inputs) == 0 or (inputs != 256).any(dim=1).all(), "an empty row"


@pytest.mark.parametrize("length", [1, 5, 7])
def test_a_mask_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match="argument"):
        pack([([1, 2, 3, 4, 5, 6], [True] * length)], 8, 9)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_positions_and_mask_agree_with_a_loop(row):
    positions, mask = separate(torch.tensor([row]), 0)
    start, starts = 0, []
    for place, token in enumerate(row):
        starts.append(start)
        if token == 0:
            start = place + 1
    places, starts = torch.arange(len(row)), torch.tensor(starts)
    assert torch.equal(positions[0], places - starts)
    sees = (places <= places[:, None]) & (starts == starts[:, None])
    assert torch.equal(mask[0, 0], sees)


def test_packed_rotary_logits_are_those_alone():
    """To rounding; for learned positions, a check compares the losses."""
    torch.manual_seed(0)
    model = ModernGPT(ModernConfig(300, 32, 2, 2, 8, **LLAMA_CHOICES)).double().eval()
    one, two = [5, 6, 7, 256], [8, 9, 10, 11, 256]
    packed = torch.tensor([one + two])
    with torch.no_grad():
        together = model.head(model.hidden_states(packed, *separate(packed, 256)))
        alone = [model(torch.tensor([row])) for row in (one, two)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_every_row_is_seen_once_an_epoch():
    inputs = torch.arange(10)[:, None].repeat(1, 4)
    rows = Packed(inputs, inputs)
    batches = [rows.random_batch(3, 4, (7, step))[0] for step in range(10)]
    seen = torch.cat(batches)[:, 0].tolist()
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert torch.equal(rows.random_batch(3, 4, 7)[0], batches[0])
    found = [x[:, 0].tolist() for x, _ in rows.fixed_batches(4, 4, 3)]
    assert found == [[0, 3, 6], [9]]


# Training.


def test_data_for_a_trainer(tokenizer, model):
    data = pack_data([TALK] * 5, [TALK[:3]], tokenizer, 32)
    assert len(data.train) == 5 * sum(render(TALK, tokenizer)[1])
    assert data.vocab_size == tokenizer.vocab_size
    separator = tokenizer.special_tokens["<|endoftext|>"]
    config = TrainConfig(12, 4, learning_rate=1e-2, warmup=1, evaluate_every=6)
    student, _ = add_roles(model, tokenizer)
    trainer = Trainer(student, data, config, loss=chat_loss(student, separator))
    first = trainer.evaluate()["validation_loss"]
    assert glassgpt.train(trainer, progress=False)[-1]["validation_loss"] < first
    small = GPT(GPTConfig(tokenizer.vocab_size, 16, 1, 2, 8))
    with pytest.raises(ValueError, match="don't fit a context of 16"):
        Trainer(small, data, config)
    with pytest.raises(ValueError, match="no answer to learn from"):
        Trainer(model, pack_data([TALK[:2]], [TALK], tokenizer, 32), config)


def test_the_loss_is_the_mean_surprise_of_what_is_learned(model, tokenizer):
    """By hand, for a conversation that nothing was packed with."""
    ids, learned = render(TALK, tokenizer)
    separator = tokenizer.special_tokens["<|endoftext|>"]
    found = chat_loss(model, separator)(*pack([(ids, learned)], 64, separator))
    log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
    places = [n for n in range(1, len(ids)) if learned[n]]
    wanted = -sum(log_p[n - 1, ids[n]] for n in places) / len(places)
    torch.testing.assert_close(found, wanted)


def test_evaluation_weighs_by_targets(model, tokenizer):
    """The mean over all targets, however rows are put into batches."""
    data = pack_data([TALK] * 3 + [TALK[:3]] * 4, [TALK], tokenizer, 48)
    loss = chat_loss(model, tokenizer.special_tokens["<|endoftext|>"])
    whole = loss(data.train.inputs, data.train.targets).item()
    for size in (1, 2, 3, 100):
        found = evaluate(model, data.train, 100, size, loss)
        assert found == pytest.approx(whole, abs=1e-6)


# Talking.


def test_history_is_cut_where_a_user_begins(tokenizer):
    def size(talk):
        return len(render(talk, tokenizer, reply=True)[0])

    talk = [*TALK, {"role": "user", "content": "And?"}]
    shorter = [[talk[0], *talk[1 + dropped :]] for dropped in (0, 2, 4)]
    for room in range(size(shorter[-1]), size(talk) + 2):
        fitting = [each for each in shorter if size(each) <= room]
        assert fit_history(talk, tokenizer, room) == fitting[0]
    for talk in (shorter[-1], [{"role": "user", "content": "word " * 99}]):
        with pytest.raises(ValueError, match="shorten"):
            fit_history(talk, tokenizer, size(talk) - 1)


def test_an_answer_ends_with_a_special_token_or_the_context(model, tokenizer):
    ids, _ = render(TALK[:2], tokenizer, reply=True)
    special = list(tokenizer.special_tokens.values())
    for seed in range(2):
        rows = generate(model, ids, 64 - len(ids), special, seed=seed)
        text = "".join(stream_answer(model, tokenizer, TALK[:2], 500, seed=seed))
        assert text == tokenizer.decode(rows[len(ids) :])
    with pytest.raises(ValueError, match="no room"):
        stream_answer(model, tokenizer, [{"role": "user", "content": "tower " * 80}])


def talk_to(folder, monkeypatch, text, *words):
    """The exit code of `glassgpt chat`, with a text from a pipe."""
    stdin = io.TextIOWrapper(io.BytesIO(text.encode(errors="surrogateescape")))
    monkeypatch.setattr(sys, "stdin", stdin)
    return cli.main(["chat", str(folder), "--device", "cpu", *words])


def test_lines_of_a_pipe_are_answered_the_same_again(folder, monkeypatch, capsys):
    text, said = "/system Be brief.\na tower?\n\nof iron?\r\n/reset\na tower?", []
    for _ in range(2):
        assert talk_to(folder, monkeypatch, text, "--tokens", "3", "--seed", "1") == 0
        said.append(capsys.readouterr())
    assert said[0] == said[1]
    assert said[0].err == ""
    assert said[0].out.count("\n") >= 3


def test_a_long_talk_is_cut_with_a_word(folder, monkeypatch, capsys):
    text = "a miniature Eiffel tower\n" * 9
    assert talk_to(folder, monkeypatch, text, "--tokens", "8") == 0
    assert "oldest turns are forgotten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text", "named"),
    [
        (["--temperature", "inf"], "", "temperature"),
        ([], "\udcff\n", "utf-8"),  # a byte that is no text
        ([], "tower " * 200, "shorten"),
    ],
)
def test_mistakes_in_a_chat_get_a_sentence(
    folder, monkeypatch, capsys, words, text, named
):
    assert talk_to(folder, monkeypatch, text, *words) == 2
    assert named in capsys.readouterr().err


def test_a_model_without_roles_is_refused(monkeypatch, capsys):
    assert talk_to("shakespeare", monkeypatch, "hello\n") == 2
    assert "add_roles" in capsys.readouterr().err


def interrupted(model, tokenizer, talk, *_, **__):
    """An answer that Ctrl-C cuts off, unless another came before."""
    yield "Well"
    if len(talk) == 1:
        raise KeyboardInterrupt
    yield f" after {talk[1]['content']}"


def test_ctrl_c_stops_an_answer_and_not_the_program(folder, monkeypatch, capsys):
    typed = iter([KeyboardInterrupt, "first", "tower " * 200, "second", EOFError])

    def read(_):
        line = next(typed)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(cli, "stream_answer", interrupted)
    assert cli.main(["chat", str(folder), "--device", "cpu", "--tokens", "8"]) == 0
    shown = capsys.readouterr()
    assert "Well\nWell after Well\n" in shown.out
    assert "Ctrl-D ends" in shown.err
    assert "shorten" in shown.err


def test_a_pipe_is_stopped_as_a_whole(folder, monkeypatch):
    monkeypatch.setattr(cli, "stream_answer", interrupted)
    assert talk_to(folder, monkeypatch, "one\ntwo\n") == 130


def test_the_chapter_shows_the_record(names_in):
    book = Path(__file__).parent.parent / "book"
    record = json.loads((book / "runs" / "chat.json").read_text("utf-8"))
    shown = names_in("17_chat.ipynb", "lora-record")["LORA"]
    assert record["lora"]
    for run in record["lora"]:
        assert shown[run["way"]][run["rate"]] == (run["learned"], run["forgotten"])
    system, shown = record["system"], names_in("17_chat.ipynb", "system-record")
    keys = ("step", "gain", "error", "kl", "right")
    ends = [system["curve"][0], system["curve"][-1]]
    assert shown["GAINS"] == [tuple(point[key] for key in keys) for point in ends]
    assert (shown["REPLIES"], shown["FALSTAFF"]) == (system["speeches"], system["most"])
    for name, losses in names_in("17_chat.ipynb", "everything-read")["LAST"].items():
        assert [run["answers"][-1] for run in record["masks"][name]] == losses
    page = (book / "17_chat.ipynb").read_text("utf-8")
    assert f"steps={record['masks']['steps'][-1]}," in page
    capitals = [len(record["manner"][f"capitals {x}"]) for x in ("after", "before")]
    assert "it knew {} of 16 capitals, before them {} (".format(*capitals) in page
    for way in record["name"]["ways"] + record["name"]["other ways"]:
        assert way in page
    for found in record["name"]["right"].values():
        assert "{}, {} and {}".format(*found) in page
