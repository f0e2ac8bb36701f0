"""Moments of the calibration pass against the definitions, written out with a dense softmax and autograd."""

import lightning as L
import pytest
import torch
from random_models import naive_attention, random_model, small_config, tokens
from torch.utils.data import DataLoader

from tpa_train.errors import UserError
from tpa_train.factorization import calibration
from tpa_train.factorization.calibration import Calibration, CalibrationModule, in_turn, squared_attention_received
from tpa_train.gemma3.layers import apply_rotary


def _trainer(folder):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, inference_mode=False,
    )  # fmt: skip


def _calibrate(model, layers, rows, folder, batch_size=1, **options):
    module = CalibrationModule(model, layers, **options)
    _trainer(folder).validate(module, DataLoader(rows, batch_size=batch_size), verbose=False)
    return module.result


def _inputs(model, layer, ids, documents=None):
    context = model.context(ids, documents)
    with torch.no_grad():
        x = model.run_layers(model.embed(ids), context, stop=layer)
        return model.layers[layer].input_layernorm(x), context


def _probabilities(model, layer, x, context, documents=None):
    attention, c = model.layers[layer].self_attn, model.config
    rotary = context.rotary[attention.kind]
    q = apply_rotary(attention.q_norm(attention.q_proj(x).unflatten(-1, (c.num_heads, c.head_dim))), rotary)
    k = apply_rotary(attention.k_norm(attention.k_proj(x).unflatten(-1, (c.num_kv_heads, c.head_dim))), rotary)
    return naive_attention(q, k, c.scale, None if c.is_global(layer) else c.sliding_window, documents)


