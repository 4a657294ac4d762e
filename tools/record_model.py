"""Make the model that ships, and the record of the run that trained it.

    python tools/record_model.py runs/shakespeare

From the folder of a run with all its checkpoints (`make model` trains it) this writes

* src/glassgpt/models/shakespeare/   config.json, tokenizer and weights in float16,
* book/runs/shakespeare.json         the record that chapter 1 draws its figures from,
* the same record as run.json beside the weights, for a notebook that runs alone,
* book/_static/cover.html            the moving figure of the cover,
* book/_static/readme.svg            the same for README.md, where no script may run.

Everything is computed with one thread and fixed seeds, so that a second call writes the same bytes.
`--cover` only draws the last two again, from the record that is there.
"""

import argparse
import bz2
import html
import json
import lzma
import math
import platform
import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "src" / "glassgpt" / "models" / "shakespeare"
RECORD = ROOT / "book" / "runs" / "shakespeare.json"
COVER = ROOT / "book" / "_static" / "cover.html"
README_PICTURE = ROOT / "book" / "_static" / "readme.svg"

TEXT_PROMPT, TEXT_STEPS, TEXT_TOKENS, TEXT_SEED = "ROMEO:\n", [0, 50, 100, 300, 1000, 3000], 60, 1
BARS_PROMPT, BARS_STEPS = "ROMEO:\nO, my", [0, 50, 100, 200, 400, 800, 1600, 3200, 6400]
TRACE_PROMPT, TRACE_TOKENS, TRACE_SEED, TRACE_TEMPERATURE = "ROMEO:\nO Juliet,", 19, 9, 0.7
CANDIDATES = 12  # tokens shown with their probabilities
LONGEST = 6  # characters that the longest of the counted contexts has, and one more
SHARE = 40  # what the shorter context's guess weighs, in characters counted; chapter 11 explains it
# What the command line has for each setting of the run.
FLAGS = {
    "layers": ("model", "layers"),
    "heads": ("model", "heads"),
    "width": ("model", "width"),
    "context": ("model", "context"),
    "batch-size": ("training", "batch_size"),
    "steps": ("training", "steps"),
    "precision": ("machine", "precision"),
    "compile": ("machine", "compile"),
    "evaluate-every": ("training", "evaluate_every"),
    "checkpoint-every": ("saving", "checkpoint_every"),
    "keep": ("saving", "keep"),
}


def command_of(settings):
    """The command that trains with the settings in a run's run.json."""
    flags = " ".join(f"--{flag} {settings[a][b]}" for flag, (a, b) in FLAGS.items())
    size = settings["model"]["vocab_size"]
    out = "runs/shakespeare"
    return f"glassgpt train --data shakespeare --vocab-size {size} {flags} --out {out}"


