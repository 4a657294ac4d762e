# Written by tools/tangle.py from book/20_evaluation.ipynb: change it there.
"""Evaluation: questions, scores, and how far they can be trusted."""

import hashlib
import json
import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from glassgpt.data import HELD_OUT_PLAYS, shakespeare
from glassgpt.generation import generate
from glassgpt.gpt import GPT
from glassgpt.softmax import log_softmax
from glassgpt.training import in_mode


@dataclass(frozen=True)
class Question:
    """A prompt, its right ending, and wrong ones: none where the model has to write.

    Raises ValueError for a text that is empty, and for an ending that is there twice.

    Book: 20_evaluation.html#the-function
    """

    prompt: str
    answer: str
    wrong: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        texts = (self.prompt, *self.choices)
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(
                "prompt, answer and wrong endings must be texts, not empty"
            )
        endings = {text.strip() for text in self.choices}
        if "" in endings or len(endings) < len(self.choices):
            raise ValueError("the endings must differ, and none may be blank")

    @property
    def choices(self) -> tuple[str, ...]:
        """All endings, the right one first."""
        return (self.answer, *self.wrong)

    @property
    def chance(self) -> float:
        """How often a guess is right; 0 where there is nothing to choose from."""
        return 1 / len(self.choices) if self.wrong else 0.0


