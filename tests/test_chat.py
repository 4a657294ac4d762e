"""Chat: roles nobody can forge, masks, packing, and the template in transformers."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
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
from glassgpt.checks import chat as checks
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, ModernGPT
from glassgpt.tokens import BPETokenizer, CharTokenizer
from glassgpt.training import TrainConfig, count_targets, evaluate, token_loss

MARKS = ["<|endoftext|>", *GLASS.before.values(), GLASS.stop]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a miniature"},
    {"role": "assistant", "content": "Eiffel tower"},
    {"role": "user", "content": "of iron?"},
    {"role": "assistant", "content": "Yes."},
]
OURS = {"render": render, "pack": pack, "make_loss": chat_loss, "trainer": Trainer}
CHECKS = {name: getattr(checks, name) for name in dir(checks) if name[:6] == "check_"}


@pytest.fixture(scope="module")
def tokenizer():
    words = "a miniature Eiffel tower of iron, is it? Yes. It is. " * 5
    return BPETokenizer.train(words, 320, MARKS)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return GPT(GPTConfig(tokenizer.vocab_size, 64, 1, 2, 16)).eval()


@pytest.mark.parametrize("name", CHECKS)
def test_ours_passes_every_check(name):
    CHECKS[name](OURS[next(iter(CHECKS[name].__annotations__))])


def changed_mask(change):
    """A rendering whose mask is another: change(ids, mask)."""

    def wrong(talk, tokenizer, reply=False):
        ids, mask = render(talk, tokenizer, reply)
        return ids, change(ids, mask)

    return wrong


def rewritten(change):
    """A rendering that changes what people say."""

    def wrong(talk, tokenizer, reply=False):
        talk = [{**turn, "content": change(turn["content"])} for turn in talk]
        return render(talk, tokenizer, reply)

    return wrong


def repacked(change):
    """Packed rows, each changed in some way."""
    return lambda talks, context, separator: change(*pack(talks, context, separator))


def never_asking(talk, tokenizer, reply=False):
    return render(talk, tokenizer)


def accepting_roles(talk, tokenizer, reply=False):
    known = [turn for turn in talk if turn["role"] in GLASS.before]
    return render(known, tokenizer, reply) if known else ([], [])


def too_long_dropped(talks, context, separator):
    return pack([talk for talk in talks if len(talk[0]) <= context], context, separator)


def unseparated(talks, context, separator):
    inputs, targets = pack(talks, context, separator)
    return inputs.where(inputs != separator, 0), targets


def lenient(talks, context, separator):
    """A mask that is too short is made longer."""
    whole = [(ids, [*mask, *[True] * len(ids)][: len(ids)]) for ids, mask in talks]
    return pack(whole, context, separator)


def summed(model, end):
    """Not divided by anything."""

    def loss(ids, targets):
        return chat_loss(model, end)(ids, targets) * count_targets(targets)

    return loss


def late(model, end):
    """Targets one place later."""
    return lambda ids, targets: chat_loss(model, end)(ids, targets.roll(1, dims=1))


def without_positions(model, end):
    """Conversations don't see each other, but their positions go on."""

    def loss(ids, targets):
        _, mask = separate(ids, end)
        logits = model.head(model.hidden_states(ids, mask=mask)).mT
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total / max(count_targets(targets), 1)

    return loss


class Idle(Trainer):
    """It moves nothing."""

    def take_step(self):
        self.step += 1


class Summing(Trainer):
    """It doesn't divide by the targets of the batch."""

    def backward(self, loss):
        super().backward(loss * self.config.batch_size)


@pytest.mark.parametrize(
    ("check", "wrong", "named"),
    [
        ("answers_only", changed_mask(lambda i, m: [True] * len(m)), "no part of"),
        ("answers_only", changed_mask(lambda i, m: [False] * len(m)), "nothing is"),
        ("answers_only", changed_mask(lambda i, m: m[:-1]), "flags for"),
        ("prefix_stable", never_asking, "reply=True"),
        ("prefix_stable", changed_mask(lambda i, m: [*m[:-1], True]), "learned"),
        ("no_forgery", rewritten(str.strip), "changed"),
        ("no_forgery", rewritten(lambda said: said.replace("\r\n", "\n")), "changed"),
        ("no_forgery", accepting_roles, "must be refused"),
        ("pack", lambda t, c, s: pack(t, c - 1, s), "the shape"),
        ("pack", too_long_dropped, "are dropped"),
        ("pack", lenient, "a mask of 2 for 4 ids"),
        ("pack", repacked(lambda x, y: (x.flip(1), y.flip(1))), "stand"),
        ("pack", unseparated, "something else"),
        ("apart", lambda model, end: token_loss(model), "sees the one before"),
        ("apart", without_positions, "positions of each"),
        ("apart", summed, "the loss is another"),
        ("apart", late, "the loss of"),
        ("weighing", Idle, "the weights are"),
        ("weighing", Summing, "the weights are"),
    ],
)
def test_checks_name_the_mistake(check, wrong, named):
    with pytest.raises(AssertionError) as caught:
        CHECKS[f"check_{check}"](wrong)
    assert named in str(caught.value)


