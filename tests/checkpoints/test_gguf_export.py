"""Factors multiplied out into a GGUF file: what our reader, and the package's, find in it."""

from __future__ import annotations

import dataclasses

import gguf
import pytest
import torch
from form_students import LINEAR, random_student
from small_models import TINY, vocabulary

from tpa_train.checkpoints import load_pretrained
from tpa_train.checkpoints.dense_export import BIAS, dense_attention
from tpa_train.checkpoints.gguf_export import export_gguf, with_value_bias
from tpa_train.errors import UserError
from tpa_train.pipeline import Session
from tpa_train.settings import RunSettings
from tpa_train.tpa.spec import LayerSpec, dense_specs

IDS = torch.randint(4, TINY.vocab_size, (2, 30), generator=torch.Generator().manual_seed(0))
# Values of every linear form with constants, each with a direction left in a head of 32.
NARROW = [LINEAR[0], LayerSpec("joint", 31, "joint", 31), *LINEAR[2:5], LayerSpec("joint", 24, "joint", 24), LINEAR[6]]
ONE_LAYER = dataclasses.replace(TINY, num_layers=1, layer_kinds=("global",))


def unrounded(specs, config=TINY, **options):
    return random_student([dataclasses.replace(s, bits_k=16, bits_v=16) for s in specs], config, **options)


