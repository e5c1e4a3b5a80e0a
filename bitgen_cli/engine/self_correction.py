"""Bitwise self-correction: bits flipped in training, whose effects the following scales learn to mend.

Source: INFINITY_FORMAT section 6, flip_requant (infinity/models/bitwise_self_correction.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitgen_cli.engine.draws import Draws
from bitgen_cli.engine.pyramid import ChangeBits


def flip(bits: Tensor, mask: Tensor) -> Tensor:
    """The bits with those under the mask inverted; both bool of one shape."""
    return bits ^ mask


def flipper(strength: float, scales: int, draws: Draws) -> ChangeBits:
    """A change for pyramid.walk that flips bits at random.

    Once per scale and batch a probability is drawn from 0.00, 0.01, ... strength; each bit flips with it.

    Args:
        strength: largest probability, [0, 1].
        scales: the first so many scales are changed.
        draws: source of all randomness; the pictures are its rows.
    """
    choices = int(100 * strength + 1)

    def change(bits: Tensor, scale: int) -> Tensor:
        if scale >= scales:
            return bits
        probability = torch.randint(0, choices, (), generator=draws.shared).item() * 0.01
        mask = draws.uniform(*bits.shape[1:]) < probability
        return flip(bits, mask.to(bits.device))

    return change
