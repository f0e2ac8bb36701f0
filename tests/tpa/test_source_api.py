"""The class that the source design names, as its example uses it: load, convert in place, generate."""

from __future__ import annotations

import functools
import importlib
import os
import pydoc_data.topics
import subprocess
import sys

import pytest
import torch
from random_models import head_shapes, random_model, small_config, tokens
from tiny_runs import ROOT, write_model

from tpa_train.checkpoints import find_default
from tpa_train.checkpoints.export import export_model
from tpa_train.errors import UserError
from tpa_train.factorization.contextual_factorization import paying_rank
from tpa_train.factorization.own_text import calibrate_on_own_text, sample_own_text
from tpa_train.gemma3.config import SIZES
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec

sys.path.append(str(ROOT / "tests" / "checkpoints"))
from small_models import TINY, random_state  # noqa: E402

FORMS = {
    "tucker": lambda model, **options: model.factorize_all_layers_with_shared_factors(**options),
    "contextual": lambda model, **options: model.apply_contextual_tensor_decomposition(**options),
}
FULL = {"tucker": {"rank": TINY.head_dim}, "contextual": {"rank_q": 4, "rank_k": 2, "rank_v": 2}}
pytestmark = pytest.mark.filterwarnings("ignore:rank_[kv]=")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random weights whose keys and values have directions that hardly matter."""
    state = random_state(TINY)
    decay = 0.7 ** torch.arange(TINY.head_dim)[:, None]
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] *= decay.repeat(TINY.num_kv_heads, 1)
    return write_model(tmp_path_factory.mktemp("source") / "model", state)


@pytest.fixture(autouse=True)
def little_text(request, monkeypatch):
    """Models write 256 tokens to calibrate on instead of 1 024."""
    if "real" not in request.keywords:
        brief = functools.partial(calibrate_on_own_text, rows=8, length=32)
        monkeypatch.setattr("tpa_train.factorization.own_text.calibrate_on_own_text", brief)


@pytest.fixture
def model(folder):
    model = Gemma3ForMultimodalLMwithTPA(TINY)
    model.load_weights(folder)
    return model


def copy_of(dense) -> Gemma3ForMultimodalLMwithTPA:
    """The class around the very parameters of ``dense``."""
    return Gemma3ForMultimodalLMwithTPA.from_dense(dense, [LayerSpec()] * dense.config.num_layers, {})


# ------------------------------------------------------------------------------------------------------------- example


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_the_example(model, form, tmp_path):
    ids = tokens(TINY, 2, 40)
    expected, shared = model(ids), {n: p for n, p in model.named_parameters() if n.startswith(("embed", "norm"))}
    dense_bytes = model.cache_bytes(TINY.max_context)
    FORMS[form](model, **({"steps": 10} if form == "contextual" else {}))
    assert {(s.form_k, s.form_v) for s in model.specs} == {(form, form)} and model.converted_layers == list(range(7))
    assert all(p is dict(model.named_parameters())[n] for n, p in shared.items())
    assert model.cache_bytes(TINY.max_context) < dense_bytes
    logits = model(ids)
    assert torch.isfinite(logits).all() and not torch.allclose(logits, expected, atol=1e-3)
    # With the factored cache, the text is that of the whole forward pass.
    written = []
    model.generate("the hello world", max_tokens=8, on_tokens=lambda row: written.extend(row))
    ids_so_far = model.tokenizer.encode("the hello world")
    for token in written:
        assert int(model(torch.tensor([ids_so_far]))[0, -1].argmax()) == token
        ids_so_far.append(token)
    assert len(model.generate(["the", "hello world"], max_tokens=5)) == 2
    back = Gemma3ForMultimodalLMwithTPA.from_pretrained(export_model(model, tmp_path / "out"))
    assert back.specs == model.specs and set(back.state_dict()) == set(model.state_dict())
    torch.testing.assert_close(back(ids), logits, rtol=0, atol=1e-6)
    assert back.generate("the hello", max_tokens=5) == model.generate("the hello", max_tokens=5)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_full_rank_is_the_original(model, form):
    ids = tokens(TINY, 2, 40)
    expected, text = model(ids), model.generate(["the hello", "world"], max_tokens=8)
    FORMS[form](model, **FULL[form])
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-4)
    assert model.generate(["the hello", "world"], max_tokens=8) == text


@torch.no_grad()
@pytest.mark.parametrize("form,low", [("tucker", {"rank": 16}), ("contextual", {"rank_k": 1, "rank_v": 1})])
def test_half_precision_models_run(folder, form, low):
    model = Gemma3ForMultimodalLMwithTPA(TINY).to(torch.bfloat16)
    model.load_weights(folder)
    FORMS[form](model, layers=[1, 6], **low)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.converted_layers == [1, 6]
    assert torch.isfinite(model(tokens(TINY, 1, 20))).all() and model.generate("the", max_tokens=3)


def test_a_failure_changes_nothing(model):
    before, specs = dict(model.named_parameters()), model.specs
    for call in (lambda: FORMS["tucker"](model, rank=33), lambda: FORMS["contextual"](model, rank_k=3)):
        with pytest.raises(UserError, match="must lie between"):
            call()
        assert model.specs is specs and all(p is before[n] for n, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------------------- weights


def test_sizes_have_names():
    with torch.device("meta"):
        assert Gemma3ForMultimodalLMwithTPA("1B").config == SIZES["1b"]
    with pytest.raises(UserError, match="no Gemma 3 of size '270'.*270m"):
        Gemma3ForMultimodalLMwithTPA("270")


def test_weights_go_where_the_model_is(folder):
    with torch.device("meta"):  # nothing is allocated twice
        model = Gemma3ForMultimodalLMwithTPA(TINY).to(torch.bfloat16)
    model.load_weights(folder)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}
    assert model.tokenizer is not None and model.source.format == "huggingface"


def test_without_a_path_the_packaged_model_is_found(folder, monkeypatch):
    monkeypatch.setattr("tpa_train.checkpoints.find_default", lambda: folder)
    model = Gemma3ForMultimodalLMwithTPA(TINY)
    model.load_weights()
    assert model.source.path == folder


def test_mistakes(model, folder):
    with pytest.raises(UserError, match="other sizes than this one was built with: .*num_kv_heads=2, not 1"):
        Gemma3ForMultimodalLMwithTPA(small_config()).load_weights(folder)
    for call, message in (
        (lambda: FORMS["tucker"](model, max_error=1.0), "max_error=1.0 must be at least 0 and below 1"),
        (lambda: FORMS["tucker"](model, share_across_layers=True), "one U_feat for all layers: give a rank"),
        (lambda: FORMS["tucker"](model, rank=8, layers=[7], moments={}), r"layers=\[7\] must name some"),
        (lambda: FORMS["tucker"](model, calibration=calibrate_on_own_text(model, [0], 2, 8)), "layer 1 is to be conv"),
        (lambda: FORMS["contextual"](model, rank_k=1, constant_k="c", moments={}), "constant_k='c'"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    FORMS["tucker"](model, rank=8, layers=[0], moments={})
    for call in (*FORMS.values(), lambda m: m.load_weights(folder), lambda m: copy_of(m)):
        with pytest.raises(UserError, match=r"layers \[0\] of this model are converted already"):
            call(model)


# -------------------------------------------------------------------------------------------------- moments and ranks


def test_own_text(model):
    text = sample_own_text(model, 3, 20)
    assert text.shape == (3, 20) and set(text[:, 0].tolist()) == {model.tokenizer.bos_id}
    assert torch.equal(text, sample_own_text(model, 3, 20)) and not torch.equal(text, sample_own_text(model, 3, 20, 1))
    assert sample_own_text(copy_of(random_model(small_config(max_context=9))), 1).shape == (1, 9)
    calibration = calibrate_on_own_text(model, [2, 6], 3, 20)
    assert list(calibration.layers) == [2, 6] and (calibration.tokens, calibration.context) == (60, 20)


@torch.no_grad()
@pytest.mark.parametrize("form,low", [("tucker", {"rank": 16}), ("contextual", {"rank_k": 1, "rank_v": 1})])
def test_calibration_is_used(folder, form, low):
    ids, converted, fit = tokens(TINY, 2, 40), {}, {"steps": 5} if form == "contextual" else {}
    for name in ("own text", "calibration", "weights"):
        model = Gemma3ForMultimodalLMwithTPA(TINY)
        model.load_weights(folder)
        calibration = calibrate_on_own_text(model, rows=4, length=16, seed=5) if name == "calibration" else None
        FORMS[form](model, **low, **fit, **({"moments": {}} if name == "weights" else {"calibration": calibration}))
        converted[name] = model(ids)
    assert len({float(logits.sum()) for logits in converted.values()}) == 3


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_ranks_are_the_least_that_stay_within_the_error(data, shared):
    dense = random_model(small_config(num_kv_heads=1, head_dim=64, hidden_size=96, num_layers=2,
                                      layer_kinds=("local", "global")))  # fmt: skip
    decay = 0.9 ** torch.arange(64, dtype=torch.float64)[:, None]
    with torch.no_grad():
        for layer in dense.layers:
            layer.self_attn.k_proj.weight.mul_(decay)
            layer.self_attn.v_proj.weight.mul_(decay.flip(0) ** 0.5)

    def converted(**options):
        model = copy_of(dense)
        return model, FORMS["tucker"](model, shared_features=shared, moments=None if data else {}, **options)

    model, reports = converted(max_error=0.2)
    for spec, report in zip(model.specs, reports, strict=True):
        assert spec.rank_k % 8 == 0 and spec.rank_v % 8 == 0 and 8 <= spec.rank_k < 64
        assert spec.rank_k == spec.rank_v or not shared
        # The rank of one U_feat for kinds whose metrics differ is chosen by their average: a guide, not a bound.
        assert report.relative_error < (0.5 if shared and data else 0.2 * (1 + 1e-6))
    if shared and not data:
        _, fewer = converted(rank=model.specs[0].rank_k - 8)
        assert fewer[0].relative_error > 0.2
    exact, reports = converted(max_error=0.0)
    assert all(s.rank_k == s.rank_v == 64 for s in exact.specs) and max(r.relative_error for r in reports) < 1e-6


@pytest.mark.parametrize("size", SIZES)
def test_the_paying_rank_is_the_largest(size):
    config, rank = SIZES[size], paying_rank(SIZES[size])
    groups, width = config.num_kv_heads, config.head_dim
    assert (rank + 1) * (groups + width) >= groups * width
    assert rank * (groups + width) < groups * width or (rank, groups) == (1, 1)


# ------------------------------------------------------------------------------------------------- every size's heads


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_head_shapes_of_every_size(size, form):
    dense = random_model(head_shapes(size), dtype=torch.float32)
    config, ids = dense.config, tokens(dense.config, 1, 20)
    d, g = config.head_dim, config.num_kv_heads
    low = {"rank": d // 2} if form == "tucker" else {"rank_k": max(1, g // 2), "rank_v": paying_rank(config)}
    full = {"rank": d} if form == "tucker" else {"rank_k": g, "rank_v": g}
    model = copy_of(dense)
    FORMS[form](model, moments={}, **full)
    torch.testing.assert_close(model(ids), dense(ids), rtol=0, atol=1e-4)
    model = copy_of(dense)
    FORMS[form](model, moments={}, layers=[1], **low)
    cache = model.allocate_cache(1, 20, dtype=torch.float32)
    out = torch.cat([model(part, cache=cache) for part in ids.split([11, 9], dim=1)], dim=1)
    torch.testing.assert_close(out, model(ids), rtol=0, atol=1e-4)
    assert torch.isfinite(out).all()


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "module,names",
    [
        ("tpa.tensor_product_utils", "register_freqs_cis create_attention_mask populate_image_embeddings "
         "reshape_for_broadcast"),
        ("tpa.gemma3_tpa_model_modular", "Gemma3ForMultimodalLMwithTPA"),
        ("factorization.tucker_factorization", "factorize_all_layers_with_shared_factors adaptive_rank_selection "
         "_factorize_mha_weights_with_shared_factors _factorize_and_set_weights"),
        ("factorization.contextual_factorization", "contextual_tensor_decomposition convert_from_standard_weights "
         "_init_contextual_factorization apply_contextual_tensor_decomposition"),
    ],
)  # fmt: skip
def test_names_of_the_source_are_where_the_design_says(module, names):
    module = importlib.import_module(f"tpa_train.{module}")
    for name in names.split():
        assert getattr(module, name).__doc__ and "Raises:" in getattr(module, name).__doc__, name


def test_the_model_needs_neither_lightning_nor_hydra():
    code = (
        "import sys, tpa_train.tpa.gemma3_tpa_model_modular, tpa_train.tpa.tensor_product_utils;"
        "assert not {'lightning', 'hydra', 'tensorly'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---------------------------------------------------------------------------------------------------------- real model


@torch.no_grad()
@pytest.mark.real
def test_the_example_on_the_real_model():
    """Measured with the defaults: KL .14, top-1 .80, cache 1.39 times smaller; contextual in bfloat16: KL .0009.

    The contextual form is tried in the global layers only, which is quicker.
    """
    try:
        find_default()
    except UserError as error:
        if os.environ.get("CI"):  # the test extra installs the package there: its absence is a failure
            raise
        pytest.skip(str(error))
    with torch.device("meta"):
        model, other = (Gemma3ForMultimodalLMwithTPA("270m").to(torch.bfloat16) for _ in range(2))
    model.load_weights()
    for name, parameter in model.named_parameters():
        other.get_submodule(name.rpartition(".")[0])._parameters[name.rpartition(".")[2]] = parameter
    topics = pydoc_data.topics.topics
    ids = torch.tensor([model.tokenizer.encode(topics["assert"] + topics["lambda"] + topics["del"])[:200]])
    reference, dense_bytes = model(ids).double().log_softmax(-1), model.cache_bytes(32_768)

    def kl(converted) -> float:
        return float((reference.exp() * (reference - converted(ids).double().log_softmax(-1))).sum(-1).mean())

    with pytest.warns(UserWarning, match="with one KV head .* use the latent form"):
        other.apply_contextual_tensor_decomposition(layers=[5, 11, 17])
    assert kl(other) < 0.005
    reports = model.factorize_all_layers_with_shared_factors()
    assert len(reports) == 18 and dense_bytes / model.cache_bytes(32_768) > 1.2
    assert 0 < kl(model) < 0.3
    assert "Paris" in model.generate(["The capital of France is"], max_tokens=8)[0]
