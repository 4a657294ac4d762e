"""Chapter 21's runs: a small GPT learns to think before it answers.

    python benchmarks/reasoning.py --write           # everything, about half an hour
    python benchmarks/reasoning.py story --seed 1    # one part of one seed

The parts, in this order: `start` trains the models that the others begin with; `story`
is the run with rewards; `filter` and `supervised` are its rivals; `careless` has a bad
checker; `tests` measures all of them. With seed 0 alone: `variants`, `prices`, `rates`,
`wall`, `deaf` and `pairs`. Each part is a file in --folder, and one that is there is
not made again. `--write` puts them together into src/glassgpt/records/reasoning.json.
"""

import argparse
import copy
import json
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch

from glassgpt.generation import generate
from glassgpt.gpt import GPT
from glassgpt.modern import ModernConfig, MuonConfig, build, muon_optimizers
from glassgpt.rewards import (
    END,
    EQUALS,
    SWAPS,
    WORDS,
    RewardConfig,
    answer_of,
    dpo_loss,
    draw_replies,
    follow,
    group_advantages,
    pass_at_k,
    reinforce,
    reply_batch,
    reply_log_probabilities,
    right,
    shell_game,
    sound,
)
from glassgpt.training import TrainConfig, count_targets, make_optimizers, rate_at

SIZES = {"context": 64, "layers": 4, "heads": 4, "width": 64}
LONGEST = 10  # swaps in training
LENGTHS = (1, 2, 3, 4, 6, 8, 10)
SEEDS = (0, 1, 2)
STEPS = 120  # with rewards
SHOWN = (0, 20, 48, 60, 120)  # steps whose replies are kept
MUON = MuonConfig(
    steps=500, matrix_learning_rate=0.02, learning_rate=3e-3, warmup=20,
    weight_decay=0.01,
)  # fmt: skip
GENTLE = replace(MUON, steps=60, matrix_learning_rate=2e-3, learning_rate=3e-4)
ADAMW = TrainConfig(
    steps=800, learning_rate=4e-4, warmup=10, schedule="linear", weight_decay=0.0,
    beta2=0.95,
)  # fmt: skip
EXAMPLE = [3, *(WORDS.index(pair) for pair in ("13", "25", "14", "24", "35")), 6]


def demonstration(
    rng: random.Random, thinkers: float, whole: float
) -> tuple[list[int], list[int]]:
    """A game and a right reply, which thinks to the end or stops before, or neither."""
    question, places = shell_game(rng, rng.randint(1, LONGEST))
    count = 0
    if rng.random() < thinkers:
        count = len(places)
        if rng.random() >= whole:
            count = rng.randint(1, len(places))
    return question, [*places[:count], EQUALS, places[-1], END]


def teach(model: GPT, examples: Callable, config: TrainConfig) -> None:
    """Learn the replies of batches of (question, reply), which examples() makes."""
    muon = isinstance(config, MuonConfig)
    optimizers = (
        muon_optimizers(model, config) if muon else make_optimizers(model, config)
    )
    share = partial(rate_at, config=config)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, share) for each in optimizers]
    for _ in range(config.steps):
        ids, targets = reply_batch(*zip(*examples(), strict=True))
        log_p = reply_log_probabilities(model, ids, targets)
        model.zero_grad()
        (-log_p.sum() / count_targets(targets)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()


def thoughts(reply: Sequence[int], places: Sequence[int] = ()) -> int:
    """How many words a reply says before its first `=`."""
    return [*reply, EQUALS].index(EQUALS)


MEASURES = {
    "right": right,
    "thinkers": lambda reply, places: thoughts(reply) > 0,
    "thoughts": thoughts,
}


def majority(answers: Sequence[int | None]) -> int | None:
    """The most frequent answer, the first of equals; None counts as no vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0][0] if votes else None


class Part:
    """One seed's files: models by name, and numbers by name of the part."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder / str(seed), seed
        self.folder.mkdir(parents=True, exist_ok=True)

    def new(self) -> GPT:
        torch.manual_seed(self.seed)
        return build(ModernConfig(vocab_size=len(WORDS), **SIZES))

    def load(self, name: str) -> GPT:
        model = self.new()
        model.load_state_dict(torch.load(self.folder / f"{name}.pt"))
        return model

    def save(self, name: str, model: GPT) -> None:
        torch.save(model.state_dict(), self.folder / f"{name}.pt")


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(len(values), 1), 4)


