"""Prompts to text features: a T5 encoder through transformers, fixed or trained with the model.

Source of the published use: INFINITY_FORMAT section 5, "Prompt": T5 tokens with </s>, the encoder's last hidden state,
rows of real tokens only.

transformers takes as long to import as everything else together, so it waits until an encoder is made.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as Vocabulary
from torch import Tensor, nn

from bitgen_cli.config import TextEncoderConfig
from bitgen_cli.engine import hub
from bitgen_cli.engine.transformer import TextFeatures
from bitgen_cli.engine.vocabulary import (
    END,
    PAD,
    SENTENCE_PIECE,
    VOCABULARY_FILE,
    PromptReader,
    load_vocabulary,
    new_vocabulary,
)
from bitgen_cli.errors import BitgenError, InputError
from bitgen_cli.files import explain, read_json, sha256
from bitgen_cli.report import Report, Silent

if TYPE_CHECKING:
    from transformers import T5EncoderModel

MOST_LAYERS = 1000
"""Of a text encoder."""
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_VOCABULARIES = (VOCABULARY_FILE, SENTENCE_PIECE)
"""Names of an encoder's files, the first that are there."""


class TextEncoder(nn.Module, PromptReader):
    """A T5 encoder with its vocabulary.

    Args:
        model: the encoder.
        vocabulary, max_length: as in PromptReader.

    Attributes:
        rows: embeddings (width,) float32 of learned tokens by their id as text; the embedding table is left as it is.
    """

    def __init__(self, model: T5EncoderModel, vocabulary: Vocabulary, max_length: int) -> None:
        nn.Module.__init__(self)
        PromptReader.__init__(self, vocabulary, max_length)
        self.model = model
        self.rows = nn.ParameterDict()

    @property
    def width(self) -> int:
        """Channels of the features."""
        return int(self.model.config.d_model)

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, padded to the longest of them; gradients flow when they are on."""
        return self.encode_ids(self.tokenise(prompts))

    def encode_alone(self, prompts: Sequence[str]) -> list[Tensor]:
        """Features (T, width) of each prompt, which hold no matter what it is encoded with: one is encoded at a time.

        In a batch with longer ones it is padded, and sums round otherwise.
        """
        return [self.encode_ids([ids]).features[0] for ids in self.tokenise(prompts)]

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> TextFeatures:
        """Features (B, T, width) of token ids from `tokenise`."""
        lengths = tuple(len(row) for row in ids)
        longest = max(lengths)
        device = self.model.device
        pad = self.vocabulary.token_to_id(PAD)
        padded = torch.tensor([[*row, *[pad] * (longest - len(row))] for row in ids], device=device)
        mask = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        features: Tensor = self.model(inputs_embeds=self._embed(padded), attention_mask=mask).last_hidden_state
        return TextFeatures(features, lengths)

    @torch.no_grad()
    def embedding_of(self, text: str) -> Tensor:
        """Mean embedding (width,) float32 of a text's tokens: what a new token is begun with."""
        ids = torch.tensor([self.word_ids(text)], device=self.model.device)
        return self._embed(ids).float().mean(1)[0]

    def learn(self, token: str, row: Tensor) -> None:
        """Reads the token from now on as one entry with this embedding, whatever it was split into before.

        The table of embeddings and the vocabulary on disk are untouched. White space before the token belongs to it.

        Args:
            token: as it stands in prompts, upper and lower case told apart.
            row: (width,).
        """
        alone = token[0].isalnum() and token[-1].isalnum()
        self.vocabulary.add_tokens([AddedToken(token, single_word=alone, lstrip=True, normalized=False)])
        key = str(self.vocabulary.token_to_id(token))
        self.rows[key] = nn.Parameter(row.detach().float().to(self.model.device))

    def row(self, token: str) -> nn.Parameter:
        """The embedding of a learned token."""
        found: nn.Parameter = self.rows[str(self.vocabulary.token_to_id(token))]
        return found

    @torch.no_grad()
    def settle(self) -> None:
        """Moves the learned tokens into the table of embeddings, so that they are saved with it."""
        table = self._table
        rows = table.weight.shape[0]
        needed = max((int(key) + 1 for key in self.rows), default=0)
        if needed > rows:
            self.model.resize_token_embeddings(needed, mean_resizing=False)
            table = self._table
        for key, row in self.rows.items():
            table.weight[int(key)] = row.to(table.weight.dtype)
        self.rows.clear()

    @property
    def _table(self) -> nn.Embedding:
        table: nn.Embedding = self.model.get_input_embeddings()  # type: ignore[no-untyped-call]
        return table

    def _embed(self, ids: Tensor) -> Tensor:
        """Embeddings (B, T, width) of ids (B, T)."""
        table = self._table
        embedded: Tensor = table(ids.clamp_max(table.num_embeddings - 1))
        for key, row in self.rows.items():
            embedded = torch.where((ids == int(key))[..., None], row.to(embedded.dtype), embedded)
        return embedded

