"""Gemma's tokenizer over SentencePiece, with ids identical to Hugging Face's, and streaming decoding.

What SentencePiece alone does not do, and this module adds:
- control pieces (``<bos>``, ``<eos>``, ...) written in the text: SentencePiece spells them out, Hugging Face reads
  each as its single id, and chat templates rely on that;
- the same names written by a user inside a chat, which must stay text (``literal``, ``encode_rendered``);
- a model rebuilt from another container (GGUF) has no file: ``sentencepiece_model`` writes one, byte by byte.

One difference from transformers is left on purpose: of a run of 32 or more spaces SentencePiece takes 31 at a time,
while the merges that transformers reconstructs from a GGUF file give 16s. The 31s are what Gemma was trained on: over
15 excerpts of code with such a run, the 270M finds them 17 nats a run more likely.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from tpa_train.errors import UserError

# Piece types of sentencepiece_model.proto (github.com/google/sentencepiece, src/sentencepiece_model.proto).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Pieces that carry structure, not text: parsed from text as Hugging Face does, never printed.
CONTROL_NAMES = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
TURN_NAMES = ("<start_of_turn>", "<end_of_turn>")

# Stands after the "<" of a name that is meant as text. A lone surrogate: no valid text holds one.
_LITERAL = "\udc00"
_STRUCTURE = re.compile("<(?=(?:pad|eos|bos|unk|mask|start_of_[a-z]+|end_of_[a-z]+|image_soft_token|unused[0-9]+)>)")


class Tokenizer:
    """Text to Gemma token ids and back.

    Attributes:
        model_proto: the serialized SentencePiece model; write it as ``tokenizer.model`` to export it.
        chat_template: the Jinja template of an instruction-tuned model, if its checkpoint carried one.
    """

    def __init__(self, model_proto: bytes, chat_template: str | None = None, origin: str = "tokenizer") -> None:
        """See ``from_model_proto``; ``origin`` names the file in error messages."""
        self.model_proto = bytes(model_proto)
        self.chat_template = chat_template
        try:
            # SentencePiece accepts an empty string as "nothing to load" and fails only when used.
            if not self.model_proto:
                raise RuntimeError("it is empty")
            self._sp = SentencePieceProcessor(model_proto=self.model_proto)
        except RuntimeError as error:
            raise UserError(f"{origin} is not a SentencePiece model ({_first_line(error)}).") from error
        self.vocab_size: int = self._sp.vocab_size()
        self.bos_id, self.eos_id = self._required("<bos>", origin), self._required("<eos>", origin)
        self.pad_id, self.unk_id = self._required("<pad>", origin), self._sp.unk_id()
        self.end_of_turn_id = self.piece_id("<end_of_turn>")
        # Only pieces that SentencePiece itself would spell out need to be cut out of the text first.
        in_text = {name: self.piece_id(name) for name in CONTROL_NAMES}
        self._control_ids = {name: i for name, i in in_text.items() if i is not None}
        self._control = re.compile("(" + "|".join(map(re.escape, self._control_ids)) + ")")
        turns = (self.piece_id(name) for name in TURN_NAMES)
        self._silent = frozenset(i for i in (*self._control_ids.values(), *turns) if i is not None)

    @classmethod
    def from_model_proto(cls, model_proto: bytes, chat_template: str | None = None) -> Tokenizer:
        """Builds a tokenizer from a serialized SentencePiece ``ModelProto``.

        Raises:
            UserError: the bytes are not a SentencePiece model, or not one of Gemma's.
        """
        return cls(model_proto, chat_template)

    @classmethod
    def from_file(cls, path: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Reads a ``tokenizer.model`` file.

        Raises:
            UserError: the file is missing, or not a Gemma SentencePiece model.
        """
        try:
            model_proto = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the tokenizer {path}: {error.strerror}.") from error
        return cls(model_proto, chat_template, origin=str(path))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model, hexadecimal: two tokenizers with the same one give the same ids."""
        return hashlib.sha256(self.model_proto).hexdigest()

    def piece_id(self, name: str) -> int | None:
        """Returns the id of the piece ``name`` ('▁' for a space), or None if the vocabulary lacks it."""
        index = self._sp.piece_to_id(name)
        return index if self._sp.id_to_piece(index) == name else None

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Returns the ids of ``text``; with ``bos``, ``<bos>`` comes first.

        A control piece written in the text becomes its id. A rendered chat template already starts with ``<bos>``:
        encode it with ``bos=False``.
        """
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = True, control: bool = True) -> list[list[int]]:
        """Returns the ids of each text; SentencePiece works through them in parallel threads.

        ``control=False`` spells out the names of control pieces, as SentencePiece does by itself: documents that write
        about ``<eos>`` do not end there.
        """
        # One flat list of stretches without control pieces, so that a batch is one call into SentencePiece.
        parts = [
            self._control.split(_valid(text)) if control and "<" in text else [_valid(text)] for text in texts
        ]  # fmt: skip
        encoded = iter(self._sp.encode([stretch for part in parts for stretch in part[::2]], out_type=int))
        start = [self.bos_id] if bos else []
        batch = []
        for part in parts:
            ids = [*start, *next(encoded)]
            for name in part[1::2]:
                ids.append(self._control_ids[name])
                ids.extend(next(encoded))
            batch.append(ids)
        return batch

    def literal(self, text: str) -> str:
        """Returns ``text`` for use in a chat template, such that no name of a control or turn piece in it is one.

        Only ``encode_rendered`` understands the result: what a user or a data set writes must not end a turn.
        """
        return _STRUCTURE.sub("<" + _LITERAL, _valid(text))

    def encode_rendered(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of rendered templates, without a ``<bos>`` of their own.

        Control pieces of the template become their ids; those inside ``literal`` text are spelled out.
        """
        parts = [text.split(_LITERAL) for text in texts]
        encoded = iter(self.encode_batch([stretch for part in parts for stretch in part], bos=False))
        return [[index for _ in part for index in next(encoded)] for part in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ``ids``; control and turn pieces, and ids beyond the vocabulary, print nothing."""
        stream = StreamDecoder(self)
        return "".join([*map(stream.push, ids), stream.flush()])

    def piece_text(self, index: int) -> str:
        """Returns what one id prints: its piece with spaces for '▁', or nothing for control pieces."""
        if index in self._silent or not 0 <= index < self.vocab_size:
            return ""
        return self._sp.id_to_piece(index).replace("▁", " ")

    def byte_value(self, index: int) -> int | None:
        """Returns the byte that a byte-fallback piece stands for, or None for every other id."""
        if 0 <= index < self.vocab_size and self._sp.is_byte(index):
            return int(self._sp.id_to_piece(index)[1:-1], 16)  # "<0xE2>"
        return None

    def _required(self, name: str, origin: str) -> int:
        index = self.piece_id(name)
        if index is None:
            raise UserError(f"{origin} is not a Gemma tokenizer: it has no piece {name}.")
        return index


class StreamDecoder:
    """Turns ids into text one by one: what ``push`` returned so far is always a prefix of the final text.

    A character outside the vocabulary arrives as several byte pieces; its text is held back until the last one, and
    a byte that cannot be part of a character prints U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = bytearray()  # the start of a character whose end has not arrived

    def push(self, index: int) -> str:
        """Takes the next id and returns the text that has become certain (often empty inside a character)."""
        byte = self._tokenizer.byte_value(index)
        if byte is None:
            return self.flush() + self._tokenizer.piece_text(index)
        self._bytes.append(byte)
        return self._drain(final=False)

    def flush(self) -> str:
        """Returns what is still held back, as U+FFFD if it is not a whole character; call it at the end."""
        return self._drain(final=True) if self._bytes else ""

    def _drain(self, final: bool) -> str:
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode("utf-8")
                self._bytes.clear()
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode("utf-8")
                del self._bytes[: error.start]
                if not final and error.reason == "unexpected end of data":
                    break
                text += "\ufffd"  # one per byte, as SentencePiece does
                del self._bytes[0]
        return text


def sentencepiece_model(
    pieces: Sequence[str], scores: Sequence[float], types: Sequence[int], ids: dict[str, int]
) -> bytes:
    """Serializes a SentencePiece ``ModelProto``: BPE, byte fallback, no dummy prefix, no normalisation.

    Written by hand, since it needs two dozen lines of the wire format (protobuf.dev/programming-guides/encoding)
    and spares users the protobuf package. Field numbers: sentencepiece_model.proto.

    Args:
        pieces, scores, types: one entry per id.
        ids: ``unk_id``, ``bos_id``, ``eos_id`` and ``pad_id``.
    """
    out = bytearray()
    for piece, score, kind in zip(pieces, scores, types, strict=True):
        text = piece.encode("utf-8")
        # SentencePiece message: 1 piece (string), 2 score (float), 3 type (enum).
        body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind)
        out += b"\x0a" + _varint(len(body)) + body
    trainer = _int_field(3, 2)  # model_type: BPE
    trainer += _int_field(4, len(pieces))  # vocab_size
    trainer += _int_field(35, 1)  # byte_fallback
    for number, name in ((40, "unk_id"), (41, "bos_id"), (42, "eos_id"), (43, "pad_id")):
        trainer += _int_field(number, ids[name])
    for number, key in ((45, "unk_id"), (46, "bos_id"), (47, "eos_id"), (48, "pad_id")):
        trainer += _bytes_field(number, pieces[ids[key]].encode("utf-8"))
    normalizer = _bytes_field(1, b"identity") + _int_field(3, 0) + _int_field(4, 0) + _int_field(5, 1)
    # 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces
    return bytes(out) + _bytes_field(2, trainer) + _bytes_field(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def without_marks(text: str) -> str:
    """Returns the text that ``literal`` was given, at least as far as it is valid."""
    return text.replace(_LITERAL, "")


def _valid(text: str) -> str:
    """Replaces lone surrogates, which no UTF-8 text can hold, by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