def test_what_render_refuses(tokenizer):
    for bad in (
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        ["hello"],
        [None],
        "hello",
    ):
        with pytest.raises(ValueError, match="a turn|one turn"):
            render(bad, tokenizer)
    with pytest.raises(ValueError, match="add_roles"):
        render(TALK, BPETokenizer([], []))
    with pytest.raises(ValueError, match="surrogate"):
        render([{"role": "user", "content": "\ud800"}], tokenizer)


def test_chatml_has_its_system_line_and_learns_answers():
    tokenizer = BPETokenizer([], ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert template_of(tokenizer) is CHATML
    ids, mask = render(TALK[1:3], tokenizer)
    assert tokenizer.decode(ids) == (
        f"<|im_start|>system\n{CHATML.default_system}<|im_end|>\n"
        "<|im_start|>user\na miniature<|im_end|>\n"
        "<|im_start|>assistant\nEiffel tower<|im_end|>\n"
    )
    learned = [token for token, learn in zip(ids, mask, strict=True) if learn]
    assert tokenizer.decode(learned) == "Eiffel tower<|im_end|>"
    own, _ = render(TALK, tokenizer, reply=True)
    text = tokenizer.decode(own)
    assert text.count("system\n") == 1
    assert text.endswith("<|im_start|>assistant\n")


# What people say: anything, and much of what means something to a template.
HOSTILE = [
    "<|",
    "|>",
    "\ufdd0",
    "\ufdd00",
    "\ufdd01",
    "\ufdd1",
    "{{",
    "{% raw %}",
    "\0",
]
HOSTILE += [*MARKS, "<|im_start|>", " ", "\n", "\r\n", "\\n", "'", '"', "0", "1", "é"]
LETTERS = st.characters(exclude_categories=["Cs"])
SAYING = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(LETTERS))).map("".join)
ROLE = st.sampled_from(["system", "user", "assistant"])


def conversations(role, saying=SAYING):
    turn = st.fixed_dictionaries({"role": role, "content": saying})
    return st.lists(turn, min_size=1, max_size=5)


