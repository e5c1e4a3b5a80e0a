"""Several processes that train one model: torch's DDP and FSDP2, and what they tell each other.

A micro-batch is shared by all ranks, so that the loss curve does not depend on how many there are. One process alone
is the case of one rank, in which everything here does nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from bitgen_cli.errors import ResourceError, UsageError
from bitgen_cli.place import place

Strategy = Literal["ddp", "fsdp"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp")

_PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others; the first one draws pictures and writes files meanwhile."""
_HERE = "bitgen-here"
_LOOK_AGAIN = 0.2
"""Seconds between two looks whether the others have come."""


@dataclass(frozen=True)
class Share:
    """What a rank computes of a micro-batch.

    Attributes:
        rows: which pictures of it.
        weight: what their mean loss is multiplied with, so that the mean over the ranks is that of all pictures; 0
            where there are fewer pictures than ranks and the rows stand in for none.
    """

    rows: range
    weight: float


class Ranks:
    """This process among those that train together.

    Args:
        rank, count: which one of how many.
        strategy: what is shared: `ddp` the pictures alone, `fsdp` also weights, gradients and optimizer state.
        device: where this rank computes.
        writers: torch's group of the same processes for writing checkpoints in the background; None where each rank
            holds everything.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        strategy: Strategy = "ddp",
        device: torch.device | None = None,
        writers: Any = None,
    ) -> None:
        self.rank = rank
        self.count = count
        self.strategy = strategy
        self.device = device or torch.device("cpu")
        self.writers = writers
        self._wrapped: nn.Module | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of every tensor only."""
        return self.strategy == "fsdp" and self.count > 1

    def share(self, count: int) -> Share:
        """The part of this rank of a micro-batch of `count` pictures."""
        start, stop = count * self.rank // self.count, count * (self.rank + 1) // self.count
        if start == stop:
            return Share(range(0, 1), 0.0)
        return Share(range(start, stop), (stop - start) * self.count / count)

    def wrap(self, module: nn.Module, units: Sequence[nn.Module], *, partly: bool = False) -> Callable[..., Any]:
        """Shares a module between the ranks; returns what is to be called in its place.

        Args:
            module: with equal weights on every rank.
            units: parts of it whose weights come and go together where they are shared.
            partly: whether some of it takes no part in some steps.
        """
        if self.count == 1:
            return module
        if self.strategy == "ddp":
            from torch.nn.parallel import DistributedDataParallel

            where = [self.device.index or 0] if self.device.type == "cuda" else None
            self._wrapped = DistributedDataParallel(
                module, device_ids=where, gradient_as_bucket_view=True, find_unused_parameters=partly
            )
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(self.device.type, (self.count,))
            for unit in units:
                fully_shard(unit, mesh=mesh)
            fully_shard(module, mesh=mesh)
            self._wrapped = module
        return self._wrapped

    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        """For a backward pass: gradients are averaged over the ranks in the last micro-batch of a step alone."""
        if self._wrapped is None:
            return nullcontext()
        if self.strategy == "ddp":
            return nullcontext() if last else self._wrapped.no_sync()  # type: ignore[operator]
        self._wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank holds all weights for the length of the block, as ordinary tensors."""
        parts = [part for part in self._parts() if self.sharded]
        for part in parts:
            part.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            for part in parts:
                part.reshard()  # type: ignore[operator]

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over the ranks; no gradient passes."""
        if self.count == 1:
            return tensor.detach()
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.count

    def means(self, values: Mapping[str, Tensor], weight: float) -> dict[str, Tensor]:
        """The weighted means of single numbers; all ranks must give the same names."""
        if self.count == 1 or not values:
            return dict(values)
        stacked = torch.stack([values[name].detach().double().to(self.device) for name in sorted(values)])
        return dict(zip(sorted(values), self.mean(stacked * weight).unbind(), strict=True))

    def mean_over(
        self, chunks: Sequence[list[int]], measure: Callable[[list[int], float], Mapping[str, Tensor]]
    ) -> dict[str, float]:
        """Means of what is measured over all pictures of some batches, which the ranks share.

        Args:
            chunks: batches of pictures; empty ones do not occur.
            measure: means over the pictures it is given, single numbers; it is told their weight, too.
        """
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for whole in chunks:
            share = self.share(len(whole))
            mine = whole[share.rows.start : share.rows.stop]
            values = self.means(measure(mine, share.weight), share.weight)
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(whole)
                counts[name] = counts.get(name, 0) + len(whole)
        return {name: value / counts[name] for name, value in sums.items()}

    def gather(self, value: Any) -> list[Any]:
        """A small value of every rank, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Returns when all ranks are here."""
        if self.count > 1:
            dist.barrier()

    def _parts(self) -> list[nn.Module]:
        if self._wrapped is None:
            return []
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self._wrapped.modules() if isinstance(module, FSDPModule)]


def wait_for_others() -> None:
    """Returns when all processes that torchrun has started for one job have come here, however long that takes.

    It ends all of them as soon as one ends with an exit code that says something failed. Where it has not started them
    nobody does, and there is nothing to wait for.
    """
    here = place()
    if here.count == 1 or not dist.is_torchelastic_launched():
        return
    store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
    store.set(f"{_HERE}/{here.rank}", "")
    everyone = [f"{_HERE}/{rank}" for rank in range(here.count)]
    with suppress(RuntimeError):  # whoever keeps the store has left, as all have been here
        while not store.check(everyone):
            time.sleep(_LOOK_AGAIN)


@contextmanager
def joined(strategy: str, device: torch.device) -> Iterator[Ranks]:
    """This process as torchrun, or `--devices`, started it; alone without them.

    Args:
        strategy: `ddp` or `fsdp`.
        device: of this rank.

    Raises:
        UsageError: unknown strategy.
        ResourceError: this torch cannot do it.
    """
    if strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {strategy!r}", "ddp or fsdp")
    here = place()
    if here.count == 1:
        yield Ranks(device=device)
        return
    if strategy == "fsdp":
        _require_fsdp()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo beside nccl: checkpoints travel over the CPU
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        if strategy == "fsdp":
            yield Ranks(here.rank, here.count, "fsdp", device, dist.new_group(backend="gloo"))
        else:
            yield Ranks(here.rank, here.count, "ddp", device)
    finally:
        dist.destroy_process_group()


def _require_fsdp() -> None:
    """Checkpoints of shared tensors are safetensors files, which torch writes from 2.8 on."""
    try:
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: F401
        from torch.distributed.fsdp import fully_shard  # noqa: F401
    except ImportError as error:
        raise ResourceError(f"--strategy fsdp needs torch 2.8 or newer, this is {torch.__version__}") from error


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; all of it where nothing is shared."""
    held: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return held


def fill(target: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into one that may be shared: each rank takes its part."""
    if hasattr(target, "to_local"):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
        value = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None).to_local()
    local(target).copy_(value)
