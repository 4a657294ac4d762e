"""Right and wrong answers to the checks of chapter 20."""

import re
from statistics import mean, stdev

import torch

from glassgpt.checks import evaluation as checks
from glassgpt.evaluation import Question, log_likelihoods, paired_difference
from glassgpt.generation import log_probabilities


def one_by_one(model, tokenizer, prompt, endings):
    """Lists of plain numbers, each ending by itself."""
    totals, lengths = [], []
    for ending in endings:
        lengths.append(len(tokenizer.encode(ending)))
        found = log_probabilities(model, tokenizer.encode(prompt + ending))
        totals.append(found[-lengths[-1] :].sum().item())
    return totals, lengths


def padded(model, tokenizer, prompt, endings):
    """Log-probabilities of all tokens but the first, of rows padded with 0."""
    rows = [tokenizer.encode(prompt + ending) for ending in endings]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(tokenizer.encode(ending)) for ending in endings])
    return ids, model(ids).log_softmax(-1), lengths


def counts_padding(model, tokenizer, prompt, endings):
    ids, logs, lengths = padded(model, tokenizer, prompt, endings)
    found = logs[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return found[:, len(prompt) - 1 :].sum(1), lengths


def counts_the_prompt(model, tokenizer, prompt, endings):
    totals, lengths = log_likelihoods(model, tokenizer, prompt, endings)
    return totals + log_probabilities(model, tokenizer.encode(prompt)).sum(), lengths


def looks_at_the_token_itself(model, tokenizer, prompt, endings):
    ids, logs, lengths = padded(model, tokenizer, prompt, endings)
    found = logs.gather(2, ids[..., None])[:, len(prompt) :, 0]
    return (found * (torch.arange(found.shape[1]) < lengths[:, None])).sum(1), lengths


def counts_all_tokens(model, tokenizer, prompt, endings):
    totals, lengths = log_likelihoods(model, tokenizer, prompt, endings)
    return totals, lengths + len(prompt)


def forgets_the_prompt(model, tokenizer, prompt, endings):
    return log_likelihoods(model, tokenizer, "a", endings)


def by_statistics(ours, others):
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    return mean(differences), stdev(differences) / len(differences) ** 0.5


def no_root(ours, others):
    found, error = by_statistics(ours, others)
    return found, error * len(ours) ** 0.5


def unpaired(ours, others):
    squares = (stdev(ours) ** 2 + stdev(others) ** 2) / len(ours)
    return mean(ours) - mean(others), squares**0.5


def of_the_population(ours, others):
    found, error = by_statistics(ours, others)
    return found, error * ((len(ours) - 1) / len(ours)) ** 0.5


def other_way_round(ours, others):
    return by_statistics(others, ours)


def twice_the_error(ours, others):
    found, error = by_statistics(ours, others)
    return found, 2 * error


def choose(after, alone, endings, by, strip=str.strip, minus=sum):
    scores = []
    for logs, own, ending in zip(after, alone, endings, strict=True):
        score = sum(logs)
        if by == "token":
            score /= len(logs)
        if by == "character":
            score /= len(strip(ending))
        if by == "pmi":
            score -= minus(own)
        scores.append(score)
    return max(range(len(scores)), key=scores.__getitem__)


def counts_spaces(*arguments):
    return choose(*arguments, strip=str)


def never_subtracts(*arguments):
    return choose(*arguments, minus=lambda own: 0)


def pmi_of_a_token(after, alone, endings, by):
    if by != "pmi":
        return choose(after, alone, endings, by)
    gains = [
        (sum(logs) - sum(own)) / len(logs)
        for logs, own in zip(after, alone, strict=True)
    ]
    return gains.index(max(gains))


def always_by_token(after, alone, endings, by):
    return choose(after, alone, endings, "token")


def always_by_sum(after, alone, endings, by):
    return choose(after, alone, endings, "sum")


def overlap(questions, text, n, words=r"[a-z']+", change=str.lower):
    def runs(part):
        found = re.findall(words, change(part), re.IGNORECASE)
        return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}

    known = runs(text)
    return [bool(runs(q.prompt + q.answer) & known) for q in questions]


def minds_case(questions, text, n):
    return overlap(questions, text, n, change=str)


def splits_at_spaces(questions, text, n):
    return overlap(questions, text, n, words=r"\S+")


def prompt_alone(questions, text, n):
    return overlap([Question(q.prompt, "?") for q in questions], text, n)


def any_words(questions, text, n):
    known = set(re.findall("[a-z']+", text.lower()))
    found = [re.findall("[a-z']+", (q.prompt + q.answer).lower()) for q in questions]
    return [sum(word in known for word in words) >= n for words in found]


def parts_of_words(questions, text, n):
    def flat(part):
        return " ".join(re.findall("[a-z']+", part.lower()))

    found = []
    for question in questions:
        words = flat(question.prompt + question.answer).split()
        runs = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
        found.append(any(run in flat(text) for run in runs))
    return found


def short_ones_too(questions, text, n):
    whole = [(q.prompt + q.answer).lower() in text.lower() for q in questions]
    found = overlap(questions, text, n)
    return [a or b for a, b in zip(whole, found, strict=True)]


RIGHT = {
    checks.check_log_likelihoods: [log_likelihoods, one_by_one],
    checks.check_paired: [paired_difference, by_statistics],
    checks.check_choose: [choose],
    checks.check_overlap: [overlap],
}
WRONG = {
    checks.check_log_likelihoods: [
        (counts_padding, "the padding of shorter endings is counted"),
        (counts_the_prompt, "the prompt's own tokens are counted"),
        (looks_at_the_token_itself, "predicted by the position before it"),
        (counts_all_tokens, "lengths are the endings' tokens"),
        (forgets_the_prompt, "is wanted"),
    ],
    checks.check_paired: [
        (no_root, "divide by the root of n"),
        (unpaired, "the error of unpaired answers"),
        (of_the_population, "divide the squares by n - 1"),
        (other_way_round, "the mean difference is"),
        (twice_the_error, "the standard error is"),
    ],
    checks.check_choose: [
        (counts_spaces, "spaces around an ending are no characters"),
        (never_subtracts, "subtract what the ending has"),
        (pmi_of_a_token, "and don't divide"),
        (always_by_token, "the sum has no divisor"),
        (always_by_sum, "as many tokens as log-probabilities"),
    ],
    checks.check_overlap: [
        (minds_case, "upper and lower case don't matter"),
        (splits_at_spaces, "apostrophes belong to words"),
        (prompt_alone, "a run may go from the prompt into the answer"),
        (any_words, "the words must stand in a row"),
        (parts_of_words, "words are compared whole"),
        (short_ones_too, "fewer than n words can't be found"),
    ],
}
