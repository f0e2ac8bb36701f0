"""Training a small Gemma-like tokenizer: SentencePiece BPE with byte fallback, digits split, spaces kept exactly.

The layout is Gemma's: <pad> <eos> <bos> <unk> at 0 to 3, then the pieces that are never merged with others (turns,
runs of line feeds, tabs and spaces), then the 256 bytes, then what BPE learned. There is no normalisation and no
leading space, so that decoding gives back every text.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
import string
from collections.abc import Iterable, Iterator

import sentencepiece

from tpa_train.errors import UserError
from tpa_train.gemma3.tokenizer import Tokenizer

CONTROL_BY_ID = ("<pad>", "<eos>", "<bos>", "<unk>")
LONGEST_RUN = {"\n": 8, "\t": 8, "▁": 31}  # Gemma's go up to 31 each, which a small vocabulary cannot spend
# Found in text as one piece before BPE begins; a single ▁ is BPE's own business ("▁the").
WHOLE_PIECES = (
    "<mask>", "<start_of_turn>", "<end_of_turn>",
    *(mark * n for mark, most in LONGEST_RUN.items() for n in range(2 if mark == "▁" else 1, most + 1)),
)  # fmt: skip
ASCII = string.digits + string.ascii_letters + string.punctuation  # pieces even where the text hardly has them
LEAST_VOCABULARY = 512  # all of these and 256 bytes leave about 100 to learn
MOST_VOCABULARY = 1 << 18
LONGEST_LINE = 4000  # bytes; SentencePiece leaves out longer ones (its own default limit is 4192)


def sample_documents(documents: Iterable[str], characters: int, seed: int) -> list[str]:
    """Returns documents worth about ``characters``, spread over all: those of the smallest hash of seed and text.

    The choice does not depend on the documents' order, and one pass holds no more than it returns.

    Raises:
        UserError: there is no text.
    """
    if characters < 1:
        raise UserError(f"tokenizer_characters={characters} must be at least 1.")
    kept: list[tuple[int, str]] = []  # a heap with the largest hash on top, as SentencePiece needs no order
    total = 0
    for text in documents:
        digest = hashlib.sha256(f"{seed}:".encode() + text.encode("utf-8", "replace")).digest()
        heapq.heappush(kept, (-int.from_bytes(digest[:8], "big"), text))
        total += len(text)
        while total - len(kept[0][1]) >= characters:
            total -= len(heapq.heappop(kept)[1])
    if not kept:
        raise UserError("there is no text to train a tokenizer on; name some in data.path.")
    return [text for _, text in sorted(kept, reverse=True)]


def training_lines(documents: Iterable[str]) -> Iterator[str]:
    """Yields what BPE learns from: stretches without line feeds, tabs and NULs, of at most ``LONGEST_LINE`` bytes.

    Line feeds and tabs are pieces of their own, and SentencePiece's trainer skips whole lines that hold one (or a NUL).
    """
    for text in documents:
        for line in re.split("[\n\t\0]+", text):
            data = line.encode("utf-8", "replace")
            for start in range(0, len(data), LONGEST_LINE):
                yield data[start : start + LONGEST_LINE].decode("utf-8", "ignore")


def train_tokenizer(documents: Iterable[str], vocab_size: int, characters: int, seed: int = 0) -> Tokenizer:
    """Trains a tokenizer of exactly ``vocab_size`` pieces; equal arguments give equal bytes.

    Args:
        documents: text, read once.
        vocab_size: V, special pieces and bytes included.
        characters: how much of the text is learned from, whole documents chosen by ``seed``.

    Raises:
        UserError: V is out of range or more than this text can fill, or there is no text.
    """
    check_vocab_size(vocab_size)
    sample = sample_documents(documents, characters, seed)
    model = io.BytesIO()
    pad, eos, bos, unk = CONTROL_BY_ID
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,  # rarer characters are spelled in bytes
            required_chars=ASCII,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=list(WHOLE_PIECES),
            pad_id=0, eos_id=1, bos_id=2, unk_id=3,
            pad_piece=pad, eos_piece=eos, bos_piece=bos, unk_piece=unk,
            input_sentence_size=0,  # all of the sample, in order: nothing is left to the trainer's own shuffling
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(
            f"vocab_size={vocab_size}: SentencePiece cannot train on this text ({_reason(error)}); use another size or "
            f"more text."
        ) from error
    return Tokenizer(model.getvalue(), origin="the trained tokenizer")


def check_vocab_size(vocab_size: int) -> None:
    """Raises UserError if a tokenizer cannot have so many pieces."""
    if not LEAST_VOCABULARY <= vocab_size <= MOST_VOCABULARY:
        raise UserError(f"vocab_size={vocab_size} must be between {LEAST_VOCABULARY} and {MOST_VOCABULARY:,}.")


def _reason(error: RuntimeError) -> str:
    """SentencePiece's messages begin with a source line and the failed condition; what follows is for people."""
    text = " ".join(str(error).split())
    return re.sub(r"^\w+: \S+\(\d+\) \[.*?\]\s*", "", text).rstrip(". ") or text
