"""A training step on tensors without contents: what it would hold at its peak, nothing computed.

Modules and losses are the real ones. A tensor without contents has a shape, a type and a device, so that autocast,
recomputation and frozen layers need no rules here; behind it stands one on torch's meta device, whose kernels know the
shape of every result. Every tensor that an operation makes is counted until the last reference to its storage goes,
autograd's included. Not seen is what kernels use inside, and what an allocator wastes.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")


@dataclass(frozen=True)
class Peak:
    """Bytes beside the module's own weights.

    Attributes:
        working: the most that activations, inputs and passing tensors hold at once.
        step: the most that they and the gradients hold at once.
    """

    working: int = 0
    step: int = 0

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
    """What a step holds, from one mark of its course to the next.

    Within each of these windows every further block of a module adds the same: what it keeps, copies of its weights, in
    the last one its gradients.

    Attributes:
        windows: until the first block begins, the last one has ended, mixed precision is left, and the loss is there;
            then until the gradient has passed the last block, and from the first block on.
    """

    windows: tuple[Peak, ...]

    @property
    def peak(self) -> Peak:
        """Of the whole step."""
        found = Peak()
        for window in self.windows:
            found = found.largest(window)
        return found

    def deeper(self, before: Rehearsed, times: int) -> Rehearsed:
        """The step of a module with as many more blocks as lie between it and `before`, `times` over."""
        pairs = zip(self.windows, before.windows, strict=True)
        return Rehearsed(tuple(own.further(other, times) for own, other in pairs))


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that are made while it is entered, as long as they live.

    Attributes:
        peak: the most there was at once since the beginning.
        passed: names of the marks and the most there was before each, since the one before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, tuple[int, bool]] = {}
        self.begin()

    def begin(self, module: nn.Module | None = None, gradient_share: float = 1.0) -> None:
        """Counts from nothing.

        Args:
            module: whose weights and buffers do not count, nor views of them.
            gradient_share: part of each gradient that is kept here; less than 1 where other ranks keep the rest.
        """
        self._share = gradient_share
        self._working, self._gradients = 0, 0.0
        self.peak = self._since = Peak()
        self.passed: list[tuple[str, Peak]] = []
        for key in self._known:
            self._known[key] = 0, True
        if module is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                self._known.setdefault(_storage(tensor)._cdata, (0, True))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = self.compute(func, args, kwargs or {})
        for value in tree_leaves(found):
            if isinstance(value, Tensor):
                self._note(value)
        return found

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation returns."""
        return func(*args, **kwargs)

    def as_gradient(self, tensor: Tensor) -> None:
        """Counts a tensor among the gradients from now on."""
        key = _storage(tensor)._cdata
        size, is_gradient = self._known.get(key, (0, True))
        if not is_gradient:
            self._known[key] = size, True
            self._working -= size
            self._gradients += size * self._share

    def mark(self, name: str) -> None:
        """Ends what is looked at since the last mark; a name that has passed is not marked again."""
        if name not in dict(self.passed):
            self.passed.append((name, self._since))
            self._since = Peak()
            self._look()

    def _note(self, tensor: Tensor) -> None:
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes(), False
            self._working += storage.nbytes()
            weakref.finalize(storage, self._forget, key)
            self._look()

    def _look(self) -> None:
        now = Peak(self._working, self._working + round(self._gradients))
        self.peak, self._since = self.peak.largest(now), self._since.largest(now)

    def _forget(self, key: int) -> None:
        size, is_gradient = self._known.pop(key)
        if is_gradient:
            self._gradients -= size * self._share
        else:
            self._working -= size


class Empty(Tensor):
    """A tensor without contents.

    Attributes:
        shape_of: the tensor on the meta device behind it.
    """

    shape_of: Tensor

    @staticmethod
    def __new__(cls, shape_of: Tensor, device: torch.device) -> Empty:
        """A tensor of that shape which says that it is on that device."""
        made: Empty = Tensor._make_wrapper_subclass(
            cls,
            shape_of.size(),
            strides=shape_of.stride(),
            storage_offset=shape_of.storage_offset(),
            dtype=shape_of.dtype,
            device=device,
        )
        made.shape_of = shape_of
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuses: only a rehearsal knows what to do."""
        raise RuntimeError(f"{func} outside of a rehearsal")


class Rehearsal(Watched):  # type: ignore[no-untyped-call]
    """While it is entered, tensors have no contents, and are counted.

    Args:
        device: where they say they are.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result's shape, by the kernels of the meta device."""
        if func is torch.ops.aten.lift_fresh.default:
            return args[0]  # numbers given in Python stay what they are
        shapes, options = tree_map(_shape_of, args), tree_map(_shape_of, kwargs)
        if any(argument.name == "device" for argument in func._schema.arguments):
            options["device"] = META
        found = func(*shapes, **options)
        changed: dict[int, Tensor] = {}
        if func._schema.is_mutable:
            pairs = zip(tree_leaves((args, kwargs)), tree_leaves((shapes, options)), strict=False)
            changed = {id(shape): given for given, shape in pairs if isinstance(given, Tensor)}

        def outside(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return changed.get(id(value)) if id(value) in changed else Empty(value, self._device)

        return tree_map(outside, found)


def _shape_of(value: Any) -> Any:
    """What stands behind a tensor, as the meta kernels take it."""
    if isinstance(value, Empty):
        return value.shape_of
    return value.to(META) if isinstance(value, Tensor) else value


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.shape_of if isinstance(tensor, Empty) else tensor).untyped_storage()