def processor():
    """The name of this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class CountingGuesser:
    """Guesses a character from how often it followed the last `longest` ones.

    What followed a context is counted, and to these counts come SHARE more, dealt out as the
    context shortened by one would guess: so nothing is impossible.
    """

    def __init__(self, texts, alphabet, longest):
        self.alphabet, self.longest = len(alphabet), longest
        self.counts, self.totals = Counter(), Counter()
        for text in texts:
            for length in range(longest + 1):
                spans = range(len(text) - length)
                self.counts.update(text[i : i + length + 1] for i in spans)
        for span, count in self.counts.items():
            self.totals[span[:-1]] += count

    def nats(self, texts):
        """Nats a character on texts, for each length of context from 0 on."""
        sums = [0.0] * (self.longest + 1)
        for text in texts:
            for place, character in enumerate(text):
                p = 1 / self.alphabet
                for length in range(self.longest + 1):
                    if length <= place:
                        context = text[place - length : place]
                        p = self.counts[context + character] + SHARE * p
                        p /= self.totals[context] + SHARE
                    sums[length] -= math.log(p)
        characters = sum(map(len, texts))
        return [total / characters for total in sums]


def yardsticks(train, held_out):
    """Nats a character of simple guessers and of two compressors on the held-out text."""
    alphabet = set("".join(train + held_out))
    counted = CountingGuesser(train, alphabet, LONGEST).nats(held_out)
    characters = sum(map(len, held_out))
    before, text = "".join(train).encode(), "".join(held_out).encode()

    def compressed(squeeze):
        return len(squeeze(text)) * 8 * math.log(2) / characters

    def xz_after(data):
        return lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)

    extra = len(xz_after(before + text)) - len(xz_after(before))
    return {
        "alphabet": len(alphabet),
        "uniform": round(math.log(len(alphabet)), 4),
        "counts": [round(value, 4) for value in counted],
        "bz2": round(compressed(bz2.compress), 4),
        "xz": round(compressed(xz_after), 4),
        "xz after the training plays": round(extra * 8 * math.log(2) / characters, 4),
    }


def surprise(model, tokenizer, texts, every=1):
    """(sum of -ln p, tokens, characters) of texts; each token sees at least half a context.

    `every`: look at one window in so many, for a sample; characters are then those of the tokens
    counted.
    """
    import torch
    import torch.nn.functional as F

    context, total, count, characters = model.config.context, 0.0, 0, 0
    start = tokenizer.special_tokens["<|endoftext|>"]
    for text in texts:
        ids = [start, *tokenizer.encode(text)]
        # The first window counts all its tokens, the others the second half of theirs.
        begins = list(range(0, max(len(ids) - 1 - context // 2, 1), context // 2))
        for begin in begins[::every]:
            window = torch.tensor(ids[begin : begin + context + 1])
            skip = context // 2 if begin else 0
            with torch.no_grad():
                logits = model(window[None, :-1])[0, skip:]
            targets = window[1 + skip :]
            total += F.cross_entropy(logits.double(), targets, reduction="sum").item()
            count += len(targets)
            characters += len(tokenizer.decode(targets.tolist()))
    return total, count, characters


def top(model, tokenizer, ids, temperature=1.0):
    """All probabilities of the next token, and the likeliest as [text, probability]."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1].double()
    p = (logits / temperature).softmax(-1)
    best = p.sort(descending=True, stable=True).indices[:CANDIDATES].tolist()
    return p, [[tokenizer.decode([i]), round(p[i].item(), 5)] for i in best]


def trace(model, tokenizer):
    """The prompt's tokens, and each step of writing on: candidates and the choice."""
    import torch

    ids = tokenizer.encode(TRACE_PROMPT)
    pieces = [tokenizer.decode([i]) for i in ids]
    generator, steps = torch.Generator().manual_seed(TRACE_SEED), []
    for _ in range(TRACE_TOKENS):
        p, best = top(model, tokenizer, ids, TRACE_TEMPERATURE)
        new = torch.multinomial(p, 1, generator=generator).item()
        ids.append(new)
        steps.append({"token": tokenizer.decode([new]), "p": round(p[new].item(), 5), "top": best})
    return {
        "prompt": TRACE_PROMPT,
        "temperature": TRACE_TEMPERATURE,
        "pieces": pieces,
        "steps": steps,
    }


def model_at(run, step, settings):
    """The model of a run after `step` steps; 0 is the one that nothing has trained."""
    import glassgpt
    import torch
    from safetensors.torch import load_file

    model, tokenizer = glassgpt.load(run)
    if step is None:
        return model, tokenizer
    torch.manual_seed(settings["training"]["seed"])
    model = glassgpt.GPT(model.config).eval()
    if step:
        state = load_file(run / f"checkpoint-{step:08d}" / "model.safetensors")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state[name])
    return model, tokenizer


def ship(run):
    """Write the model that comes with the package: the run's best weights, in float16."""
    import glassgpt

    model, tokenizer = glassgpt.load(run)
    shutil.rmtree(MODEL, ignore_errors=True)
    glassgpt.save(MODEL, model.half(), tokenizer)


