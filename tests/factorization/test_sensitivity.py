"""What one changed part costs: the KL of two whole models, zero where nothing is lost."""

import copy

import pytest
import torch
from calibrated_models import calibrated_bases
from random_models import tokens

from tpa_train.distillation.losses import linear_kl
from tpa_train.factorization import sensitivity
from tpa_train.factorization.sensitivity import (
    NOISE_BITS,
    OutputDivergence,
    Probe,
    layer_kls,
    measure_sensitivity,
    output_kl,
)
from tpa_train.factorization.solutions import build_student
from tpa_train.tpa.spec import LayerSpec, dense_specs

LAYERS = (1, 5)  # a local and a global one
PARTS = [(layer, kind) for layer in LAYERS for kind in "kv"]


@pytest.fixture(params=[1, 4], ids=["G1", "G4"])
def setting(request):
    model, bases = calibrated_bases(request.param, LAYERS)
    return model, bases, tokens(model.config, 2, 40)


def _whole(model, probe):
    specs = dense_specs(model.config)
    specs[probe.layer] = probe.spec(model.config)
    return specs


def test_nothing_is_lost_at_full_rank(setting):
    model, bases, ids = setting
    full = 2 * model.config.num_kv_heads * model.config.head_dim
    probes = [Probe(layer, kind, "latent", 8) for layer, kind in PARTS]
    probes += [Probe(layer, "kv", "joint", full) for layer in LAYERS]
    measured = measure_sensitivity(model, bases, probes, ids)
    assert set(measured) == set(probes)
    assert all(abs(kl) < 1e-9 for kl in measured.values())


def _probes(groups):
    """Every form, local and global, exact and rounded."""
    probes = [Probe(layer, kind, "latent", 3, bits) for layer, kind in PARTS for bits in (16, 4)]
    probes += [Probe(layer, "kv", "joint", 7, bits) for layer in LAYERS for bits in (16, NOISE_BITS)]
    if groups > 1:
        probes += [Probe(layer, kind, "constant_a", 2) for layer, kind in PARTS]
        probes += [Probe(5, kind, "contextual", 2, 8) for kind in "kv"]
    return probes


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 4])
def test_equals_the_kl_of_the_whole_models(setting, every):
    model, bases, ids = setting
    measured = measure_sensitivity(model, bases, _probes(model.config.num_kv_heads), ids, every=every)
    for probe, kl in measured.items():
        student = build_student(model, bases, _whole(model, probe))
        assert student.converted_layers == [probe.layer]
        p, q = (m(ids).log_softmax(-1)[:, every - 1 :: every] for m in (model, student))
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-9), probe
        assert kl == pytest.approx(output_kl(model, student, ids, every), rel=1e-9)
        assert kl > 1e-6


def test_texts_shorter_than_the_stride_are_measured_at_their_end(setting):
    model, bases, ids = setting
    probe = Probe(5, "v", "latent", 3)
    short = measure_sensitivity(model, bases, [probe], ids[:, :3], every=100)
    assert short == measure_sensitivity(model, bases, [probe], ids[:, :3], every=3) and short[probe] > 0


def test_lower_ranks_and_fewer_bits_cost_more(setting):
    model, bases, ids = setting
    for kind, form, ranks in (("k", "latent", (1, 7)), ("v", "latent", (1, 7)), ("kv", "joint", (2, 14))):
        low, high = (Probe(layer, kind, form, r) for r in ranks for layer in (5,))
        coarse, fine = (Probe(5, kind, form, ranks[1], bits) for bits in (2, 8))
        measured = measure_sensitivity(model, bases, [low, high, coarse, fine], ids)
        assert measured[low] > measured[high] > 0 and measured[coarse] > measured[fine] > 0


def test_every_probe_is_measured_once(setting, monkeypatch):
    model, bases, ids = setting
    built, original = [], sensitivity.changed_layer
    monkeypatch.setattr(sensitivity, "changed_layer", lambda m, b, probe: built.append(probe) or original(m, b, probe))
    a, b = Probe(5, "k", "latent", 3), Probe(1, "v", "latent", 3)
    measured = measure_sensitivity(model, bases, iter([a, b, a, b, a]), ids)
    assert built == [b, a] == list(measured)
    assert measure_sensitivity(model, bases, [], ids) == {} and len(built) == 2


def test_the_model_is_left_alone(setting):
    model, bases, ids = setting
    before = model(ids)
    measure_sensitivity(model, bases, _probes(model.config.num_kv_heads), ids)
    assert torch.equal(model(ids), before)


# ---------------------------------------------------------------------------------------------------------------- Probe


@pytest.mark.parametrize(
    "probe", [Probe(5, "k", "latent", 64), Probe(11, "kv", "joint", 2048, 3), Probe(0, "v", "constant_a", 1, 8)]
)
def test_probes_survive_text(probe):
    assert Probe.parse(str(probe)) == probe
    assert str(Probe(5, "k", "latent", 64)) == "5.k latent 64 @16", "what run folders hold"


def test_probes_change_one_part(setting):
    config = setting[0].config
    assert Probe(1, "k", "latent", 3, 4).spec(config) == LayerSpec("latent", 3, "dense", 8, 4, 16)
    assert Probe(1, "v", "contextual", 2).spec(config) == LayerSpec("dense", 8, "contextual", 2)
    assert Probe(1, "kv", "joint", 9, 3).spec(config) == LayerSpec("joint", 9, "joint", 9, 3)


# ----------------------------------------------------------------------------------------------------- OutputDivergence


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_divergence_is_the_loss_of_recovery(dtype, tolerance, monkeypatch):
    """In chunks that do not divide the tokens, like ``linear_kl``; zero for the original itself."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(23, 12, generator=generator, dtype=dtype) for _ in range(2))
    head = torch.randn(31, 12, generator=generator, dtype=dtype)
    monkeypatch.setattr(sensitivity, "chunk_tokens", lambda *_: 7)
    divergence = OutputDivergence(teacher, head)
    assert len(divergence.reference) == 4
    expected = float(linear_kl(student, teacher, head, head)[0])
    assert expected > 0.1 and divergence(student) == pytest.approx(expected, rel=tolerance)
    assert divergence(teacher) == 0.0


def test_layers_of_a_student_are_measured_alone(setting):
    """As probes of them are; and in half precision the weights are what is rounded, not what is computed."""
    model, bases, ids = setting
    probes = [Probe(1, "kv", "joint", 7, NOISE_BITS), Probe(5, "kv", "joint", 3)]
    specs = dense_specs(model.config)
    for probe in probes:
        specs[probe.layer] = probe.spec(model.config)
    student = build_student(model, bases, specs)
    measured = measure_sensitivity(model, bases, probes, ids)
    expected = {probe.layer: measured[probe] for probe in probes}
    assert layer_kls(model, student, ids) == pytest.approx(expected, rel=1e-9)
    half = [copy.deepcopy(m).to(torch.bfloat16) for m in (model, student)]
    wide = [copy.deepcopy(m).to(torch.float32) for m in half]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer_kls(*half, ids) == pytest.approx(layer_kls(*wide, ids), rel=1e-3)
    assert all(p.dtype == torch.bfloat16 for m in half for p in m.parameters())
