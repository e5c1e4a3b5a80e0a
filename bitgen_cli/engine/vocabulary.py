"""Prompts to token ids: a vocabulary and how much of a prompt is read. Light, where no text encoder is needed."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Vocabulary
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from bitgen_cli.errors import InputError

VOCABULARY_FILE, SENTENCE_PIECE = "tokenizer.json", "spiece.model"
"""Of a transformers folder: the first that is there."""
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
WORD_START = "\u2581"
UNKNOWABLE = "\ue000"
"""A character that no text has."""


class PromptReader:
    """Reads prompts as a text encoder does.

    Args:
        vocabulary: text to token ids; adds </s> itself.
        max_length: longest prompt in tokens, </s> included; longer ones are cut.
    """

    def __init__(self, vocabulary: Vocabulary, max_length: int) -> None:
        self.vocabulary = vocabulary
        self.max_length = max_length
        vocabulary.no_padding()
        vocabulary.no_truncation()

    def tokenise(self, prompts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt, ending with </s>, cut to `max_length`."""
        return [self._cut(encoding.ids) for encoding in self.vocabulary.encode_batch(list(prompts))]

    def is_cut(self, prompt: str) -> bool:
        """Whether the prompt is longer than the encoder takes."""
        return len(self.vocabulary.encode(prompt).ids) > self.max_length

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


def find_vocabulary(source: str) -> Vocabulary | None:
    """The vocabulary of a transformers folder, or of a hub repository that was fetched before; None if there is none.

    Nothing is loaded but the vocabulary, and nothing is fetched.

    Raises:
        InputError: it is broken.
    """
    file = Path(source) / VOCABULARY_FILE
    if not file.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(source, VOCABULARY_FILE)
        except HFValidationError:
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    vocabulary = _read(file)
    vocabulary.no_padding()
    vocabulary.no_truncation()
    return vocabulary


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a transformers folder; transformers is loaded where it has no tokenizer.json.

    Raises:
        InputError: it is broken, or there is none.
    """
    file = folder / VOCABULARY_FILE
    if file.is_file():
        return _read(file)
    if not (folder / SENTENCE_PIECE).is_file():  # transformers makes one that knows no word
        raise InputError(f"the text encoder {folder} has no vocabulary", f"{VOCABULARY_FILE} is missing")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder).backend_tokenizer
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"cannot read {folder / SENTENCE_PIECE}: {reason}", f"or give {VOCABULARY_FILE}") from error


def _read(file: Path) -> Vocabulary:
    try:
        vocabulary = Vocabulary.from_file(str(file))
        vocabulary.encode(UNKNOWABLE)  # one that has no entry for what it does not know says so only then
        return vocabulary
    except BaseException as error:
        # tokenizers raises bare Exception for files it cannot parse, and none at all where it gives up on one
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{file} is not a tokenizer file: {error}") from error
