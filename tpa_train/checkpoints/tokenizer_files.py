"""The tokenizer as transformers reads it: ``tokenizer.json``, ``tokenizer_config.json`` and the chat template.

Ids are those of ``gemma3.tokenizer``: user-defined pieces are cut out of the text before anything merges, longest
first, as SentencePiece does (arXiv:1808.06226), runs of spaces among them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tpa_train.gemma3.tokenizer import CONTROL_NAMES, NORMAL, TURN_NAMES, USER_DEFINED, Tokenizer

TEMPLATE = "chat_template.jinja"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_context: int) -> None:
    """Writes the tokenizer's files into ``folder``, ``tokenizer.model`` among them, for ``AutoTokenizer``."""
    (folder / "tokenizer.model").write_bytes(tokenizer.model_proto)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer), ensure_ascii=False), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
        "padding_side": "left", "model_max_length": max_context, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer.chat_template:
        (folder / TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of a ``tokenizer.json`` (the format of Hugging Face's ``tokenizers``) for this tokenizer."""
    pieces = list(read_pieces(tokenizer.model_proto))
    vocabulary = {piece: index for index, (piece, _, _) in enumerate(pieces)}
    structure = {*CONTROL_NAMES, *TURN_NAMES}
    added = [
        # Matched in the normalised text, where a space is '▁'; structure is matched first, in the text as it is.
        {"id": index, "content": piece, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": piece not in structure, "special": piece in structure}
        for index, (piece, _, kind) in enumerate(pieces) if kind == USER_DEFINED or piece in structure
    ]  # fmt: skip
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": int(name == "B")}} for name in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, bos, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [tokenizer.bos_id], "tokens": ["<bos>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": merges(pieces),
        },
    }  # fmt: skip


def merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Returns every pair of pieces that makes a piece, in the order in which SentencePiece would join them."""
    scores = {piece: score for piece, score, kind in pieces if kind == NORMAL}
    index = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    found = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                found.append((-score, index[piece], index[left], index[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def read_pieces(model_proto: bytes) -> Iterator[tuple[str, float, int]]:
    """Yields piece, score and type of every id of a serialized SentencePiece ``ModelProto`` (field 1, repeated)."""
    for number, message in _fields(model_proto):
        if number == 1:
            fields = dict(_fields(message))
            (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
            yield fields[1].decode("utf-8"), score, fields.get(3, NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the number and the value of a protobuf message's fields: bytes, or an int where it is a varint."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}[wire] if wire != 2 else varint()
        yield number, message[at : at + size]
        at += size
