"""One layer at a time gives what the whole model gives, and really is one layer at a time."""

import copy
import itertools
import weakref

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from random_models import random_model, small_config, tokens
from torch.utils.data import DataLoader

from tpa_train.errors import UserError
from tpa_train.factorization import calibration as calibration_file
from tpa_train.factorization.calibration import CalibrationModule
from tpa_train.factorization.latent import key_basis, latent_key_factors, latent_value_factors, value_basis
from tpa_train.factorization.streaming import factorize_streaming, generator_for
from tpa_train.gemma3.model import DecoderLayer
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec

SEED, BATCH = 3, 2


def _calibrated(model, layers, ids, documents, monkeypatch, folder):
    """``CalibrationModule``'s moments, with labels and signs drawn from the streaming pass's sources."""
    batches = itertools.count()
    score, add = calibration_file.sampled_score, calibration_file.add_layer
    current = []

    def sampled_score(hidden, head, _generator):
        current[:] = [next(batches)]
        return score(hidden, head, generator_for(hidden.device, SEED, current[0], None))

    def add_layer(moments, attention, record, keys, output, context, _generator):
        signs = generator_for(keys.device, SEED, current[0], attention.layer)
        add(moments, attention, record, keys, output, context, signs)

    monkeypatch.setattr(calibration_file, "sampled_score", sampled_score)
    monkeypatch.setattr(calibration_file, "add_layer", add_layer)
    rows = [{"token_ids": i} | ({} if documents is None else {"document_ids": d})
            for i, d in zip(ids, ids if documents is None else documents, strict=True)]  # fmt: skip
    module = CalibrationModule(model, layers, score_every=3)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, inference_mode=False,
    )  # fmt: skip
    trainer.validate(module, DataLoader(rows, batch_size=BATCH), verbose=False)
    return module.result


class _Layers:
    """Hands out copies of a model's layers and counts how many of them are alive."""

    def __init__(self, model):
        self.model, self.alive, self.most, self.loads = model, weakref.WeakSet(), 0, []

    def __call__(self, index: int) -> DecoderLayer:
        layer = copy.deepcopy(self.model.layers[index])
        self.alive.add(layer)
        self.most = max(self.most, len(self.alive))
        self.loads.append(index)
        return layer


def _stream(model, ids, documents=None, **options):
    layers, found = _Layers(model), {}

    def sink(index, factors, moments):
        found[index] = (factors, moments)

    with torch.no_grad():
        hidden = [model.embed(batch) for batch in ids.split(BATCH)]
    cost = factorize_streaming(
        model.config, layers, lambda: (model.norm, model.head_weight), hidden, 3, 5, sink, seed=SEED, score_every=3,
        progress=False, document_ids=None if documents is None else documents.split(BATCH), **options,
    )  # fmt: skip
    return found, cost, layers


