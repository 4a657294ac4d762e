"""The hard cases of chapter 22: two chats and two runs with rewards, each with a fault.

    python benchmarks/clinic_hard.py    # a few minutes on one core

It writes src/glassgpt/records/clinic_hard.json. Each case has what its owner sees
(curves, samples) and the numbers of three or four examinations; `healthy` beside them
are those of the same program without the fault. The name of the fault stands there as
a hash, and in clear only in this file.
"""

import copy
import json
import math
import random
from pathlib import Path
from statistics import fmean
from time import process_time

import torch
from reasoning import MUON, demonstration, teach

import glassgpt
from glassgpt.chat import GLASS, Packed, chat_loss, pack, render
from glassgpt.figures import fnv1a
from glassgpt.generation import generate
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, build
from glassgpt.rewards import (
    END,
    WORDS,
    RewardConfig,
    dpo_loss,
    draw_replies,
    reinforce,
    reply_batch,
    reply_log_probabilities,
    right,
    shell_game,
)
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, make_optimizers, rate_at

RECORD = Path(glassgpt.__file__).parent / "records" / "clinic_hard.json"
SEPARATOR = "<|endoftext|>"
SOUNDS = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack",
    "sheep": "baa", "pig": "oink", "owl": "hoot", "frog": "croak",
}  # fmt: skip
FORMS = ("What does the {} say?", "How does a {} sound?", "And the {}?", "{}, please.")


# Two chats


def talk(rng, count):
    """A conversation of `count` questions about animals, with their answers."""
    turns = []
    for _ in range(count):
        animal = rng.choice(list(SOUNDS))
        asked = rng.choice(FORMS).format(animal)
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": f"It says {SOUNDS[animal]}."})
    return turns


def stop_unlearned(conversation, tokenizer):
    """Rendered as it should be, but the tokens that end answers aren't learned."""
    ids, mask = render(conversation, tokenizer)
    stop = tokenizer.special_tokens[GLASS.stop]
    learned = [one and id != stop for id, one in zip(ids, mask, strict=True)]
    return ids, learned


def everything_learned(conversation, tokenizer):
    """Rendered as it should be, but all tokens are learned."""
    ids, _ = render(conversation, tokenizer)
    return ids, [True] * len(ids)


