"""Kill a small run again and again, let it go on, and compare every bit at the end.

python benchmarks/kills.py [KILLS]: so many processes kill themselves at a random moment
(one of the calls that touch the disk, or a step), and as many are killed from outside
after a random time. Each is then started anew: with `resume_run` where there is a run,
with `start_run` where the kill came before that. One more run is killed again and again
until it is done. Needs fork and SIGKILL. Prints how many were killed where.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from glassgpt import checkpoints, runs
from glassgpt.data import TokenData
from glassgpt.gpt import GPTConfig
from glassgpt.modern import MuonConfig
from glassgpt.plan import Machine, Plan
from glassgpt.tokens import CharTokenizer
from glassgpt.training import Trainer

IDS = [n * n % 11 for n in range(400)]
DATA = TokenData.of(IDS[:300], IDS[300:], 11)
MODEL = GPTConfig(11, context=4, layers=1, heads=1, width=8, dropout=0.2)
TRAINING = MuonConfig(
    steps=8, batch_size=2, warmup=2, evaluate_every=3, evaluation_crops=2
)
PLAN = Plan(MODEL, TRAINING, Machine())

moment, last = 0, None


def watched(function, name, half=None):
    """The function; its process dies where the moment has come, perhaps half-way."""

    def call(*arguments, **options):
        global moment
        moment += 1
        if moment == last:
            if half:
                half(*arguments)
            (PLACE.parent / "where").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return call


def half_a_file(content, path, *rest):
    Path(path).write_bytes(b"half of it")


def half_a_folder(path, *rest, **options):
    for file in sorted(Path(path).glob("*"))[:2]:
        file.unlink()


def watch():
    for name in ("fsync", "replace", "rename", "unlink", "mkdir"):
        setattr(os, name, watched(getattr(os, name), name))
    shutil.rmtree = watched(shutil.rmtree, "rmtree", half_a_folder)
    Trainer.take_step = watched(Trainer.take_step, "step")
    checkpoints.save_file = watched(checkpoints.save_file, "save_file", half_a_file)


def train(place):
    """What a job queue does: go on with a run, or begin one."""
    if (place / "run.json").exists():
        return runs.resume_run(place, progress=False, say=lambda line: None)
    tokenizer = CharTokenizer("abcdefghijk")
    return runs.start_run(
        place, PLAN, DATA, tokenizer, checkpoint_every=2, progress=False
    )


def run(place, kill_at=None, seconds=None):
    """Train in a process of its own, killed by itself or from here; its exit code."""
    global PLACE
    PLACE = place
    child = os.fork()
    if child == 0:
        global last
        last = kill_at
        try:
            watch()
            train(place)
            (place.parent / "moments").write_text(str(moment))
            os._exit(0)
        except BaseException as error:
            print(f"{place}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(place):
    """Every number of a finished run but those that a clock made."""
    path = runs.checkpoints_in(place)[-1]
    state = runs.read_checkpoint(path)[2]
    optimizers = [
        (number, name, value.numpy().tobytes())
        for saved in state["optimizers"]
        for number, moments in saved["state"].items()
        for name, value in moments.items()
    ]
    timed = {"seconds", "tokens_per_second"}
    records = [{k: r[k] for k in r.keys() - timed} for r in state["records"]]
    files = [place / "model.safetensors", path / "model.safetensors"]
    weights = [file.read_bytes() for file in files]
    return path.name, weights, optimizers, records, state["recent"]


def main(kills, root):
    torch.set_num_threads(1)
    # What PyTorch imports only when it is needed, it shall import once, not per child.
    warm = torch.nn.Parameter(torch.zeros(2, 2))
    warm.grad = torch.zeros(2, 2)
    torch.optim.AdamW([warm], fused=True).step()
    assert run(root / "first") == 0  # it takes longer
    began = time.perf_counter()
    assert run(root / "whole") == 0
    duration, wanted = time.perf_counter() - began, outcome(root / "whole")
    moments, generator = int((root / "moments").read_text()), random.Random(0)
    where = Counter()
    for kill_at in sorted(generator.sample(range(1, moments + 1), kills)):
        place = root / f"moment-{kill_at}"
        assert run(place, kill_at) == -signal.SIGKILL, kill_at
        where[(root / "where").read_text()] += 1
        for path in runs.checkpoints_in(place):
            runs.read_checkpoint(path)  # what bears the name is whole
        assert run(place) == 0, kill_at
        assert outcome(place) == wanted, kill_at
    late = 0
    for number in range(kills):
        place = root / f"time-{number}"
        late += run(place, seconds=generator.uniform(0, duration)) == 0
        assert run(place) == 0, number
        assert outcome(place) == wanted, number
    place, again = root / "again", 0
    while (code := run(place, 15 + 5 * again)) != 0:
        assert code == -signal.SIGKILL, code
        again += 1
    assert outcome(place) == wanted
    print(f"{moments} moments; killed at {kills} of them: {dict(where)}")
    print(f"killed from outside: {kills - late}, and {late} were done before that")
    print(f"one run killed {again} times until it was done")
    print("all ended with the same bits")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 30, Path(folder))
