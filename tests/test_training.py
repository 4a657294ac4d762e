"""Training: runs that survive, and checks that name mistakes."""

import errno
import json
import math
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from shutil import which
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_compiler

from glassgpt import training
from glassgpt.checkpoints import (
    checkpoints_in,
    load,
    read_checkpoint,
    save,
    write_file,
)
from glassgpt.checks import training as checks
from glassgpt.data import TokenData
from glassgpt.gpt import GPT, GPTConfig
from glassgpt.modern import ModernConfig, ModernGPT
from glassgpt.tokens import CharTokenizer
from glassgpt.training import (
    Muon,
    TrainConfig,
    Trainer,
    compiled,
    evaluate,
    fit,
    make_loss,
    make_optimizers,
    next_batch,
    orthogonalize,
    rate_at,
    resume_run,
    take_step,
    train,
)

SHAPE = GPTConfig(11, context=8, layers=1, heads=2, width=16, dropout=0.1)
CONFIG = TrainConfig(
    steps=12,
    batch_size=4,
    warmup=3,
    evaluate_every=4,
    evaluation_batches=2,
    checkpoint_every=5,
)
IDS = [n * n % 11 for n in range(400)]
DATA = TokenData.of(IDS[:300], IDS[300:], 11)
TOKENIZER = CharTokenizer("abcdefghijk")


def gpt(shape=SHAPE, seed=0):
    torch.manual_seed(seed)
    return GPT(shape)


def run(model=None, config=CONFIG, data=DATA, directory=None, **options):
    model = model or gpt()
    options.setdefault("progress", False)
    return model, train(model, data, config, directory, **options)


def weights(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


class PowerCut(Exception):
    pass


def cut_at(step):
    def on_record(record):
        if record["step"] == step:
            raise PowerCut

    return on_record


# Properties of the parts.


def test_package_passes_its_checks():
    checks.check_schedule(rate_at)
    checks.check_resume(train)


@given(
    st.integers(1, 500),
    st.integers(0, 600),
    st.sampled_from(["cosine", "linear", "stable"]),
    st.floats(0, 1),
)
@settings(deadline=None)
def test_every_rate_is_a_share(steps, warmup, schedule, final):
    config = TrainConfig(
        steps=steps, warmup=warmup, schedule=schedule, final_rate=final
    )
    rates = [rate_at(step, config) for step in range(steps)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 0), ("steps", 1.5), ("steps", True), ("batch_size", -1)]
    + [("warmup", -1), ("seed", -1), ("keep", 0), ("accumulate", "2")]
    + [("learning_rate", 0.0), ("learning_rate", math.nan), ("clip", math.inf)]
    + [("matrix_learning_rate", -1.0), ("weight_decay", -0.1)]
    + [("weight_decay", math.nan), ("final_rate", 1.1), ("optimizer", "sgd")]
    + [
        ("compile", True),
        ("compile", "some"),
        ("schedule", "step"),
        ("precision", "int8"),
        ("precision", ["float32"]),
    ]
    + [("learning_rate", "0.1"), ("clip", None), ("seed", 1 << 64)],
)
def test_impossible_settings_are_refused(setting, value):
    with pytest.raises(ValueError, match=setting):
        TrainConfig(**{setting: value})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("modern", [False, True])