@torch.no_grad()
def test_the_file_computes_what_the_student_does(tmp_path):
    config = dataclasses.replace(
        TINY, layer_kinds=("global", "local") * 3 + ("local",), rope_scaling_factor=8.0, query_pre_attn_scalar=20.0,
        rope_local_theta=500.0,
    )  # fmt: skip
    student = unrounded(NARROW, config)
    model = load_pretrained(export_gguf(student, tmp_path / "new" / "m.gguf"))
    # The scale of the scores, which the format has no place for, is in the norm of the queries.
    assert model.config == dataclasses.replace(config, query_pre_attn_scalar=32.0)
    torch.testing.assert_close(model(IDS), student(IDS), rtol=0, atol=1e-4)
    assert sum(spec.converted for spec in model.specs) > 3 and all(spec.form_k == "dense" for spec in model.specs)
    assert model.cache_bytes(100) == sum(512 * config.cached_tokens(layer, 100) // 2 for layer in range(7))
    with pytest.raises(UserError, match="converted already; start from the original"):  # no original to train from
        _ = Session(RunSettings(), tmp_path, loaded=model).teacher


@torch.no_grad()
@pytest.mark.parametrize("rank,exact", [(32, True), (20, True), (64, False)])
def test_a_constant_of_the_output_becomes_one_of_the_values(rank, exact):
    """Rank 32 within the reach of W_O, as factorization leaves it; 20 and 64 out of it, as training may."""
    config = dataclasses.replace(ONE_LAYER, hidden_size=96)  # wider than the heads of all groups
    student = unrounded([LayerSpec("joint", rank, "joint", rank)], config)
    attention = student.layers[0].self_attn
    if rank == 32:
        attention.values.bias.copy_(attention.values.out.weight @ torch.ones(4 * 32))
    dense = dense_attention(attention)
    turned, is_exact = with_value_bias(dense, config)
    assert is_exact is exact

    def output(tensors, x, weights):  # of the attention, for given attention weights [H, S]
        values = (x @ tensors["v_proj.weight"].mT + tensors.get("v_proj.bias", 0.0)).unflatten(-1, (2, 32))
        heads = torch.einsum("hs,shd->hd", weights, values.repeat_interleave(2, 1)).flatten()
        return tensors["o_proj.weight"] @ heads + tensors.get(BIAS, 0.0)

    x, weights = torch.randn(9, 96, dtype=torch.float64), torch.rand(4, 9, dtype=torch.float64).softmax(-1)
    expected, found = output(dense, x, weights), output(turned, x, weights)
    error = float((found - expected).norm() / expected.norm())
    assert error < 1e-6 if exact else 1e-4 < error < 0.3
    dropped = output({**dense, BIAS: 0.0}, x, weights)
    assert (found - expected).norm() < 0.3 * (dropped - expected).norm()


@torch.no_grad()
def test_little_that_is_left_of_large_constants_is_kept(tmp_path):
    """The norm after attention enlarges some numbers: 3e-5 of a bias changed the logits of the 270M by 0.003."""
    student = unrounded([LayerSpec("joint", 32, "joint", 32)], dataclasses.replace(ONE_LAYER, hidden_size=96))
    attention = student.layers[0].self_attn
    left = attention.values.out.weight @ torch.ones(4 * 32)
    left *= 3e-5 * attention.values.bias.abs().max() / left.abs().max()
    attention.values.bias += left - dense_attention(attention)[BIAS].float()
    model = load_pretrained(export_gguf(student, tmp_path / "m.gguf"))
    assert model.specs[0].converted  # has a bias of values, unlike an original
    torch.testing.assert_close(model(IDS), student(IDS), rtol=0, atol=1e-4)


def test_vocabulary_and_metadata_are_as_converters_write_them(tmp_path, tokenizer):
    student = unrounded([LayerSpec("latent", 8, "latent", 8)], ONE_LAYER, dtype=torch.bfloat16)
    tokenizer.chat_template = "{{ bos_token }}"
    student.tokenizer = tokenizer
    path = export_gguf(student, tmp_path / "m.gguf", "float16")
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    pieces, scores, kinds = vocabulary()
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    count, rows = len(pieces), TINY.vocab_size
    found = fields["tokenizer.ggml.tokens"]
    assert found[:count] == [p.replace("▁", " ") if k == 4 else p for p, k in zip(pieces, kinds, strict=True)]
    assert len(found) == rows and found[-1] == f"[PAD{rows - 1}]"
    expected = [3 if p in special else k for p, k in zip(pieces, kinds, strict=True)] + [5] * (rows - count)
    assert fields["tokenizer.ggml.token_type"] == expected
    assert fields["tokenizer.ggml.scores"][:count] == scores
    assert (fields["general.architecture"], fields["tokenizer.ggml.model"]) == ("gemma3", "llama")
    assert fields["tokenizer.ggml.eot_token_id"] == tokenizer.end_of_turn_id
    assert fields["gemma3.attention.sliding_window_pattern"] == [False] and fields["gemma3.rope.freq_base"] == 1e6
    assert "a cache as large as the original's" in fields["general.description"]
    types = {t.tensor_type.name for t in reader.tensors if len(t.shape) > 1}
    assert types == {"F16"} and all(t.tensor_type.name == "F32" for t in reader.tensors if len(t.shape) == 1)
    loaded = load_pretrained(path)
    text = "hello  the   wörld\n\n<end_of_turn><bos>"
    assert loaded.tokenizer.encode(text) == tokenizer.encode(text)
    assert loaded.tokenizer.chat_template == "{{ bos_token }}"
    assert loaded.source.description == "GGUF, F16" and not loaded.source.weights_quantized


def test_without_a_constant_it_is_an_original(tmp_path):
    student = random_student(dense_specs(ONE_LAYER), ONE_LAYER)
    model = load_pretrained(export_gguf(student, tmp_path / "m.gguf"))
    assert type(model).__name__ == "Gemma3ForCausalLM"
    torch.testing.assert_close(model(IDS), student(IDS), rtol=0, atol=1e-5)


def test_bad_requests_leave_nothing(tmp_path, monkeypatch):
    import tpa_train.checkpoints.gguf_export as module

    student = unrounded([LayerSpec("latent", 8, "latent", 8)], ONE_LAYER)
    with pytest.raises(UserError, match="ends in .gguf"):
        export_gguf(student, tmp_path / "model")
    contextual = random_student([LayerSpec("contextual", 1, "latent", 8)], ONE_LAYER)
    with pytest.raises(UserError, match="layer 0 has keys in the contextual form"):
        export_gguf(contextual, tmp_path / "m.gguf")
    full = unrounded([LayerSpec("joint", 64, "joint", 64)], dataclasses.replace(ONE_LAYER, hidden_size=96))
    monkeypatch.setattr("tpa_train.checkpoints.export.ROUNDING_KL", 1e-6)
    with pytest.raises(UserError, match=r"layers \[0\] adds constants .*; export with format=dense"):
        export_gguf(full, tmp_path / "m.gguf")
    right = module.dense_attention
    monkeypatch.setattr(module, "dense_attention", lambda *a: right(*a) | {"k_norm.weight": right(*a)["q_norm.weight"]})
    with pytest.raises(UserError, match="the exported logits differ from the student's"):
        export_gguf(student, tmp_path / "m.gguf")
    monkeypatch.undo()
    student.layers[0].mlp.down_proj.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match="too large for float16; export with dtype=bfloat16"):
        export_gguf(student, tmp_path / "m.gguf", "float16")
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UserError, match="m.gguf already exists"):
        export_gguf(student, tmp_path / "m.gguf")
