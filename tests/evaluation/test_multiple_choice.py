"""Multiple choice against the naive computation, and bad files."""

import json

import pytest
import torch
from evaluation_models import ByteTokenizer, dense_model

from tpa_train.errors import UserError
from tpa_train.evaluation.multiple_choice import (
    Question,
    encode_answer,
    read_questions,
    score_questions,
    scores_and_greedy,
)


@pytest.fixture(scope="module")
def model():
    return dense_model(dtype=torch.float64)


def _naive(model, text: str, answer: str) -> float:
    ids = model.tokenizer.encode(text + answer)
    log = model(torch.tensor([ids])).log_softmax(-1)[0]
    begin = len(ids) - len(answer.encode())
    return sum(log[i - 1, ids[i]].item() for i in range(begin, len(ids)))


def test_scores_equal_the_naive_ones(model):
    questions = [
        Question(("The sky is",) * 3, ("blue", "a very deep kind of green", "x"), 0, "colours"),
        Question(("", ""), ("These are words.", "This are words."), 1, "grammar"),
        Question(("because Ann", "because the other one"), ("was late.",) * 2, 0, "names"),
        Question(("Question: why?\n",) * 2, ("So.", "No."), 1),
    ]
    expected = []
    for question in questions:
        for context, answer in zip(question.contexts, question.answers, strict=True):
            joint = f" {answer}" if context and not context[-1].isspace() else answer
            expected.append(_naive(model, context, joint))
    encoded = [
        encode_answer(model.tokenizer, c, a) for q in questions for c, a in zip(q.contexts, q.answers, strict=True)
    ]
    for batch_tokens in (1, 64, 8192):
        scores, _ = scores_and_greedy(model, encoded, torch.float64, batch_tokens=batch_tokens)
        assert scores == pytest.approx(expected, rel=1e-8)
    result = score_questions(model, questions, progress=False)
    chosen, first = [], 0
    for question in questions:
        mine = expected[first : first + len(question.answers)]
        first += len(question.answers)
        chosen.append(mine.index(max(mine)))
    assert result.choices == chosen
    assert result.accuracy == sum(c == q.label for c, q in zip(chosen, questions, strict=True)) / 4
    assert set(result.by_task) == {"colours", "grammar", "names", ""}
    assert result.chance == pytest.approx((1 / 3 + 3 / 2) / 4)


def test_length_normalisation_counts_characters(model):
    question = Question(("q",) * 2, ("a", "a much longer answer than the other"), 1)
    result = score_questions(model, [question], progress=False)
    assert (result.accuracy, result.acc_norm) in {(0.0, 1.0), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)}
    scores, _ = scores_and_greedy(model, [encode_answer(model.tokenizer, "q", a) for a in question.answers])
    normalised = [s / len(a) for s, a in zip(scores, question.answers, strict=True)]
    assert result.acc_norm == float(normalised[1] > normalised[0])


def test_texts_beyond_the_context_lose_their_beginning(model):
    tokens, begin = encode_answer(model.tokenizer, "x" * 600, "yes")
    (score,), _ = scores_and_greedy(model, [(tokens, begin)], torch.float64)
    kept = [tokens[0], *tokens[-511:]]
    log = model(torch.tensor([kept])).log_softmax(-1)[0]
    assert score == pytest.approx(sum(log[i - 1, kept[i]].item() for i in range(508, 512)), rel=1e-8)


def test_a_token_across_the_border_counts_as_the_answers():
    class Merging(ByteTokenizer):
        def encode(self, text, bos=True):  # "b " is one token
            ids = super().encode(text.replace("b ", "\x01"), bos)
            return ids

    tokens, begin = encode_answer(Merging(), "ab", "c")
    assert tokens[begin:] == [1 + 4, ord("c") + 4]


def test_both_shapes_are_read(tmp_path):
    path = tmp_path / "suite.jsonl"
    lines = [
        {"context": "c", "choices": ["a", "b"], "label": 1, "task": "t"},
        {"contexts": ["x", "y"], "continuation": "z", "choices": ["x z", "y z"], "context": "", "label": 0},
        {"context": "", "choices": ["a", "b", "c"], "label": 2},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    questions = read_questions(path)
    assert questions == [
        Question(("c", "c"), ("a", "b"), 1, "t"),
        Question(("x", "y"), ("z", "z"), 0),
        Question(("", "", ""), ("a", "b", "c"), 2),
    ]
    assert len(read_questions(path, limit=1)) == 1


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"context": "c", "choices": ["a", "b"]', "line 2 is not JSON"),
        ("[1]", "line 2 is a list, not an object"),
        ('{"context": "c", "choices": ["a"], "label": 0}', "line 2: 'choices' must be a list of at least two"),
        ('{"context": "c", "choices": ["a", 3], "label": 0}', "line 2: 'choices'"),
        ('{"context": "c", "choices": ["a", ""], "label": 0}', "line 2: a choice is empty"),
        ('{"context": "c", "choices": ["a", "b"], "label": 2}', "line 2: 'label' must be a number from 0 to 1"),
        ('{"context": "c", "choices": ["a", "b"], "label": true}', "line 2: 'label'"),
        ('{"context": "c", "choices": ["a", "b"]}', "line 2: 'label'.*None"),
        ('{"context": 1, "choices": ["a", "b"], "label": 0}', "line 2: 'context'"),
        ('{"contexts": ["a", "b"], "label": 0}', "line 2: 'continuation'"),
        ('{"continuation": "a", "label": 0}', "line 2: 'contexts'"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = tmp_path / "suite.jsonl"
    path.write_text('{"context": "c", "choices": ["a", "b"], "label": 1}\n' + line)
    with pytest.raises(UserError, match=message):
        read_questions(path)


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="cannot read the suite"):
        read_questions(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no questions"):
        read_questions(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        read_questions(tmp_path / "binary.jsonl")
    model = dense_model()
    model.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        score_questions(model, [Question(("", ""), ("a", "b"), 0)])
