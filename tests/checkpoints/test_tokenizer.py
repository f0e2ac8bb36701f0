"""The tokenizer on a small vocabulary, and on the real one against transformers."""

from __future__ import annotations

import inspect
import pydoc_data.topics
import random
import re
import sysconfig
from pathlib import Path

import pytest

from tpa_train.checkpoints import open_checkpoint
from tpa_train.errors import UserError
from tpa_train.gemma3.chat import ChatTemplate
from tpa_train.gemma3.tokenizer import StreamDecoder, Tokenizer


def pieces(tokenizer, text, bos=False):
    return [tokenizer._sp.id_to_piece(i) for i in tokenizer.encode(text, bos)]


def test_merges_spaces_and_newlines(tokenizer):
    assert pieces(tokenizer, "hello world") == ["hello", "▁world"]
    assert pieces(tokenizer, "the   \n\n") == ["the", "▁▁▁", "\n\n"]
    assert pieces(tokenizer, " the") == ["▁the"]  # no dummy prefix, nothing stripped
    assert tokenizer.encode("") == [tokenizer.bos_id]


def test_control_pieces_in_text_are_single_ids(tokenizer):
    ids = tokenizer.encode("<bos><start_of_turn>hello<end_of_turn>\n<eos>", bos=False)
    assert ids == [2, 5, tokenizer.piece_id("hello"), tokenizer.end_of_turn_id, tokenizer.piece_id("\n"), 1]
    assert tokenizer.decode(ids) == "hello\n"


def test_control_pieces_are_spelled_out_on_demand(tokenizer):
    text = "the <unk> and <eos><bos><"
    (ids,) = tokenizer.encode_batch([text], bos=False, control=False)
    assert not {0, 1, 2, 3, 4} & set(ids) and tokenizer.decode(ids) == text
    assert {1, 2, 3} < set(tokenizer.encode(text, bos=False))
    assert tokenizer.encode_batch(["the"], control=False) == tokenizer.encode_batch(["the"])


def test_batch_equals_single_encoding(tokenizer):
    texts = ["hello", "", "<bos>", "<eos>the<pad>", "<<bos>>", " world"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]
    assert tokenizer.encode_batch([]) == []


def test_attributes(tokenizer):
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.piece_id("no such piece") is None and tokenizer.piece_id("<unk>") == 3
    assert Tokenizer.from_model_proto(tokenizer.model_proto).fingerprint == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 64


def test_round_trip_through_a_file(tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_proto)
    again = Tokenizer.from_file(tmp_path / "tokenizer.model")
    assert again.encode("hello  wörld") == tokenizer.encode("hello  wörld")


@pytest.mark.parametrize("text", ["naïve 日本語 🙂", "\x00\x01", "a\u200bb", "👩‍👩‍👧"])
def test_byte_fallback_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b🙂")) == "a\ufffdb🙂"


def test_streaming_holds_back_incomplete_characters(tokenizer):
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("a🙂", bos=False)] == ["a", "", "", "", "🙂"]
    first = tokenizer.encode("🙂", bos=False)[0]
    assert stream.push(first) == ""
    assert stream.push(tokenizer.piece_id("hello")) == "\ufffdhello"  # it will never be completed
    assert stream.push(first) == "" and stream.flush() == "\ufffd" and stream.flush() == ""


def test_streaming_and_decode_agree_with_sentencepiece_on_random_ids(tokenizer):
    rng = random.Random(0)
    text_ids = [i for i in range(tokenizer.vocab_size) if i > 6]
    for _ in range(2000):
        ids = rng.choices(text_ids, k=rng.randint(1, 8))
        assert tokenizer.decode(ids) == tokenizer._sp.decode(ids)


def test_ids_beyond_the_vocabulary_print_nothing(tokenizer):
    assert tokenizer.decode([tokenizer.piece_id("hello"), 10**6, -1]) == "hello"


def test_bad_models_are_refused(tmp_path):
    for content in (b"", b"not a model", b"\x0a\x05junk"):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model"):
            Tokenizer.from_file(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="missing.model"):
        Tokenizer.from_file(tmp_path / "missing.model")


def documents(count: int) -> list[str]:
    """Returns Python sources, language reference pages and adversarial mixtures; runs of spaces stay under 32."""
    stdlib = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [p.read_text(encoding="utf-8", errors="replace")[:12_000] for p in stdlib][: count // 2]
    texts += list(pydoc_data.topics.topics.values())[: count // 4]
    parts = ["<bos>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<table>", "<unused7>", "[multimodal]", " ",
             "  ", " " * 9, "\n", "\n" * 40, "\t\t", "▁", "é", "日本語", "🙂", "👩‍👩‍👧", "\x00", "\ufeff", "e\u0301",
             "word", " world", "4567.89", "<", ">", "\r\n", "\u200b", "\u00a0", "a" * 50, "<0x0A>"]  # fmt: skip
    rng = random.Random(0)
    texts += ["".join(rng.choices(parts, k=40)) for _ in range(count - len(texts))]
    return [re.sub("[ ▁]{32,}", lambda run: run[0][:31], text) for text in texts]


@pytest.mark.real
def test_real_ids_equal_transformers(real_path):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(real_path.parent, gguf_file=real_path.name)
    tokenizer = open_checkpoint(real_path).tokenizer
    texts = documents(300)
    assert len(texts) == 300 and tokenizer.vocab_size == len(reference)
    ours = tokenizer.encode_batch(texts)
    theirs = [encoding.ids for encoding in reference.backend_tokenizer.encode_batch(texts)]
    different = [text[:80] for text, a, b in zip(texts, ours, theirs, strict=True) if a != b]
    assert different == []
    text = inspect.getsource(random)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # A conversation is tokenised turn by turn, which changes no id.
    template = ChatTemplate(tokenizer)
    for text in texts[:100]:
        turns = [{"role": "user", "content": text[:500]}, {"role": "assistant", "content": text[500:1500] or "yes"}]
        turns = [turn | {"content": re.sub("<[a-z_]+[0-9]*>", "", turn["content"]).strip() or "no"} for turn in turns]
        rendered = template.render(turns)
        expected = reference.backend_tokenizer.encode(rendered.text, add_special_tokens=False).ids
        assert template.encode([rendered])[0][0] == expected


@pytest.mark.real
def test_real_structure_and_long_runs(real_path):
    tokenizer = open_checkpoint(real_path).tokenizer
    assert (tokenizer.vocab_size, tokenizer.end_of_turn_id, tokenizer.piece_id("<start_of_turn>")) == (262144, 106, 105)
    run = tokenizer.encode(" " * 40, bos=False)
    assert run == [tokenizer.piece_id("▁" * 31), tokenizer.piece_id("▁" * 9)]  # Google's own segmentation
