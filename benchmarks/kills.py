"""Kill a small run again and again, let it go on, and compare every bit at the end.

python benchmarks/kills.py [KILLS]: so many processes kill themselves at a random moment
(one of the calls that touch the disk, or a step), and as many are killed from outside
after a random time. Each is then started anew: with `resume_run` where there is a run,
with `start_run` where the kill came before that. One more run is killed again and again
until it is done. Needs fork and SIGKILL. Prints how many were killed where.

python benchmarks/kills.py KILLS torchrun: for each way to divide a run, two processes
of torchrun train, and one of them is killed from outside, so many times, each time
shortly after the first checkpoint at or past a random step. torchrun ends the other
one; two new ones go on from the last checkpoint. Needs Linux.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from glassgpt import checkpoints, runs
from glassgpt.data import TokenData
from glassgpt.distributed import make_trainer, process_group
from glassgpt.gpt import GPTConfig
from glassgpt.modern import MuonConfig
from glassgpt.plan import Machine, Plan
from glassgpt.tokens import CharTokenizer
from glassgpt.training import TrainConfig, Trainer

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


SHARED_STEPS = 300


def train_shared(place, shard):
    """What each process of torchrun does: go on with a run, or begin one."""
    torch.set_num_threads(1)

    def make(plan, data, model):
        return make_trainer(plan, data, model, shard)

    with process_group():
        if (place / "run.json").exists():
            runs.resume_run(
                place, progress=False, say=lambda line: None, make_trainer=make
            )
            return
        training = TrainConfig(
            steps=SHARED_STEPS,
            batch_size=2,
            warmup=2,
            evaluate_every=20,
            evaluation_crops=2,
        )
        plan = replace(PLAN, training=training)
        tokenizer = CharTokenizer("abcdefghijk")
        runs.start_run(
            place,
            plan,
            DATA,
            tokenizer,
            checkpoint_every=10,
            progress=False,
            make_trainer=make,
        )


def last_step(place):
    """The step of a run's last checkpoint, -1 where there is none."""
    names = [path.name for path in runs.checkpoints_in(place)]
    return int(names[-1][-8:]) if names else -1


def run_shared(place, shard, kill_after=None):
    """Train in two processes, one killed from here once a checkpoint is there."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, "worker", str(place), shard]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while kill_after is not None and process.poll() is None:
            ranks = [int(number) for number in children.read_text().split()]
            if last_step(place) >= kill_after and len(ranks) == 2:
                os.kill(ranks[kill_after % 2], signal.SIGKILL)
                break
            time.sleep(0.002)
    return process.returncode


def main_shared(kills, root):
    generator = random.Random(0)
    for shard in ("nothing", "optimizer", "model"):
        whole, killed = root / f"{shard}-whole", root / shard
        assert run_shared(whole, shard) == 0
        moments = sorted(generator.sample(range(SHARED_STEPS - 20), kills))
        for kill_after in moments:
            assert run_shared(killed, shard, kill_after) != 0, kill_after
            assert last_step(killed) < SHARED_STEPS
        assert run_shared(killed, shard) == 0
        assert outcome(killed) == outcome(whole), shard
        print(f"divided: {shard}; killed {kills} times, the same bits", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        train_shared(Path(sys.argv[2]), sys.argv[3])
        sys.exit()
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    with TemporaryDirectory() as folder:
        if sys.argv[2:] == ["torchrun"]:
            main_shared(kills, Path(folder))
        else:
            main(kills, Path(folder))
