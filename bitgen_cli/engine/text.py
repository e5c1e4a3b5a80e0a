"""Prompts to text features: a T5 encoder through transformers, fixed or trained with the model.

Source of the published use: INFINITY_FORMAT section 5, "Prompt": T5 tokens with </s>, the encoder's last hidden state,
rows of real tokens only.

transformers takes as long to import as everything else together, so it waits until an encoder is made.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Vocabulary
from torch import Tensor, nn

from bitgen_cli.config import TextEncoderConfig
from bitgen_cli.engine.transformer import TextFeatures
from bitgen_cli.errors import InputError
from bitgen_cli.files import explain, sha256

if TYPE_CHECKING:
    from transformers import T5EncoderModel

_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
_VOCABULARIES = ("tokenizer.json", "spiece.model")
"""Names of an encoder's files, the first that are there."""
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
WORD_START = "\u2581"


class TextEncoder(nn.Module):
    """A T5 encoder with its vocabulary.

    Args:
        model: the encoder.
        vocabulary: text to token ids; adds </s> itself.
        max_length: longest prompt in tokens, </s> included; longer ones are cut.

    Attributes:
        rows: embeddings (width,) float32 of learned tokens by their id as text; the embedding table is left as it is.
    """

    def __init__(self, model: T5EncoderModel, vocabulary: Vocabulary, max_length: int) -> None:
        super().__init__()
        self.model = model
        self.vocabulary = vocabulary
        self.max_length = max_length
        self.rows = nn.ParameterDict()
        vocabulary.no_padding()
        vocabulary.no_truncation()

    @property
    def width(self) -> int:
        """Channels of the features."""
        return int(self.model.config.d_model)

    def tokenise(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, ending with </s>, cut to `max_length`."""
        return [self._cut(encoding.ids) for encoding in self.vocabulary.encode_batch(list(prompts))]

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt is longer than the encoder takes."""
        return len(self.vocabulary.encode(prompt).ids) > self.max_length

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Features of prompts, padded to the longest of them; gradients flow when they are on."""
        return self.encode_ids(self.tokenise(prompts))

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

    def word_ids(self, text: str) -> list[int]:
        """Ids of a text without </s>."""
        return list(self.vocabulary.encode(text, add_special_tokens=False).ids)

    def knows(self, token: str) -> bool:
        """Whether the vocabulary has the token as one entry."""
        ids = self.word_ids(token)
        return len(ids) == 1 and ids[0] != self.vocabulary.token_to_id(UNKNOWN)

    def has_no_word_for(self, text: str) -> bool:
        """Whether all of a text is unknown to the vocabulary."""
        return set(self.word_ids(text)) <= {self.vocabulary.token_to_id(piece) for piece in (UNKNOWN, WORD_START)}

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

    def _cut(self, ids: list[int]) -> list[int]:
        return ids if len(ids) <= self.max_length else [*ids[: self.max_length - 1], ids[-1]]


def new_vocabulary(captions: Iterable[str], size: int) -> Vocabulary:
    """A subword vocabulary of at most `size` entries learned from captions: lower case, BPE, printable ASCII known."""
    vocabulary = Vocabulary(models.BPE(unk_token=UNKNOWN))
    vocabulary.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    vocabulary.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    vocabulary.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, END, UNKNOWN],
        initial_alphabet=[c for c in string.printable if c.isprintable() and not c.isupper()],
        show_progress=False,
    )
    vocabulary.train_from_iterator(captions, trainer)
    end = vocabulary.token_to_id(END)
    vocabulary.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return vocabulary


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


def load_text_encoder(source: str, max_length: int, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The encoder of a transformers folder or hub repository, in evaluation mode.

    Raises:
        InputError: it cannot be found, read, or is no T5.
    """
    from transformers import T5EncoderModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        model = T5EncoderModel.from_pretrained(source, dtype=dtype, use_safetensors=Path(source).is_dir() or None)
        vocabulary = _load_vocabulary(source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot load the text encoder {source}: {reason}") from error
    encoder = TextEncoder(model, vocabulary, max_length).to(device)
    return encoder.eval()


def find_vocabulary(source: str) -> Vocabulary | None:
    """The vocabulary of a transformers folder, or of a hub repository that was fetched before; None if there is none.

    Nothing is loaded but the vocabulary, and nothing is fetched.

    Raises:
        InputError: it is broken.
    """
    file = Path(source) / "tokenizer.json"
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(source, "tokenizer.json")
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    vocabulary = _read_vocabulary(file)
    vocabulary.no_padding()
    vocabulary.no_truncation()
    return vocabulary


def _read_vocabulary(file: Path) -> Vocabulary:
    try:
        return Vocabulary.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception for files it cannot parse
        raise InputError(f"{file} is not a tokenizer file: {error}") from error


def _load_vocabulary(source: str) -> Vocabulary:
    file = Path(source) / "tokenizer.json"
    if file.is_file():
        return _read_vocabulary(file)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source).backend_tokenizer


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