@contextmanager
def rehearsal(device: torch.device) -> Iterator[Rehearsal]:
    """Makes every tensor of the block one without contents, on a device of that type.

    A device that this torch cannot stand in for is taken as a CPU.
    """
    standing = torch.device("cpu")
    if device.type == "cuda" and torch.cuda.is_available():
        # autograd wants to know which one
        standing = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    try:
        with Rehearsal(standing) as entered:
            yield entered
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
    entered: Rehearsal,
    module: nn.Module,
    loss: Callable[[], Tensor],
    *,
    blocks: nn.ModuleList | None = None,
    gradients_kept: bool = False,
    gradient_share: float = 1.0,
) -> Rehearsed:
    """What a micro-batch holds beside the weights.

    Args:
        entered: in which the module was made.
        module: what is trained.
        loss: of a micro-batch; makes its inputs itself.
        blocks: alike and one after the other, through which most of the time goes; None: there are none such.
        gradients_kept: whether gradients of a micro-batch before are there already.
        gradient_share: as in `Watched.begin`.
    """
    entered.begin(module, gradient_share)

    def gradient_is_there(parameter: Tensor) -> None:
        assert parameter.grad is not None
        entered.as_gradient(parameter.grad)

    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(gradient_is_there)  # type: ignore[no-untyped-call]
            if gradients_kept:
                parameter.grad = torch.empty_like(parameter)
                entered.as_gradient(parameter.grad)
    if blocks is not None:
        blocks[0].register_forward_pre_hook(lambda _, inputs: entered.mark(BLOCKS))
        blocks[-1].register_forward_hook(lambda _, inputs, output: entered.mark(ROUNDED))
        blocks[-1].register_forward_pre_hook(lambda _, inputs: _on_gradient(inputs[0], entered, PASSED))
        blocks[0].register_forward_hook(lambda _, inputs, output: _on_gradient(output, entered, LAST))
    value = loss()
    entered.mark(LOSS)
    value.backward()  # type: ignore[no-untyped-call]
    entered.mark(END)
    return _windows(entered.passed)


BLOCKS, ROUNDED, FORWARD, LOSS, PASSED, LAST, END = "blocks", "rounded", "forward", "loss", "passed", "last", "end"
"""Marks: the first block begins, the last one has ended, the forward pass has, the loss is there; the gradient has
passed the last block, reaches the first one's end, and is everywhere."""


def _windows(passed: list[tuple[str, Peak]]) -> Rehearsed:
    """The windows of a step from its marks, of which those that concern blocks or the forward pass may be missing."""
    found = dict(passed)
    names = list(found)

    def between(start: str, end: str) -> Peak:
        peaks = [peak for _, peak in passed[names.index(start) + 1 : names.index(end) + 1]]
        return Rehearsed(tuple(peaks)).peak

    forward = tuple(found.get(name, Peak()) for name in (BLOCKS, ROUNDED, FORWARD, LOSS))
    climbing = between(LOSS, PASSED if PASSED in found else END)
    falling = between(LAST if LAST in found else LOSS, END)
    return Rehearsed((*forward, climbing, falling))


def infer(entered: Rehearsal, module: nn.Module, work: Callable[[], Any]) -> int:
    """Bytes that a module without gradients holds beside its weights."""
    entered.begin(module)
    with torch.no_grad():
        work()
    return entered.peak.working


def _on_gradient(tensor: Tensor, entered: Rehearsal, name: str) -> None:
    """Marks when a tensor's gradient is there."""
    if tensor.requires_grad and torch.is_grad_enabled():
        tensor.register_hook(lambda _: entered.mark(name))  # type: ignore[no-untyped-call]
