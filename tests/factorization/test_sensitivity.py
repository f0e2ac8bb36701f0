"""What truncating one part costs: the KL of two whole models, zero at full rank."""

import pytest
import torch
from random_models import random_model, small_config, specs_of, tokens
from test_latent import random_moments

from tpa_train.factorization.latent import key_basis, value_basis
from tpa_train.factorization.sensitivity import Bases, build_student, measure_sensitivity

LAYERS = [1, 5]
PARTS = [(layer, kind) for layer in LAYERS for kind in "kv"]


@pytest.fixture(params=[1, 4], ids=["G1", "G4"])
def setting(request):
    model = random_model(small_config(num_kv_heads=request.param))
    moments = {i: random_moments(model.config, i) for i in LAYERS}
    bases = Bases(
        {i: key_basis(m, 100) for i, m in moments.items()},
        {i: value_basis(model.layers[i].self_attn, m) for i, m in moments.items()},
    )
    return model, bases, tokens(model.config, 2, 40)


def test_nothing_is_lost_at_full_rank(setting):
    model, bases, ids = setting
    measured = measure_sensitivity(model, bases, PARTS, 8, ids)
    assert set(measured) == set(PARTS)
    assert all(abs(kl) < 1e-9 for kl in measured.values())


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 4])
def test_equals_the_kl_of_the_whole_models(setting, every):
    model, bases, ids = setting
    measured = measure_sensitivity(model, bases, PARTS, 3, ids, every=every)
    for (layer, kind), kl in measured.items():
        student = build_student(model, bases, specs_of(model.config, {layer: (3, 0) if kind == "k" else (0, 3)}))
        p, q = (m(ids).log_softmax(-1)[:, every - 1 :: every] for m in (model, student))
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9)
        assert kl > 1e-6


def test_lower_ranks_cost_more(setting):
    model, bases, ids = setting
    low, high = (measure_sensitivity(model, bases, PARTS, rank, ids) for rank in (1, 7))
    assert all(low[part] > high[part] >= 0 for part in PARTS)