@torch.inference_mode()
def log_likelihoods(
    model: GPT, tokenizer: Any, prompt: str, endings: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """The log-probability of each ending after a prompt, and its tokens: (E,) each.

    Spaces at the end of the prompt count as the beginning of the endings. Raises
    ValueError where prompt and ending don't fit the context, or merge into one token.

    Book: 20_evaluation.html#the-function
    """
    stem = prompt.rstrip() or prompt
    spaces = prompt[len(stem) :]
    given = len(tokenizer.encode(stem))
    rows = [tokenizer.encode(stem + spaces + ending) for ending in endings]
    for row, ending in zip(rows, endings, strict=True):
        before = tokenizer.decode(row[:given]).rstrip()
        if len(row) <= given or before != stem.rstrip():
            raise ValueError(
                f"the ending {ending!r} merges with the last word of the prompt "
                f"{prompt[-40:]!r} into one token: begin it with a space"
            )
    longest = max(map(len, rows))
    if longest - 1 > model.config.context:
        raise ValueError(
            f"{longest - 1} tokens don't fit the context, {model.config.context}: "
            f"give fewer examples, or shorten the prompt {prompt[-40:]!r}"
        )
    device = next(model.parameters()).device
    padded = [row + [0] * (longest - len(row)) for row in rows]
    ids = torch.tensor(padded, device=device)  # (E, T)
    with in_mode(model, training=False):
        logits = model(ids[:, :-1])[:, given - 1 :]  # of the endings' tokens
    of_tokens = log_softmax(logits.float()).gather(2, ids[:, given:, None])[..., 0]
    lengths = torch.tensor([len(row) - given for row in rows], device=device)
    is_ending = torch.arange(longest - given, device=device) < lengths[:, None]
    return (of_tokens * is_ending).sum(dim=1), lengths


def with_examples(prompt: str, examples: Iterable[Question]) -> str:
    """A prompt after solved questions, with an empty line after each.

    Book: 20_evaluation.html#the-function
    """
    return "".join(f"{one.prompt}{one.answer}\n\n" for one in examples) + prompt


Score = Literal["sum", "token", "character", "pmi"]


def score_choices(
    model: GPT,
    tokenizer: Any,
    question: Question,
    by: Score = "character",
    examples: Sequence[Question] = (),
) -> Tensor:
    """A score (E,) for each choice of a question, the right one first.

    by: "sum" is the log-probability of the ending; "token" and "character" divide it
    by the ending's length; "pmi" subtracts what it is after nothing but a line break.
    examples: solved questions that stand in front. Raises ValueError as
    `log_likelihoods`. Sources: Brown et al. (2020), Gao et al. (2024).

    Book: 20_evaluation.html#the-function
    """
    prompt = with_examples(question.prompt, examples)
    found, lengths = log_likelihoods(model, tokenizer, prompt, question.choices)
    if by == "token":
        return found / lengths
    if by == "character":
        characters = [len(choice.strip()) for choice in question.choices]
        return found / torch.tensor(characters, device=found.device)
    if by == "pmi":
        alone, _ = log_likelihoods(model, tokenizer, "\n", question.choices)
        return found - alone
    if by != "sum":
        raise ValueError(f"by must be sum, token, character or pmi, not {by!r}")
    return found


def evaluate_choices(
    model: GPT,
    tokenizer: Any,
    questions: Iterable[Question],
    by: Score = "character",
    examples: Sequence[Question] = (),
) -> list[bool]:
    """For each question, whether the right ending has the highest score of all.

    A tie isn't right. by, examples: as in `score_choices`. Raises ValueError for a
    question without wrong endings, which `exact_match` is for.

    Book: 20_evaluation.html#the-function
    """
    right = []
    for question in questions:
        if not question.wrong:
            raise ValueError(f"nothing to choose from: {question.prompt!r}")
        scores = score_choices(model, tokenizer, question, by, examples)
        right.append(bool(scores[0] > scores[1:].max()))
    return right


@dataclass(frozen=True)
class Task:
    """Questions, and others that may stand solved in front of each.

    Book: 20_evaluation.html#three-hundred-questions
    """

    questions: list[Question]
    examples: list[Question]

    @property
    def chance(self) -> float:
        """The accuracy of a guess."""
        return sum(question.chance for question in self.questions) / len(self.questions)

    @property
    def fingerprint(self) -> str:
        """Twelve digits that differ where any text of the questions does."""
        texts = [[q.prompt, q.answer, *q.wrong] for q in self.questions]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def _task(questions: list[Question], seed: int = 0) -> Task:
    """300 of the questions, and eight examples, in a random order."""
    chosen = random.Random(seed).sample(questions, 308)
    return Task(chosen[8:], chosen[:8])


def _three_others(
    answer: str, candidates: Sequence[str], pick: random.Random
) -> tuple[str, ...]:
    """Three of the candidates, which are different, that aren't the answer."""
    return tuple(pick.sample([other for other in candidates if other != answer], 3))


def line_endings(plays: Iterable[str] = HELD_OUT_PLAYS, seed: int = 0) -> Task:
    """Which three words end a line of a play? The others end lines of other places.

    Another seed chooses other lines.

    Book: 20_evaluation.html#three-hundred-questions
    """
    lines = []
    for play in shakespeare():
        rows = play.text.split("\n") if play.name in plays else []
        for before, line in zip(rows, rows[1:], strict=False):
            spoken = before and not before.endswith(":") and "[" not in before + line
            if spoken and len(line.split()) >= 7:
                lines.append((before, line.rsplit(maxsplit=3)))
    endings = [" " + " ".join(words[1:]) for _, words in lines]
    different = sorted(set(endings))
    pick = random.Random(0)
    questions = []
    for (before, words), ending in zip(lines, endings, strict=True):
        wrong = _three_others(ending, different, pick)
        questions.append(Question(f"{before}\n{words[0]}", ending, wrong))
    return _task(questions, seed)


def mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error: the standard deviation over the root of n.

    Raises ValueError for fewer than two values.

    Book: 20_evaluation.html#how-far-is-that-from-the-truth
    """
    if len(values) < 2:
        raise ValueError("a standard error takes two values at least")
    numbers = torch.tensor(values, dtype=torch.float64)
    error = numbers.std() / math.sqrt(len(numbers))  # n - 1 in the deviation
    return numbers.mean().item(), error.item()


def wilson_interval(right: Sequence[float]) -> tuple[float, float]:
    """The ends of a 95 % interval for an accuracy, also for few answers.

    right: 0 or 1 for each question. Raises ValueError for none. Source: Wilson (1927).

    Book: 20_evaluation.html#how-far-is-that-from-the-truth
    """
    if not right:
        raise ValueError("an interval takes one answer at least")
    n, share = len(right), sum(right) / len(right)
    extra = 1.96**2 / n
    middle = share + extra / 2
    half = math.sqrt(extra * (share * (1 - share) + extra / 4))
    return (middle - half) / (1 + extra), (middle + half) / (1 + extra)


def paired_difference(
    ours: Sequence[float], others: Sequence[float]
) -> tuple[float, float]:
    """By how much one model is better on the same questions, and the standard error.

    Raises ValueError where the numbers of answers differ.

    Book: 20_evaluation.html#which-of-two-models-is-better
    """
    if len(ours) != len(others):
        raise ValueError(f"{len(ours)} answers can't be paired with {len(others)}")
    return mean_with_error([a - b for a, b in zip(ours, others, strict=True)])


def questions_needed(difference: float, deviation: float) -> int:
    """How many questions show a difference of means in four tests of five.

    deviation: of one question's value, or of one pair's difference. The difference is
    2.8 standard errors then: 1.96, where chance alone would come once in 20, and 0.84
    so that bad luck hides it once in five. Raises ValueError for no difference.

    Book: 20_evaluation.html#how-many-questions-does-a-claim-need
    """
    if difference == 0:
        raise ValueError("no number of questions shows a difference of 0")
    return math.ceil((2.8 * deviation / difference) ** 2)


def speakers(plays: Iterable[str] = HELD_OUT_PLAYS) -> Task:
    """Who speaks next? The others speak elsewhere in the same play.

    Book: 20_evaluation.html#questions-about-the-world
    """
    pick = random.Random(0)
    questions = []
    for play in shakespeare():
        if play.name in plays:
            found = list(re.finditer(r"\n\n([A-Z][A-Z ]+):\n", play.text))
            names = [match[1] + ":" for match in found]
            different = sorted(set(names))
            for match, name in zip(found, names, strict=True):
                before = play.text[max(0, match.start() - 400) : match.start() + 2]
                before = before.partition("\n")[2]  # from a whole line on
                wrong = _three_others(name, different, pick)
                questions.append(Question(before, name, wrong))
    return _task(questions)


def capitals() -> Task:
    """Which city is the capital of a country, a state or a province?

    Book: 20_evaluation.html#questions-about-the-world
    """
    path = files("glassgpt") / "records/capitals.json"
    places = json.loads(path.read_text("utf-8"))
    different = sorted(set(places.values()))
    pick = random.Random(0)
    questions = []
    for place, city in places.items():
        others = _three_others(city, different, pick)
        wrong = tuple(f" {other}" for other in others)
        questions.append(Question(f"The capital of {place} is", f" {city}", wrong))
    return _task(questions)


def sums() -> Task:
    """What do two numbers of two digits make? The others are off by 1, 2 or 10.

    Book: 20_evaluation.html#questions-about-the-world
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    pick = random.Random(0)
    questions = []
    for a, b in pairs:
        near = [a + b + off for off in pick.sample((-10, -2, -1, 1, 2, 10), 3)]
        wrong = tuple(f" {number}" for number in near)
        questions.append(Question(f"{a} + {b} =", f" {a + b}", wrong))
    return _task(questions)


TASKS: dict[str, Callable[[], Task]] = {
    "endings": line_endings,
    "speakers": speakers,
    "capitals": capitals,
    "sums": sums,
}


def write_answer(
    model: GPT,
    tokenizer: Any,
    question: Question,
    examples: Sequence[Question] = (),
) -> str:
    """What the model writes after a prompt, greedily, up to the end of the line.

    It may write four tokens more than the right answer has. Raises ValueError for a
    prompt that doesn't fit the context.

    Book: 20_evaluation.html#or-let-it-write
    """
    prompt = tokenizer.encode(with_examples(question.prompt, examples).rstrip())
    room = len(tokenizer.encode(question.answer)) + 4
    stop = tokenizer.special_tokens.values()
    ids = generate(model, prompt, room, stop, temperature=0)
    return tokenizer.decode(ids[len(prompt) :]).strip().partition("\n")[0]


def exact_match(
    model: GPT,
    tokenizer: Any,
    questions: Iterable[Question],
    examples: Sequence[Question] = (),
) -> list[bool]:
    """For each question, whether the model writes the right answer, and stops there.

    Spaces around it and a period at its end don't count.

    Book: 20_evaluation.html#or-let-it-write
    """
    right = []
    for question in questions:
        written = write_answer(model, tokenizer, question, examples)
        right.append(written.strip(" .") == question.answer.strip(" ."))
    return right


def read_questions(path: str | Path) -> list[Question]:
    """Questions from JSON lines: {"prompt": ..., "answer": ..., "wrong": [...]}.

    Empty lines are skipped. Raises ValueError that names the line for what isn't a
    question, for a file without any, and where only some have wrong endings.

    Book: 20_evaluation.html#questions-of-your-own
    """
    questions = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                questions.append(_question_of(json.loads(line.decode("utf-8"))))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not questions:
        raise ValueError(f"{path} holds no questions")
    if len({bool(question.wrong) for question in questions}) > 1:
        raise ValueError(f"{path}: give wrong endings to all questions, or to none")
    return questions


def _question_of(fields: Any) -> Question:
    """A question from a line's fields."""
    match fields:
        case {"prompt": prompt, "answer": answer, "wrong": list(wrong), **others}:
            question = Question(prompt, answer, tuple(wrong))
        case {"prompt": prompt, "answer": answer, **others} if "wrong" not in fields:
            question = Question(prompt, answer)
        case _:
            raise ValueError(
                'a question is {"prompt": text, "answer": text, "wrong": [text, ...]}'
            )
    if others:
        raise ValueError(f"a question has no field {next(iter(others))!r}")
    return question


def load_task(name: str | Path, examples: int = 0) -> Task:
    """A task of `TASKS`, or a file of questions, with this many examples.

    The first questions of a file become its examples. Raises ValueError for what is
    neither, as `read_questions` does, and where no question is left.

    Book: 20_evaluation.html#questions-of-your-own
    """
    if name in TASKS:
        task = TASKS[str(name)]()
    elif Path(name).is_file():
        questions = read_questions(name)
        task = Task(questions[examples:], questions[:examples])
    else:
        raise ValueError(
            f"{name} is neither a file of questions nor one of {', '.join(TASKS)}"
        )
    if not 0 <= examples <= len(task.examples) or not task.questions:
        raise ValueError(f"{name} has no {examples} examples and a question besides")
    return Task(task.questions, task.examples[:examples])


def answer_task(
    model: GPT, tokenizer: Any, task: Task, by: Score = "character"
) -> list[bool]:
    """Right and wrong answers: chosen where a question has endings, else written.

    Book: 20_evaluation.html#questions-of-your-own
    """
    if any(question.wrong for question in task.questions):
        return evaluate_choices(model, tokenizer, task.questions, by, task.examples)
    return exact_match(model, tokenizer, task.questions, task.examples)
