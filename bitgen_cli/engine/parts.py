"""Which parts of a model learn a subject: names in a configuration to parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bitgen_cli.engine.lora import LAYERS

ADAPTER = ".adapter."
"""Between the names of a layer and of its adapter's parameters."""

SubjectKind = Literal["token", "lora", "delta"]


def is_trained(name: str, parts: set[str]) -> bool:
    """Whether a parameter of subject_stage.Taught belongs to the parts that train.

    `all` is everything but the autoencoder and the table of embeddings, in which only the token has a row to learn.
    """
    if name.startswith("text_encoder.rows."):
        return bool(parts & {"token", "all"})
    if ADAPTER in name:
        return "lora" in parts
    if name.startswith("text_encoder."):
        return bool(parts & {"text", "all"}) and "shared.weight" not in name and "embed_tokens" not in name
    if "all" in parts:
        return True
    return any(f".{LAYERS[part]}." in name for part in parts & set(LAYERS))


def kind_of(parts: Sequence[str]) -> SubjectKind:
    """What kind of subject those parts make."""
    if set(parts) == {"token"}:
        return "token"
    return "lora" if set(parts) <= {"token", "lora"} else "delta"