def new_text_encoder(config: TextEncoderConfig, captions: Iterable[str], max_length: int, seed: int) -> TextEncoder:
    """An encoder of the configured geometry with fresh weights and a vocabulary learned from captions.

    Args:
        config: of source `new`.
        captions: what the vocabulary is learned from.
        max_length: longest prompt in tokens.
        seed: of the weights.
    """
    from transformers import T5Config, T5EncoderModel

    assert config.vocabulary is not None
    assert config.width is not None
    assert config.layers is not None
    assert config.heads is not None
    assert config.ffn_width is not None
    vocabulary = new_vocabulary(captions, config.vocabulary)
    geometry = T5Config(
        vocab_size=vocabulary.get_vocab_size(),
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.ffn_width,
        num_layers=config.layers,
        num_heads=config.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=vocabulary.token_to_id(PAD),
        eos_token_id=vocabulary.token_to_id(END),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5EncoderModel(geometry)
    return TextEncoder(model, vocabulary, max_length)


def _check_layers(folder: Path) -> None:
    """Raises InputError where a T5's config.json names more layers than any has: they would be built one by one."""
    file = folder / "config.json"
    stored = read_json(file) if file.is_file() else {}
    layers = stored.get("num_layers", 0) if isinstance(stored, dict) else 0
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise InputError(f"{file}: no text encoder has so many layers, more than {MOST_LAYERS}")



def load_text_encoder(
    source: str, max_length: int, device: torch.device, dtype: torch.dtype, report: Report | None = None
) -> TextEncoder:
    """The encoder of a transformers folder or hub repository, in evaluation mode.

    Args:
        source: folder, or repository, which is fetched when it is not on this machine.
        max_length: as in PromptReader.
        device, dtype: where the weights go and as what.
        report: gets bars for what is fetched.

    Raises:
        InputError: it cannot be found, fetched, read, or is no T5.
        ResourceError: no space left for what is fetched.
        Interrupted: stopped by the user while it was fetched, which the next call goes on with.
    """
    from transformers import T5EncoderModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    folder = text_folder(source, report)
    _check_layers(folder)
    try:
        model = T5EncoderModel.from_pretrained(folder, dtype=dtype, use_safetensors=Path(source).is_dir() or None)
        vocabulary = load_vocabulary(folder)
    except (BitgenError, MemoryError):
        raise
    except Exception as error:  # transformers and its parts raise what they like for a configuration that is none
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load the text encoder {source}: {reason}") from error
    encoder = TextEncoder(model, vocabulary, max_length).to(device)
    return encoder.eval()


def text_folder(source: str, report: Report | None = None) -> Path:
    """Where a text encoder's files are: the folder itself, or that of a hub repository, fetched when it is not here.

    Args:
        source: transformers folder or hub repository.
        report: gets bars for what is fetched.

    Raises:
        InputError: the hub cannot give it.
        ResourceError: no space left.
        Interrupted: stopped by the user; what was fetched stays.
    """
    if Path(source).is_dir():
        return Path(source)
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise InputError(
            f"cannot load the text encoder {source}: no such folder",
            "give a folder of transformers, or a repository OWNER/NAME",
        )
    return hub.provided(source, hub.any_text_encoder_files, report or Silent()).path("")


def encoder_fingerprint(source: str) -> str | None:
    """The sha256 of all that an encoder's features depend on: names and contents of configuration, weights, vocabulary.

    A folder and the same files of a hub repository have the same one. Nothing is loaded or fetched.

    Args:
        source: transformers folder or hub repository.

    Returns:
        64 hexadecimal digits; None when the files are not on this machine.

    Raises:
        InputError: a file cannot be read.
    """
    folder = Path(source) if Path(source).is_dir() else _fetched(source)
    if folder is None:
        return None
    files = [folder / "config.json"]
    for names in (_WEIGHTS, _VOCABULARIES):
        found = next((matching for name in names if (matching := sorted(folder.glob(name)))), [])
        if not found:
            return None
        files += found
    digest = hashlib.sha256()
    for file in files:
        try:
            digest.update(f"{file.name} {_sha256(file)}\n".encode())
        except OSError as error:
            raise explain(error, file, "read") from error
    return digest.hexdigest()


def _fetched(repository: str) -> Path | None:
    """Where the hub's files of a repository are kept on this machine; None when they are not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repository, "config.json")
    except HFValidationError:  # no name that a repository can have
        return None
    return Path(config).parent if isinstance(config, str) else None


def _sha256(file: Path) -> str:
    """The sha256 of a file; large files of the hub are kept under that name, and need not be read."""
    kept = file.resolve()
    if kept.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", kept.name):
        return kept.name
    return sha256(file)