def trained_chat(rendering, steps=400):
    """A small GPT after `steps` steps on conversations, and its losses."""
    rng = random.Random(0)
    talks = [talk(rng, rng.randint(1, 2)) for _ in range(600)]
    words = "".join(turn["content"] for each in talks for turn in each)
    tokenizer = CharTokenizer.train(
        words, [SEPARATOR, *GLASS.before.values(), GLASS.stop]
    )
    separator = tokenizer.special_tokens[SEPARATOR]
    rows = [rendering(each, tokenizer) for each in talks]
    data = Packed(*pack(rows, 96, separator))
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 96, 2, 4, 64))
    config = TrainConfig(steps=steps, learning_rate=3e-3, warmup=20, weight_decay=0.0)
    (optimizer,) = make_optimizers(model, config)
    loss_of, losses = chat_loss(model, separator), []
    for step in range(steps):
        loss = loss_of(*data.random_batch(16, 96, (0, step)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_at(step, config)
        optimizer.step()
        losses.append(loss.item())
    return model.eval(), tokenizer, losses


def marked(rendering, tokenizer):
    """One conversation, with [ ] around the tokens that are learned."""
    ids, mask = rendering(talk(random.Random(1), 1), tokenizer)
    text = ""
    for id, learned in zip(ids, mask, strict=True):
        piece = tokenizer.decode([id])
        text += f"[{piece}]" if learned else piece
    return text.replace("][", "")


def answers(model, tokenizer):
    """The answers to a question about each animal, and whether each ended by itself."""
    stop, said, ended = tokenizer.special_tokens[GLASS.stop], [], []
    for animal in SOUNDS:
        turns = [{"role": "user", "content": FORMS[0].format(animal)}]
        prompt, _ = render(turns, tokenizer, reply=True)
        ids = generate(model, [prompt], 40, temperature=1.0, seed=1, stop={stop})[0]
        said.append(tokenizer.decode(ids[len(prompt) :]))
        ended.append(len(ids) < len(prompt) + 40)
    return said, ended


@torch.no_grad()
def costs_of(model, tokenizer):
    """Mean nats a letter of questions and answers, and the chance of the end."""
    stop, rng = tokenizer.special_tokens[GLASS.stop], random.Random(2)
    costs: dict[str, list[float]] = {"user": [], "assistant": [], "end": []}
    for _ in range(40):
        ids, answer = render(talk(rng, 1), tokenizer)
        logs = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        for place in range(1, len(ids)):
            cost = -logs[place - 1, ids[place]].item()
            if ids[place] not in tokenizer.special_tokens.values():
                costs["assistant" if answer[place] else "user"].append(cost)
            elif answer[place] and ids[place] == stop:
                costs["end"].append(math.exp(-cost))
    return {name: fmean(found) for name, found in costs.items()}


def chat_case(owner, rendering):
    """What a chat's owner sees, and the numbers of its examinations."""
    model, tokenizer, losses = trained_chat(rendering)
    said, ended = answers(model, tokenizer)
    sounds = [f"It says {sound}." for sound in SOUNDS.values()]
    begun = [text.startswith(s) for text, s in zip(said, sounds, strict=True)]
    costs = costs_of(model, tokenizer)
    return {
        "owner": owner,
        "curves": {"loss": [round(x, 3) for x in losses[19::20]]},
        "samples": said[:4],
        "examinations": {
            "Which tokens of a conversation are learned, in brackets?": marked(
                rendering, tokenizer
            ),
            "How many of 8 answers begin right, and how many end?": (
                f"{sum(begun)} begin right, {sum(ended)} end"
            ),
            "How likely is the end after a right answer?": f"{costs['end']:.3f}",
            "Nats a letter, in answers and in questions": (
                f"{costs['assistant']:.2f} and {costs['user']:.2f}"
            ),
        },
    }


# Two runs with rewards


def shown_games(thinkers):
    """A GPT that was shown games; this share of the replies had thoughts."""
    torch.manual_seed(0)
    model = build(ModernConfig(len(WORDS), context=64, layers=4, heads=4, width=64))
    rng = random.Random(0)

    def examples():
        return [demonstration(rng, thinkers, whole=1.0) for _ in range(64)]

    teach(model, examples, MUON)
    return model


def ask(rng):
    return shell_game(rng, rng.randint(6, 10))


def spelled(reply):
    return " ".join(WORDS[word] for word in reply)


def rewards_case(owner, model, longest):
    """A run of 20 steps whose replies may have `longest` tokens."""
    model = copy.deepcopy(model)
    config = RewardConfig(steps=20, questions=16, longest=longest)
    history = reinforce(model, ask, right, END, config)
    rng = random.Random(3)
    games = [ask(rng) for _ in range(64)]
    prompts = [question for question, _ in games]
    replies = draw_replies(model, prompts, longest, END, 1.0, 7)
    by_hand = [[*places, 7, places[-1], END] for _, places in games]
    shown = [
        f"{spelled(q)} -> {spelled(r)}" for q, r in zip(prompts, replies, strict=True)
    ][:3]
    pairs = [(r, places) for r, (_, places) in zip(by_hand, games, strict=True)]
    return {
        "owner": owner,
        "curves": {
            key: [round(row[key], 3) for row in history]
            for key in ("reward", "loss", "idle")
        },
        "samples": shown,
        "examinations": {
            "What does the checker give to right replies, written by hand?": (
                f"{fmean(right(*pair) for pair in pairs):.2f} on average"
            ),
            "How many of 64 replies hold the token that ends them?": str(
                sum(END in reply for reply in replies)
            ),
            "How many tokens has a right reply with all thoughts?": (
                f"{min(map(len, by_hand))} to {max(map(len, by_hand))}"
            ),
            "How long are the replies that are drawn?": (
                f"{min(map(len, replies))} to {max(map(len, replies))} tokens"
            ),
        },
    }


def preferences_case(owner, model, reference):
    """Sixty steps of DPO; reference(start, model) is the model that it is held to."""
    start, model, rng = copy.deepcopy(model), copy.deepcopy(model), random.Random(4)
    games = [ask(rng) for _ in range(160)]
    prompts = [question for question, _ in games for _ in range(8)]
    replies = draw_replies(model, prompts, 16, END, 1.0, 11)
    chosen, rejected = [], []
    for number, (question, places) in enumerate(games):
        group = replies[8 * number : 8 * number + 8]
        good = [reply for reply in group if right(reply, places)]
        bad = [reply for reply in group if not right(reply, places)]
        if good and bad:
            chosen.append((question, rng.choice(good)))
            rejected.append((question, rng.choice(bad)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), weight_decay=0)
    losses, norms, gaps = [], [], []
    for step in range(60):
        some = rng.sample(range(len(chosen)), min(64, len(chosen)))
        now, before, first = [], [], []
        for kind in (chosen, rejected):
            batch = reply_batch(*zip(*[kind[i] for i in some], strict=True))
            now.append(reply_log_probabilities(model, *batch).sum(1))
            with torch.no_grad():
                held = reference(start, model)
                before.append(reply_log_probabilities(held, *batch).sum(1))
                first.append(reply_log_probabilities(start, *batch).sum(1))
        loss = dpo_loss(*now, *before)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
        gaps.append(
            [(a - b).abs().max().item() for a, b in zip(now, before, strict=True)]
        )
        moved = [(a - b).mean().item() for a, b in zip(now, first, strict=True)]
        if step in (0, 59):
            print(step, loss.item(), norm.item(), moved, flush=True)
    return {
        "owner": owner,
        "curves": {"loss": [round(loss, 3) for loss in losses[::3]]},
        "samples": [],
        "examinations": {
            "How many pairs are there, and which is preferred?": (
                f"{len(chosen)}; a right reply to a wrong one"
            ),
            "Is there a gradient?": (
                f"norm {norms[0]:.2f} at first, {norms[-1]:.2f} at the end"
            ),
            "Log-probabilities less those of the frozen start, chosen and rejected": (
                f"{moved[0]:+.2f} and {moved[1]:+.2f} after 60 steps"
            ),
            "The largest gap to what the loss calls the reference": (
                f"{max(gaps[0]):.3f} at first, {max(gaps[-1]):.3f} at the end"
            ),
        },
    }


def main():
    torch.set_num_threads(1)
    began = process_time()
    thinker, mixed = shown_games(thinkers=1.0), shown_games(thinkers=0.5)
    kinds = {"A": chat_case, "B": chat_case, "C": rewards_case, "D": preferences_case}
    owners = {
        "A": "It answers well, and then it babbles on until the limit.",
        "B": "It answers as well as my colleague's; its loss is fifty times as high.",
        "C": "The reward is 0 from the first step to the last, and the loss is 0.000.",
        "D": "The loss of DPO stays at 0.693 for ever.",
    }
    faults = {
        "A": ("stop unlearned", (stop_unlearned,)),
        "B": ("everything learned", (everything_learned,)),
        "C": ("replies cut off", (thinker, 6)),
        "D": ("reference is the policy", (mixed, lambda start, model: model)),
    }
    well = {
        "A": (render,),
        "B": (render,),
        "C": (thinker, 16),
        "D": (mixed, lambda start, model: start),
    }
    cases = []
    for letter, make in kinds.items():
        name, given = faults[letter]
        case = make(owners[letter], *given)
        healthy = make("", *well[letter])
        case["healthy"] = healthy["examinations"]
        case["letter"], case["answer"] = letter, fnv1a(f"{letter}:{name}")
        cases.append(case)
        print(json.dumps(case, indent=1), json.dumps(healthy["curves"]), flush=True)
    record = {"cases": cases, "seconds": round(process_time() - began)}
    RECORD.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
