"""Training a tokenizer: Gemma's layout, texts that come back exactly, and the same bytes every time."""

from __future__ import annotations

import pydoc_data.topics

import pytest

from tpa_train.errors import UserError
from tpa_train.gemma3.tokenizer import Tokenizer
from tpa_train.pretraining.tokenizer import sample_documents, train_tokenizer, training_lines

TEXTS = list(pydoc_data.topics.topics.values())[:12]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 700, 10**9)


def pieces(tokenizer, text):
    return [tokenizer._sp.id_to_piece(i) for i in tokenizer.encode(text, bos=False)]


@pytest.mark.parametrize(
    "text",
    [
        TEXTS[0], "hello world", " leading, trailing ", "   three   runs   ", "a\n\n\n\tb\t\t\n", "\n" * 40 + " " * 100,
        "naïve 日本語 🙂 e\u0301 ﬁ Å", "\x00\x01\x7f", "a\u200bb\u00a0c", "👩‍👩‍👧", "12345", "", " ", "\r\n",
    ],
)  # fmt: skip
def test_texts_come_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_layout_is_gemmas(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 700 and tokenizer.end_of_turn_id == tokenizer.piece_id("<end_of_turn>")
    assert tokenizer.encode("x")[0] == tokenizer.bos_id
    assert tokenizer.byte_value(tokenizer.piece_id("<0x41>")) == 0x41
    assert tokenizer.encode("<bos><start_of_turn>\n<eos>", bos=False) == [2, 5, tokenizer.piece_id("\n"), 1]


def test_spaces_digits_and_runs_are_pieces_of_their_own(tokenizer):
    assert pieces(tokenizer, "the the") == ["the", "▁the"]  # no dummy prefix
    assert pieces(tokenizer, "1905~Z") == ["1", "9", "0", "5", "~", "Z"]
    assert pieces(tokenizer, "\n\n    \t") == ["\n\n", "▁▁▁▁", "\t"]
    learned = [tokenizer.piece_text(i) for i in range(330, 700)]
    assert not any("\n" in piece or "  " in piece for piece in learned)


def test_equal_arguments_give_equal_bytes(tokenizer):
    again = train_tokenizer(reversed(TEXTS), 700, 10**9)
    assert again.model_proto == tokenizer.model_proto
    assert train_tokenizer(TEXTS, 700, 20_000, seed=1).fingerprint != tokenizer.fingerprint


def test_sample_is_chosen_by_text_and_seed():
    chosen = sample_documents(TEXTS, 20_000, seed=0)
    size = sum(map(len, chosen))
    assert 20_000 <= size < 20_000 + max(map(len, chosen)) and set(chosen) < set(TEXTS)
    assert sample_documents(reversed(TEXTS), 20_000, seed=0) == chosen
    assert sample_documents(TEXTS, 20_000, seed=1) != chosen
    assert sample_documents(["one"], 1, seed=0) == ["one"]


def test_lines_hold_nothing_that_the_trainer_skips():
    lines = list(training_lines(["a\n\n b\tc\0d", "é" * 5000]))
    assert lines[:4] == ["a", " b", "c", "d"]
    assert "".join(lines[4:]) == "é" * 5000 and all(len(line.encode()) <= 4000 for line in lines)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (TEXTS, 100, "vocab_size=100 must be between"),
        (["too little text"], 5000, "vocab_size=5000: SentencePiece cannot train on this text"),
        ([], 700, "no text"),
    ],
)
def test_what_cannot_be_trained_is_refused(texts, vocab_size, message):
    with pytest.raises(UserError, match=message) as error:
        train_tokenizer(texts, vocab_size, 10**6)
    assert "\n" not in str(error.value)
