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
from glassgpt.generation import KeyValueCache, generate
from glassgpt.gpt import GPT
from glassgpt.softmax import log_softmax
from glassgpt.training import in_mode


@dataclass(frozen=True)
class Question:
    """A prompt, its right ending, and wrong ones: none where the model has to write.

    Raises ValueError for a text that is empty, and for an ending that is there twice.

    Book: 20_evaluation.html#evaluation-how-good-is-it
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

    Spaces at the end of the prompt count as the beginning of the endings, as most
    tokenizers have them. Raises ValueError where prompt and ending don't fit the
    context.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    stem = prompt.rstrip() or prompt
    spaces = prompt[len(stem) :]
    given = len(tokenizer.encode(stem))
    rows = [tokenizer.encode(stem + spaces + ending) for ending in endings]
    longest = max(map(len, rows))
    if longest - 1 > model.config.context:
        raise ValueError(
            f"a question of {longest - 1} tokens doesn't fit the context, "
            f"{model.config.context}: shorten it, or give fewer examples"
        )
    device = next(model.parameters()).device
    padded = [row + [0] * (longest - len(row)) for row in rows]
    ids = torch.tensor(padded, device=device)  # (E, T)
    shared = min(_shared_start(rows), given - 1)
    caches = [KeyValueCache(longest) for _ in model.blocks]
    with in_mode(model, training=False):
        if shared > 0:  # the prompt is read once, for all endings
            model.hidden_states(ids[:1, :shared], caches=caches)
            for cache in caches:
                cache.keys = cache.keys.repeat(len(rows), 1, 1, 1)
                cache.values = cache.values.repeat(len(rows), 1, 1, 1)
        hidden = model.hidden_states(ids[:, shared:-1], caches=caches)
        logits = model.head(hidden[:, given - 1 - shared :])
    of_tokens = log_softmax(logits.float()).gather(2, ids[:, given:, None])[..., 0]
    lengths = torch.tensor([len(row) - given for row in rows], device=device)
    is_ending = torch.arange(longest - given, device=device) < lengths[:, None]
    return (of_tokens * is_ending).sum(dim=1), lengths


def _shared_start(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows have in common at their beginning."""
    for place, tokens in enumerate(zip(*rows, strict=False)):
        if len(set(tokens)) > 1:
            return place
    return min(map(len, rows))


def with_examples(prompt: str, examples: Iterable[Question]) -> str:
    """A prompt after solved questions, with an empty line after each.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    return "".join(f"{one.prompt}{one.answer}\n\n" for one in examples) + prompt


Way = Literal["sum", "token", "character", "pmi"]


def score_choices(
    model: GPT,
    tokenizer: Any,
    question: Question,
    by: Way = "character",
    examples: Sequence[Question] = (),
) -> Tensor:
    """A score (E,) for each choice of a question, the right one first.

    by: "sum" is the log-probability of the ending; "token" and "character" divide it
    by the ending's length; "pmi" subtracts what it is after nothing but a line break.
    examples: solved questions that stand in front. Raises ValueError as
    `log_likelihoods`. Sources: Brown et al. (2020), Gao et al. (2024).

    Book: 20_evaluation.html#evaluation-how-good-is-it
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
    return found


def evaluate_choices(
    model: GPT,
    tokenizer: Any,
    questions: Iterable[Question],
    by: Way = "character",
    examples: Sequence[Question] = (),
) -> list[bool]:
    """For each question, whether the right ending has the highest score of all.

    A tie isn't right. by, examples: as in `score_choices`.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    right = []
    for question in questions:
        scores = score_choices(model, tokenizer, question, by, examples)
        right.append(bool(scores[0] > scores[1:].max()))
    return right


def write_answers(
    model: GPT,
    tokenizer: Any,
    questions: Sequence[Question],
    examples: Sequence[Question] = (),
) -> list[str]:
    """What the model writes after each prompt, greedily, up to the end of the line.

    16 prompts are one batch. Each may have four tokens more than the longest right
    answer. Raises ValueError for a prompt that doesn't fit the context.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    stop = tokenizer.special_tokens.values()
    written = []
    for first in range(0, len(questions), 16):
        batch = questions[first : first + 16]
        texts = [with_examples(question.prompt, examples) for question in batch]
        prompts = [tokenizer.encode(text.rstrip()) for text in texts]
        answers = [tokenizer.encode(question.answer) for question in batch]
        room = max(map(len, answers)) + 4
        rows = generate(model, prompts, room, stop, temperature=0)
        for prompt, row in zip(prompts, rows, strict=True):
            text = tokenizer.decode(row[len(prompt) :])
            written.append(text.strip().partition("\n")[0])
    return written