def ask(rng: random.Random) -> tuple[list[int], list[int]]:
    return shell_game(rng, rng.randint(1, LONGEST))


def batches(rng: random.Random, thinkers: float, whole: float = 1.0) -> Callable:
    return lambda: [demonstration(rng, thinkers, whole) for _ in range(64)]


def replies_to(
    model: GPT, games: list, length: int, seed: int, greedy: bool = False
) -> list[list[int]]:
    temperature = 0.0 if greedy else 1.0
    prompts = [question for question, _ in games]
    return draw_replies(
        model, prompts, length + 6, END, temperature=temperature, seed=seed
    )


def accuracy(
    model: GPT, lengths: Sequence[int] = LENGTHS, greedy: bool = True, count: int = 150
) -> dict[str, list]:
    """For each length the shares right and sound, thoughts, and right by luck."""
    table: dict[str, list] = {"lengths": list(lengths)}
    for length in lengths:
        rng = random.Random(length)
        games = [shell_game(rng, length) for _ in range(count)]
        replies = replies_to(model, games, length, length, greedy)
        pairs = [(r, places) for r, (_, places) in zip(replies, games, strict=True)]
        lucky = [
            right(r, places) and thoughts(r) > 0 and r[: len(places)] != places
            for r, places in pairs
        ]
        found = {
            "right": [right(*pair) for pair in pairs],
            "sound": [sound(*pair) for pair in pairs],
            "thoughts": [thoughts(r) for r in replies],
            "lucky": [float(each) for each in lucky],
        }
        for name, values in found.items():
            table.setdefault(name, []).append(mean(values))
    return table


def columns(history: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [round(row[name], 4) for row in history] for name in history[0]}


def rewarded(part: Part, model: GPT, config: RewardConfig, reward=right, **more) -> Any:
    """A run from a model: its curves, its seconds, and what it answers afterwards."""
    began = process_time()
    history = reinforce(model, ask, reward, END, config, measures=MEASURES, **more)
    seconds = round(process_time() - began, 1)
    return {
        "curves": columns(history),
        "seconds": seconds,
        "greedy": accuracy(model),
        "sampled": accuracy(model, greedy=False),
    }


def start(part: Part) -> dict:
    rng, found = random.Random(part.seed), {}
    for name, thinkers in (("direct", 0.0), ("thinker", 1.0)):
        began, model = process_time(), part.new()
        teach(model, batches(rng, thinkers), MUON)
        part.save(name, model)
        found[name] = accuracy(model, range(1, 15))
        found[name]["seconds"] = round(process_time() - began, 1)
    began, base = process_time(), part.new()
    teach(base, batches(rng, 0.5, 0.5), replace(MUON, steps=800))
    teach(base, batches(rng, 0.05, 0.5), GENTLE)
    part.save("base", base)
    found["base"] = {
        "seconds": round(process_time() - began, 1),
        "greedy": accuracy(base),
        "sampled": accuracy(base, greedy=False),
    }
    return found


def story(part: Part) -> dict:
    model, shown = part.load("base"), {}

    def look(step: int) -> None:
        if step in SHOWN:
            prompts = [EXAMPLE] * 6
            shown[step] = draw_replies(model, prompts, len(EXAMPLE) + 4, END, seed=5)
        if step in (48, STEPS):
            part.save(f"step-{step}", model)

    look(0)
    found = rewarded(part, model, RewardConfig(seed=part.seed), after_step=look)
    found["question"], found["replies"] = EXAMPLE, shown
    found["longer"] = accuracy(model, (11, 12, 14))
    return found


