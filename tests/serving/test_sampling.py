"""Sampling by the definition, each row by its own rules and independent of the others."""

import pytest
import torch

from tpa_train.errors import UserError
from tpa_train.serving import sampling
from tpa_train.serving.sampling import Sampling, SeenTokens, random_seed, restrict, sample, uniform

PROBABILITIES = torch.tensor([0.5, 0.3, 0.15, 0.05])
MANY = 4000


def shares(**rule):
    """How often each of four tokens is chosen over many steps of one sequence."""
    rules = [Sampling(**{"temperature": 1.0, "seed": 5} | rule)] * MANY
    return (sample(PROBABILITIES.log().expand(MANY, -1), rules, range(MANY)).bincount(minlength=4) / MANY).tolist()


def test_every_token_gets_its_share():
    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    assert shares(temperature=0.5) == pytest.approx([0.685, 0.246, 0.062, 0.007], abs=0.03)
    assert shares(top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    assert shares(top_k=99)[3] > 0
    # The smallest set with that much probability: two reach .8, three are needed for .81.
    assert shares(top_p=0.79)[2:] == [0, 0]
    assert shares(top_p=0.81) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.03)
    assert shares(top_p=1e-9) == [1, 0, 0, 0]
    # A third of the likeliest one's .5 is .167.
    assert shares(min_p=0.33)[2:] == [0, 0] and shares(min_p=0.29)[2] > 0 and shares(min_p=0.0)[3] > 0
    assert shares(temperature=0.0) == [1, 0, 0, 0]


def test_rows_have_rules_of_their_own():
    """Every row of a mixed batch is what it is alone, and as the others change."""
    logits = torch.randn(7, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rules = [
        Sampling(), Sampling(1.0, seed=3), Sampling(0.7, top_k=5, seed=4), Sampling(1.3, top_p=0.8, seed=5),
        Sampling(2.0, min_p=0.2, seed=6), Sampling(1.5, 20, 0.9, 0.05, 1.3, 7), Sampling(repetition_penalty=5.0),
    ]  # fmt: skip
    seen = torch.rand(7, 50, generator=torch.Generator().manual_seed(1)) < 0.3
    for steps in (range(7), range(100, 107)):
        together = sample(logits, rules, steps, seen)
        for i in range(7):
            assert sample(logits[i : i + 1], [rules[i]], [steps[i]], seen[i : i + 1])[0] == together[i]
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    shuffled = sample(logits[order], [rules[i] for i in order], [100 + int(i) for i in order], seen[order])
    assert torch.equal(shuffled, together[order])


def test_what_is_left_out_is_what_the_definitions_say():
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = logits.softmax(-1)[0]
    order = p.argsort(descending=True)

    def kept(**rule):
        return {int(i) for i in restrict(logits, [Sampling(1.0, **rule)])[0].isfinite().nonzero()}

    assert kept(top_k=7) == {int(i) for i in order[:7]}
    before = p[order].cumsum(0) - p[order]
    assert kept(top_p=0.6) == {int(i) for i in order[before < 0.6]}
    assert kept(min_p=0.1) == {int(i) for i in (p >= 0.1 * p.max()).nonzero()}
    q = p * torch.zeros_like(p).index_fill(0, order[:7], 1)  # top_p is of what top_k has left
    q = q[order] / q.sum()
    assert kept(top_k=7, top_p=0.6) == {int(i) for i in order[(q.cumsum(0) - q < 0.6) & (q > 0)]}


def test_repetition_is_penalized_on_both_sides_of_zero():
    seen = SeenTokens(3, 4, torch.device("cpu"))
    rules = [Sampling(repetition_penalty=2.0)] * 2
    for row in (2, 0):
        seen.begin(row, rules[0], [1, 3, 99])  # an image token may lie beyond the vocabulary
    logits = torch.tensor([[1.0, 1.9, -3.0, -1.0], [-1.1, -0.5, -1.2, -9.0]])
    assert sample(logits, rules, [0, 0], seen.of([2, 0], rules)).tolist() == [0, 1]  # 1.9 / 2, and -0.5 · 2
    seen.add([2, 0], rules, torch.tensor([0, 1]))
    assert seen.of([2], rules[:1])[0].tolist() == [True, True, False, True]
    assert sample(logits[:1], rules[:1], [1], seen.of([2], rules[:1])).tolist() == [1]  # 1 / 2 < 1.9 / 2
    seen.begin(2, rules[0], [2])  # another request takes the row over
    assert seen.of([2], rules[:1])[0].tolist() == [False, False, True, False]
    assert seen.of([1], [Sampling()]) is None


def test_sequences_choose_the_same_whoever_chooses_beside_them(monkeypatch):
    torch.manual_seed(0)
    logits, seen = torch.randn(7, 40), torch.rand(7, 40) < 0.3
    rules = [Sampling(temperature=i % 3 / 2, top_k=9, top_p=0.9, repetition_penalty=1.3, seed=i) for i in range(7)]
    steps = list(range(7))
    whole = sample(logits, rules, steps, seen)
    sizes, own = [], sampling._sample
    monkeypatch.setattr(sampling, "_sample", lambda x, *rest: sizes.append(len(x)) or own(x, *rest))
    monkeypatch.setattr(sampling, "BLOCK", 3 * 40)
    assert torch.equal(sample(logits, rules, steps, seen), whole) and sizes == [3, 3, 1]


def test_uniform_numbers():
    draws = torch.tensor(
        [[uniform(seed, step) for step in range(200)] for seed in range(-100, 100)], dtype=torch.float64
    )
    assert 0 <= draws.min() and draws.max() < 1
    counts = torch.histc(draws, 10, 0, 1) / draws.numel()
    assert (counts - 0.1).abs().max() < 0.01
    # Neither neighbouring steps nor neighbouring seeds, nor both, go together.
    for a, b in ((draws[:, 1:], draws[:, :-1]), (draws[1:], draws[:-1]), (draws[1:, :-1], draws[:-1, 1:])):
        assert torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].abs() < 0.02
    assert len(draws.unique()) == draws.numel()
    torch.manual_seed(4)
    first = random_seed()
    torch.manual_seed(4)
    assert first == random_seed() != random_seed()


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1},
    {"min_p": -0.1}, {"min_p": 2.0}, {"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")},
])  # fmt: skip
def test_rules_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
