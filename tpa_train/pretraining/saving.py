"""The Hugging Face style folder of a pretrained model, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tpa_train.checkpoints import load_pretrained
from tpa_train.checkpoints.export import new_folder
from tpa_train.errors import UserError
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.tokenizer import Tokenizer


def huggingface_config(config: Gemma3Config, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """Returns ``config.json``'s content, with RoPE in both spellings that transformers has used (4.50 to 5.x)."""
    factor = config.rope_scaling_factor
    scaling = {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
    names = {"local": "sliding_attention", "global": "full_attention"}
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "query_pre_attn_scalar": int(config.query_pre_attn_scalar),  # transformers refuses 64.0
        "sliding_window": config.sliding_window,
        "layer_types": [names[kind] for kind in config.layer_kinds],
        "rope_theta": config.rope_theta,
        "rope_local_base_freq": config.rope_local_theta,
        "rope_scaling": None if factor == 1.0 else scaling,
        "rope_parameters": {
            "full_attention": scaling | {"rope_theta": config.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_theta},
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def save_pretrained(
    model: Gemma3ForCausalLM, tokenizer: Tokenizer, out: Path, dtype: torch.dtype, facts: dict[str, Any]
) -> Path:
    """Writes the folder that ``load_pretrained`` reads, and reads it back before it gets its name.

    Args:
        model, tokenizer: what was trained.
        out: folder to make; must not exist or be empty.
        dtype: of the stored weights.
        facts: how the model came about, for ``pretraining.json``.

    Raises:
        UserError: ``out`` is in use or cannot be written, a weight is not finite, or what was written reads back
            differently (nothing is left behind then).
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise UserError(f"'{name}' holds NaN or infinite values: the training diverged; lower optimizer.lr.")
        tensors[name] = parameter.detach().to(device="cpu", dtype=dtype).contiguous()
    with new_folder(out) as partial:
        config = huggingface_config(model.config, tokenizer, dtype)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / "tokenizer.model").write_bytes(tokenizer.model_proto)
        (partial / "pretraining.json").write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n")
        stored = {f"model.{name}": tensor for name, tensor in tensors.items()}
        save_file(stored, partial / "model.safetensors", metadata={"format": "pt"})
        read = load_pretrained(partial, dtype=dtype)
        same = read.config == model.config and read.tokenizer.fingerprint == tokenizer.fingerprint
        if not same or any(not torch.equal(p, tensors[name]) for name, p in read.named_parameters()):
            raise UserError(f"what was written to {out} reads back differently; nothing was kept: check the disk.")
    return out
