# Written by tools/tangle.py from book/25_many_machines.ipynb: change it there.
"""Many machines: one training run on many processes."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from glassgpt.data import Batch, TokenData, Tokens
from glassgpt.gpt import GPT
from glassgpt.modern import MuonConfig
from glassgpt.plan import Plan, meta_model
from glassgpt.training import Loss, Trainer


def connect(
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
    timeout: timedelta = timedelta(days=1),
) -> None:
    """Join the other processes: GPUs talk by NCCL, everything else by gloo.

    Book: 25_many_machines.html#starting-processes
    """
    env = os.environ
    if env.get("LOCAL_WORLD_SIZE") == env.get("WORLD_SIZE") and os.name == "posix":
        # The loopback: gloo may not find this computer by its name.
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        env.setdefault("GLOO_SOCKET_IFNAME", loopback)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    # A day, since the others wait while rank 0 encodes a corpus.
    dist.init_process_group(backend, init_method, timeout, world_size, rank)


def run_processes(number: int, function: Callable[..., Any], *arguments: Any) -> list:
    """What `function(*arguments)` returns in each of so many new, joined processes.

    function: one of a module, since a process can't import a notebook. It returns
    tensors, numbers, strings, and lists and dicts of them. Raises the error of
    `torch.multiprocessing` where a process fails, or waits three minutes for another.

    Book: 25_many_machines.html#starting-processes
    """
    with TemporaryDirectory() as place:
        how = (number, place, function, arguments)
        method = "forkserver" if sys.platform == "linux" else "spawn"
        preload = [__name__, "torch._dynamo"]  # an optimizer imports it
        torch.multiprocessing.set_forkserver_preload(preload)
        torch.multiprocessing.start_processes(_enter, how, number, start_method=method)
        return [torch.load(Path(place, f"{rank}.pt")) for rank in range(number)]


def _enter(rank: int, number: int, place: str, function: Any, arguments: Any) -> None:
    """Join, compute, leave the result in a file; one thread each, to share the cores.

    The all-reduce waits until all are there: one that left while others still connect
    would cut them off.
    """
    torch.set_num_threads(1)
    meeting = Path(place, "meeting").as_uri()
    connect(meeting, rank, number, timedelta(minutes=3))
    dist.all_reduce(torch.zeros(1))
    torch.save(function(*arguments), Path(place, f"{rank}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()


class ParallelTrainer(Trainer):
    """A `Trainer` on several processes: each computes its own rows of every batch.

    Gradients are added up after the backward pass. Every process has the whole model
    and the whole optimizer. `accumulate` is in how many parts it computes its rows.

    Book: 25_many_machines.html#all-processes-one-gradient
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        for parameter in self.model.parameters():  # all begin with rank 0's
            dist.broadcast(parameter.detach(), 0)

    def parts(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:

        mine = [rows.tensor_split(self.world)[self.rank] for rows in batch]
        number = min(self.config.accumulate, len(batch[0]) // self.world)  # for all
        return zip(*(rows.tensor_split(number) for rows in mine), strict=True)

    def exchange(self) -> None:
        """Add up the gradients of all processes."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)

    def update(self) -> Tensor:
        self.exchange()
        return super().update()

    def read_losses(self) -> float:
        if self.unread:
            losses = torch.stack(self.unread)
            dist.all_reduce(losses)  # each has that of its rows
            self.unread = list(losses)
        return super().read_losses()


class _LossModule(nn.Module):
    """A loss as a module, whose `forward` PyTorch's wrappers can surround."""

    def __init__(self, model: GPT, loss: Loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        return self.loss(ids, targets)


class DDPTrainer(ParallelTrainer):
    """The same with PyTorch's DDP, which sends while the backward pass computes.

    Book: 25_many_machines.html#pytorch-s-which-overlaps
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        whole = _LossModule(self.model, self.loss)
        wrap = nn.parallel.DistributedDataParallel
        self.loss = self.ddp = wrap(whole, gradient_as_bucket_view=True)  # no copy

    def parts(self, batch: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
        parts = list(super().parts(batch))
        for number, part in enumerate(parts):
            is_last = number == len(parts) - 1
            self.ddp.require_backward_grad_sync = is_last  # before its forward pass
            yield part

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.world)  # DDP divides by it

    def exchange(self) -> None:
        """DDP has done it."""


class ShardedOptimizerTrainer(DDPTrainer):
    """The same, but each parameter has an owner, who keeps its moments and moves it.

    Source: Rajbhandari et al. (2020), stage 1.

    Book: 25_many_machines.html#dividing-the-optimizer
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        large_first = sorted(self.model.parameters(), key=lambda p: -p.numel())
        self.owners = {p: place % self.world for place, p in enumerate(large_first)}
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self.keep_own)

    def keep_own(self, *_: Any) -> None:
        """Drop the gradients of what others own."""
        for parameter, owner in self.owners.items():
            if owner != self.rank:
                parameter.grad = None

    def update(self) -> Tensor:
        norm = super().update()
        for parameter, owner in self.owners.items():
            dist.broadcast(parameter.detach(), owner)
        return norm

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for saved in state["optimizers"]:
            own = saved["state"].items()
            # In main memory: what is sent from a GPU arrives on a GPU.
            here = {k: {n: v.cpu() for n, v in moments.items()} for k, moments in own}
            everyone: list[Any] = [{}] * self.world
            dist.gather_object(here, None if self.rank else everyone)
            saved["state"] = {k: v for part in everyone for k, v in part.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        optimizers = []  # own moments alone: a GPU may have no room to load all
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            order = [p for group in optimizer.param_groups for p in group["params"]]
            own = [k for k in saved["state"] if self.owners[order[k]] == self.rank]
            optimizers.append({"state": {k: saved["state"][k] for k in own}})
        super().load_state_dict({**state, "optimizers": optimizers})


class _SlicesTrainer(ParallelTrainer):
    """What a checkpoint of parameters in slices takes."""

    def _gather(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Slices put together in main memory, on rank 0."""
        found = {}
        for name, tensor in tensors.items():
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.rank == 0:
                found[name] = whole.detach().cpu()
        return found

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["model"] = self._gather(state["model"])
        for saved in state["optimizers"]:
            saved["state"] = {k: self._gather(v) for k, v in saved["state"].items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        from torch.distributed.tensor import distribute_tensor

        def cut(whole: Tensor, like: Any) -> Tensor:
            if whole.dim() == 0 or hasattr(whole, "full_tensor"):
                return whole
            place = like.device_mesh, like.placements
            return distribute_tensor(whole.to(like.device), *place, src_data_rank=None)

        ours = dict(self.model.named_parameters())
        theirs = state.get("model", ours)
        optimizers = []
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            order = [p for group in optimizer.param_groups for p in group["params"]]
            moments = {
                place: {name: cut(value, order[place]) for name, value in own.items()}
                for place, own in saved["state"].items()
            }
            optimizers.append({"state": moments})
        model = {name: cut(theirs[name], p) for name, p in ours.items()}
        super().load_state_dict({**state, "model": model, "optimizers": optimizers})

    def whole_model(self) -> GPT:
        """The model with all its weights, on rank 0; every rank must call."""
        state = self._gather(dict(self.model.named_parameters()))
        model = meta_model(self.model.config)
        model.load_state_dict(state, strict=False, assign=True)
        if model.config.tied:
            model.head.weight = model.tokens.weight
        return model


class FSDPTrainer(_SlicesTrainer):
    """Every process keeps a slice of each parameter, gradient and moment: FSDP2.

    Not for Muon, which needs whole matrices. slices: the kind of device where they lie,
    if the model that is given begins elsewhere.

    Book: 25_many_machines.html#dividing-the-model
    """

    def __init__(self, *arguments: Any, slices: str | None = None, **named: Any):
        from torch.distributed.device_mesh import init_device_mesh  # slow to import
        from torch.distributed.fsdp import fully_shard

        super().__init__(*arguments, **named)
        before = list(self.model.parameters())
        self.loss = whole = _LossModule(self.model, self.loss)
        mesh = init_device_mesh(slices or self.device.type, (self.world,))
        for module in (*self.model.blocks, whole):
            # The last group, too: else it would stay whole after an evaluation.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sliced = dict(zip(before, self.model.parameters(), strict=True))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [sliced[p] for p in group["params"]]
        self.device = next(self.model.parameters()).device

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self.world)  # FSDP divides by it

    def exchange(self) -> None:
        """FSDP has done it."""

    def update(self) -> Tensor:
        norm: Any = super().update()
        return norm.full_tensor()  # of all slices, by which each was clipped


@contextmanager
def process_group() -> Iterator[int]:
    """Join the processes that `torchrun` started, and yield the rank; alone it is 0.

    What other ranks than 0 print is dropped. After an error the group stays as it is:
    the process ends, and `torchrun` ends the others.

    Book: 25_many_machines.html#a-whole-run
    """
    joins = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if joins:
        connect()
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank == 0:
        yield rank
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield rank
    if joins:
        dist.destroy_process_group()


@contextmanager
def first_process_first() -> Iterator[int]:
    """Let rank 0 through a block before the others, and yield the rank; alone it is 0.

    The others wait in an all-reduce on the CPU, since none has chosen its GPU yet.

    Book: 25_many_machines.html#a-whole-run
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:
        dist.all_reduce(torch.zeros(1))
    yield rank
    if rank == 0 and dist.is_initialized():
        dist.all_reduce(torch.zeros(1))


SHARDS = {"nothing": DDPTrainer, "optimizer": ShardedOptimizerTrainer}


def make_trainer(
    plan: Plan, data: TokenData, model: GPT | None = None, shard: str | None = None
) -> Trainer:
    """`Plan.trainer`, on every rank where there are several; for `start_run`.

    shard: what they divide, "nothing", "optimizer" (if None) or "model". Raises
    ValueError for another one, fewer rows than processes, a device on which processes
    can't exchange numbers, float16, and where Muon would have to work on slices.
    With dropout each process draws masks of its own, so another number of them is
    another run.

    Book: 25_many_machines.html#a-whole-run
    """
    shard = shard or "optimizer"
    if shard not in (*SHARDS, "model"):
        raise ValueError(f"shard is nothing, optimizer or model, not {shard!r}")
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return plan.trainer(data, model)
    plans = [plan]
    dist.broadcast_object_list(plans, 0, device=torch.device("cpu"))
    plan = plans[0]  # rank 0's
    rows, world = plan.training.batch_size, dist.get_world_size()
    if rows < world:
        raise ValueError(f"a batch of {rows} rows is too small for {world} processes")
    device = torch.device(plan.machine.device).type
    if device not in ("cpu", "cuda"):
        raise ValueError(f"several processes need the device cpu or cuda, not {device}")
    if plan.machine.precision == "float16":
        raise ValueError("several processes need the precision bfloat16 or float32")
    if shard == "model" and isinstance(plan.training, MuonConfig):
        raise ValueError("to divide the model takes a run with --optimizer adamw")
    if device == "cuda":  # each rank has a GPU of its own
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(gpu)
        plan = replace(plan, machine=replace(plan.machine, device=gpu))
    if shard == "model":  # made in main memory, where the whole may fit
        return plan.trainer(data, model, partial(FSDPTrainer, slices=device), "cpu")
    return plan.trainer(data, model, SHARDS[shard])


class StreamedTokens(Tokens):
    """Tokens in shards, of which one is here at a time: for corpora larger than a disk.

    shards: addresses, say; `fetch` turns one into ids, the first at once, so that the
    context can be checked. steps_each: how many steps learn from a shard before the
    next. In each round every shard comes once. Seed and step alone decide which.

    Book: 25_many_machines.html#a-corpus-larger-than-your-disk
    """

    def __init__(
        self, shards: Sequence[Any], fetch: Callable[[Any], np.ndarray], steps_each: int
    ):
        self.shards, self.fetch, self.steps_each = shards, fetch, steps_each
        self.number, first = 0, fetch(shards[0])
        super().__init__(first)

    def shard_at(self, seed: int, step: int) -> int:
        """The number of the shard that a step learns from."""
        turn, place = divmod(step // self.steps_each, len(self.shards))
        order = np.random.default_rng((seed, turn)).permutation(len(self.shards))
        return int(order[place])

    def random_batch(self, batch_size: int, context: int, seed: Any) -> Batch:
        """As in `Tokens`. seed: that of the run, and the step."""
        number = self.shard_at(*seed)
        if number != self.number:
            self.number, self.ids = -1, np.empty(0)  # room for the next
            self.number, self.ids = number, self.fetch(self.shards[number])
        return super().random_batch(batch_size, context, seed)
