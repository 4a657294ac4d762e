# Written by tools/tangle.py from book/20_evaluation.ipynb: change it there.


"""Checks of scores, errors and overlaps that name the mistake."""

import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev

import torch
from torch import Tensor

from glassgpt.checks.expect import close
from glassgpt.evaluation import Question
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.tokens import CharTokenizer


@torch.no_grad()
def check_log_likelihoods(
    log_likelihoods: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    """Each ending gets the sum of its own tokens' log-probabilities after the prompt.

    log_likelihoods: called as log_likelihoods(model, tokenizer, prompt, endings).

    Book: 20_evaluation.html#the-function
    """
    tokenizer = CharTokenizer("abcdefgh")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = GPT(GPTConfig(8, 16, 2, 2, 16, tied=False)).eval()
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    prompt, endings = "gab", ["b", "cdef", "ag"]
    found, lengths = log_likelihoods(model, tokenizer, prompt, endings)
    own = [len(ending) for ending in endings]
    assert torch.as_tensor(lengths).tolist() == own, "lengths are the endings' tokens"
    texts = [(prompt + ending).ljust(7, "a") for ending in endings]  # padded by 0
    ids = torch.tensor([tokenizer.encode(text) for text in texts])  # (E, T)
    logs = model(ids).log_softmax(-1)
    before = logs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # (E, T - 1)
    at_itself = logs.gather(2, ids[..., None])[..., 0]  # (E, T)
    place = torch.arange(7)
    until_end = place < 3 + torch.tensor(own)[:, None]
    in_ending = until_end & (place >= 3)
    wanted = (before * in_ending[:, 1:]).sum(1)
    for mistake, wrong in (
        ("the prompt's own tokens are counted", before * until_end[:, 1:]),
        ("a token is predicted by the position before it", at_itself * in_ending),
        ("the padding of shorter endings is counted", before[:, 2:]),
    ):
        assert not close(torch.as_tensor(found), wrong.sum(1), within=1e-6), mistake
    right = close(torch.as_tensor(found), wanted)
    assert right, f"{found} where {wanted} is wanted"


def check_paired(
    paired_difference: Callable[[Sequence[int], Sequence[int]], tuple[float, float]],
) -> None:
    """The mean of the differences, and their standard error.

    paired_difference: called as paired_difference(ours, others) with lists of 0 and 1.

    Book: 20_evaluation.html#exercise-1-the-error-of-a-difference
    """
    ours, others = [1, 1, 0, 1, 1, 0, 1, 1, 1], [1, 0, 0, 1, 0, 1, 1, 0, 1]
    found, error = map(float, paired_difference(ours, others))
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    assert math.isclose(found, mean(differences), abs_tol=1e-6), (
        f"the mean difference is {mean(differences):.4f}, not {found:.4f}"
    )
    deviation = stdev(differences)
    unpaired = math.hypot(stdev(ours), stdev(others)) / 3
    for mistake, wrong in (
        ("this is the deviation of one question: divide by the root of n", deviation),
        ("this is the error of unpaired answers: subtract them first", unpaired),
        ("divide the squares by n - 1, not by n", deviation / 3 * (8 / 9) ** 0.5),
    ):
        assert not math.isclose(error, wrong, abs_tol=1e-6), mistake
    assert math.isclose(error, deviation / 3, abs_tol=1e-6), (
        f"the standard error is {deviation / 3:.4f}, not {error:.4f}"
    )


def check_choose(choose: Callable[..., int]) -> None:
    """Each of the four scores chooses the ending that is highest by it.

    choose: called as choose(after, alone, endings, by).

    Book: 20_evaluation.html#exercise-2-choose-by-four-scores
    """
    endings = [" at sea", " a", " to the island of Malta", " " * 30 + "x y"]
    after = [[-2.0, -2.5], [-3.0], [-1.2] * 4, [-1.0] * 5]
    alone = [[-5.0, -6.0], [-8.0], [-2.0] * 4, [-1.5] * 5]
    for by, wanted, mistake in (
        ("sum", 1, "the sum has no divisor"),
        ("token", 3, "an ending has as many tokens as log-probabilities"),
        ("character", 2, "spaces around an ending are no characters of it"),
        ("pmi", 0, "subtract what the ending has without the prompt, and don't divide"),
    ):
        found = choose(after, alone, endings, by)
        assert found == wanted, f"by {by} {found} is chosen, not {wanted}: {mistake}"


def check_overlap(overlap: Callable[..., list[bool]]) -> None:
    """A question is found where n words of it in a row stand in the text.

    overlap: called as overlap(questions, text, n).

    Book: 20_evaluation.html#exercise-3-find-the-leak
    """
    text = "The dog's bone was buried. Nobody KNEW who had the old map of the town."
    asked = {
        "runs of the text end at its last word": (
            "an old map of the town",
            " was lost",
        ),
        "a run may go from the prompt into the answer": ("Who had the", " old map"),
        "upper and lower case don't matter": ("NOBODY knew who", " had gone"),
        "apostrophes belong to words, commas don't": ("the dog's bone,", " was ours"),
    }
    for mistake, (prompt, answer) in asked.items():
        found = overlap([Question(prompt, answer)], text, 4)
        assert list(found) == [True], mistake
    for mistake, (prompt, answer) in {
        "the words must stand in a row, in this order": ("the old town", " of the map"),
        "a question of fewer than n words can't be found": ("the old", " map"),
        "words are compared whole": ("ad the old", " map"),
    }.items():
        found = overlap([Question(prompt, answer)], text, 4)
        assert list(found) == [False], mistake