def draw_groups(model: GPT, rng: random.Random, seed: int, count: int = 5120) -> list:
    """Games with eight replies each: (question, places, replies)."""
    games = [ask(rng) for _ in range(count // 8)]
    each = [game for game in games for _ in range(8)]
    replies = replies_to(model, each, LONGEST, seed)
    return [
        (*game, replies[8 * number : 8 * number + 8])
        for number, game in enumerate(games)
    ]


def filter_(part: Part) -> dict:
    """Learn from one's own right replies: six rounds, as many draws as the story."""
    model, curves = part.load("base"), []
    rng, began = random.Random(2000 + part.seed), process_time()
    for number in range(6):
        groups = draw_groups(model, rng, 77 * part.seed + number)
        good = [(q, r) for q, p, replies in groups for r in replies if right(r, p)]
        everything = [r for _, _, replies in groups for r in replies]
        curves.append(
            {
                "right": len(good) / len(everything),
                "thinkers": mean([float(thoughts(r) > 0) for r in everything]),
                "thoughts": mean([thoughts(r) for r in everything]),
            }
        )
        config = replace(ADAMW, steps=2 * len(good) // 128)
        teach(model, lambda good=good: rng.sample(good, 128), config)
    part.save("filter", model)
    return {
        "curves": columns(curves),
        "seconds": round(process_time() - began, 1),
        "greedy": accuracy(model),
        "sampled": accuracy(model, greedy=False),
    }


def supervised(part: Part) -> dict:
    """More demonstrations: as the base last saw them, and with all thoughts."""
    found = {}
    kinds = (("same", 0.05, 0.5, 800), ("thoughts", 1.0, 1.0, 200))
    for name, thinkers, whole, steps in kinds:
        model, rng = part.load("base"), random.Random(3000 + part.seed)
        began = process_time()
        teach(model, batches(rng, thinkers, whole), replace(ADAMW, steps=steps))
        found[name] = {
            "steps": steps,
            "seconds": round(process_time() - began, 1),
            "greedy": accuracy(model),
            "sampled": accuracy(model, greedy=False),
        }
    return found


def careless(part: Part) -> dict:
    """The checker looks whether the right cup occurs anywhere in the reply."""
    model = part.load("base")
    config = RewardConfig(steps=84, seed=part.seed)
    found = rewarded(part, model, config, lambda r, places: float(places[-1] in r))
    rng = random.Random(9)
    games = [ask(rng) for _ in range(500)]
    replies = draw_replies(model, [question for question, _ in games], 16, END, seed=9)
    pairs = [(q, r, p) for (q, p), r in zip(games, replies, strict=True)]
    hacks = [(q, r, p) for q, r, p in pairs if p[-1] in r and not right(r, p)]
    found["hacks"] = [[question, reply, p[-1]] for question, reply, p in hacks]
    return found


def many(model: GPT, length: int, count: int = 40, draws: int = 64) -> dict:
    """pass@k by the answer and by sound replies, and votes of k."""
    rng = random.Random(length + 50)
    games = [shell_game(rng, length) for _ in range(count)]
    each = [game for game in games for _ in range(draws)]
    replies = replies_to(model, each, length, length)
    ks = [2**power for power in range(7)]
    found: dict[str, Any] = {"ks": ks, "tokens": mean([len(r) for r in replies])}
    for name, check in (("right", right), ("sound", sound)):
        counts = [
            sum(
                int(check(r, places))
                for r in replies[number * draws : (number + 1) * draws]
            )
            for number, (_, places) in enumerate(games)
        ]
        found[name] = [mean([pass_at_k(draws, c, k) for c in counts]) for k in ks]
    found["vote"] = []
    for k in ks:
        votes = []
        for first in range(0, len(replies), k):
            answers = [answer_of(r) for r in replies[first : first + k]]
            votes.append(float(majority(answers) == each[first][1][-1]))
        found["vote"].append(mean(votes))
    return found


def corrupted(model: GPT, length: int, place: int, count: int = 150) -> dict:
    """One thought is replaced by a wrong one, and the model goes on from there."""
    rng = random.Random(length)
    wrong, truth, follows = [], [], []
    for _ in range(count):
        question, places = shell_game(rng, length)
        swaps = [SWAPS[word - 8] for word in question[1:-1]]
        lie = rng.choice([cup for cup in range(1, 6) if cup != places[place]])
        wrong.append([*question, *places[:place], lie])
        truth.append(places[-1])
        follows.append([lie, *follow(lie, swaps[place + 1 :])][-1])
    replies = draw_replies(model, wrong, length + 6, END, temperature=0.0)
    answers = [answer_of([EQUALS, *r][-3:]) for r in replies]
    return {
        "length": length,
        "place": place + 1,
        "truth": mean([float(a == t) for a, t in zip(answers, truth, strict=True)]),
        "follows": mean([float(a == f) for a, f in zip(answers, follows, strict=True)]),
    }


def after_thoughts(model: GPT, length: int, count: int = 150) -> list[float]:
    """How often the answer is right after 0, 1, ... right thoughts and a `=`."""
    rng = random.Random(length)
    games = [shell_game(rng, length) for _ in range(count)]
    shares = []
    for number in range(length + 1):
        prompts = [[*q, *places[:number], EQUALS] for q, places in games]
        rows = generate(model, prompts, 1, temperature=0.0)
        pairs = zip(rows, games, strict=True)
        shares.append(
            mean([float(row[-1] == places[-1]) for row, (_, places) in pairs])
        )
    return shares


PLACES = ((2, 0), (4, 1), (8, 3), (8, 6))


def tests(part: Part) -> dict:
    found: dict[str, Any] = {"many": {}, "corrupted": {}, "after_thoughts": {}}
    for name in ("base", "step-48", f"step-{STEPS}"):
        model = part.load(name)
        found["many"][name] = {str(n): many(model, n) for n in (8, 12)}
    for name in ("thinker", "base", f"step-{STEPS}"):
        model = part.load(name)
        found["corrupted"][name] = [corrupted(model, *place) for place in PLACES]
        found["after_thoughts"][name] = after_thoughts(model, 4)
    return found


def variants(part: Part) -> dict:
    normalized = partial(group_advantages, normalize=True)
    kinds = {
        "published": (RewardConfig(average="reply", kl=0.04), normalized),
        "normalized": (RewardConfig(), normalized),
        "each reply": (RewardConfig(average="reply"), group_advantages),
        "nanochat": (RewardConfig(average="batch"), group_advantages),
        "no baseline": (RewardConfig(), lambda rewards: rewards),
        "two updates": (RewardConfig(updates=2), group_advantages),
    }
    return {
        name: rewarded(part, part.load("base"), config, compare=compare)
        for name, (config, compare) in kinds.items()
    }


def rates(part: Part) -> dict:
    return {
        str(rate): rewarded(part, part.load("base"), RewardConfig(learning_rate=rate))
        for rate in (1e-3, 3e-3)
    }


def prices(part: Part) -> dict:
    """Each thought costs something; and a model that never saw a thought."""
    found = {}
    for price, steps in ((0.02, 120), (0.05, 120), (0.1, 48)):

        def reward(reply: list[int], places: list[int], price: float = price) -> float:
            return right(reply, places) - price * thoughts(reply)

        config = RewardConfig(steps=steps)
        found[str(price)] = rewarded(part, part.load("base"), config, reward)
    config = RewardConfig(steps=48)
    found["never saw a thought"] = rewarded(part, part.load("direct"), config)
    return found


def wall(part: Part) -> dict:
    """Four times the training for the model that answers at once."""
    model = part.new()
    teach(model, batches(random.Random(0), 0.0), replace(MUON, steps=2000))
    return accuracy(model, range(1, 15))


def deaf(part: Part) -> dict:
    """A model that thinks aloud and does not listen: 30 percent thinkers, one stage."""
    model = part.new()
    teach(model, batches(random.Random(0), 0.3, 0.5), replace(MUON, steps=800))
    part.save("deaf", model)
    rng = random.Random(4)
    games = [shell_game(rng, 4) for _ in range(150)]
    prompts = [[*question, places[0]] for question, places in games]
    rows = generate(model, prompts, 3, temperature=0.0)
    pairs = zip(prompts, rows, games, strict=True)
    kept = [
        float(row[len(prompt) + i] == places[i + 1])
        for prompt, row, (_, places) in pairs
        for i in range(3)
        if EQUALS not in row[len(prompt) : len(prompt) + i + 1]
    ]
    return {
        "greedy": accuracy(model),
        "sampled": accuracy(model, greedy=False),
        "thoughts_right": mean(kept),
        "corrupted": [corrupted(model, *place) for place in PLACES],
        "after_thoughts": after_thoughts(model, 4),
    }


def pairs(part: Part) -> dict:
    """DPO: of each question's eight replies a right one against a wrong one."""
    model, curves = part.load("base"), []
    rng, began = random.Random(5000), process_time()
    for number in range(6):
        groups, chosen, rejected = draw_groups(model, rng, 900 + number), [], []
        for question, places, replies in groups:
            good = [r for r in replies if right(r, places)]
            bad = [r for r in replies if not right(r, places)]
            if good and bad:
                chosen.append((question, rng.choice(good)))
                rejected.append((question, rng.choice(bad)))
        first = copy.deepcopy(model)
        config = replace(ADAMW, steps=24)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95))
        for _ in range(config.steps):
            some = rng.sample(range(len(chosen)), min(64, len(chosen)))
            sums = []
            for kind in (chosen, rejected):
                batch = reply_batch(*zip(*[kind[i] for i in some], strict=True))
                with torch.no_grad():
                    before = reply_log_probabilities(first, *batch).sum(1)
                sums.append((reply_log_probabilities(model, *batch).sum(1), before))
            (good_now, good_before), (bad_now, bad_before) = sums
            loss = dpo_loss(good_now, bad_now, good_before, bad_before)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curves.append(
                {
                    "loss": loss.item(),
                    "chosen": (good_now - good_before).mean().item(),
                    "rejected": (bad_now - bad_before).mean().item(),
                    "right": mean([right(r, p) for _, p, rs in groups for r in rs]),
                    "thoughts": mean([thoughts(r) for _, _, rs in groups for r in rs]),
                    "pairs": len(chosen),
                }
            )
    return {
        "curves": columns(curves),
        "seconds": round(process_time() - began, 1),
        "greedy": accuracy(model),
        "sampled": accuracy(model, greedy=False),
    }


EVERY_SEED = {
    "start": start,
    "story": story,
    "tests": tests,
    "filter": filter_,
    "careless": careless,
    "supervised": supervised,
}
FIRST_SEED = {
    "variants": variants,
    "rates": rates,
    "prices": prices,
    "pairs": pairs,
    "deaf": deaf,
    "wall": wall,
}


def main() -> None:
    """Make the parts that are missing, and write all of them down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", nargs="?", choices=[*EVERY_SEED, *FIRST_SEED])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--folder", default=Path(tempfile.gettempdir(), "reasoning"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    content: dict[str, Any] = {}
    wanted = [(seed, name) for seed in SEEDS for name in EVERY_SEED]
    wanted += [(0, name) for name in FIRST_SEED]
    for seed, name in wanted:
        if arguments.part not in (None, name) or arguments.seed not in (None, seed):
            continue
        part = Part(Path(arguments.folder), seed)
        path = part.folder / f"{name}.json"
        if not path.exists():
            began = process_time()
            found = (EVERY_SEED | FIRST_SEED)[name](part)
            path.write_text(json.dumps(found))
            print(f"{name} {seed}: {process_time() - began:.0f} s", flush=True)
        found = json.loads(path.read_text())
        if name in EVERY_SEED:
            content.setdefault(name, {})[str(seed)] = found
        else:
            content[name] = found
    if arguments.write:
        content["command"] = "python benchmarks/reasoning.py --write"
        root = Path(__file__).resolve().parents[1]
        target = root / "src/glassgpt/records/reasoning.json"
        target.parent.mkdir(exist_ok=True)
        text = json.dumps(content, separators=(",", ":"))
        target.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
