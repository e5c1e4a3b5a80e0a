"""The published models by name: the files that are fetched for each, and the preset that says what they are."""

from __future__ import annotations

from dataclasses import dataclass

REPOSITORY = "FoundationVision/Infinity"
"""Where the hub keeps the weights."""
REVISION = "main"
"""What is fetched unless another revision is asked for; the commit it stands for is kept with the model."""


@dataclass(frozen=True)
class Published:
    """A published model. Its text encoder is the preset's.

    Attributes:
        preset: its configuration and sampling defaults.
        tokenizer: file in the repository.
        transformer: file, or folder with an index of shards; None for a tokenizer alone.
        overrides: `a.b=1` each, where the preset says something else.
        repository: on the hub.
    """

    preset: str
    tokenizer: str
    transformer: str | None = None
    overrides: tuple[str, ...] = ()
    repository: str = REPOSITORY


CATALOGUE = {
    "infinity-2b": Published("infinity-2b", "infinity_vae_d32reg.pth", "infinity_2b_reg.pth"),
    "infinity-8b": Published("infinity-8b", "infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_weights"),
    "infinity-8b-512": Published(
        "infinity-8b-512", "infinity_vae_d56_f8_14_patchify.pth", "infinity_8b_512x512_weights"
    ),
    "infinity-vae-d16": Published("16bit", "infinity_vae_d16.pth"),
    "infinity-vae-d24": Published("32bit", "infinity_vae_d24.pth", overrides=("model.tokenizer.bits=24",)),
    "infinity-vae-d32": Published("32bit", "infinity_vae_d32.pth"),
    "infinity-vae-d64": Published("64bit", "infinity_vae_d64.pth"),
}
"""Every published model by its name in bitgen (INFINITY_FORMAT section 2)."""
