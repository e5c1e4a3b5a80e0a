"""A training step on tensors without contents: what it would hold at its peak, nothing computed.

Modules and losses are the real ones; torch's fake tensors have a shape, a type and a device but no memory. Every tensor
that an operation makes is counted until the last reference to its storage goes, autograd's included, so autocast,
recomputation and frozen layers need no rules here. Not seen is what kernels use inside, and what the allocator wastes.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Peak:
    """Bytes beside the module's own weights.

    Attributes:
        working: the most that activations, inputs and passing tensors hold at once.
        step: the most that they and the gradients hold at once.
    """

    working: int
    step: int

    def largest(self, other: Peak) -> Peak:
        """The larger of each."""
        return Peak(max(self.working, other.working), max(self.step, other.step))

    def with_more(self, working: int, gradients: int) -> Peak:
        """The peak when so many bytes more are there all the time."""
        return Peak(self.working + working, self.step + working + gradients)

    def further(self, before: Peak, times: int) -> Peak:
        """This peak after as many more of the steps that led here from `before`."""
        return Peak(
            self.working + times * (self.working - before.working), self.step + times * (self.step - before.step)
        )


@dataclass(frozen=True)
class Rehearsed:
    """What a step holds.

    Attributes:
        rising: until the gradients of the last block are there: each further block adds what it keeps.
        falling: from the first block's on: each further block adds its gradients.
    """

    rising: Peak
    falling: Peak

    @property
    def peak(self) -> Peak:
        """Of the whole step."""
        return self.rising.largest(self.falling)

    def deeper(self, before: Rehearsed, times: int) -> Rehearsed:
        """The step of a module with as many more blocks as lie between it and `before`, `times` over."""
        return Rehearsed(self.rising.further(before.rising, times), self.falling.further(before.falling, times))


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are made while it is entered, as long as they live.

    Args:
        module: whose weights and buffers do not count, nor views of them.
        gradient_share: part of each gradient that is kept here; less than 1 where other ranks keep the rest.

    Attributes:
        peak: the most there was at once.
        since: the most since the last `mark`.
    """

    def __init__(self, module: nn.Module | None = None, gradient_share: float = 1.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.share = gradient_share
        self.working = 0
        self.gradients = 0.0
        self.peak = self.since = Peak(0, 0)
        own = () if module is None else (*module.parameters(), *module.buffers())
        self._known = {tensor.untyped_storage()._cdata: (0, True) for tensor in own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self.note(value)
        return found

    def note(self, tensor: Tensor) -> None:
        """Counts a tensor's storage, once."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes(), False
            self.working += storage.nbytes()
            weakref.finalize(storage, self._forget, key)
            self._look()

    def as_gradient(self, tensor: Tensor) -> None:
        """Counts a tensor among the gradients from now on."""
        key = tensor.untyped_storage()._cdata
        size, is_gradient = self._known.get(key, (0, True))
        if not is_gradient:
            self._known[key] = size, True
            self.working -= size
            self.gradients += size * self.share

    def mark(self) -> None:
        """Begins `since` anew with what is there."""
        self.since = Peak(0, 0)
        self._look()

    def _look(self) -> None:
        now = Peak(self.working, self.working + round(self.gradients))
        self.peak, self.since = self.peak.largest(now), self.since.largest(now)

    def _forget(self, key: int) -> None:
        size, is_gradient = self._known.pop(key)
        if is_gradient:
            self.gradients -= size * self.share
        else:
            self.working -= size


@contextmanager
def without_contents(device: torch.device) -> Iterator[None]:
    """Makes every tensor of the block one without contents, on a device of that type.

    A device that this torch cannot stand in for is taken as a CPU.
    """
    kind = device.type if device.type == "cuda" and torch.cuda.is_available() else "cpu"
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(kind):
            yield
    finally:
        _forget_kept()


def _forget_kept() -> None:
    """Empties what functions of the engine keep: it has no contents either."""
    for name, module in list(sys.modules.items()):
        if name.startswith("bitgen_cli.engine."):
            for value in vars(module).values():
                if hasattr(value, "cache_parameters"):  # functools.lru_cache
                    value.cache_clear()


def rehearse(
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    blocks: nn.ModuleList | None = None,
    gradients_kept: bool = False,
    gradient_share: float = 1.0,
) -> Rehearsed:
    """What a micro-batch holds beside the weights; call it `without_contents`.

    Args:
        module: what is trained.
        loss: of a micro-batch; makes its inputs itself.
        blocks: alike and one after the other, through which most of the time goes; None: there are none such.
        gradients_kept: whether gradients of a micro-batch before are there already.
        gradient_share: as in `Watched`.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    risen: list[Peak] = []
    with Watched(module, gradient_share) as watched:

        def gradient_is_there(parameter: Tensor) -> None:
            assert parameter.grad is not None
            watched.as_gradient(parameter.grad)

        def rises_no_more(_: Tensor) -> None:
            risen.append(watched.peak)

        def falls(_: Tensor) -> None:
            watched.mark()

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(gradient_is_there)  # type: ignore[no-untyped-call]
            if gradients_kept:
                parameter.grad = torch.empty_like(parameter)
                watched.as_gradient(parameter.grad)
        if blocks is not None:
            blocks[-1].register_forward_pre_hook(_on_gradient_of_input(rises_no_more))
            blocks[0].register_forward_hook(_on_gradient_of_output(falls))
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return Rehearsed(risen[0] if risen else watched.peak, watched.since)


def infer(module: nn.Module, work: Callable[[], Any]) -> int:
    """Bytes that a module without gradients holds beside its weights; call it `without_contents`."""
    with torch.no_grad(), Watched(module) as watched:
        work()
        found: int = watched.peak.working
    return found


def _on_gradient_of_input(do: Callable[[Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs[0].requires_grad and torch.is_grad_enabled():
            inputs[0].register_hook(do)

    return hook


def _on_gradient_of_output(do: Callable[[Tensor], None]) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad and torch.is_grad_enabled():
            output.register_hook(do)  # type: ignore[no-untyped-call]

    return hook