def write_texts(run, steps, last, settings):
    """What the model writes after each of the steps, from the same prompt and seed."""
    import glassgpt

    texts = []
    for step in [*steps, None]:
        model, tokenizer = model_at(run, step, settings)
        ids = tokenizer.encode(TEXT_PROMPT)
        ids = glassgpt.generate(model, ids, TEXT_TOKENS, temperature=0.8, seed=TEXT_SEED)
        texts.append({"step": last if step is None else step, "text": tokenizer.decode(ids)})
    return texts


def write_bars(run, steps, last, settings, held_out):
    """The candidates for one prompt after each of the steps, with the loss of a sample."""
    bars = []
    for step in [*steps, None]:
        model, tokenizer = model_at(run, step, settings)
        total, _, characters = surprise(model, tokenizer, held_out, every=8)
        _, best = top(model, tokenizer, tokenizer.encode(BARS_PROMPT))
        step = last if step is None else step
        bars.append({"step": step, "nats": round(total / characters, 4), "top": best})
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(BARS_PROMPT)]
    return {"prompt": BARS_PROMPT, "pieces": pieces, "steps": bars}


def record(run):
    """Everything that the book tells about the run, as JSON can hold it."""
    import glassgpt
    import numpy
    import torch
    from glassgpt.data import HELD_OUT_PLAYS, shakespeare

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of additions, and so the last digit, depends on it
    settings = json.loads((run / "run.json").read_text("utf-8"))
    header = json.loads((run / "data" / "tokens.json").read_text("utf-8"))
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    metrics = [json.loads(line) for line in lines]
    last, training = metrics[-1]["step"], settings["training"]
    # A run keeps the weights that were best on the held-out plays, and these ship.
    best = min(metrics, key=lambda line: line["validation_loss"])["step"]
    there = {0} | {int(path.name[-8:]) for path in run.glob("checkpoint-????????")}
    plays = {play.name: "".join(play.pieces()) for play in shakespeare()}
    held_out = [plays[name] for name in HELD_OUT_PLAYS]
    train = [text for name, text in plays.items() if name not in HELD_OUT_PLAYS]
    shipped, tokenizer = glassgpt.load(MODEL)
    total, tokens, _ = surprise(shipped, tokenizer, held_out)
    characters = sum(map(len, held_out))
    assert characters == header["validation"]["characters"], "these are not the run's plays"
    when = datetime.fromtimestamp((run / "metrics.jsonl").stat().st_mtime, UTC)
    text_steps = [step for step in TEXT_STEPS if step in there and step < best]
    bars_steps = [step for step in BARS_STEPS if step in there and step < best]
    return {
        "command": command_of(settings),
        "finished": last == training["steps"],
        "date": when.date().isoformat(),
        "processor": processor(),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "seed": training["seed"],
        "steps": last,
        "shipped_step": best,
        "seconds": round(metrics[-1]["seconds"]),
        "parameters": sum(parameter.numel() for parameter in shipped.parameters()),
        "bytes": (MODEL / "model.safetensors").stat().st_size,
        "train": {
            "plays": len(train),
            "characters": header["train"]["characters"],
            "tokens": header["train"]["tokens"],
            "tokens_seen": last * training["batch_size"] * settings["model"]["context"],
        },
        "held_out": {
            "plays": list(HELD_OUT_PLAYS),
            "characters": characters,
            "tokens": tokens,
            "nats_per_token": round(total / tokens, 4),
            "nats_per_character": round(total / characters, 4),
        },
        "yardsticks": yardsticks(train, held_out),
        "curve": {
            "step": [line["step"] for line in metrics],
            "train": [round(line["train_loss"], 4) for line in metrics],
            "held_out": [round(line["validation_loss"], 4) for line in metrics],
            "nats_per_character": [round(line["nats_per_character"], 4) for line in metrics],
        },
        "texts": write_texts(run, text_steps, best, settings),
        "bars": write_bars(run, bars_steps, best, settings, held_out),
        "trace": trace(shipped, tokenizer),
    }