@pytest.fixture(scope="module")
def theirs(tokenizer, model, tmp_path_factory):
    """The tokenizer of transformers, from a folder that we saved."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("saved") / "chat"
    glassgpt.save(folder, model, tokenizer)
    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(talk=conversations(ROLE, st.text(LETTERS)), reply=st.booleans())
def test_transformers_gives_the_same_ids_and_mask(theirs, tokenizer, talk, reply):
    ids, mask = render(talk, tokenizer, reply)
    found = theirs.apply_chat_template(
        talk, add_generation_prompt=reply, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == ids
    assert [bool(flag) for flag in found["assistant_masks"]] == mask


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(talk=conversations(ROLE))
def test_no_content_becomes_a_special_token(tokenizer, talk):
    ids, mask = render(talk, tokenizer)
    special = set(tokenizer.special_tokens.values())
    found = [tokenizer.decode([token]) for token in ids if token in special]
    due = [mark for t in talk for mark in (GLASS.before[t["role"]], "<|end|>")]
    assert found == due
    assert tokenizer.decode(ids) == "".join(
        f"{GLASS.before[turn['role']]}{turn['content']}<|end|>" for turn in talk
    )
    learned = [token for token, learn in zip(ids, mask, strict=True) if learn]
    assert tokenizer.decode(learned) == "".join(
        f"{turn['content']}<|end|>" for turn in talk if turn["role"] == "assistant"
    )


def test_contents_that_are_no_text_are_refused_by_both(theirs, tokenizer):
    from jinja2 import TemplateError

    for content in (7, None, ["x"], {"a": "b"}):
        talk = [{"role": "user", "content": content}]
        with pytest.raises(ValueError, match="a turn"):
            render(talk, tokenizer)
        with pytest.raises(TemplateError):
            theirs.apply_chat_template(talk)
    with pytest.raises(TemplateError):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


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
        found = theirs.apply_chat_template(talk, return_assistant_tokens_mask=True)
        ids, mask = render(talk, tokenizer)
        assert found["input_ids"] == ids
        assert [bool(flag) for flag in found["assistant_masks"]] == mask
    white = [{"role": "user", "content": "\n\n a"}]
    assert theirs.apply_chat_template(white)["input_ids"] != render(white, tokenizer)[0]


def test_a_saved_chat_model_loads_again(tmp_path, tokenizer, model):
    glassgpt.save(tmp_path / "one", model, tokenizer)
    again, same = glassgpt.load(tmp_path / "one")
    assert same.special_tokens == tokenizer.special_tokens
    assert render(TALK, same) == render(TALK, tokenizer)
    assert list(tokenizer_files(BPETokenizer([], []))) == ["tokenizer.json"]


def test_roles_for_any_model():
    configs = [
        (GPT, GPTConfig(260, 16, 1, 2, 8)),
        (GPT, GPTConfig(260, 16, 1, 2, 8, tied=False)),
        (GPT, GPTConfig(300, 16, 1, 2, 8)),  # with room to spare
        (ModernGPT, ModernConfig(260, 16, 1, 2, 8, **LLAMA_CHOICES)),
    ]
    bytewise = BPETokenizer([], ["<|endoftext|>", "<|pad|>"])
    for kind, config in configs:
        torch.manual_seed(0)
        model = kind(config).eval()
        before = {name: p.clone() for name, p in model.named_parameters()}
        larger, tokenizer = add_roles(model, bytewise)
        ids = torch.tensor([tokenizer.encode("a tower")])
        with torch.no_grad():
            old, new = model(ids)[..., :258], larger(ids)
        assert torch.equal(old, new[..., :258])
        assert new.shape[-1] == larger.config.vocab_size == max(config.vocab_size, 262)
        assert (larger.head.weight is larger.tokens.weight) == config.tied
        rows = larger.tokens.weight
        assert torch.allclose(rows[258:], rows[:258].mean(dim=0))
        share = new[..., :262].softmax(-1)[..., 258:].sum(-1)
        assert share.max() <= 4 / 258
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
        add_roles(model, SimpleNamespace(special_tokens={}, vocab_size=9, decode=str))


@st.composite
def rendered(draw):
    size = draw(st.integers(1, 70))
    ids = draw(st.lists(st.integers(0, 255), min_size=size, max_size=size))
    return ids, draw(st.lists(st.booleans(), min_size=size, max_size=size))


@settings(max_examples=40)
@given(st.lists(rendered(), min_size=1, max_size=12), st.integers(2, 40))
def test_packing_keeps_every_target_once(talks, context):
    talks.append(([1, 2], [True, True]))
    inputs, targets = pack(iter(talks), context, 256)
    due = sorted(
        (token, target)
        for ids, mask in talks
        for token, target, learn in zip(ids, ids[1:], mask[1:], strict=False)
        if learn
    )
    learned = targets != -100
    found = zip(inputs[learned].tolist(), targets[learned].tolist(), strict=True)
    assert sorted(found) == due
    assert inputs.shape == targets.shape == (len(inputs), context)
    assert inputs.dtype == targets.dtype == torch.int64
    used = [(row != 256).any() for row in inputs]
    assert all(used), "an empty row"


@settings(max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_positions_and_mask_agree_with_a_loop(row):
    positions, mask = separate(torch.tensor([row]), 0)
    start, starts = 0, []
    for place, token in enumerate(row):
        starts.append(start)
        if token == 0:
            start = place + 1
    assert positions[0].tolist() == [n - s for n, s in enumerate(starts)]
    for query in range(len(row)):
        for key in range(len(row)):
            sees = key <= query and starts[key] == starts[query]
            assert bool(mask[0, 0, query, key]) == sees


@pytest.mark.parametrize("length", [1, 2, 5, 7])
def test_a_mask_of_another_length_is_refused(length):
    with pytest.raises(ValueError, match="argument"):
        pack([([1, 2, 3, 4, 5, 6], [True] * length)], 8, 9)


def test_packed_logits_are_those_alone():
    """Learned and rotary positions alike, to rounding."""
    for kind, config in (
        (GPT, GPTConfig(300, 32, 2, 2, 8)),
        (ModernGPT, ModernConfig(300, 32, 2, 2, 8, **LLAMA_CHOICES)),
    ):
        torch.manual_seed(0)
        model = kind(config).double().eval()
        one, two = [5, 6, 7, 256], [8, 9, 10, 11, 256]
        packed = torch.tensor([one + two])
        with torch.no_grad():
            together = model.head(model.hidden_states(packed, *separate(packed, 256)))
            alone = [model(torch.tensor([row])) for row in (one, two)]
        assert torch.allclose(together, torch.cat(alone, dim=1), atol=1e-12)


def test_every_row_is_seen_once_an_epoch():
    inputs = torch.arange(10)[:, None].repeat(1, 4)
    rows = Packed(inputs, inputs)
    seen = [rows.random_batch(3, 4, (7, step))[0][:, 0].tolist() for step in range(10)]
    seen = sum(seen, [])
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    again = rows.random_batch(3, 4, (7, 5))[0][:, 0].tolist()
    assert again == seen[15:18]
    found = [x[0][:, 0].tolist() for x in rows.fixed_batches(4, 4, 3)]
    assert found == [[0, 3, 6], [9]]


def test_data_for_a_trainer(tokenizer, model):
    data = pack_data([TALK] * 5, [TALK[:3]], tokenizer, 32)
    learned = sum(render(TALK, tokenizer)[1])
    assert len(data.train) == count_targets(data.train.targets) == 5 * learned
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


def test_dropout_of_the_trainer_is_still_decided_by_the_seed(tokenizer):
    data = pack_data([TALK] * 3, [TALK], tokenizer, 48)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = GPT(GPTConfig(tokenizer.vocab_size, 48, 1, 2, 8, dropout=0.5))
        config = TrainConfig(2, 2, warmup=0)
        loss = chat_loss(model, tokenizer.special_tokens["<|endoftext|>"])
        trainer = Trainer(model, data, config, loss=loss)
        trainer.take_step()
        torch.rand(5)
        trainer.take_step()
        found.append(trainer.read_losses())
    assert found[0] == found[1]


def test_history_is_cut_where_a_user_begins(tokenizer):
    talk = [*TALK, {"role": "user", "content": "And?"}]
    for room in range(10, 80, 3):
        least = [talk[0], talk[-1]]
        if len(render(least, tokenizer, reply=True)[0]) > room:
            with pytest.raises(ValueError, match=f"more than the {room}"):
                fit_history(talk, tokenizer, room)
            continue
        kept = fit_history(talk, tokenizer, room)
        assert len(render(kept, tokenizer, reply=True)[0]) <= room
        assert (kept[0], kept[-1]) == (talk[0], talk[-1])
        assert kept[1]["role"] == "user"
        dropped = len(talk) - len(kept)
        if dropped:  # no more than had to go
            longer = [talk[0], *talk[dropped - 1 :]]
            assert len(render(longer, tokenizer, reply=True)[0]) > room
    assert fit_history(talk, tokenizer, 500) == talk
    with pytest.raises(ValueError, match="shorten"):
        fit_history([{"role": "user", "content": "word " * 99}], tokenizer, 20)


def test_an_answer_ends_with_a_special_token_or_the_context(model, tokenizer):
    ids, _ = render(TALK[:2], tokenizer, reply=True)
    special = list(tokenizer.special_tokens.values())
    for seed in range(2):
        rows = generate(model, ids, 64 - len(ids), special, seed=seed)
        text = "".join(stream_answer(model, tokenizer, TALK[:2], 500, seed=seed))
        assert text == tokenizer.decode(rows[len(ids) :])
    full = [{"role": "user", "content": "tower " * 80}]
    with pytest.raises(ValueError, match="no room"):
        stream_answer(model, tokenizer, full)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "talker"
    glassgpt.save(folder, model, tokenizer)
    return folder


def piped(monkeypatch, text):
    stdin = io.TextIOWrapper(
        io.BytesIO(text if isinstance(text, bytes) else text.encode())
    )
    monkeypatch.setattr(sys, "stdin", stdin)


def test_lines_of_a_pipe_are_answered_one_by_one(folder, monkeypatch, capsys):
    """After /reset and with the same system line, a question has the same answer."""
    piped(monkeypatch, "/system Be brief.\na tower?\n\nof iron?\r\n/reset\na tower?")
    words = ["chat", str(folder), "--tokens", "3", "--top-k", "1", "--device", "cpu"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.count("\n") >= 3


def test_with_a_seed_it_says_the_same_again(folder, monkeypatch, capsys):
    said = []
    for _ in range(2):
        piped(monkeypatch, "a tower?\n")
        words = ["--tokens", "4", "--device", "cpu", "--seed", "1"]
        assert cli.main(["chat", str(folder), *words]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_a_long_talk_is_cut_with_a_word(folder, monkeypatch, capsys):
    piped(monkeypatch, "a miniature Eiffel tower\n" * 9)
    assert cli.main(["chat", str(folder), "--tokens", "8", "--device", "cpu"]) == 0
    assert "oldest turns are forgotten" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text", "named"),
    [
        (["--temperature", "inf"], "", "temperature"),
        ([], b"\xff\n", "utf-8"),
        ([], "tower " * 200, "shorten"),
    ],
)
def test_mistakes_in_a_chat_get_a_sentence(
    folder, monkeypatch, capsys, words, text, named
):
    piped(monkeypatch, text)
    assert cli.main(["chat", str(folder), "--device", "cpu", *words]) == 2
    assert named in capsys.readouterr().err


def test_a_model_without_roles_is_refused(monkeypatch, capsys):
    piped(monkeypatch, "hello\n")
    assert cli.main(["chat", "shakespeare"]) == 2
    assert "add_roles" in capsys.readouterr().err


class Terminal(io.StringIO):
    """Somebody at a keyboard."""

    def isatty(self):
        return True


def at_the_keyboard(monkeypatch, *events):
    """What is typed, or raised, at each prompt."""
    events = iter(events)

    def read(_):
        event = next(events, EOFError())
        if isinstance(event, BaseException):
            raise event
        return event

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)


def test_ctrl_c_stops_an_answer_and_not_the_program(folder, monkeypatch, capsys):
    at_the_keyboard(monkeypatch, KeyboardInterrupt(), "first", "tower " * 200, "second")
    talks = []

    def interrupted(model, tokenizer, talk, *_, **__):
        talks.append([dict(turn) for turn in talk])
        yield "Well"
        if len(talks) == 1:
            raise KeyboardInterrupt
        yield ", no"

    monkeypatch.setattr(cli, "stream_answer", interrupted)
    assert cli.main(["chat", str(folder), "--device", "cpu", "--tokens", "8"]) == 0
    assert talks[1][:2] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "Well"},
    ]
    shown = capsys.readouterr()
    assert "Well\n" in shown.out
    assert "Well, no\n" in shown.out
    assert "Ctrl-D ends" in shown.err
    assert "shorten" in shown.err


def test_a_pipe_is_stopped_as_a_whole(folder, monkeypatch):
    def interrupted(*_, **__):
        yield "Well"
        raise KeyboardInterrupt

    piped(monkeypatch, "one\ntwo\n")
    monkeypatch.setattr(cli, "stream_answer", interrupted)
    assert cli.main(["chat", str(folder), "--device", "cpu"]) == 130


def test_the_chapter_shows_the_record():
    book = cli.Path(glassgpt.__file__).parents[2] / "book"
    record = json.loads((book / "runs" / "chat.json").read_text("utf-8"))
    chapter = json.loads((book / "17_chat.ipynb").read_text("utf-8"))
    sources = {cell["id"]: "".join(cell["source"]) for cell in chapter["cells"]}
    shown: dict = {}
    records = ("system-record", "everything-read", "lora-record")
    exec("\n".join(sources[name] for name in records), shown)
    lora: dict = {}
    for found in record["lora"]:
        losses = found["learned"], found["forgotten"]
        lora.setdefault(found["way"], {})[found["rate"]] = losses
    assert shown["LORA"] == lora
    keys = ("step", "gain", "error", "kl", "right")
    curve = record["system"]["curve"]
    ends = [tuple(point[key] for key in keys) for point in (curve[0], curve[-1])]
    assert shown["GAINS"] == ends
    assert shown["REPLIES"] == record["system"]["speeches"]
    assert shown["FALSTAFF"] == record["system"]["most"]
    before, after = (
        len(record["manner"][f"capitals {x}"]) for x in ("before", "after")
    )
    said = f"it knew {after} of 16 capitals, before them {before} ("
    assert said in sources["manner"]
    named = record["name"]
    exec(sources["name-taught"].partition("named =")[0], shown)
    ways = sources["after-more"].partition("other_ways = ")[2].partition("assert")[0]
    exec(f"other_ways = {ways}", shown)
    assert shown["ways"] == named["ways"]
    assert shown["other_ways"] == named["other ways"]
    for found in named["right"].values():
        assert "{}, {} and {}".format(*found) in sources["after-table"]
    record = record["masks"]
    assert f"steps={record['steps'][-1]}," in sources["train"]
    for name in ("answers", "everything"):
        assert [run["seed"] for run in record[name]] == [0, 1, 2]
        for run in record[name]:
            assert len(run["answers"]) == len(record["steps"])
            assert np.isfinite(run["answers"]).all()
        assert shown["LAST"][name] == [run["answers"][-1] for run in record[name]]
