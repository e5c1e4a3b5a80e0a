"""Which pictures a training sees, in which order: pure functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from bitgen_cli.engine.draws import mix

_ORDER = 0
"""What a seed is for; engine/trainer.py has further purposes."""


def batches(groups: list[list[int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """One epoch's batches, each of one group, in an order that (seed, epoch) decides.

    What is left of a group after its last whole batch waits for another epoch, unless it is all there is.
    """
    generator = torch.Generator().manual_seed(mix(seed, _ORDER, epoch))
    found: list[list[int]] = []
    for group in groups:
        order = torch.randperm(len(group), generator=generator).tolist()
        shuffled = [group[i] for i in order]
        whole = max(batch_size, len(shuffled) - len(shuffled) % batch_size)
        found += [shuffled[i : i + batch_size] for i in range(0, min(whole, len(shuffled)), batch_size)]
    order = torch.randperm(len(found), generator=generator).tolist()
    return [found[i] for i in order]


def split(count: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices 0 ... count - 1 for training and for validation, both ascending; chosen by the seed.

    Args:
        held_out: pictures for validation; at most a tenth are taken.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, _ORDER))).tolist()
    taken = min(held_out, count // 10)
    return sorted(order[taken:]), sorted(order[:taken])


def grouped(indices: Iterable[int], key: Callable[[int], float]) -> list[list[int]]:
    """The indices in groups of equal keys, in order of first appearance."""
    groups: dict[float, list[int]] = {}
    for index in indices:
        groups.setdefault(key(index), []).append(index)
    return list(groups.values())


def chunks(groups: list[list[int]], size: int) -> list[list[int]]:
    """Batches of at most `size`, each of one group, nothing left out."""
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]
