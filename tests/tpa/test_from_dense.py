"""A student shares what was not converted with its teacher, and refuses factors that do not fit."""

import pytest
import torch
from random_models import factors_for, random_model, small_config, specs_of, student_of, tokens

from tpa_train.errors import UserError
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec

FORMS = {1: (5, 3), 2: (6, 0), 3: (0, 4), 5: (4, 4)}


@pytest.fixture(params=[1, 4], ids=["G1", "G4"])
def dense(request):
    return random_model(small_config(num_kv_heads=request.param))


@pytest.mark.parametrize("bits", [16, 8])
def test_shares_storage(dense, bits):
    student = student_of(dense, FORMS | ({4: (0, 0)} if bits != 16 else {}), bits)
    originals = dict(dense.named_parameters())
    shared = {id(p) for p in originals.values()}
    factors = set(student.factor_names())
    for name, p in student.named_parameters():
        if name in factors:
            assert id(p) not in shared and not p.requires_grad
        else:
            assert id(p) in shared, name  # the parameter itself, so the storage too
    expected = set()
    for layer, (k, v) in FORMS.items():
        prefix = f"layers.{layer}.self_attn."
        expected |= {prefix + "keys." + n for n in ("up", "down.weight", "center")} if k else set()
        expected |= {prefix + "values." + n for n in ("out.weight", "down.weight", "center", "bias")} if v else set()
    assert factors == expected
    # Where everything is dense but the bits, every parameter is the teacher's, under its own name.
    for name in ("k_proj", "v_proj", "o_proj", "q_proj", "k_norm", "q_norm"):
        full = f"layers.{'4' if bits != 16 else '0'}.self_attn.{name}.weight"
        pointer = originals[full].data_ptr()
        assert pointer in {p.data_ptr() for p in student.layers[4 if bits != 16 else 0].parameters()}


def test_a_teachers_change_shows_in_the_student(dense):
    student, ids = student_of(dense, {5: (4, 4)}), tokens(dense.config, 1, 12)
    before = student(ids)
    with torch.no_grad():
        dense.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert not torch.equal(student(ids), before)


def test_factors_are_copied(dense):
    specs = specs_of(dense.config, {5: (4, 4)})
    factors = factors_for(dense, specs)
    student = Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, factors)
    name = "layers.5.self_attn.keys.up"
    assert student.get_parameter(name).data_ptr() != factors[name].data_ptr()
    assert torch.equal(student.get_parameter(name), factors[name])


def test_no_conversion_is_the_dense_model(dense):
    student = student_of(dense, {})
    ids = tokens(dense.config, 1, 20)
    assert torch.equal(student(ids), dense(ids)) and student.factor_names() == [] and student.converted_layers == []


def test_missing_factors_are_refused(dense):
    specs = specs_of(dense.config, FORMS)
    factors = factors_for(dense, specs)
    for name in factors:
        rest = {n: t for n, t in factors.items() if n != name}
        with pytest.raises(UserError, match=f"no factor was given for '{name}'"):
            Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, rest)


def test_wrong_shapes_are_refused(dense):
    specs = specs_of(dense.config, FORMS)
    factors = factors_for(dense, specs)
    name = "layers.2.self_attn.keys.up"
    factors[name] = factors[name][..., :-1]
    with pytest.raises(UserError, match=f"'{name}' has shape .* not "):
        Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, factors)


def test_a_wrong_number_of_layers_is_refused(dense):
    with pytest.raises(UserError, match="2 layer specifications were given for 6 layers"):
        Gemma3ForMultimodalLMwithTPA(dense.config, [LayerSpec(), LayerSpec()])
