"""gemma_pytorch files written from random weights load back exactly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from small_models import TINY, random_state

from tpa_train.checkpoints import load_pretrained
from tpa_train.errors import UserError
from tpa_train.gemma3 import config as gemma3_config
from tpa_train.gemma3.config import SIZES, Gemma3Config
from tpa_train.gemma3.vision_config import VisionConfig


def to_gemma_pytorch(state: dict, config: Gemma3Config, embedding: str = "text_token_embedder") -> dict:
    """Renames and fuses our weights as google/gemma_pytorch stores them."""
    out = {f"{embedding}.weight": state["embed_tokens.weight"], "model.norm.weight": state["norm.weight"]}
    for i in range(config.num_layers):
        layer = {n.removeprefix(f"layers.{i}."): t for n, t in state.items() if n.startswith(f"layers.{i}.")}
        qkv = [layer.pop(f"self_attn.{p}_proj.weight") for p in "qkv"]
        layer["self_attn.qkv_proj.weight"] = torch.cat(qkv)
        for short, long in (("q", "query"), ("k", "key")):
            layer[f"self_attn.{long}_norm.weight"] = layer.pop(f"self_attn.{short}_norm.weight")
        out |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    out["local_freqs_cis"] = torch.zeros(4, 2, dtype=torch.complex64)
    return out


@pytest.fixture
def known_size(monkeypatch):
    monkeypatch.setitem(gemma3_config.SIZES, "tiny", dataclasses.replace(TINY, rope_scaling_factor=8.0))
    return gemma3_config.SIZES["tiny"]


def save(path, state):
    torch.save({"model_state_dict": state}, path)
    return path


@pytest.mark.parametrize("embedding", ["embedder", "text_token_embedder"])
def test_round_trip(embedding, known_size, tokenizer, tmp_path):
    state = random_state(known_size)
    stored = to_gemma_pytorch(state, known_size, embedding)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_proto)
    save(tmp_path / "model.ckpt", stored)
    model = load_pretrained(tmp_path)  # the folder holds one checkpoint file
    assert model.config == known_size
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert model.tokenizer.fingerprint == tokenizer.fingerprint
    assert model.source.format == "gemma_pytorch" and not model.source.weights_quantized
    assert model.vision is None


def vision_to_gemma_pytorch(state: dict) -> dict:
    """Renames our vision weights as google/gemma_pytorch stores them, and transposes the projection."""
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("vision.").replace("vision_tower.", "siglip_vision_model.")
        name = name.replace("embeddings.", "").replace("encoder.layers.", "encoder_blocks.")
        name = name.replace("out_proj", "o_proj").replace("post_layernorm", "final_norm")
        name = name.replace("multi_modal_projector.mm_soft_emb_norm", "mm_soft_embedding_norm")
        if name.endswith("mm_input_projection_weight"):
            name, tensor = "mm_input_projection.weight", tensor.T.contiguous()
        out[name] = tensor
    return out


def test_multimodal_round_trip(known_size, tmp_path):
    """In bfloat16 on disk and float32 in memory, the vision side as stored."""
    from multimodal_models import random_multimodal

    vision = VisionConfig(
        image_size=56, patch_size=14, hidden_size=144, intermediate_size=20, num_layers=2, num_heads=2,
        tokens_per_image=1,
    )  # fmt: skip
    config = dataclasses.replace(known_size, vision=vision)
    state = random_multimodal(config, dtype=torch.bfloat16).state_dict()
    text = {name: tensor for name, tensor in state.items() if not name.startswith("vision.")}
    rest = {name: tensor for name, tensor in state.items() if name.startswith("vision.")}
    stored = to_gemma_pytorch(text, config) | vision_to_gemma_pytorch(rest)
    stored["siglip_vision_model.position_ids"] = torch.arange(16)[None]
    model = load_pretrained(save(tmp_path / "model.ckpt", stored), torch.float32)
    assert model.config == config
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if name in rest else torch.float32)
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name
    del stored["siglip_vision_model.final_norm.bias"]
    with pytest.raises(UserError, match="post_layernorm.bias is missing"):
        load_pretrained(save(tmp_path / "model.ckpt", stored))


def test_int8_weights_are_dequantized(known_size, tmp_path):
    state = random_state(known_size)
    stored = to_gemma_pytorch(state, known_size)
    for name in [n for n in stored if n.endswith(".weight") and stored[n].ndim == 2]:
        scale = stored[name].abs().amax(1) / 127
        stored[name] = (stored[name] / scale[:, None]).round().to(torch.int8)
        stored[name.removesuffix(".weight") + ".weight_scaler"] = scale
    model = load_pretrained(save(tmp_path / "m.ckpt", stored))
    assert model.source.weights_quantized and "int8" in model.source.description
    for name, tensor in model.state_dict().items():
        step = state[name].abs().max() / 127
        torch.testing.assert_close(tensor, state[name], atol=float(step) / 2 + 1e-6, rtol=0)


@pytest.mark.parametrize("size", ["1b", "4b", "12b", "27b"])
def test_published_sizes_are_recognized(size):
    from tpa_train.checkpoints.gemma_pytorch import infer_config

    c, first = SIZES[size], "model.layers.0."
    with torch.device("meta"):
        stored = {
            "embedder.weight": torch.empty(262_208 if size == "4b" else 262_144, c.hidden_size),
            first + "self_attn.query_norm.weight": torch.empty(c.head_dim),
            first + "self_attn.qkv_proj.weight": torch.empty((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, 1),
            first + "self_attn.o_proj.weight": torch.empty(1, c.num_heads * c.head_dim),
            first + "mlp.gate_proj.weight": torch.empty(c.intermediate_size, 1),
            f"model.layers.{c.num_layers - 1}.x": torch.empty(1),
        }
    assert infer_config("x.ckpt", stored, "embedder.weight") == c


def test_other_shapes_are_refused(tmp_path):
    path = save(tmp_path / "m.ckpt", to_gemma_pytorch(random_state(TINY), TINY))
    with pytest.raises(UserError, match="matches no published Gemma 3 size: 7 layers, hidden size 64"):
        load_pretrained(path)


def test_a_projection_of_another_size_is_named(known_size, tmp_path):
    stored = to_gemma_pytorch(random_state(known_size), known_size)
    stored["model.layers.3.self_attn.qkv_proj.weight"] = torch.zeros(5, known_size.hidden_size)
    with pytest.raises(UserError, match="layers.3.self_attn.qkv_proj.weight has shape"):
        load_pretrained(save(tmp_path / "m.ckpt", stored))