def _squared_mass(model, layer, x, context, documents=None):
    """Σ_t a_ts² over the queries and a group's heads, [B, L, G]."""
    p = _probabilities(model, layer, x, context, documents)
    return p.square().sum(2).unflatten(1, (model.config.num_kv_heads, -1)).sum(2).transpose(1, 2)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("layer", [1, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_squared_attention_is_unbiased(groups, layer, packed):
    model = random_model(small_config(num_kv_heads=groups, head_dim=16))
    ids = tokens(model.config, 2, 25)
    documents = (torch.arange(25)[None].expand(2, -1) >= torch.tensor([[8], [16]])).long() if packed else None
    x, context = _inputs(model, layer, ids, documents)
    expected = _squared_mass(model, layer, x, context, documents).detach()
    generator, rounds = torch.Generator().manual_seed(0), 200
    attention = model.layers[layer].self_attn
    mean = sum(squared_attention_received(attention, x, context, generator) for _ in range(rounds)) / rounds
    assert mean.shape == (2, 25, groups)
    # One estimate is good to √(2/16); a mean of 200 to 2.5 %; five sigmas for the worst of 50 to 200 tokens.
    torch.testing.assert_close(mean, expected, rtol=0.125, atol=1e-9)
    assert float(mean.sum() / expected.sum()) == pytest.approx(1, abs=0.02)


def _exact_fisher(model, layer, ids, every=1):
    """Σ_s of E[g_s g_sᵀ] over labels: every position's and label's gradient with respect to k̃, one by one."""
    attention = model.layers[layer].self_attn
    g, d = model.config.num_kv_heads, model.config.head_dim
    total = torch.zeros(g, d, d, dtype=torch.float64)
    # A zero added behind the norm, (1 + w) ⊙ k̃, is what is differentiated by; k̃ itself then follows by the chain rule.
    probe = torch.zeros(*ids.shape, g, d, dtype=torch.float64, requires_grad=True)
    handle = attention.k_norm.register_forward_hook(lambda _m, _a, out: out + probe)
    log_p = model(ids)[0].log_softmax(-1)
    handle.remove()
    for t in range(every - 1, log_p.shape[0], every):
        for y in range(log_p.shape[1]):
            (gradient,) = torch.autograd.grad(log_p[t, y], probe, retain_graph=True)
            gradient = gradient[0] * (1 + attention.k_norm.weight.detach())
            total += log_p[t, y].exp().detach() * torch.einsum("sgd,sge->gde", gradient, gradient)
    return total * every


@pytest.mark.parametrize("groups,layer,every", [(1, 0, 1), (4, 0, 3), (1, 1, 3), (4, 1, 1)])
def test_fisher_metric_and_value_moments_are_unbiased(groups, layer, every, tmp_path):
    """One row many times over: the mean of the sampled sums is the sum over all labels."""
    model = random_model(
        small_config(
            num_kv_heads=groups, vocab_size=11, head_dim=4, num_layers=2, layer_kinds=("local", "global"),
            sliding_window=4,
        )
    )  # fmt: skip
    ids, rounds = tokens(model.config, 1, 12), 800
    rows = [{"token_ids": ids[0]}] * rounds
    moments = _calibrate(model, [layer], rows, tmp_path, batch_size=20, score_every=every).layers[layer]
    expected = _exact_fisher(model, layer, ids, every)
    assert float((moments.key_fisher / rounds - expected).norm() / expected.norm()) < 0.2
    assert float((moments.key_fisher / rounds).diagonal(dim1=1, dim2=2).sum()) == pytest.approx(
        float(expected.diagonal(dim1=1, dim2=2).sum()), rel=0.15
    )
    x, context = _inputs(model, layer, ids)
    mass = _squared_mass(model, layer, x, context)[0].detach()
    v = model.layers[layer].self_attn.v_proj(x)[0].unflatten(-1, (groups, 4)).detach()
    mean, covariance = moments.value_covariance()
    exact_mean = (mass[..., None] * v).sum(0) / mass.sum(0)[:, None]
    centered = v - exact_mean
    exact = torch.einsum("tg,tgd,tge->gde", mass, centered, centered) / mass.sum(0)[:, None, None]
    torch.testing.assert_close(moments.value_weight / rounds, mass.sum(0), rtol=0.05, atol=0)
    torch.testing.assert_close(mean, exact_mean, rtol=0, atol=0.05)
    assert float((covariance - exact).norm() / exact.norm()) < 0.1


def test_key_moments_are_weighted_averages_of_normalised_keys(tmp_path):
    """Whatever the weights are: k̃ has mean square one, so the trace of C is head_dim times the weight."""
    model = random_model(small_config(num_kv_heads=4))
    rows = [{"token_ids": row} for row in tokens(model.config, 3, 40)]
    result = _calibrate(model, [1, 5], rows, tmp_path)
    for moments in result.layers.values():
        trace = moments.key_second.diagonal(dim1=1, dim2=2).sum(-1)
        torch.testing.assert_close(trace, 8 * moments.key_weight, rtol=1e-3, atol=0)
        spread = moments.key_second * moments.key_weight[:, None, None] - torch.einsum(
            "gd,ge->gde", moments.key_first, moments.key_first
        )
        assert torch.linalg.eigvalsh(spread).min() > -1e-6 * spread.abs().max()  # a variance


def test_the_pass_adds_batches_and_leaves_the_model_alone(tmp_path):
    model = random_model(small_config(num_kv_heads=4))
    rows = [{"token_ids": row, "document_ids": (torch.arange(30) >= 11).long()} for row in tokens(model.config, 4, 30)]
    before = model(rows[0]["token_ids"][None])
    result = _calibrate(model, [5, 1], rows, tmp_path)
    assert (result.tokens, result.context, sorted(result.layers)) == (120, 30, [1, 5])
    assert all(t.dtype == torch.float64 for m in result.layers.values() for t in m.sums().values())
    again = _calibrate(model, [5, 1], rows, tmp_path)
    other = _calibrate(model, [5, 1], rows, tmp_path, seed=1)
    for index, moments in result.layers.items():
        for name, tensor in moments.tensors().items():
            assert torch.equal(tensor, getattr(again.layers[index], name)), name
        assert not torch.equal(moments.value_weight, other.layers[index].value_weight)
    assert torch.equal(model(rows[0]["token_ids"][None]), before)
    assert all(p.grad is None for p in model.parameters())
    # Several rows are the sum of passes over each, in expectation; the total attention is exact to the estimate.
    single = _calibrate(model, [5, 1], rows[:1], tmp_path).layers[5]
    assert 2 < float(result.layers[5].value_weight.sum() / single.value_weight.sum()) < 8


def test_round_trip_through_tensors(tmp_path):
    model = random_model(small_config())
    result = _calibrate(model, [5], [{"token_ids": tokens(model.config, 1, 20)[0]}], tmp_path)
    back = Calibration.from_tensors(result.to_tensors())
    assert (back.tokens, back.context, list(back.layers)) == (20, 20, [5])
    for name, tensor in result.layers[5].tensors().items():
        assert torch.equal(tensor, getattr(back.layers[5], name))


def test_overflowing_weights_are_refused(tmp_path):
    model = random_model(small_config())
    with torch.no_grad():
        model.layers[5].self_attn.v_proj.weight[0, 0] = torch.inf
    with pytest.raises((UserError, RuntimeError), match="layer 5|nan|inf"):
        _calibrate(model, [5], [{"token_ids": tokens(model.config, 1, 20)[0]}], tmp_path)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_gather_what_one_gathers(processes, monkeypatch):
    """Batches are dealt, and each is worked on with the random numbers that a single process gives it."""
    model = random_model(small_config(head_dim=16)).bfloat16()
    rows = [tokens(model.config, 2, 40, seed=i) for i in range(5)]
    # Small chunks, so that labels are drawn in several parts, the last of them smaller.
    monkeypatch.setattr(calibration, "chunk_tokens", lambda *_: 7)

    def gathered(rank: int, world: int) -> CalibrationModule:
        monkeypatch.setattr(calibration, "rank", lambda: rank)
        monkeypatch.setattr(calibration, "world_size", lambda: world)
        module = CalibrationModule(model, [1, 5])
        module.on_validation_start()
        for index, ids in enumerate(rows):
            module.validation_step({"token_ids": ids}, index)
        return module

    alone = gathered(0, 1)
    together = [gathered(rank, processes) for rank in range(processes)]
    assert sum(m._tokens for m in together) == alone._tokens and {m._context for m in together} == {40}
    for module in together:
        assert torch.equal(module._generator.get_state(), alone._generator.get_state())
    for layer, moments in alone._moments.items():
        parts = [m._moments[layer] for m in together]
        for name, tensor in moments.sums().items():
            torch.testing.assert_close(sum(getattr(p, name) for p in parts), tensor, rtol=1e-12, atol=1e-12)
        sampled = [p.sample_x.split(m._sampled) for p, m in zip(parts, together, strict=True)]
        assert torch.equal(torch.cat(in_turn(sampled)), moments.sample_x)