def to_json(content):
    """JSON with a line for each field of the record, and for each item of a list in it."""
    rows = []
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict) and isinstance(value.get("steps"), list):
            rest = {k: v for k, v in value.items() if k != "steps"}
            items = ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value["steps"])
            text = json.dumps(rest, ensure_ascii=False)[:-1] + f', "steps": [\n  {items}]}}'
        elif key == "texts":
            text = "[\n  " + ",\n  ".join(json.dumps(t, ensure_ascii=False) for t in value) + "]"
        rows.append(f'"{key}": {text}')
    return "{\n" + ",\n".join(rows) + "\n}\n"


def draw_cover(content):
    """The cover's live model, which book/intro.md includes; its recorded steps are the still."""
    from glassgpt.figures import guess_bars, live_model, slider, token_boxes

    trace = content["trace"]
    highest = max(p for step in trace["steps"] for _, p in step["top"])

    def draw(number):
        written = [step["token"] for step in trace["steps"][:number]]
        text = token_boxes(trace["pieces"] + written, new=number > 0)
        if number == len(trace["steps"]):
            return text
        step = trace["steps"][number]
        return text + guess_bars(step["top"][:8], (step["token"], step["p"]), highest)

    def tell(number):
        written = "".join(step["token"] for step in trace["steps"][:number])
        said = f"The text so far: {trace['prompt'] + written!r}."
        if number < len(trace["steps"]):
            step = trace["steps"][number]
            said += f" The model's next token, with {step['p']:.0%}: {step['token']!r}."
        return said

    moving = slider(draw, range(len(trace["steps"]) + 1), "tokens written", tell, play=1.2)
    live = live_model("write tokens next", trace["prompt"], trace["temperature"], moving)
    page = live._repr_html_().replace("<glass-gpt", "<glass-gpt plays", 1)
    COVER.write_text(page + "\n", "utf-8", newline="\n")


