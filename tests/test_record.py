"""The model that ships and the record of its training: whole, small, and true."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import record_model as tool
import torch

import glassgpt

ROOT = Path(__file__).parent.parent
INSIDE = Path(glassgpt.__file__).parent / "models" / "shakespeare"


@pytest.fixture(scope="module")
def record():
    return json.loads(tool.RECORD.read_text("utf-8"))


@pytest.fixture(scope="module")
def shipped():
    return glassgpt.load(INSIDE)


def test_the_record_of_the_book_and_of_the_package_are_the_same_bytes():
    assert tool.RECORD.read_bytes() == (INSIDE / "run.json").read_bytes()
    assert tool.RECORD.stat().st_size < 120_000


def test_the_model_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in INSIDE.iterdir()) <= 3_000_000


def test_the_makefile_trains_with_the_recorded_command(record):
    makefile = (ROOT / "Makefile").read_text("utf-8").replace("\\\n", " ")
    command = re.search(r"\$\(BIN\)/(glassgpt train .*)", makefile)[1]
    assert " ".join(command.split()) == record["command"]


def test_the_run_was_finished(record):
    assert record["finished"]
    curve = record["curve"]
    assert curve["step"][-1] == record["steps"]
    best = min(curve["held_out"])
    assert curve["step"][curve["held_out"].index(best)] == record["shipped_step"]


def test_the_record_describes_the_shipped_model(record, shipped):
    model, _ = shipped
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert record["bytes"] == (INSIDE / "model.safetensors").stat().st_size


def test_the_shipped_model_gives_the_recorded_probabilities(record, shipped):
    model, tokenizer = shipped
    trace = record["trace"]
    ids = tokenizer.encode(trace["prompt"])
    assert [tokenizer.decode([i]) for i in ids] == trace["pieces"]
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0, -1]
    p = (logits / trace["temperature"]).softmax(-1)
    values, best = p.topk(tool.CANDIDATES)
    found = [tokenizer.decode([i]) for i in best.tolist()]
    assert found == [piece for piece, _ in trace["steps"][0]["top"]]
    wanted = [q for _, q in trace["steps"][0]["top"]]
    assert values.tolist() == pytest.approx(wanted, abs=1e-3)


def test_the_held_out_loss_is_that_of_the_model(record, shipped):
    """On a piece of a held-out play, within what a piece may differ from the whole."""
    from glassgpt.data import shakespeare

    model, tokenizer = shipped
    plays = {play.name: play for play in shakespeare()}
    text = "".join(plays[record["held_out"]["plays"][0]].pieces())[:12_000]
    total, _, characters = tool.surprise(model, tokenizer, [text])
    assert characters == len(text)
    assert total / characters == pytest.approx(
        record["held_out"]["nats_per_character"], abs=0.15
    )


def test_the_gpt_beats_what_counts_and_what_compresses(record):
    sticks = record["yardsticks"]
    ours = record["held_out"]["nats_per_character"]
    assert ours < min(*sticks["counts"], sticks["bz2"], sticks["xz"])
    assert sticks["counts"] == sorted(sticks["counts"], reverse=True)
    assert len(sticks["counts"]) == tool.LONGEST + 1
    assert sticks["uniform"] == pytest.approx(math.log(sticks["alphabet"]), abs=1e-4)


def test_a_counting_guesser_by_hand():
    """Trained on "aab": a is 2 of 3, and with the share (2 + 40/2) / (3 + 40)."""
    guesser = tool.CountingGuesser(["aab"], "ab", longest=1)
    alone = (2 + 40 / 2) / (3 + 40)
    after = (1 + 40 * alone) / (2 + 40)  # after a came a once and b once
    singles, pairs = guesser.nats(["aa"])
    assert singles == pytest.approx(-math.log(alone))
    assert pairs == pytest.approx(-(math.log(alone) + math.log(after)) / 2)


def test_every_token_is_counted_once_and_sees_half_a_context():
    """Whatever the window, a text's surprise covers each of its tokens once."""

    class Uniform:
        config = glassgpt.GPTConfig(
            vocab_size=300, context=8, layers=1, heads=1, width=8
        )

        def __call__(self, ids):
            assert ids.shape[1] <= 8
            return torch.zeros(*ids.shape, 300)

    tokenizer = glassgpt.BPETokenizer.train(["abc"], 257)
    for length in (1, 4, 7, 8, 9, 12, 13, 40):
        text = ("xyz" * 20)[:length]
        total, count, characters = tool.surprise(Uniform(), tokenizer, [text])
        assert count == characters == length
        assert total == pytest.approx(length * math.log(300))


def test_the_same_record_gives_the_same_bytes(record, monkeypatch, tmp_path):
    assert tool.to_json(record) == tool.RECORD.read_text("utf-8")
    for name, draw in (
        ("COVER", "draw_cover"),
        ("README_PICTURE", "draw_readme_picture"),
    ):
        drawn = getattr(tool, name)
        monkeypatch.setattr(tool, name, tmp_path / drawn.name)
        getattr(tool, draw)(record)
        assert (tmp_path / drawn.name).read_bytes() == drawn.read_bytes()


def tell(piece, p):
    """What stands beside a bar of the picture."""
    return piece.replace("\n", "\u21b5").strip() + f"{p:.1%}"


def test_the_picture_of_the_readme_tells_the_trace_and_stands_still_when_asked(record):
    picture = ElementTree.parse(tool.README_PICTURE)
    steps, groups = record["trace"]["steps"], picture.findall("{*}g")
    words = ["".join(group.itertext()) for group in groups]
    chosen = [before for before, word in pairwise(words) if word == "\u25c4 chosen"]
    assert chosen == [tell(step["token"], step["p"]) for step in steps]
    # Seen without motion: the text before one step, its bars and its choice.
    still = [w for w, g in zip(words, groups, strict=True) if not g.get("visibility")]
    wanted = [step["token"].strip() for step in steps[: tool.STILL]]
    wanted += [tell(*candidate) for candidate in steps[tool.STILL]["top"][:8]]
    assert [word for word in still if word not in ("", "\u25c4 chosen")] == wanted
    assert still.count("\u25c4 chosen") == 1
    assert tool.README_PICTURE.stat().st_size < 300_000
