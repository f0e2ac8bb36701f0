"""GGUF: small files in several quantizations, and the real 270M against transformers."""

from __future__ import annotations

import dataclasses
import math
import pydoc_data.topics
import re

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Type
from small_models import TINY, random_state, vocabulary

from tpa_train.checkpoints import load_pretrained
from tpa_train.checkpoints.gguf import GGUFFile, weight_name
from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES

PARTS = ["attn_q", "attn_k", "attn_v", "attn_output", "attn_q_norm", "attn_k_norm", "attn_norm", "post_attention_norm",
         "ffn_norm", "post_ffw_norm", "ffn_gate", "ffn_up", "ffn_down"]  # fmt: skip


def stored_name(ours: str, config) -> str:
    names = ["token_embd.weight", "output_norm.weight"]
    names += [f"blk.{i}.{part}.weight" for i in range(config.num_layers) for part in PARTS]
    return next(name for name in names if weight_name(name) == ours)


def write_gguf(path, config, state, kind=Type.F32, architecture="gemma3", tokenizer=True, drop=()):
    """Writes a file as llama.cpp's converter does: norms as 1 + w in float32, '▁' of user-defined pieces as spaces."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_sliding_window(config.sliding_window)
    if config.rope_scaling_factor != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling_factor)
    if tokenizer:
        pieces, scores, kinds = vocabulary()
        # The converter types everything that looks special as control, and <unk> too.
        looks_special = {"<mask>", "<unk>", "<start_of_turn>", "<end_of_turn>"}
        writer.add_tokenizer_model("llama")
        writer.add_token_list([p.replace("▁", " ") if k == 4 else p for p, k in zip(pieces, kinds, strict=True)])
        writer.add_token_scores(scores)
        writer.add_token_types([3 if p in looks_special else k for p, k in zip(pieces, kinds, strict=True)])
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(6)  # instruction-tuned files name <end_of_turn> here
        writer.add_unk_token_id(3)
        writer.add_pad_token_id(0)
        writer.add_chat_template("{{ bos_token }}")
    for name, tensor in state.items():
        if name in drop:
            continue
        array = tensor.numpy()
        if name.endswith("norm.weight"):
            writer.add_tensor(stored_name(name, config), array + np.float32(1))
        else:
            writer.add_tensor(stored_name(name, config), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q5_0, Type.Q5_1, Type.Q4_0, Type.Q4_1])
def test_every_quantization_is_dequantized_exactly(kind, tmp_path):
    config = dataclasses.replace(TINY, rope_scaling_factor=8.0)
    state = random_state(config)
    model = load_pretrained(write_gguf(tmp_path / "m.gguf", config, state, kind))
    assert model.config == config
    assert model.source.weights_quantized == (kind not in (Type.F32, Type.F16, Type.BF16))
    assert kind.name in model.source.description
    assert ("dequantized" in model.source.description) == model.source.weights_quantized
    for name, tensor in model.state_dict().items():
        expected = state[name].numpy()
        if name.endswith("norm.weight"):
            np.testing.assert_allclose(tensor, expected, atol=1e-6)
        else:
            np.testing.assert_array_equal(tensor, gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind))


def test_large_tensors_are_read_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("tpa_train.checkpoints.gguf._CHUNK", 100)
    state = random_state(TINY)
    model = load_pretrained(write_gguf(tmp_path / "m.gguf", TINY, state, Type.F32))
    assert torch.equal(model.embed_tokens.weight, state["embed_tokens.weight"])


def test_tokenizer_is_rebuilt(tokenizer, tmp_path):
    loaded = load_pretrained(write_gguf(tmp_path / "m.gguf", TINY, random_state(TINY))).tokenizer
    assert loaded.model_proto == tokenizer.model_proto
    assert loaded.chat_template == "{{ bos_token }}" and loaded.eos_id == 1
    bare = write_gguf(tmp_path / "bare.gguf", TINY, random_state(TINY), tokenizer=False)
    assert load_pretrained(bare).tokenizer is None


def test_score_scale_of_the_62_layer_size(tmp_path):
    config = dataclasses.replace(TINY, num_layers=62, layer_kinds=(), query_pre_attn_scalar=64 / 4)
    model = load_pretrained(write_gguf(tmp_path / "m.gguf", config, random_state(config)))
    assert model.config == config
    assert SIZES["27b"].query_pre_attn_scalar == SIZES["27b"].hidden_size / SIZES["27b"].num_heads


def test_metadata_walk_equals_the_packages_reader(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TINY, random_state(TINY), Type.Q8_0)
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        raw = ours.read_rows(info, 0, info.rows).reshape(-1)
        np.testing.assert_array_equal(raw, np.asarray(tensor.data).reshape(-1).view(np.uint8))


def test_missing_and_foreign_tensors(tmp_path):
    state = random_state(TINY)
    dropped = write_gguf(tmp_path / "m.gguf", TINY, state, drop=["layers.2.mlp.up_proj.weight"])
    with pytest.raises(UserError, match="m.gguf: weight layers.2.mlp.up_proj.weight is missing"):
        load_pretrained(dropped)
    with pytest.raises(UserError, match="holds a 'llama' model"):
        load_pretrained(write_gguf(tmp_path / "other.gguf", TINY, state, architecture="llama"))


def test_wrong_shape_and_not_finite(tmp_path):
    narrow = random_state(dataclasses.replace(TINY, intermediate_size=64))
    with pytest.raises(UserError, match=r"m.gguf: weight blk.0.ffn_gate.weight has shape \[64, 64\], .* \[96, 64\]"):
        load_pretrained(write_gguf(tmp_path / "m.gguf", TINY, narrow))
    for value in (math.nan, math.inf, -math.inf):
        state = random_state(TINY)
        state["layers.1.mlp.down_proj.weight"][3, 4] = value
        with pytest.raises(UserError, match="m.gguf: weight blk.1.ffn_down.weight holds NaN or Inf"):
            load_pretrained(write_gguf(tmp_path / "m.gguf", TINY, state))


def test_tokenizer_larger_than_the_embedding(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=100)
    with pytest.raises(UserError, match="m.gguf: the tokenizer has .* pieces but the embedding only 100 rows"):
        load_pretrained(write_gguf(tmp_path / "m.gguf", config, random_state(config)))


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.05, 0.5, 0.999])
def test_truncated_anywhere(fraction, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TINY, random_state(TINY))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    with pytest.raises(UserError, match="m.gguf") as raised:
        load_pretrained(path)
    assert re.search("cut short|not a GGUF", str(raised.value))


def test_damaged_headers_never_escape_as_other_errors(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", TINY, random_state(TINY))
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        for at in rng.integers(4, 6000, 3):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_pretrained(path)
        except UserError as error:
            assert "m.gguf" in str(error)


@pytest.mark.real
def test_real_tensors_equal_the_packages_dequantization_row_by_row(real_path):
    """One tensor of each type in the real file, k-quants among them, which the package cannot write."""
    file, state = GGUFFile(real_path), load_pretrained(real_path, torch.bfloat16).state_dict()
    one_of_each = {info.kind: info for info in file.tensors.values() if len(info.shape) == 2}
    assert {Type.Q4_K, Type.Q6_K, Type.Q5_0, Type.Q8_0} <= set(one_of_each)
    for kind, info in one_of_each.items():
        expected = gguf.quants.dequantize(file.read_rows(info, 0, 64), kind)
        loaded = state[weight_name(info.name)][:64]
        assert torch.equal(loaded, torch.from_numpy(expected).to(torch.bfloat16)), kind.name


@pytest.mark.real
def test_real_perplexity_equals_transformers(real_path):
    transformers = pytest.importorskip("transformers")
    model = load_pretrained(real_path)
    assert model.config == SIZES["270m"] and model.source.description == "GGUF, Q4_K_M (dequantized)"
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(model.tokenizer.encode(text, bos=False)[:1024]).view(1, 1024)
    ids[:, 0] = model.tokenizer.bos_id

    c = model.config
    with torch.device("meta"):
        reference = transformers.Gemma3ForCausalLM(
            transformers.Gemma3TextConfig(
                vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
                head_dim=c.head_dim, sliding_window=c.sliding_window, query_pre_attn_scalar=256,
                max_position_embeddings=c.max_context,
            )
        )  # fmt: skip
    # The same memory for both; RoPE buffers are not in the state dict, so the reference's are made again.
    reference.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False, assign=True)
    reference.tie_weights()
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config)
    scale = reference.model.embed_tokens
    scale.embed_scale = torch.tensor(c.hidden_size**0.5)

    @torch.no_grad()
    def perplexity(hidden_states) -> float:
        total = 0.0
        for row in ids:
            hidden = hidden_states(row[None])[0, :-1].float()
            for part, targets in zip(hidden.split(256), row[1:].split(256), strict=True):
                logits = part @ model.embed_tokens.weight.T
                total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        return math.exp(total / (ids.numel() - len(ids)))

    ours = perplexity(model.hidden_states)
    theirs = perplexity(lambda row: reference.model(input_ids=row, use_cache=False).last_hidden_state)
    print(f"perplexity: ours {ours:.5f}, transformers {theirs:.5f}")
    assert f"{ours:.4g}" == f"{theirs:.4g}" and 2 < ours < 100
