"""Stop strings over token borders: the text ends before the first one, and no part of one ever shows."""

from __future__ import annotations

import random

import pytest
from serving_models import CharTokenizer

from tpa_train.serving.requests import Request, TextStream
from tpa_train.serving.sampling import Sampling


class Pieces:
    """Prints the piece itself for every index into ``pieces``."""

    def __init__(self, pieces):
        self.pieces = pieces

    def piece_text(self, index):
        return self.pieces[index]

    def byte_value(self, index):
        return None


def pushed(pieces, stop):
    stream, texts = TextStream(Pieces(pieces), stop), []
    for i in range(len(pieces)):
        texts.append(stream.push(i))
        if stream.stopped:
            return texts, True
    return [*texts, stream.flush()], stream.stopped


@pytest.mark.parametrize("pieces,stop,texts,stopped", [
    (["one ", "E", "N", "D", " two"], ["END"], ["one ", "", "", ""], True),
    (["one EN", "DED"], ["END"], ["one ", ""], True),
    (["one EN", "E", "ND"], ["END"], ["one ", "EN", ""], True),  # what was held back was none
    (["one EN"], ["END"], ["one ", "EN"], False),  # nor here, at the end
    (["aab", "aac"], ["aac"], ["aab", ""], True),
    (["aaa", "aab"], ["aaab"], ["", "aa"], True),
    (["x", "yz"], ["yz", "xyz"], ["", ""], True),  # both end there: the longer
    (["abc"], ["abc", "b"], ["a"], True),  # "b" is complete first, wherever tokens end
    (["a", "b", "c"], ["abc", "b"], ["", "a"], True),
    (["a", "b"], [], ["a", "b", ""], False),
])  # fmt: skip
def test_stop_strings_over_token_borders(pieces, stop, texts, stopped):
    assert pushed(pieces, stop) == (texts, stopped)


def test_where_tokens_end_does_not_matter():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 25)))
        stop = ["".join(rng.choice("ab") for _ in range(rng.randrange(2, 6))) for _ in range(rng.randrange(1, 4))]
        cuts = sorted({0, len(text), *(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))})
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        # By the definition: the shortest beginning that ends with a stop string, less the longest that it ends with.
        ends = [n for n in range(len(text) + 1) if text[:n].endswith(tuple(stop))]
        expected = text[: ends[0] - max(len(s) for s in stop if text[: ends[0]].endswith(s))] if ends else text
        texts, stopped = pushed(pieces, stop)
        assert ("".join(texts), stopped) == (expected, bool(ends)), (text, stop, pieces)


def test_a_request_ends_as_it_should():
    def answered(tokens, **options):
        request = Request(0, [2], tokenizer=CharTokenizer(), sampling=Sampling(), **options)
        updates = [request.accept(token) for token in tokens]
        assert (
            "".join(u.text for u in updates) == request.text
            and [t for u in updates for t in u.tokens] == request.tokens
        )
        assert [u.finish_reason for u in updates] == [None] * (len(tokens) - 1) + [request.finish_reason]
        return request.text, request.tokens, request.steps, request.finish_reason

    # 9, 10 and 12 print "a", "bb" and "d"; 90 and 91 are the two bytes of "é".
    assert answered([9, 10, 12], max_tokens=3) == ("abbd", [9, 10, 12], 3, "length")
    assert answered([9, 10, 12], max_tokens=9, stop_ids=frozenset([12])) == ("abb", [9, 10], 3, "stop")
    assert answered([9, 10], max_tokens=9, stop=("bb",)) == ("a", [9, 10], 2, "stop")
    assert answered([9, 10], max_tokens=2, stop=("bb",)) == ("a", [9, 10], 2, "stop")
    assert answered([9, 10], max_tokens=2, stop=("bc",)) == ("abb", [9, 10], 2, "length")
    assert answered([9, 90, 91, 90], max_tokens=4) == ("aé\ufffd", [9, 90, 91, 90], 4, "length")
    assert answered([9, 90], max_tokens=2, stop=("\ufffd",)) == ("a", [9, 90], 2, "stop")
