"""Evaluation: scores of endings, exact matches, errors, tasks, files of questions."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from statistics import NormalDist, mean, stdev

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glassgpt.cli import main
from glassgpt.evaluation import (
    TASKS,
    Question,
    Task,
    answer_task,
    evaluate_choices,
    exact_match,
    line_endings,
    load_task,
    log_likelihoods,
    mean_with_error,
    paired_difference,
    questions_needed,
    read_questions,
    score_choices,
    wilson_interval,
    with_examples,
    write_answer,
)
from glassgpt.generation import generate, log_probabilities
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import LLAMA_CHOICES, ModernConfig, build
from glassgpt.tokens import BPETokenizer, CharTokenizer

CHARACTERS = CharTokenizer("\nabcdef .")
SIZES = {"vocab_size": 9, "context": 40, "layers": 2, "heads": 2, "width": 16}


def make(config=None):
    torch.manual_seed(0)
    model = build(config or GPTConfig(**SIZES, dropout=0.3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    return model


MODEL = make()
LLAMA = make(ModernConfig(**SIZES, key_value_heads=1, **LLAMA_CHOICES))
texts = st.text("abcdef .", min_size=1, max_size=6)
letters = st.text("abcdef", min_size=1, max_size=6)


def alone(model, prompt, ending):
    """The log-probability of one ending, read by itself."""
    ids = CHARACTERS.encode(prompt + ending)
    return log_probabilities(model, ids)[len(CHARACTERS.encode(prompt)) - 1 :].sum()


@settings(deadline=None, max_examples=60)
@given(letters, st.lists(texts, min_size=1, max_size=5), st.sampled_from([0, 1]))
def test_endings_score_together_as_each_alone(prompt, endings, number):
    model = (MODEL, LLAMA)[number]
    totals, lengths = log_likelihoods(model, CHARACTERS, prompt, endings)
    assert lengths.tolist() == [len(ending) for ending in endings]
    wanted = torch.stack([alone(model, prompt, ending) for ending in endings])
    torch.testing.assert_close(totals, wanted, atol=1e-9, rtol=0)
    assert not totals.requires_grad


def test_dropout_is_off_and_the_mode_comes_back():
    MODEL.train()
    first, _ = log_likelihoods(MODEL, CHARACTERS, "abc", ["a", "bb"])
    again, _ = log_likelihoods(MODEL, CHARACTERS, "abc", ["a", "bb"])
    assert torch.equal(first, again)
    assert MODEL.training
    MODEL.eval()


def test_spaces_at_the_end_of_a_prompt_belong_to_the_endings():
    spaced, lengths = log_likelihoods(MODEL, CHARACTERS, "abc ", ["d", "ef"])
    moved, _ = log_likelihoods(MODEL, CHARACTERS, "abc", [" d", " ef"])
    assert torch.equal(spaced, moved)
    assert lengths.tolist() == [2, 3]
    blank, lengths = log_likelihoods(MODEL, CHARACTERS, "\n", ["d"])
    assert lengths.tolist() == [1]
    assert blank[0] == pytest.approx(alone(MODEL, "\n", "d").item())


def test_an_ending_that_merges_with_the_prompt_is_refused():
    tokenizer = BPETokenizer.train(["the cat sat on the catalog " * 20], 270)
    model = GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 16)).eval()
    _, lengths = log_likelihoods(model, tokenizer, "the cat", [" cat", " catalog"])
    assert lengths.min() >= 1
    before = tokenizer.encode("the cat")
    merged = [e for e in ("a", "al", "alog") if starts_anew(tokenizer, before, e)]
    assert merged  # "catalog" has other tokens than "cat" and "alog"
    for ending in merged:
        with pytest.raises(ValueError, match=f"{ending!r} merges with .* 'the cat'"):
            log_likelihoods(model, tokenizer, "the cat", [" cat", ending])


def starts_anew(tokenizer, before, ending):
    return tokenizer.encode("the cat" + ending)[: len(before)] != before


class WithLineBreaks(CharTokenizer):
    """One token for a line break and a space, as SmolLM2 has before a digit."""

    def __init__(self) -> None:
        super().__init__("\nabcdef _")

    def encode(self, text: str) -> list[int]:
        return super().encode(text.replace("\n ", "_"))

    def decode(self, ids: Iterable[int]) -> str:
        return super().decode(ids).replace("_", "\n ")


def test_a_line_break_may_merge_with_the_space_of_an_ending():
    _, lengths = log_likelihoods(MODEL, WithLineBreaks(), "\n", [" a", " bc"])
    assert lengths.tolist() == [1, 2]


def test_a_question_fills_the_context_and_no_more():
    room = MODEL.config.context
    log_likelihoods(MODEL, CHARACTERS, "a" * room, ["b"])  # the last one isn't read
    with pytest.raises(ValueError, match="41 tokens don't fit the context, 40: .*aaa'"):
        log_likelihoods(MODEL, CHARACTERS, "a" * room, ["b", "bc"])


QUESTION = Question("abc", " de", (" f", " a b"))


def test_the_four_scores_are_their_formulas():
    given_ = "\nabc"
    question = Question(given_, " de", (" f", " a b"))
    sums = torch.stack([alone(MODEL, given_, ending) for ending in question.choices])
    own = torch.stack([alone(MODEL, "\n", ending) for ending in question.choices])
    for by, wanted in (
        ("sum", sums),
        ("token", sums / torch.tensor([3, 2, 4])),
        ("character", sums / torch.tensor([2, 1, 3])),
        ("pmi", sums - own),
    ):
        found = score_choices(MODEL, CHARACTERS, question, by)
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    usual = score_choices(MODEL, CHARACTERS, question)
    assert torch.equal(usual, score_choices(MODEL, CHARACTERS, question, "character"))


def test_examples_stand_in_front_with_an_empty_line_after_each():
    examples = [Question("ab", " c"), Question("d", " e", (" f",))]
    assert with_examples("fa", examples) == "ab c\n\nd e\n\nfa"
    shown = score_choices(MODEL, CHARACTERS, QUESTION, "sum", examples)
    whole = Question("ab c\n\nd e\n\nabc", *QUESTION.choices[:1], QUESTION.wrong)
    assert torch.equal(shown, score_choices(MODEL, CHARACTERS, whole, "sum"))


def test_the_highest_score_is_chosen_and_a_tie_is_wrong(monkeypatch):
    scores = iter([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [2.0, 2.0, 1.0]])
    monkeypatch.setattr(
        "glassgpt.evaluation.score_choices", lambda *_: torch.tensor(next(scores))
    )
    assert evaluate_choices(MODEL, CHARACTERS, [QUESTION] * 3) == [True, False, False]
    with pytest.raises(ValueError, match="nothing to choose from: 'ab'"):
        evaluate_choices(MODEL, CHARACTERS, [Question("ab", "c")])


def written(model, question, examples=()):
    ids = CHARACTERS.encode(with_examples(question.prompt, examples).rstrip())
    room = len(question.answer) + 4
    found = generate(model, ids, room, (), temperature=0)[len(ids) :]
    return CHARACTERS.decode(found).strip().partition("\n")[0]


def test_answers_are_greedy_and_end_with_their_line():
    for start in range(5):
        question = Question("abcdef"[: 1 + start] + " ", "ab c")
        found = write_answer(MODEL, CHARACTERS, question)
        assert found == written(MODEL, question)
        assert "\n" not in found
        examples = [Question("a", "b")]
        shown = write_answer(MODEL, CHARACTERS, question, examples)
        assert shown == written(MODEL, question, examples)


def test_exact_match_minds_neither_spaces_nor_a_period(monkeypatch):
    found = iter(["de", " de.", "de f", "d", "DE"])
    monkeypatch.setattr("glassgpt.evaluation.write_answer", lambda *_: next(found))
    right = exact_match(MODEL, CHARACTERS, [Question("abc", " de.")] * 5)
    assert right == [True, True, False, False, False]


answers = st.lists(st.booleans(), min_size=2, max_size=40)


@given(answers)
def test_the_error_is_that_of_the_statistics_module(values):
    found, error = mean_with_error(values)
    assert found == pytest.approx(mean(map(float, values)))
    numbers = [float(value) for value in values]
    assert error == pytest.approx(stdev(numbers) / math.sqrt(len(values)), abs=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_a_difference_is_that_of_the_means_and_is_turned_round(pairs):
    ours, others = zip(*pairs, strict=True)
    difference, error = paired_difference(ours, others)
    assert difference == pytest.approx(
        mean_with_error(ours)[0] - mean_with_error(others)[0]
    )
    back, same = paired_difference(others, ours)
    assert (back, same) == (pytest.approx(-difference), pytest.approx(error))
    assert paired_difference(ours, ours) == (0, 0)


@given(st.integers(1, 400), st.data())
def test_the_ends_of_wilsons_interval_are_1_96_of_their_own_errors_away(n, data):
    k = data.draw(st.integers(0, n))
    ends = wilson_interval([1] * k + [0] * (n - k))
    for end in ends:
        own = (max(0, end * (1 - end)) / n) ** 0.5
        assert abs(end - k / n) == pytest.approx(1.96 * own, abs=1e-6)
    assert ends[0] - 1e-9 <= k / n <= ends[1] + 1e-9
    assert ends[0] < ends[1]


def test_too_few_answers_have_no_error():
    with pytest.raises(ValueError, match="one answer"):
        wilson_interval([])
    with pytest.raises(ValueError, match="two values at least"):
        mean_with_error([1])
    with pytest.raises(ValueError, match="3 answers can't be paired with 2"):
        paired_difference([1, 0, 1], [1, 0])


def test_questions_needed_have_four_chances_of_five():
    normal = NormalDist()
    for difference, deviation in ((0.1, 0.5), (0.02, 0.3), (-0.05, 0.7)):
        n = questions_needed(difference, deviation)
        error = deviation / math.sqrt(n)
        power = normal.cdf(abs(difference) / error - 1.96)
        assert power == pytest.approx(0.8, abs=0.005)
    with pytest.raises(ValueError, match="difference of 0"):
        questions_needed(0, 0.5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("", "a"), "not empty"),
        (("a", ""), "not empty"),
        (("a", "b", ("",)), "not empty"),
        (("a", "b", (3,)), "must be texts"),
        (("a", " "), "blank"),
        (("a", "b", ("c", " c")), "must differ"),
        (("a", "b", ("b",)), "must differ"),
    ],
)
def test_a_bad_question_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Question(*fields)


def test_chance_is_one_of_the_choices():
    assert Question("a", "b", ("c", "d", "e")).chance == 0.25
    assert Question("a", "b").chance == 0
    task = Task([Question("a", "b", ("c",)), Question("a", "b", ("c", "d", "e"))], [])
    assert task.chance == 0.375


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_300_different_questions_and_eight_examples(name):
    task = TASKS[name]()
    assert (len(task.questions), len(task.examples)) == (300, 8)
    asked = {(q.prompt, q.answer) for q in (*task.questions, *task.examples)}
    assert len(asked) == 308
    assert all(len(question.wrong) == 3 for question in task.questions)
    assert task.chance == 0.25
    assert task.fingerprint == TASKS[name]().fingerprint


def test_the_questions_are_those_of_the_record():
    from importlib.resources import files

    path = files("glassgpt") / "records/evaluation.json"
    stored = json.loads(path.read_text("utf-8"))["fingerprints"]
    assert {name: make().fingerprint for name, make in TASKS.items()} == stored


def test_questions_of_the_tasks_are_right():
    for question in TASKS["sums"]().questions:
        first, _, second, _ = question.prompt.split()
        total = int(first) + int(second)
        assert question.answer == f" {total}"
        off = {abs(int(wrong) - total) for wrong in question.wrong}
        assert off <= {1, 2, 10}
    known = {q.prompt: q.answer for q in TASKS["capitals"]().questions}
    assert known["The capital of Norway is"] == " Oslo"
    for question in TASKS["speakers"]().questions:
        assert question.prompt.endswith("\n\n")
        assert all(name.isupper() and name.endswith(":") for name in question.choices)


def test_lines_are_of_held_out_plays_and_other_seeds_choose_others():
    from glassgpt.data import HELD_OUT_PLAYS, shakespeare

    held_out = "".join(p.text for p in shakespeare() if p.name in HELD_OUT_PLAYS)
    task, other = line_endings(), line_endings(seed=1)
    for question in task.questions:
        assert f"\n{question.prompt}{question.answer}\n" in f"\n{held_out}\n"
        assert all(len(choice.split()) == 3 for choice in question.choices)
        before, line = question.prompt.split("\n")
        assert before
        assert len(line.split()) >= 4
    assert task.fingerprint != other.fingerprint


def test_a_fingerprint_changes_with_any_text():
    def of(*fields):
        return Task([Question(*fields)], []).fingerprint

    found = {of("a", "b"), of("a", "c"), of("ab", "b"), of("a", "b", ("c",))}
    assert len(found) == 4
    assert all(len(digits) == 12 for digits in found)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


ONE = '{"prompt": "abc", "answer": " d", "wrong": [" e"]}'
TWO = '{"prompt": "fé", "answer": " d", "wrong": [" e", " f"]}'


def test_questions_are_read_line_by_line(tmp_path):
    path = write(tmp_path / "mine.jsonl", ONE, "", TWO)
    first, second = read_questions(path)
    assert first == Question("abc", " d", (" e",))
    assert second == Question("fé", " d", (" e", " f"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("not json", "line 3: Expecting value"),
        ("[1, 2]", "line 3: a question is"),
        ('{"prompt": "a"}', "line 3: a question is"),
        ('{"prompt": "a", "answer": 3}', "line 3: prompt, answer"),
        ('{"prompt": "a", "answer": "b", "Wrong": ["c"]}', "line 3: .* field 'Wrong'"),
        ('{"prompt": "a", "answer": "b", "wrong": ["c"], "id": 3}', "no field 'id'"),
        ('{"prompt": "a", "answer": "b", "wrong": "c"}', "line 3: a question is"),
        ('{"prompt": "a", "answer": "b", "wrong": ["b"]}', "line 3: the endings"),
        ('{"prompt": "a", "answer": "b", "wrong": [1]}', "line 3: prompt, answer"),
        ('{"prompt": "a", "answer": "b"}', "to all questions, or to none"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "mine.jsonl", ONE, "", line)
    with pytest.raises(ValueError, match=words):
        read_questions(path)


def test_a_file_without_questions_and_one_that_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(write(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="line 1: "):
        read_questions(tmp_path / "picture")


def test_a_task_is_a_name_or_a_file(tmp_path):
    task = load_task("capitals", 2)
    assert task.fingerprint == TASKS["capitals"]().fingerprint
    assert task.examples == TASKS["capitals"]().examples[:2]
    path = write(tmp_path / "mine.jsonl", ONE, TWO)
    assert len(load_task(path).questions) == 2
    shown = load_task(str(path), 1)
    assert (shown.examples[0].prompt, shown.questions[0].prompt) == ("abc", "fé")
    for name, examples, words in (
        ("capitols", 0, "neither a file of questions nor one of endings, "),
        ("sums", 9, "sums has no 9 examples"),
        ("sums", -1, "no -1 examples"),
        (path, 2, "no 2 examples"),
        (path, 3, "no 3 examples"),
    ):
        with pytest.raises(ValueError, match=words):
            load_task(name, examples)


def test_a_task_is_chosen_or_written():
    chosen = [Question("ab", " c", (" d",)), Question("cd", " e", (" f",))]
    examples = [Question("e", " f")]
    found = answer_task(MODEL, CHARACTERS, Task(chosen, examples), "pmi")
    assert found == evaluate_choices(MODEL, CHARACTERS, chosen, "pmi", examples)
    right = Question("ab", written(MODEL, Question("ab", "abc")))
    asked = [right, Question("b", "a")]
    found = answer_task(MODEL, CHARACTERS, Task(asked, []))
    assert found == exact_match(MODEL, CHARACTERS, asked)


def test_the_harness_gives_the_same_accuracies(tmp_path, monkeypatch):
    reason = "lm-eval isn't installed; benchmarks/harness.py has compared 300 lines"
    pytest.importorskip("lm_eval", reason=reason)
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import harness

    from glassgpt import load, save

    model, tokenizer = load("shakespeare")
    questions = line_endings(seed=2).questions[:40]
    save(tmp_path / "model", model, tokenizer)
    found = harness.by_harness(tmp_path / "model", questions)
    for name, by in (("acc", "sum"), ("acc_norm", "character")):
        ours = sum(evaluate_choices(model, tokenizer, questions, by)) / 40
        assert found[name] == pytest.approx(ours)


def test_the_command_prints_accuracy_error_and_chance(tmp_path, capsys):
    from glassgpt import load

    lines = [
        json.dumps({"prompt": f"{name}:\nThou art", "answer": " a", "wrong": [wrong]})
        for name, wrong in (("ROMEO", " zoo"), ("JULIET", " the"), ("KING", " xyz"))
    ]
    path = write(tmp_path / "mine.jsonl", *lines)
    assert main(["evaluate", "shakespeare", "--task", str(path), "--by", "sum"]) == 0
    printed = capsys.readouterr().out
    model, tokenizer = load("shakespeare")
    right = evaluate_choices(model, tokenizer, read_questions(path), "sum")
    accuracy, error = mean_with_error(right)
    low, high = wilson_interval(right)
    assert printed == (
        f"accuracy {accuracy:.3f} ± {error:.3f} (95 %: {low:.2f} to {high:.2f}) "
        "by sum, chance 0.500: questions 3, examples 0, "
        f"fingerprint {load_task(path).fingerprint}\n"
    )
    command = ["evaluate", "shakespeare", "--task", str(path), "--examples", "1"]
    assert main(command) == 0
    assert "questions 2, examples 1" in capsys.readouterr().out


def test_the_command_writes_every_answer(tmp_path, capsys):
    from glassgpt import load

    path = write(tmp_path / "mine.jsonl", ONE, TWO)
    out = tmp_path / "answers.jsonl"
    command = ["evaluate", "shakespeare", "--task", str(path), "--answers", str(out)]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    right = evaluate_choices(*load("shakespeare"), read_questions(path))
    assert [row["right"] for row in rows] == right
    assert [row["prompt"] for row in rows] == ["abc", "fé"]
    before = out.read_text("utf-8")
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert out.read_text("utf-8") == before


def test_the_command_says_that_written_answers_match_exactly(tmp_path, capsys):
    written = '{"prompt": "ROMEO:", "answer": "no"}'
    path = write(tmp_path / "mine.jsonl", written, written)
    assert main(["evaluate", "shakespeare", "--task", str(path), "--by", "pmi"]) == 0
    assert "by exact match, chance 0.000" in capsys.readouterr().out


def test_the_command_names_a_bad_line_before_it_loads_a_model(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", ONE, "{")
    assert main(["evaluate", "no-model", "--task", str(path)]) == 2
    assert "line 2" in capsys.readouterr().err
