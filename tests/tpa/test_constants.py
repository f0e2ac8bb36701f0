"""Constants that a bias of the values gives as well: see ``tpa.constants``."""

import pytest
import torch
from random_models import random_model, small_config

from tpa_train.checkpoints.dense_export import dense_attention
from tpa_train.checkpoints.gguf_export import with_value_bias
from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.distillation.layerwise import LayerwiseModule
from tpa_train.distillation.modules import OptimizerSettings
from tpa_train.tpa.constants import CLOSE, settle_constants
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

CONFIG = small_config(num_kv_heads=2)  # heads of 8, 24 numbers wide: values reach 16 of 24 directions


def _student(form, rank, share):
    """A student whose biases are of the values' kind but for ``share`` of them, which lies across; and its values."""
    torch.manual_seed(0)
    specs = dense_specs(CONFIG)
    specs[1] = specs[4] = LayerSpec(form, rank, form, rank)
    student = Gemma3ForMultimodalLMwithTPA(CONFIG, specs).double().requires_grad_(False)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
    values = [student.layers[layer].self_attn.values for layer in (1, 4)]
    for v in values:
        width = v.out.weight.shape[1] // 4
        summed = v.out.weight.unflatten(1, (2, 2, width)).sum(2).flatten(1)
        across = torch.linalg.qr(summed, mode="complete").Q[:, -1]
        v.bias.copy_(summed @ torch.randn(2 * width, dtype=torch.float64))
        v.bias.add_(across, alpha=share * float(v.bias.norm()))
    return student, values


def _is_exact(student, layer):
    return with_value_bias(dense_attention(student.layers[layer].self_attn), CONFIG)[1]


@torch.no_grad()
@pytest.mark.parametrize("form,rank", [("joint", 8), ("joint", 12), ("latent", 8)])
def test_a_bias_moves_to_one_of_the_values_next_to_it(form, rank):
    student, values = _student(form, rank, CLOSE / 2)
    before = [v.bias.clone() for v in values]
    assert not _is_exact(student, 1) and not _is_exact(student, 4)
    assert settle_constants(student, {"layers.4.self_attn.values.bias"}) == [4]
    assert torch.equal(values[0].bias, before[0]) and not _is_exact(student, 1)
    moved = float((values[1].bias - before[1]).norm() / before[1].norm())
    assert moved == pytest.approx(CLOSE / 2, rel=1e-3) and _is_exact(student, 4)


@torch.no_grad()
@pytest.mark.parametrize("form,rank,share", [("joint", 8, 2 * CLOSE), ("latent", 6, CLOSE / 2)])
def test_others_stay(form, rank, share):
    """What training moved far, and where there are numbers of the values to spare."""
    student, values = _student(form, rank, share)
    before = [v.bias.clone() for v in values]
    assert settle_constants(student, set(dict(student.named_parameters()))) == []
    assert all(torch.equal(v.bias, bias) for v, bias in zip(values, before, strict=True))
    assert _is_exact(student, 1) is (rank < 8)


@torch.no_grad()
@pytest.mark.parametrize("part", ["bias", "out.weight"])
def test_what_diverged_is_left_as_it_is(part):
    """Evaluation and export have words for it."""
    student, values = _student("joint", 12, CLOSE / 2)
    values[0].get_parameter(part).view(-1)[3] = torch.nan
    assert settle_constants(student, set(dict(student.named_parameters()))) == [4]


def test_an_average_of_weights_is_settled_too():
    student, values = _student("joint", 12, CLOSE / 2)
    module = EndToEndModule(random_model(CONFIG), student, OptimizerSettings(), "all", total_steps=0, ema=0.9)
    module.average.update(module.trained_tensors())
    module.finish()
    assert _is_exact(student, 1) and _is_exact(student, 4)


def test_a_stage_ends_so_once_all_its_steps_are_done():
    student, values = _student("joint", 12, CLOSE / 2)
    module = LayerwiseModule(random_model(CONFIG), student, OptimizerSettings(), 3, {1: 1.0, 4: 1.0})
    before = values[0].bias.clone()
    module.finish()
    assert torch.equal(student.layers[1].self_attn.values.bias, before), "it was interrupted"
    module.total_steps = 0
    module.finish()
    assert _is_exact(student, 1) and _is_exact(student, 4)
