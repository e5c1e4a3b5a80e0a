"""Text features beside the tokens: the captions of a store through the model's text encoder, once and for all."""

from __future__ import annotations

from functools import partial

import torch

from bitgen_cli.config import ModelConfig
from bitgen_cli.engine.store_format import StoredText, read_rows
from bitgen_cli.engine.store_text import write_shard_text
from bitgen_cli.engine.store_writer import StoreWriter
from bitgen_cli.engine.text import encoder_fingerprint, load_text_encoder, text_folder
from bitgen_cli.errors import InputError, UsageError
from bitgen_cli.report import Report


def find_text(config: ModelConfig, report: Report) -> StoredText:
    """What the text features of a model's captions are made by. An encoder that is not here yet is fetched.

    Args:
        config: names the text encoder.
        report: gets bars for what is fetched.

    Raises:
        UsageError: the text encoder is trained with the model.
        InputError: there is none, or the hub cannot give it.
        ResourceError: no space left for what is fetched.
        Interrupted: stopped by the user while it was fetched.
    """
    source, length = config.text_encoder.source, config.transformer.text_length
    if source == "new":
        raise UsageError(
            "this model trains its own text encoder (text_encoder.source: new), whose features change while it learns",
            "leave --text-features out",
        )
    text_folder(source, report)
    found = encoder_fingerprint(source)
    if found is None:
        raise InputError(f"the text encoder {source} has no weights of its own", "give a folder or a hub repository")
    return StoredText(encoder=found, width=config.transformer.text_width, length=length)


def has_features_for(text: StoredText | None, config: ModelConfig) -> bool:
    """Whether text features, made by `text` if there are any, are those that a configuration's text encoder makes."""
    source = config.text_encoder.source
    if text is None or source == "new":
        return False
    transformer = config.transformer
    expected = (encoder_fingerprint(source), transformer.text_width, transformer.text_length)
    return (text.encoder, text.width, text.length) == expected


def add_text_features(
    writer: StoreWriter,
    config: ModelConfig,
    text: StoredText,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
    *,
    batch_size: int,
) -> None:
    """Adds text features to all shards that have none.

    Args:
        writer: of a store whose shards are all written.
        config: names the text encoder.
        text: from `find_text`.
        device, dtype: where and in which number type it computes.
        report: who listens.
        batch_size: captions encoded at once.

    Raises:
        InputError: the encoder cannot be loaded, or is not as wide as the model takes.
        ResourceError: no space left; the shards before are safe.
    """
    lacking = [number for number, shard in enumerate(writer.manifest.shards) if shard.text is None]
    if not lacking:
        return
    encoder = load_text_encoder(config.text_encoder.source, text.length, device, torch.float32, report)
    if encoder.width != text.width:
        raise InputError(
            f"the text encoder {config.text_encoder.source} has {encoder.width} channels, the model takes {text.width}",
            "set model.transformer.text_width to that of the encoder",
        )
    if dtype == torch.float16:
        dtype = torch.float32  # T5's activations leave its range
    write = partial(
        write_shard_text,
        encoder=encoder,
        batch_size=batch_size,
        autocast=lambda: torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
    )
    with report.task("text features", sum(writer.manifest.shards[number].count for number in lacking)) as task:
        for number in lacking:
            shard = writer.manifest.shards[number]
            # a picture without captions is learned with an empty prompt
            captions = [row.captions or ("",) for row in read_rows(writer.path, shard)]
            writer.add_text(number, text, partial(write, captions=captions))
            task.advance(shard.count)