def test_every_parameter_is_trained_once_and_matrices_decay(optimizer, modern):
    model = ModernGPT(ModernConfig(11, 8, 2, 2, 16)) if modern else gpt()
    config = TrainConfig(optimizer=optimizer, weight_decay=0.3)
    groups = [g for o in make_optimizers(model, config) for g in o.param_groups]
    trained = [id(p) for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(id(p) for p in model.parameters())
    decaying = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for name, parameter in model.named_parameters():
        inside = name.startswith("blocks.") or optimizer == "adamw"
        assert (id(parameter) in decaying) == (parameter.dim() > 1 and inside), name


def test_adamw_is_torchs_with_its_rate_scheduled():
    model, other = gpt(replace(SHAPE, dropout=0.0)), gpt(replace(SHAPE, dropout=0.0))
    config = replace(CONFIG, clip=1e9)
    trainer = Trainer(model, DATA, config)
    matrices = [p for p in other.parameters() if p.dim() > 1]
    vectors = [p for p in other.parameters() if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(
        groups, betas=(0.9, 0.99), weight_decay=0.1, fused=True
    )
    for step in range(6):
        ids, targets = next_batch(trainer)
        take_step(trainer)
        for group in reference.param_groups:
            group["lr"] = config.learning_rate * rate_at(step, config)
        F.cross_entropy(other(ids).flatten(0, 1), targets.flatten()).backward()
        reference.step()
        reference.zero_grad()
    assert torch.equal(weights(model), weights(other))


def test_evaluation_is_fixed_weighs_by_rows_and_leaves_the_mode():
    model = gpt().train()
    few = replace(CONFIG, batch_size=5, evaluation_batches=100)
    first = evaluate(model, DATA.validation, few)
    assert first == evaluate(model, DATA.validation, few)
    assert model.training
    one = replace(few, batch_size=500, evaluation_batches=1)
    assert first == pytest.approx(evaluate(model, DATA.validation, one), abs=1e-5)
    before = torch.get_rng_state()
    evaluate(model, DATA.validation, few)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_falls_and_the_record_is_honest(tmp_path):
    model, result = run(
        config=replace(CONFIG, steps=60, evaluate_every=20, learning_rate=0.01),
        directory=tmp_path,
        tokenizer=TOKENIZER,
    )
    losses = [record["validation_loss"] for record in result.records]
    assert losses[-1] < losses[0] < math.log(11) + 0.1
    assert result.best == min(losses)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.records
    best, _ = load(tmp_path)
    config = replace(CONFIG, steps=60)
    assert evaluate(best, DATA.validation, config) == pytest.approx(result.best)


def test_training_leaves_the_callers_random_numbers_alone():
    model = gpt()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = run(model)
    assert torch.equal(torch.get_rng_state(), before)
    second, _ = run()
    assert torch.equal(weights(first), weights(second))
    third, _ = run(config=replace(CONFIG, seed=1))
    assert not torch.equal(weights(first), weights(third))


def test_recomputing_learns_the_same():
    plain, _ = run()
    again, _ = run(config=replace(CONFIG, recompute=True))
    assert torch.equal(weights(plain), weights(again))


def test_tf32_is_on_for_the_run_only():
    seen = []

    def look(record):
        seen.append(torch.get_float32_matmul_precision())

    before = torch.get_float32_matmul_precision()
    plain, _ = run(on_record=look)
    rounded, _ = run(config=replace(CONFIG, precision="tf32"), on_record=look)
    assert set(seen[: len(seen) // 2]) == {before} == {"highest"}
    assert set(seen[len(seen) // 2 :]) == {"high"}
    assert torch.get_float32_matmul_precision() == before
    assert (weights(plain) - weights(rounded)).abs().max() < 0.1  # a CPU has no TF32


# Resuming.


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_resuming_is_exact(tmp_path, optimizer, precision):
    config = replace(CONFIG, optimizer=optimizer, precision=precision, accumulate=2)
    whole, records = run(config=config)
    with pytest.raises(PowerCut):
        run(config=config, directory=tmp_path, on_record=cut_at(8))
    resumed, again = run(gpt(seed=9), config, directory=tmp_path, resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.training == resumed.training
    for old, new in zip(records.records, again.records, strict=True):
        same = ("step", "train_loss", "validation_loss", "learning_rate")
        assert [old[key] for key in same] == [new[key] for key in same]
    moved = (weights(whole) - weights(gpt())).abs().max()
    assert 1e-3 < moved < 1


needs_compiler = pytest.mark.skipif(not which("c++"), reason="needs a C++ compiler")


@needs_compiler
@pytest.mark.parametrize("scope", ["blocks", "all"])
def test_resuming_a_compiled_run_is_exact(tmp_path, scope):
    config = replace(CONFIG, precision="bfloat16", compile=scope)
    before = counters["stats"]["unique_graphs"]
    whole, _ = run(config=config)
    assert counters["stats"]["unique_graphs"] > before
    with pytest.raises(PowerCut):
        run(config=config, directory=tmp_path, on_record=cut_at(8))
    resumed, _ = run(gpt(seed=9), config, directory=tmp_path, resume=True)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_finished_run_resumes_to_itself(tmp_path):
    first, _ = run(directory=tmp_path)
    again, result = run(gpt(seed=9), directory=tmp_path, resume=True)
    assert torch.equal(weights(first), weights(again))
    assert (result.step, result.stopped) == (12, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(CONFIG, learning_rate=0.01)}, "learning_rate = 0.003, not"),
        ({"config": replace(CONFIG, seed=1)}, "seed = 0, not 1"),
        ({"data": TokenData.of([*IDS[:299], 3], IDS[300:], 11)}, "same text"),
        ({"data": TokenData.of(IDS[:300], IDS[301:], 11)}, "same text"),
        ({"model": GPT(replace(SHAPE, dropout=0.2))}, "dropout = 0.1, not 0.2"),
        ({"model": GPT(replace(SHAPE, width=32))}, "width = 16, not 32"),
    ],
)
def test_resuming_with_something_else_is_refused(tmp_path, change, message):
    run(directory=tmp_path)
    with pytest.raises(ValueError, match=message):
        run(**change, directory=tmp_path, resume=True)


def test_a_run_is_not_overwritten(tmp_path):
    run(directory=tmp_path)
    with pytest.raises(FileExistsError, match="holds a run: resume it"):
        run(directory=tmp_path)


def test_a_model_is_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="holds a model: use another"):
        run(directory=tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_two_runs_in_one_directory(tmp_path):
    def second(record):
        with pytest.raises(FileExistsError, match="another run is training into"):
            run(directory=tmp_path, resume=True)
        refused.append(record["step"])

    refused = []
    run(directory=tmp_path, on_record=second)
    assert refused == [4, 8, 12]
    with FileLock(tmp_path / ".lock", timeout=0):
        pass  # free again


def test_a_damaged_checkpoint_is_refused_and_the_one_before_works(tmp_path):
    whole, _ = run(directory=tmp_path)
    before, last = checkpoints_in(tmp_path)
    file = last / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=f"delete it to go on from {before.name}"):
        run(directory=tmp_path, resume=True)
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    again, _ = run(gpt(seed=9), directory=tmp_path, resume=True)
    assert torch.equal(weights(whole), weights(again))


def forge(path, file, change):
    """Change the tensors of a checkpoint and make its hashes right again."""
    tensors = read_checkpoint(path)[0][file]
    training.write_checkpoint.__globals__["write_tensors"](
        path / f"{file}.safetensors", change(tensors)
    )
    names = json.loads((path / "hashes.json").read_text())
    hashes = training.write_checkpoint.__globals__["_hashes"](path, names)
    (path / "hashes.json").write_text(json.dumps(hashes))


@pytest.mark.parametrize("file", ["model", "optimizer"])
@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {n: t[:1] if t.dim() else t for n, t in tensors.items()},
        lambda tensors: dict(list(tensors.items())[1:]),
        lambda tensors: {**tensors, "9.9.more": torch.ones(1)},
    ],
)
def test_a_forged_checkpoint_changes_nothing(tmp_path, file, change):
    run(directory=tmp_path)
    forge(checkpoints_in(tmp_path)[-1], file, change)
    model = gpt(seed=9)
    with pytest.raises(ValueError, match=f"{file}.safetensors has other tensors"):
        run(model, directory=tmp_path, resume=True)
    assert torch.equal(weights(model), weights(gpt(seed=9)))


@pytest.mark.parametrize(
    "state", [[], {}, {"settings": 1}, {"settings": {}, "run": {"attack": 1}}]
)
def test_a_strange_state_is_refused(tmp_path, state):
    run(directory=tmp_path)
    path = checkpoints_in(tmp_path)[-1]
    (path / "state.json").write_text(json.dumps(state))
    names = json.loads((path / "hashes.json").read_text())
    hashes = training.write_checkpoint.__globals__["_hashes"](path, names)
    (path / "hashes.json").write_text(json.dumps(hashes))
    with pytest.raises(ValueError, match="not a checkpoint of a run"):
        run(directory=tmp_path, resume=True)


# Kills. The script forks a process for each moment, which kills itself there.

KILLS = textwrap.dedent(
    """
    import os, random, shutil, signal, sys
    from pathlib import Path

    import torch

    from glassgpt import checkpoints, training
    from glassgpt.data import TokenData
    from glassgpt.gpt import GPT, GPTConfig
    from glassgpt.tokens import CharTokenizer

    torch.set_num_threads(1)
    IDS = [n * n % 11 for n in range(400)]
    DATA = TokenData.of(IDS[:300], IDS[300:], 11)
    CONFIG = training.TrainConfig(
        steps=8, batch_size=2, warmup=2, evaluate_every=3, evaluation_batches=1,
        checkpoint_every=2,
    )
    moment, last = 0, None

    def watched(function, half=None):
        def call(*arguments, **options):
            global moment
            moment += 1
            if moment == last:
                if half:
                    half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call

    def half_a_file(tensors, path, *rest):
        Path(path).write_bytes(b"half of it")

    def watch():
        os.fsync, os.replace = watched(os.fsync), watched(os.replace)
        os.rename, os.unlink = watched(os.rename), watched(os.unlink)
        shutil.rmtree = watched(shutil.rmtree)
        training.take_step = watched(training.take_step)
        checkpoints.save_file = watched(checkpoints.save_file, half_a_file)

    def run(place, kill_at):
        # A process of its own; how it ended, and how many moments it had.
        child = os.fork()
        if child == 0:
            global last
            last = kill_at
            watch()
            torch.manual_seed(0)
            shape = GPTConfig(11, context=4, layers=1, heads=1, width=8, dropout=0.2)
            training.train(
                GPT(shape), DATA, CONFIG, place, CharTokenizer("abcdefghijk"),
                resume=True, progress=False,
            )
            (Path(place) / "moments").write_text(str(moment))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def outcome(place):
        path = checkpoints.checkpoints_in(place)[-1]
        names = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
        best = (place / "model.safetensors").read_bytes()
        return path.name, best, [(path / name).read_bytes() for name in names]

    root = Path(sys.argv[1])
    # What PyTorch imports only when it is needed, it shall import once, not per child.
    warm = torch.nn.Parameter(torch.zeros(2, 2))
    warm.grad = torch.zeros(2, 2)
    torch.optim.AdamW([warm], fused=True).step()
    assert run(root / "whole", None) == 0
    wanted = outcome(root / "whole")
    moments = int((root / "whole" / "moments").read_text())
    chosen = sorted(random.Random(0).sample(range(1, moments + 1), 30))
    for kill_at in chosen:
        place = root / f"killed-{kill_at}"
        assert run(place, kill_at) == -signal.SIGKILL, kill_at
        for path in checkpoints.checkpoints_in(place):
            checkpoints.read_checkpoint(path)
        assert run(place, None) == 0, kill_at
        assert outcome(place) == wanted, kill_at
    # One run killed again and again, always a little later, until it is done.
    place, kills = root / "again", 0
    while (code := run(place, 9 + 5 * kills)) != 0:
        assert code == -signal.SIGKILL
        kills += 1
    assert outcome(place) == wanted
    print(moments, len(chosen), kills)
    """
)


def script(text, *arguments, **options):
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_thirty_kills_at_random_moments_lose_nothing(tmp_path):
    process = script(KILLS, tmp_path)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    moments, killed, kills = map(int, out.split())
    assert moments > 60
    assert killed == 30
    assert kills >= 2


INTERRUPTED = textwrap.dedent(
    """
    import sys
    import torch
    from glassgpt.data import TokenData
    from glassgpt.gpt import GPT, GPTConfig
    from glassgpt.training import TrainConfig, train

    torch.set_num_threads(1)
    ids = [n * n % 11 for n in range(400)]
    run = train(
        GPT(GPTConfig(11, context=4, layers=1, heads=1, width=8)),
        TokenData.of(ids, ids, 11),
        TrainConfig(steps=10**9, batch_size=2, evaluate_every=50, keep=1,
                    evaluation_batches=1, checkpoint_every=10**9),
        sys.argv[1],
        progress=False,
        on_record=lambda record: print(record["step"], flush=True),
    )
    print("left", run.step, run.stopped, flush=True)
    """
)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGINT")
def test_ctrl_c_saves_and_leaves_cleanly(tmp_path):
    process = script(INTERRUPTED, tmp_path)
    assert int(process.stdout.readline()) == 50
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    _, step, stopped = out.splitlines()[-1].split()
    assert stopped == "True"
    (checkpoint,) = checkpoints_in(tmp_path)
    assert checkpoint.name == f"checkpoint-{int(step):08d}"
    assert read_checkpoint(checkpoint)[1]["run"]["step"] == int(step)


def test_a_second_ctrl_c_interrupts_and_the_handler_comes_back(tmp_path):
    def twice(record):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    # Where tests run in the background, the shell may have them ignore Ctrl-C.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(directory=tmp_path, on_record=twice)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, outside)


def test_ctrl_c_in_an_evaluation_still_saves(tmp_path):
    config = replace(CONFIG, checkpoint_every=1000)

    def once(record):
        if record["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    whole, _ = run(config=config)
    _, half = run(config=config, directory=tmp_path, on_record=once)
    assert (half.step, half.stopped) == (5, True)
    again, _ = run(gpt(seed=9), config, directory=tmp_path, resume=True)
    assert torch.equal(weights(whole), weights(again))


# Losses that are no numbers.


def spoiled(spoil, at):
    """make_loss, with the loss of call number `at` changed by `spoil`."""

    def make(model, config, stepping=False):
        loss, calls = make_loss(model, config, stepping), []

        def call(ids, targets):
            calls.append(1)
            value = loss(ids, targets)
            return spoil(value, model) if len(calls) == at else value

        return call

    return make


def nan_gradient(loss, model):
    """The same loss; its gradient by the head is infinity times zero."""
    return loss + (model.head.weight.sum() * 0).sqrt()


@pytest.mark.parametrize("spoil", [lambda loss, model: loss * math.nan, nan_gradient])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, spoil):
    with (
        patch.object(training, "make_loss", spoiled(spoil, at=7)),
        pytest.raises(FloatingPointError, match="at step 7 is not finite"),
    ):
        run(directory=tmp_path)
    (last,) = checkpoints_in(tmp_path)
    assert last.name == "checkpoint-00000005"
    tensors, _ = read_checkpoint(last)
    assert all(value.isfinite().all() for value in tensors["model"].values())
    whole, _ = run()
    again, _ = run(directory=tmp_path, resume=True)
    assert torch.equal(weights(whole), weights(again))


def test_an_evaluation_that_is_no_number_stops_the_run(tmp_path):
    with (
        patch.object(training, "evaluate", lambda *_: math.nan),
        pytest.raises(FloatingPointError, match="validation loss at step 4 is nan"),
    ):
        run(directory=tmp_path, tokenizer=TOKENIZER)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_float16_skips_a_step_whose_gradient_overflows(optimizer):
    model = gpt()
    config = replace(CONFIG, precision="float16", optimizer=optimizer)
    trainer = Trainer(model, DATA, config)
    trainer.loss = spoiled(nan_gradient, at=1)(model, trainer.config)
    before, scale = weights(model), trainer.scaler.get_scale()
    take_step(trainer)
    assert torch.equal(weights(model), before)
    assert trainer.scaler.get_scale() == scale / 2
    take_step(trainer)
    assert not torch.equal(weights(model), before)


@pytest.mark.parametrize(
    "wrong", [{"recompute": "false"}, {"learning_rate": True}, {"steps": True}]
)
def test_kinds_of_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainConfig(**wrong)


def test_settings_from_numpy_are_the_same():
    found = TrainConfig(steps=np.int64(5), clip=np.float32(2), seed=np.uint8(3))
    assert found == TrainConfig(steps=5, clip=2.0, seed=3)
    assert json.dumps(vars(found))


def test_a_saved_model_is_not_trained_over_by_resuming(tmp_path):
    save(tmp_path, gpt(), TOKENIZER)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a model"):
        run(directory=tmp_path, tokenizer=TOKENIZER, resume=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_run_without_a_checkpoint_yet_begins_again(tmp_path):
    config = replace(CONFIG, checkpoint_every=100)
    whole, _ = run(config=config)
    with pytest.raises(PowerCut):
        run(config=config, directory=tmp_path, tokenizer=TOKENIZER, on_record=cut_at(4))
    assert (tmp_path / "model.safetensors").exists()
    model, _ = run(config=config, directory=tmp_path, resume=True)
    assert torch.equal(weights(whole), weights(model))


def test_float16_that_never_steps_is_told():
    config = replace(CONFIG, steps=200, precision="float16", evaluate_every=200)
    model = gpt()

    def hopeless(model, config, stepping=False):
        right = make_loss(model, config, stepping)

        def loss(ids, targets):
            value = right(ids, targets)
            if torch.is_grad_enabled():
                value.register_hook(lambda gradient: gradient * math.inf)
            return value

        return loss

    with (
        patch.object(training, "make_loss", hopeless),
        pytest.raises(FloatingPointError, match="overflow in float16 however"),
    ):
        run(model, config)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_from_before_the_first_sound_step_resumes(tmp_path, optimizer):
    config = replace(CONFIG, precision="float16", optimizer=optimizer)
    whole = Trainer(gpt(), DATA, config, tmp_path)
    whole.loss = spoiled(nan_gradient, at=1)(whole.model, config)
    take_step(whole)
    training.save_run(whole)
    tensors, _ = read_checkpoint(checkpoints_in(tmp_path)[-1])
    assert optimizer == "adamw" or not tensors["optimizer"]
    other = Trainer(gpt(seed=1), DATA, config, tmp_path)
    resume_run(other, checkpoints_in(tmp_path)[-1])
    dice = torch.get_rng_state()
    for trainer in (whole, other):
        torch.set_rng_state(dice)
        take_step(trainer)
    assert torch.equal(weights(whole.model), weights(other.model))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("frozen", ["tokens.weight", "blocks.0.mlp.expand.weight"])
def test_a_run_with_frozen_parameters_resumes(tmp_path, optimizer, frozen):
    def partly(seed):
        model = gpt(seed=seed)
        model.get_parameter(frozen).requires_grad_(False)
        return model

    config = replace(CONFIG, optimizer=optimizer)
    whole, _ = run(partly(0), config)
    with pytest.raises(PowerCut):
        run(partly(0), config, directory=tmp_path, on_record=cut_at(8))
    model = partly(0)
    run(model, config, directory=tmp_path, resume=True)
    assert torch.equal(weights(whole), weights(model))


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="no parameter has requires_grad"):
        run(gpt().requires_grad_(False))


def test_a_program_that_uses_the_newer_precision_switch():
    code = """
        import torch
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        from test_training import CONFIG, run
        print(run(config=CONFIG)[1].step)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.stdout.strip() == "12", done.stderr


# What `on_record` does.


def test_a_checkpoint_is_written_before_on_record_is_called(tmp_path):
    config = replace(CONFIG, evaluate_every=5)
    with pytest.raises(PowerCut):
        run(config=config, directory=tmp_path, on_record=cut_at(5))
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-00000005"]


def test_sampling_on_the_way_leaves_dropout_on():
    plain, _ = run()
    model = gpt()
    run(model, on_record=lambda record: model.eval())
    assert torch.equal(weights(plain), weights(model))


def test_a_look_at_a_stop_replaces_no_model(tmp_path):
    losses = iter([2.0, 1.0])  # at step 4, and at the stop, which is step 6
    calls, take = [], training.take_step

    def stopping(trainer):
        take(trainer)
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)

    with (
        patch.object(training, "take_step", stopping),
        patch.object(training, "evaluate", lambda *_: next(losses)),
        patch.object(training, "save", wraps=training.save) as saved,
    ):
        run(directory=tmp_path, tokenizer=TOKENIZER)
    assert saved.call_count == 1


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_comes_back_in_its_mode(mode):
    model, _ = run(gpt().train(mode))
    assert model.training is mode


def test_a_full_disk_leaves_no_remnant(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with patch("os.fsync", side_effect=full), pytest.raises(OSError, match="No space"):
        write_file(tmp_path / "a.json", b"{}")
    assert not list(tmp_path.iterdir())


def test_a_stop_leaves_no_trace_in_the_run_that_goes_on(tmp_path):
    _, whole = run(directory=tmp_path / "whole", tokenizer=TOKENIZER)
    calls, take = [], training.take_step

    def stopping(trainer):
        take(trainer)
        calls.append(1)
        if len(calls) == 6:  # neither evaluated nor saved
            signal.raise_signal(signal.SIGINT)

    place = tmp_path / "cut"
    with patch.object(training, "take_step", stopping):
        _, half = run(directory=place, tokenizer=TOKENIZER)
    assert [line["step"] for line in half.records] == [4, 6]
    _, rest = run(directory=place, tokenizer=TOKENIZER, resume=True)
    timeless = [
        [{k: v for k, v in line.items() if "second" not in k} for line in run.records]
        for run in (whole, rest)
    ]
    assert timeless[0] == timeless[1]
    assert (place / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


# Machines that are too small, too full, or lack a compiler.


def test_no_memory_says_what_to_lower():
    for failure in (
        lambda trainer: torch.empty(1 << 55, dtype=torch.uint8),
        lambda trainer: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA is full")),
        lambda trainer: (_ for _ in ()).throw(
            RuntimeError("MPS backend out of memory")
        ),
    ):
        with (
            patch.object(training, "take_step", failure),
            pytest.raises(MemoryError, match="lower batch_size .* context"),
        ):
            run()


def test_another_runtime_error_stays_what_it_is():
    with (
        patch.object(training, "take_step", side_effect=RuntimeError("a bug")),
        pytest.raises(RuntimeError, match="a bug"),
    ):
        run()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    write, calls = training.write_checkpoint, []

    def second_time_full(*arguments):
        calls.append(1)
        if len(calls) == 1:
            return write(*arguments)
        with patch("os.fsync", side_effect=full):
            return write(*arguments)

    with (
        patch.object(training, "write_checkpoint", second_time_full),
        pytest.raises(OSError, match="No space"),
    ):
        run(directory=tmp_path)
    whole, _ = run()
    again, _ = run(directory=tmp_path, resume=True)
    assert torch.equal(weights(whole), weights(again))


def test_a_place_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(directory=tmp_path / "file" / "run")


def test_data_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    wide = TokenData.of(IDS, IDS, 12)
    with pytest.raises(ValueError, match="12 token ids, the model only knows 11"):
        run(data=wide, directory=tmp_path / "run")
    short = TokenData.of(IDS, IDS[:5], 11)
    with pytest.raises(
        ValueError, match="to hold out, .* too short for a context of 8"
    ):
        run(data=short, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_things_that_do_not_belong_together():
    with pytest.raises(ValueError, match="not the one that made them"):
        run(tokenizer=CharTokenizer("abc"))
    with pytest.raises(TypeError, match="take what `tokenize` returns"):
        run(data="my-tokens")
    with pytest.raises(TypeError, match="the training of a plan"):
        run(config={"steps": 3})


def test_without_a_compiler_it_goes_on(capsys):
    plain, _ = run()
    with patch("torch.compile", side_effect=RuntimeError("no C++ compiler\nat all")):
        slow, _ = run(config=replace(CONFIG, compile="blocks"))
    torch.testing.assert_close(weights(plain), weights(slow))
    said = capsys.readouterr()
    assert (said.out + said.err).count("no C++ compiler") == 1


def test_programs_are_stored_by_their_precision():
    tags = []

    def telling(function):
        def call(*arguments):
            tags.append(torch.compiler.config.cache_key_tag)
            return function(*arguments)

        return call

    with patch("torch.compile", telling):
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                compiled(torch.add)(1, 2)
    assert len(set(tags)) == 2


def test_a_compiler_that_fails_at_the_first_call():
    def broken(function):
        def call(*arguments):
            raise RuntimeError("")

        return call

    with patch("torch.compile", broken):
        loss = compiled(lambda a, b: a + b)
        assert [loss(1, 2), loss(3, 4)] == [3, 7]


def backward_is_broken(graph, example_inputs):
    raise RuntimeError("no backward program")


def test_a_compiler_that_fails_at_the_backward_program(capsys):
    backend = aot_autograd(
        fw_compiler=make_boxed_compiler(lambda graph, inputs: graph),
        bw_compiler=backward_is_broken,
    )
    real = torch.compile
    x = torch.ones(3, requires_grad=True)
    with patch("torch.compile", lambda function: real(function, backend=backend)):
        compiled(torch.exp)(x).sum().backward()
    assert torch.allclose(x.grad, x.exp())
    said = capsys.readouterr()
    assert "no backward program" in said.out + said.err


def test_a_ninth_model_is_compiled_too():
    torch.compiler.reset()
    graphs, real = [], torch.compile

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def use(layer):
        return lambda x: layer(x)

    with patch("torch.compile", lambda function: real(function, backend=backend)):
        for width in range(1, 12):
            compiled(use(torch.nn.Linear(2, width)))(torch.ones(1, 2))
    assert len(graphs) == 11


@needs_compiler
@pytest.mark.parametrize("scope", ["blocks", "all"])
def test_a_compiled_program_can_be_stored_for_the_next_run(scope):
    torch.compiler.reset()  # nothing from another test in memory
    before = counters["aot_autograd"].copy()
    run(config=replace(CONFIG, steps=1, precision="bfloat16", compile=scope))
    since = counters["aot_autograd"] - before
    assert since["total"] == 1
    assert since["autograd_cache_bypass"] == 0


def kept_bytes(function, *inputs):
    """What a call keeps for its backward pass, each storage counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


@needs_compiler
def test_compiled_runs_compute_again_what_is_cheap():
    model = gpt(GPTConfig(11, context=64, layers=2, heads=2, width=32))
    ids = torch.zeros(8, 64, dtype=torch.int64)
    keeping = torch.compile(make_loss(model, CONFIG))
    thrifty = make_loss(model, replace(CONFIG, compile="all"), stepping=True)
    with patch("torch.cuda.is_available", return_value=False):
        ours = kept_bytes(thrifty, ids, ids)
    torch.compiler.reset()
    assert ours < 0.8 * kept_bytes(keeping, ids, ids)


@pytest.mark.parametrize("scope", ["blocks", "all"])
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_trains_like_plain(scope, recompute):
    config = replace(CONFIG, steps=3, evaluate_every=3)
    shape = replace(SHAPE, dropout=0.0)
    plain, _ = run(gpt(shape), config)
    real, used = torch.compile, []

    def counting(function):
        used.append(function)
        return real(function, backend="aot_eager")

    with patch("torch.compile", counting):
        changes = {"compile": scope, "recompute": recompute}
        fast, _ = run(gpt(shape), replace(config, **changes))
    assert len(used) == 1
    torch.testing.assert_close(weights(plain), weights(fast), atol=1e-5, rtol=1e-4)


# Wrong versions. Each check must notice, and say which mistake it was.


def torch_adamw(w, gradients, rate, beta1, beta2, decay, kind=None, **options):
    w = w.clone().requires_grad_()
    settings = {"lr": rate, "betas": (beta1, beta2), "weight_decay": decay}
    optimizer = (kind or torch.optim.AdamW)([w], **{**settings, **options})
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    return w.detach()


def epsilon_in_the_root(w, gradients, rate, beta1, beta2, decay):
    mean = square = 0.0
    for t, gradient in enumerate(gradients, start=1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        size = (square / (1 - beta2**t) + 1e-8) ** 0.5
        w = w - rate * decay * w - rate * mean / (1 - beta1**t) / size
    return w


def forgetting_train(forget):
    def wrong(model, data, config, directory, resume=False, on_record=None, **options):
        trainer = Trainer(model, data, config, Path(directory), on_record=on_record)
        if resume:
            resume_run(trainer, checkpoints_in(Path(directory))[-1])
            forget(trainer)
        else:
            torch.manual_seed(config.seed)
        return fit(trainer, progress=False)

    return wrong


def fresh_weights(trainer):
    trainer.model.initialize()
    for parameter in trainer.model.parameters():
        torch.nn.init.constant_(parameter, 9.0)


def fresh_moments(trainer):
    trainer.optimizers = make_optimizers(trainer.model, trainer.config)


def another_rate(trainer):
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["full_rate"] /= 2


def fresh_means_of_muon(trainer):
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, Muon):
            optimizer.state.clear()


def nothing_recent(trainer):
    trainer.run.recent.clear()


def fresh_count(trainer):
    trainer.run.records.clear()


def fresh_order(trainer):
    trainer.config = replace(trainer.config, seed=7)


def right_sum(model, parts):
    count = sum((y != -100).sum() for _, y in parts)
    for x, y in parts:
        (F.cross_entropy(model(x), y, reduction="sum") / count).backward()


def mean_of_means(model, parts):
    for x, y in parts:
        if (y != -100).any():
            (F.cross_entropy(model(x), y) / len(parts)).backward()


def last_only(model, parts):
    for x, y in parts:
        model.zero_grad()
        (F.cross_entropy(model(x), y) / len(parts)).backward()


def scaled(model, parts, factor):
    for x, y in parts:
        (F.cross_entropy(model(x), y) * factor).backward()


def clip(gradients, longest):
    length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return [gradient * (longest / length).clamp(max=1) for gradient in gradients]


def clip_asking(gradients, longest):
    length = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    return gradients if length <= longest else clip(gradients, longest)


def clip_in_place(gradients, longest):
    for old, new in zip(gradients, clip(gradients, longest), strict=True):
        old.copy_(new)
    return gradients


def all_at_once(model, parts):
    x, y = (torch.cat(columns) for columns in zip(*parts, strict=True))
    F.cross_entropy(model(x), y).backward()


def targets_overwritten(model, parts):
    for _, y in parts:
        y[y == -100] = 0
    right_sum(model, parts)


def weights_moved(model, parts):
    right_sum(model, parts)
    with torch.no_grad():
        model.weight -= 0.1 * model.weight.grad


def fall(shape):
    """A "stable" schedule that falls in another shape."""

    def rate(step, config):
        if config.schedule != "stable" or step < config.warmup:
            return rate_at(step, config)
        done = (step - config.warmup) / (config.steps - config.warmup)
        return config.final_rate + (1 - config.final_rate) * shape(done)

    return rate


def test_right_versions_pass():
    checks.check_adamw(torch_adamw)
    checks.check_accumulation(mean_of_means)
    checks.check_uneven_accumulation(right_sum)
    checks.check_clipping(clip)
    checks.check_resume(forgetting_train(lambda trainer: None))


WRONG = [
    ("check_adamw", {"kind": torch.optim.Adam}, "not be added to the gradient"),
    ("check_adamw", {"betas": (0.5, 0.999)}, "later steps are wrong"),
    ("check_adamw", {"betas": (0.0, 0.0), "eps": 1.0}, "the first step is wrong"),
    ("check_adamw", epsilon_in_the_root, "epsilon stands outside"),
    (
        "check_schedule",
        lambda step, c: step / c.warmup if step < c.warmup else rate_at(step, c),
        "first step has rate 0",
    ),
    ("check_schedule", lambda step, c: 2 * rate_at(step, c), "exceeds 1"),
    ("check_schedule", lambda step, c: rate_at(step, c) / 2, "not at 1"),
    ("check_schedule", lambda step, c: 1.0, "doesn't rise during warm-up"),
    (
        "check_schedule",
        lambda step, c: rate_at(10 if step > 50 else step, c),
        "rises after warm-up",
    ),
    (
        "check_schedule",
        lambda step, c: rate_at(step, replace(c, final_rate=0.5)),
        "the last rate is 0.5",
    ),
    ("check_resume", forgetting_train(another_rate), "or the schedule"),
    ("check_resume", forgetting_train(fresh_means_of_muon), "moments or the"),
    ("check_resume", forgetting_train(nothing_recent), "losses since the last"),
    (
        "check_orthogonalize",
        lambda x, rounds, dtype: orthogonalize(x, 2, dtype),
        "should be near 1 after five",
    ),
    (
        "check_orthogonalize",
        lambda x, rounds, dtype: orthogonalize(x, min(3, rounds), dtype),
        "should be near 1 after five",
    ),
    (
        "check_orthogonalize",
        lambda x, rounds, dtype: orthogonalize(x, 5, dtype),
        "not after one",
    ),
    (
        "check_orthogonalize",
        lambda x, rounds, dtype: orthogonalize(x, rounds, torch.float32),
        "asked for bfloat16",
    ),
    (
        "check_clipping",
        lambda g, longest: [part.flatten() for part in clip(g, longest)],
        "each in its shape",
    ),
    (
        "check_adamw",
        lambda w, g, rate, b1, b2, d: torch_adamw(w, g, 0.1, 0.9, 0.999, d),
        "rate or betas are ignored",
    ),
    (
        "check_adamw",
        lambda w, *rest: w.copy_(torch_adamw(w, *rest)),
        "were changed",
    ),
    (
        "check_schedule",
        lambda step, c: rate_at(
            step, c if c.schedule == "cosine" else replace(c, final_rate=0.1)
        ),
        "linear: final_rate is 0.3",
    ),
    ("check_resume", forgetting_train(fresh_weights), "weights of the checkpoint"),
    (
        "check_resume",
        forgetting_train(fresh_moments),
        "moments or the schedule",
    ),
    ("check_resume", forgetting_train(fresh_count), "the resumed run recorded steps"),
    ("check_resume", forgetting_train(fresh_order), "batches after resuming"),
    (
        "check_resume",
        forgetting_train(lambda trainer: torch.manual_seed(5)),
        "random numbers was not restored",
    ),
    (
        "check_accumulation",
        lambda model, parts: scaled(model, parts, 1),
        "divide each part's loss",
    ),
    (
        "check_accumulation",
        lambda model, parts: scaled(model, parts, 1 / 16),
        "divided twice",
    ),
    (
        "check_accumulation",
        lambda model, parts: scaled(model, parts, 1 / 3),
        "not the gradient of one big batch",
    ),
    ("check_accumulation", last_only, "only the last part counts"),
    (
        "check_accumulation",
        lambda model, parts: scaled(model, parts[-1:], 1),
        "only the last part counts",
    ),
    ("check_uneven_accumulation", mean_of_means, "mean of the parts' means"),
    (
        "check_uneven_accumulation",
        lambda model, parts: scaled(model, parts, 1 / len(parts)),
        "mean of the parts' means",
    ),
    (
        "check_clipping",
        lambda gradients, longest: [g * (longest / g.norm()) for g in gradients],
        "by itself",
    ),
    (
        "check_clipping",
        lambda gradients, longest: [g.clamp(-longest, longest) for g in gradients],
        "turns the gradient",
    ),
    (
        "check_clipping",
        lambda gradients, longest: [
            g * longest / torch.cat([part.flatten() for part in gradients]).norm()
            for g in gradients
        ],
        "a short gradient was made longer",
    ),
    ("check_clipping", clip_asking, "Python asked for a number"),
    ("check_clipping", clip_in_place, "were changed"),
    ("check_clipping", lambda g, longest: clip(g, longest)[::-1], "the order"),
    ("check_accumulation", all_at_once, "more rows at once"),
    ("check_accumulation", weights_moved, "the weights moved"),
    ("check_accumulation", lambda model, parts: None, "no gradient is left"),
    ("check_accumulation", lambda m, parts: scaled(m, parts, 2), "over all targets"),
    ("check_uneven_accumulation", targets_overwritten, "parts themselves"),
    ("check_schedule", fall(lambda done: min(1, 4 * (1 - done))), "at step 86"),
    ("check_schedule", fall(lambda done: 1 - 0.95 * (done > 0.95)), "at step 86"),
    (
        "check_schedule",
        lambda step, c: rate_at(step, replace(c, final_rate=0.1)),
        "final_rate is 0.3",
    ),
    (
        "check_schedule",
        lambda step, c: (
            ((step + 1) / c.warmup) ** 2 if step < c.warmup else rate_at(step, c)
        ),
        "not 0.5",
    ),
    (
        "check_schedule",
        lambda step, c: (
            (1 - math.cos(math.pi * (step + 1) / c.warmup)) / 2
            if step < c.warmup
            else rate_at(step, c)
        ),
        "not 0.25",
    ),
    (
        "check_schedule",
        lambda step, c: step / c.warmup * 0 + rate_at(step, c),
        "divided by 0",
    ),
    ("check_clipping", lambda gradients, longest: gradients, "its length is 5.025"),
    (
        "check_orthogonalize",
        lambda x, rounds, dtype: orthogonalize(x / x.norm(), 0, dtype) * x.norm(),
        "singular values of a large",
    ),
    (
        "check_orthogonalize",
        lambda x, rounds, dtype: orthogonalize(x, rounds, dtype).flip(1),
        "the directions",
    ),
    (
        "check_orthogonalize",
        lambda x, rounds, dtype: orthogonalize(x.mT, rounds, dtype),
        "the shape became",
    ),
    (
        "check_orthogonalize",
        lambda x, rounds, dtype: (
            torch.stack([orthogonalize(x, rounds, dtype)[0]] * 2) + (x[1:] == 0).all()
        ),
        "gradient of zero",
    ),
]


@pytest.mark.parametrize(("check", "wrong", "message"), WRONG)
def test_check_names_the_mistake(check, wrong, message):
    if isinstance(wrong, dict):
        options = wrong

        def wrong(*arguments):
            return torch_adamw(*arguments, **options)

    with pytest.raises(AssertionError) as caught:
        getattr(checks, check)(wrong)
    assert message in str(caught.value)


MUON_SHAPES = ((12, 4), (4, 16), (4, 4), (12, 4), (4, 16))


def muon_steps(optimizer, steps=4, idle=(), **settings):
    """Matrices after some steps; those in `idle` never have a gradient."""
    generator = torch.Generator().manual_seed(3)
    matrices = [
        torch.nn.Parameter(torch.randn(shape, generator=generator))
        for shape in MUON_SHAPES
    ]
    made = optimizer(matrices, lr=0.1, weight_decay=0.2, momentum=0.9, **settings)
    for _ in range(steps):
        for place, matrix in enumerate(matrices):
            gradient = torch.randn(matrix.shape, generator=generator)
            matrix.grad = None if place in idle else gradient
        made.step()
    return [matrix.detach() for matrix in matrices], made


@pytest.mark.parametrize("rounds", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(3, 7), (7, 3), (5, 5)])
def test_two_rounds_at_a_time_are_single_rounds(shape, rounds):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    x = matrix / matrix.norm()
    for _ in range(rounds):
        square = x @ x.mT
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    assert torch.allclose(orthogonalize([matrix], rounds, torch.float64)[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_does_not_grow(dtype):
    """It would, were all five rounds done on X X^T before X is multiplied."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 64))[0] for n in (64, 256))
    matrix = (left * torch.logspace(0, -3, 64)) @ right.T
    exact = orthogonalize([matrix], 5, torch.float64)[0]
    found = orthogonalize([matrix], 5, dtype)[0].double()
    assert (found - exact).norm() < 0.1 * exact.norm()
    assert torch.linalg.matrix_norm(found, 2) < 1.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ns_steps", [1, 4])
def test_muon_is_torchs_in_any_precision(dtype, ns_steps):
    ours, _ = muon_steps(Muon, dtype=dtype, ns_steps=ns_steps)
    theirs, _ = muon_steps(torch.optim.Muon, ns_steps=ns_steps)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        assert torch.allclose(one, other, atol=0.03)


def test_muon_multiplies_in_its_own_precision():
    exact, _ = muon_steps(Muon, dtype=torch.float64)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        found, _ = muon_steps(Muon, dtype=dtype)
        pairs = zip(found, exact, strict=True)
        worst = max((one - other).abs().max() for one, other in pairs)
        assert error / 100 < worst < error


def test_muon_refuses_what_it_does_not_do():
    matrix = torch.nn.Parameter(torch.ones(3, 2))
    with pytest.raises(TypeError, match="nesterov"):
        Muon([matrix], nesterov=False)
    with pytest.raises(TypeError, match="argument"):
        Muon([matrix]).step(lambda: 0.0)
    with pytest.raises(ValueError, match="2D"):
        Muon([torch.nn.Parameter(torch.ones(3))])


def test_muon_leaves_out_what_has_no_gradient():
    ours, made = muon_steps(Muon, idle=(1, 2))
    theirs, _ = muon_steps(torch.optim.Muon, idle=(1, 2))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=0.03)
    assert len(made.state) == 3


def test_muon_goes_on_from_its_state():
    _, made = muon_steps(Muon, dtype=torch.float32)
    kept, shapes = made.state_dict(), [torch.zeros(s) for s in MUON_SHAPES]
    other = Muon(map(torch.nn.Parameter, shapes), dtype=torch.float32, lr=0.1)
    other.load_state_dict(kept)
    groups = (made.param_groups[0]["params"], other.param_groups[0]["params"])
    pairs = zip(*groups, strict=True)
    for one, two in pairs:
        same = (made.state[one], other.state[two])
        assert torch.equal(*(state["momentum_buffer"] for state in same))
    assert other.param_groups[0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float32", "float32"), ("tf32", "float32"), ("bfloat16", "bfloat16")]
    + [("float16", "float16")],
)
def test_muon_multiplies_in_the_precision_of_the_run(precision, dtype):
    """Bfloat16 where a processor emulates it makes a step many times slower."""
    config = TrainConfig(optimizer="muon", precision=precision)
    assert make_optimizers(gpt(), config)[0].dtype == getattr(torch, dtype)


def test_muon_takes_a_gradient_of_zero():
    matrix = torch.nn.Parameter(torch.ones(3, 2))
    matrix.grad = torch.zeros(3, 2)
    Muon([matrix], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(matrix, torch.full((3, 2), 0.95))