@pytest.mark.parametrize("groups,packed", [(1, False), (4, True)])
def test_moments_and_factors_are_those_of_the_whole_model(groups, packed, monkeypatch, tmp_path):
    """Six layers, five local and one global, two batches; window 8 in rows of 40."""
    model = random_model(small_config(num_kv_heads=groups))
    ids = tokens(model.config, 4, 40)
    documents = (torch.arange(40)[None].expand(4, -1) >= torch.tensor([[7], [30], [20], [11]])).long()
    documents = documents if packed else None
    found, cost, layers = _stream(model, ids, documents)
    expected = _calibrated(model, list(range(6)), ids, documents, monkeypatch, tmp_path)
    assert list(found) == [5, 4, 3, 2, 1, 0] and cost.tokens == expected.tokens == 160
    for index, reference in expected.layers.items():
        factors, moments = found[index]
        for name, tensor in reference.tensors().items():
            scale = float(tensor.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(getattr(moments, name) / scale, tensor / scale, rtol=0, atol=1e-9, msg=name)
        attention = model.layers[index].self_attn
        wanted = latent_key_factors(attention, key_basis(reference, 160), 3)
        wanted |= latent_value_factors(attention, value_basis(attention, reference), 5)
        assert set(factors) == {f"layers.{index}.self_attn.{name}" for name in wanted}
        for name, tensor in wanted.items():
            torch.testing.assert_close(
                factors[f"layers.{index}.self_attn.{name}"], tensor, rtol=1e-7, atol=1e-9 * float(tensor.abs().max())
            )
    assert layers.loads == [*range(6), *reversed(range(6))]


def test_never_more_than_one_layer_is_alive():
    model = random_model(small_config())
    _, cost, layers = _stream(model, tokens(model.config, 2, 12))
    assert layers.most == 1 and not layers.alive
    expected = sum(p.nbytes for p in model.layers[0].parameters())
    assert [c.weight_bytes for c in cost.layers] == [expected] * 6
    assert [c.kind for c in cost.layers] == ["local"] * 5 + ["global"]
    assert cost.head.weight_bytes == model.head_weight.nbytes
    assert cost.kept_bytes == 6 * 2 * 12 * 24 * 8
    assert cost.peak_gib > 0 and all(c.seconds > 0 for c in cost.layers)


def test_only_some_layers():
    """Layers between are passed, layers below the lowest are run once; the moments are those of the pass over all."""
    model = random_model(small_config())
    ids = tokens(model.config, 4, 20)
    every, _, _ = _stream(model, ids)
    some, cost, layers = _stream(model, ids, layers=[5, 3])
    assert list(some) == [5, 3] and layers.loads == [0, 1, 2, 3, 4, 5, 5, 4, 3] and layers.most == 1
    assert cost.kept_bytes == 3 * 4 * 20 * 24 * 8
    for index in some:
        for name, tensor in some[index][1].tensors().items():
            assert torch.equal(tensor, getattr(every[index][1], name)), name


def test_inputs_kept_in_bfloat16_change_little():
    model = random_model(small_config())
    ids = tokens(model.config, 4, 20)
    exact, half = _stream(model, ids)[0], _stream(model, ids, kept_dtype=torch.bfloat16)
    assert half[1].kept_bytes == 6 * 4 * 20 * 24 * 2
    for index in exact:
        a, b = exact[index][1].cross_fisher, half[0][index][1].cross_fisher
        assert 0 < float((a - b).norm() / a.norm()) < 0.1


def test_bfloat16_weights():
    """As a large checkpoint has them: the residual stream stays float32 and everything is finite."""
    model = random_model(small_config(num_kv_heads=2), dtype=torch.bfloat16)
    found, cost, _ = _stream(model, tokens(model.config, 2, 20))
    assert cost.kept_bytes == 6 * 2 * 20 * 24 * 4
    assert all(t.isfinite().all() and t.dtype == torch.float64 for f, _ in found.values() for t in f.values())


def test_factors_build_the_student():
    """At full rank the factors of the streaming pass are the teacher."""
    model = random_model(small_config(num_kv_heads=2))
    ids, factors = tokens(model.config, 2, 30), {}
    hidden = [F.embedding(ids, model.head_weight.detach()) * model.config.hidden_size**0.5]
    factorize_streaming(
        model.config, _Layers(model), lambda: (model.norm, model.head_weight), hidden, 8, 8,
        lambda index, found, moments: factors.update(found), progress=False,
    )  # fmt: skip
    student = Gemma3ForMultimodalLMwithTPA.from_dense(model, [LayerSpec("latent", 8, "latent", 8)] * 6, factors)
    with torch.no_grad():
        torch.testing.assert_close(student(ids), model(ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("change,message", [
    (dict(rank_k=9), "rank_k=9 must be between 1 and head_dim=8"), (dict(rank_v=0), "rank_v=0"),
    (dict(layers=[6]), "layers 0 to 5"), (dict(layers=[]), "layers"), (dict(hidden=[]), "no hidden states"),
    (dict(hidden=[torch.zeros(2, 5, 23)]), r"\[2, 5, 23\] are not \[B, L, 24\]"),
])  # fmt: skip
def test_mistakes(change, message):
    options = dict(hidden=[torch.zeros(1, 4, 24)], rank_k=2, rank_v=2, sink=print) | change
    with pytest.raises(UserError, match=message):
        factorize_streaming(small_config(), None, None, **options)


def test_weights_that_overflow_are_named():
    model = random_model(small_config())
    with torch.no_grad():
        model.layers[5].self_attn.v_proj.weight.fill_(1e300)
    with pytest.raises(UserError, match="layer 5 gave non-finite moments"):
        _stream(model, tokens(model.config, 2, 12))
