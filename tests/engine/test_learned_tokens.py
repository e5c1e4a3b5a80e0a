"""Tokens of subjects: read as one entry with an embedding of its own, whatever the vocabulary would make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Vocabulary
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import T5Config, T5EncoderModel

from bitgen_cli.config import TextEncoderConfig
from bitgen_cli.engine.text import TextEncoder, load_text_encoder, new_text_encoder

CONFIG = TextEncoderConfig(source="new", vocabulary=120, width=16, layers=1, heads=2, ffn_width=32)


def bpe() -> TextEncoder:
    return new_text_encoder(CONFIG, ["a dog on the moon", "the dog"], 12, 0)


def unigram() -> TextEncoder:
    """As the published T5: a unigram model behind a metaspace, more rows than entries, case kept."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.0), ("▁dog", -1.0), ("▁moon", -1.0)]
    letters = [(letter, -5.0) for letter in "[]Vabdegmnosx"]
    vocabulary = Vocabulary(models.Unigram([*pieces, *letters], unk_id=2, byte_fallback=False))
    vocabulary.normalizer = normalizers.NFKC()
    vocabulary.pre_tokenizer = pre_tokenizers.Metaspace()
    vocabulary.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    torch.manual_seed(0)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return TextEncoder(T5EncoderModel(config).eval(), vocabulary, 12)


ENCODERS = pytest.mark.parametrize("make", [bpe, unigram])


@ENCODERS
@pytest.mark.parametrize("token", ["[V]", "[rex]", "sks", "<my-dog>", "ünïcode✓"])
def test_a_token_is_one_entry_between_the_same_words(make: object, token: str) -> None:
    encoder = make()  # type: ignore[operator]
    before = encoder.tokenise(["a dog"])[0]
    assert not encoder.knows(token)
    encoder.learn(token, torch.zeros(16))
    ids = encoder.tokenise([f"a {token} dog"])[0]
    own = encoder.vocabulary.token_to_id(token)
    assert ids == [before[0], own, *before[1:]]
    assert encoder.knows(token)


@ENCODERS
def test_prompts_without_the_token_are_read_as_before(make: object) -> None:
    encoder = make()  # type: ignore[operator]
    prompts = ["a dog", "a [X] dog", "sksdog"]
    with torch.no_grad():
        before = encoder.encode(prompts).features
        encoder.learn("[V]", torch.ones(16))
        encoder.learn("sks", torch.ones(16))
        assert torch.equal(encoder.encode(prompts).features, before)


@ENCODERS
def test_a_token_begun_with_a_word_means_that_word(make: object) -> None:
    encoder = make()  # type: ignore[operator]
    encoder.learn("[V]", encoder.embedding_of("dog"))
    with torch.no_grad():
        token, word = encoder.encode(["a [V]"]).features, encoder.encode(["a dog"]).features
    assert torch.equal(token, word)


@ENCODERS
def test_only_the_row_gets_a_gradient(make: object) -> None:
    encoder = make().requires_grad_(False)  # type: ignore[operator]
    encoder.learn("[V]", encoder.embedding_of("dog"))
    encoder.encode(["a [V] dog", "a dog"]).features.square().sum().backward()
    with_gradient = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"rows.{encoder.vocabulary.token_to_id('[V]')}"}
    assert float(encoder.row("[V]").grad.abs().sum()) > 0


@ENCODERS
def test_settled_tokens_are_saved_with_the_table(make: object, tmp_path: Path) -> None:
    encoder = make()  # type: ignore[operator]
    encoder.learn("[V]", torch.linspace(-1, 1, 16))
    with torch.no_grad():
        before = encoder.encode(["a [V] dog"]).features
        encoder.settle()
        assert torch.equal(encoder.encode(["a [V] dog"]).features, before)
        encoder.model.save_pretrained(tmp_path)
        encoder.vocabulary.save(str(tmp_path / "tokenizer.json"))
        loaded = load_text_encoder(str(tmp_path), 12, torch.device("cpu"), torch.float32)
        assert torch.equal(loaded.encode(["a [V] dog"]).features, before)


@ENCODERS
def test_words_are_known_and_pieces_are_not(make: object) -> None:
    encoder = make()  # type: ignore[operator]
    assert encoder.knows("dog")
    assert encoder.knows("a")
    assert not encoder.knows("[V]")
    assert not encoder.knows("moonx")


@ENCODERS
@pytest.mark.parametrize(("text", "unknown"), [("犬", True), ("犬 犬犬", True), ("a 犬", False), ("dog", False)])
def test_text_in_letters_that_the_vocabulary_never_saw(make: object, text: str, unknown: bool) -> None:
    encoder = make()  # type: ignore[operator]
    assert encoder.has_no_word_for(text) == unknown