# Seconds for a token, how many such beats the whole text stays, and the step of the still picture.
BEAT, LAST_BEATS, STILL = 1.5, 2, 2
# A card of its own color can be read on any page. Without motion the attributes hold: the still.
PICTURE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 352" role="img">
<title>A GPT writes on from {prompt}: {written}</title>
<style>
svg{{--card:#fff;--edge:#d0d7de;--ink:#1f2328;--bar:#8c959f;--new:#d2142d}}
@media (prefers-color-scheme:dark){{
svg{{--card:#161b22;--edge:#3d444d;--ink:#e6edf3;--bar:#768390;--new:#ff7b86}}}}
text{{font:18px ui-monospace,Menlo,Consolas,monospace;fill:var(--ink)}}
.bars text{{font-size:15px}}.pick text{{fill:var(--new)}}
.box{{fill:#e83e8c;fill-opacity:.15}}.box.even{{fill-opacity:.32}}
.bar{{fill:var(--bar)}}.pick .bar{{fill:var(--new)}}
.new{{fill:none;stroke:var(--new);stroke-width:2}}
@media (prefers-reduced-motion:no-preference){{
.beat,.pick,.stay{{visibility:hidden;animation:beat {seconds}s step-end infinite}}
.pick{{animation-name:pick}}}}
@keyframes beat{{0%{{visibility:visible}}{beat:.3f}%{{visibility:hidden}}}}
@keyframes pick{{0%{{visibility:visible}}{pick:.3f}%{{visibility:hidden}}}}
{stays}
</style>
<rect x="1" y="1" width="638" height="350" rx="10" fill="var(--card)" stroke="var(--edge)"/>
{shapes}
</svg>
"""


def draw_readme_picture(content):
    """README's moving picture: an SVG of the text so far and the bars of each choice."""
    trace = content["trace"]
    steps, begin = trace["steps"], len(trace["pieces"])
    highest = max(p for step in steps for _, p in step["top"])
    beats, shapes, stays = len(steps) + LAST_BEATS, [], []

    def shown(piece):
        return html.escape(piece.strip(" ").replace("\n", "\u21b5"))

    def show(kind, style, still, shape):
        """A group whose class and style say when it is seen; `still`: without motion, too."""
        hidden = "" if still else ' visibility="hidden"'
        shapes.append(f'<g class="{kind}" style="animation-{style}"{hidden}>{shape}</g>')

    def delay(beat):
        return f"delay:{beat * BEAT:.2f}s"

    x, y, wide = 20.0, 40, 10.8  # a character is so wide, whatever the font
    for place, piece in enumerate(trace["pieces"] + [step["token"] for step in steps]):
        number, long = place - begin, wide * len(piece)
        box = f'<rect x="{x:.1f}" y="{y - 18}" width="{long:.1f}" height="25" rx="3" class='
        word = piece.strip(" ")
        start = x + wide * (len(piece) - len(piece.lstrip(" ")))
        shape = f'{box}"box{" even" * (place % 2)}"/><text x="{start:.1f}" y="{y}" '
        shape += f'textLength="{wide * len(word):.1f}">{shown(piece)}</text>'
        if number < 0:
            shapes.append(shape)
        else:
            since = f"{100 * (number + 1) / beats:.3f}%{{visibility:visible}}"
            stays.append(f"@keyframes t{number}{{0%{{visibility:hidden}}{since}}}")
            show("stay", f"name:t{number}", number < STILL, shape)
            show("beat", delay(number + 1), number == STILL - 1, f'{box}"new"/>')
        x, y = (20.0, y + 34) if piece == "\n" else (x + long + 2, y)
    for number, step in enumerate(steps):
        chosen = [step["token"], step["p"]]
        listed = step["top"][:8] + [chosen] * (chosen not in step["top"][:8])
        for row, (piece, p) in enumerate(listed):
            y, long = 154 + 22 * row, max(320 * p / highest, 1)
            bar = f'<rect x="120" y="{y - 13}" width="{long:.1f}" height="16" class="bar"/>'
            texts = f'<text x="108" y="{y}" text-anchor="end">{shown(piece)}</text>'
            texts += f'<text x="{128 + long:.1f}" y="{y}">{p:.1%}</text>'
            show("beat bars", delay(number), number == STILL, bar + texts)
            if [piece, p] == chosen:
                bar += f'<text x="{188 + long:.1f}" y="{y}">\u25c4 chosen</text>'
                show("pick bars", delay(number + 0.4), number == STILL, bar)
    picture = PICTURE.format(
        prompt=html.escape(repr(trace["prompt"])),
        written=html.escape(repr("".join(step["token"] for step in steps))),
        seconds=f"{beats * BEAT:g}",
        beat=100 / beats,
        pick=60 / beats,
        stays="\n".join(stays),
        shapes="\n".join(shapes),
    )
    README_PICTURE.write_text(picture, "utf-8", newline="\n")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="the folder that was trained into")
    parser.add_argument("--cover", action="store_true", help="draw the cover only")
    options = parser.parse_args(arguments)
    if not options.cover:
        if options.run is None:
            parser.error("name the run's folder")
        ship(options.run)
        text = to_json(record(options.run))
        RECORD.write_text(text, "utf-8", newline="\n")
        (MODEL / "run.json").write_text(text, "utf-8", newline="\n")
        size = sum(path.stat().st_size for path in MODEL.iterdir())
        print(f"{MODEL}: {size / 1e6:.2f} MB; {RECORD}: {len(text) / 1e3:.0f} kB")
    content = json.loads(RECORD.read_text("utf-8"))
    draw_cover(content)
    draw_readme_picture(content)


if __name__ == "__main__":
    main()