def exact_match(
    model: GPT,
    tokenizer: Any,
    questions: Sequence[Question],
    examples: Sequence[Question] = (),
) -> list[bool]:
    """For each question, whether the model writes the right answer, and stops there.

    Spaces around it and a period at its end don't count.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    texts = write_answers(model, tokenizer, questions, examples)
    right = zip(texts, (question.answer for question in questions), strict=True)
    return [text.strip(" .") == answer.strip(" .") for text, answer in right]


def mean_with_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error: the standard deviation over the root of n.

    Raises ValueError for fewer than two values.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    if len(values) < 2:
        raise ValueError("a standard error takes two values at least")
    numbers = torch.tensor(values, dtype=torch.float64)
    error = numbers.std() / math.sqrt(len(numbers))  # n - 1 in the deviation
    return numbers.mean().item(), error.item()


def paired_difference(
    ours: Sequence[float], others: Sequence[float]
) -> tuple[float, float]:
    """By how much one model is better on the same questions, and the standard error.

    Raises ValueError where the numbers of answers differ.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    if len(ours) != len(others):
        raise ValueError(f"{len(ours)} answers can't be paired with {len(others)}")
    return mean_with_error([a - b for a, b in zip(ours, others, strict=True)])


def questions_needed(difference: float, deviation: float) -> int:
    """How many questions show a difference of means in four tests of five.

    deviation: of one question's value, or of one pair's difference. The difference is
    2.8 standard errors then: 1.96, where chance alone would come once in 20, and 0.84
    so that bad luck hides it once in five. Raises ValueError for no difference.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    if difference == 0:
        raise ValueError("no number of questions shows a difference of 0")
    return math.ceil((2.8 * deviation / difference) ** 2)


def read_questions(path: str | Path) -> list[Question]:
    """Questions from JSON lines: {"prompt": ..., "answer": ..., "wrong": [...]}.

    Empty lines are skipped. Raises ValueError that names the line for what isn't a
    question, and for a file without any.

    Book: 20_evaluation.html#evaluation-how-good-is-it
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
    return questions


def _question_of(fields: Any) -> Question:
    """A question from a line's fields; others than these three are left out."""
    match fields:
        case {"prompt": str(prompt), "answer": str(answer)}:
            wrong = fields.get("wrong", [])
            if isinstance(wrong, list):
                return Question(prompt, answer, tuple(wrong))
    raise ValueError(
        'a question is {"prompt": text, "answer": text, "wrong": [text, ...]}'
    )


@dataclass(frozen=True)
class Task:
    """Questions, and others that may stand solved in front of them.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """

    questions: list[Question]
    examples: list[Question]

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
    answer: str, candidates: Iterable[str], pick: random.Random
) -> tuple[str, ...]:
    """Three different candidates that aren't the answer."""
    return tuple(pick.sample(sorted(set(candidates) - {answer}), 3))


def line_endings(plays: Iterable[str] = HELD_OUT_PLAYS, seed: int = 0) -> Task:
    """Which three words end a line of a play? The others end lines of other places.

    Another seed chooses other lines.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    lines = []
    for play in shakespeare():
        rows = play.text.split("\n") if play.name in plays else []
        for before, line in zip(rows, rows[1:], strict=False):
            spoken = before and not before.endswith(":") and "[" not in before + line
            if spoken and len(line.split()) >= 7:
                lines.append((before, line.rsplit(maxsplit=3)))
    endings = [" " + " ".join(words[1:]) for _, words in lines]
    pick = random.Random(0)
    questions = []
    for (before, words), ending in zip(lines, endings, strict=True):
        wrong = _three_others(ending, endings, pick)
        questions.append(Question(f"{before}\n{words[0]}", ending, wrong))
    return _task(questions, seed)


def speakers(plays: Iterable[str] = HELD_OUT_PLAYS) -> Task:
    """Who speaks next? The others speak elsewhere in the same play.

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    pick = random.Random(0)
    questions = []
    for play in shakespeare():
        if play.name in plays:
            found = list(re.finditer(r"\n\n([A-Z][A-Z ]+):\n", play.text))
            names = [match[1] + ":" for match in found]
            for match, name in zip(found, names, strict=True):
                before = play.text[max(0, match.start() - 400) : match.start() + 2]
                before = before.partition("\n")[2]  # from a whole line on
                wrong = _three_others(name, names, pick)
                questions.append(Question(before, name, wrong))
    return _task(questions)


def capitals() -> Task:
    """Which city is the capital of a country, a state or a province?

    Book: 20_evaluation.html#evaluation-how-good-is-it
    """
    path = files("glassgpt") / "records/capitals.json"
    places = json.loads(path.read_text("utf-8"))
    pick = random.Random(0)
    questions = []
    for place, city in places.items():
        others = _three_others(city, places.values(), pick)
        wrong = tuple(f" {other}" for other in others)
        questions.append(Question(f"The capital of {place} is", f" {city}", wrong))
    return _task(questions)


def sums() -> Task:
    """What do two numbers of two digits make? The others are off by 1, 2 or 10.

    Book: 20_evaluation.html#evaluation-how-good-is-it
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
