"""The Hugging Face style folder of a pretrained model, written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tpa_train.checkpoints import load_pretrained
from tpa_train.checkpoints.export import new_folder
from tpa_train.checkpoints.huggingface import huggingface_config
from tpa_train.errors import UserError
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.tokenizer import Tokenizer


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
