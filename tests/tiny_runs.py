"""A tiny Gemma 3 in a Hugging Face folder, a text, and the options that make a whole run of them take a second."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tpa_train.distillation.modules import RecoveryModule
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.tokenizer import sentencepiece_model

sys.path.append(str(Path(__file__).parent / "checkpoints"))
from small_models import SPECIAL_IDS, TINY, random_state, vocabulary  # noqa: E402

STEPS = 8  # of each recovery stage
ROOT = Path(__file__).resolve().parents[1]
_KEYS = {
    "hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "intermediate_size": "intermediate_size",
    "sliding_window": "sliding_window", "query_pre_attn_scalar": "query_pre_attn_scalar",
    "max_position_embeddings": "max_context",
}  # fmt: skip


def write_model(
    folder: Path, state: dict[str, torch.Tensor] | None = None, tokenizer: bool = True, config: Gemma3Config = TINY
) -> Path:
    """Writes a Hugging Face folder of TINY's sizes, or others; random weights unless given."""
    folder.mkdir(parents=True)
    sizes = {theirs: getattr(config, ours) for theirs, ours in _KEYS.items()}
    kinds = {"local": "sliding_attention", "global": "full_attention"}
    described = {"model_type": "gemma3_text", **sizes, "layer_types": [kinds[kind] for kind in config.layer_kinds]}
    (folder / "config.json").write_text(json.dumps(described))
    state = state or random_state(config)
    save_file({f"model.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(*vocabulary(), SPECIAL_IDS))
    return folder


def write_text_file(path: Path, characters: int = 60_000) -> Path:
    """Writes documentation that every Python carries."""
    path.write_text("\n\n".join(pydoc_data.topics.topics.values())[:characters])
    return path


def training_options(text: Path, cache: Path) -> list[str]:
    """Options that the Python API takes too. float32, so that results do not depend on the CPU's abilities."""
    tokens = 64 * 2 * STEPS
    return [
        "data=text", f"data.path={text}", f"data.cache_dir={cache}", "data.split_chars=4000", "trainer=cpu",
        "trainer.context=64", "trainer.batch_size=2", "trainer.precision=float32", "recipe.calibration.tokens=512",
        "recipe.calibration.sensitivity_tokens=128", f"recipe.layerwise.tokens={tokens}",
        f"recipe.distill.tokens={tokens}", "budget.context=512", "budget.cache_ratio=5", "budget.bits=8",
        "budget.forms=latent",
    ]  # fmt: skip


def run_options(model: Path, text: Path, cache: Path) -> list[str]:
    """Options of scripts/train.py; add run_dir=…"""
    return [
        f"model.path={model}", *training_options(text, cache), "evaluation.tokens=256", "evaluation.context=64",
        "evaluation.copy=[20,40]", "evaluation.copy_count=1", "evaluation.sample_tokens=3",
    ]  # fmt: skip


def send_signal_at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, signum=signal.SIGTERM, times: int = 1):
    """Makes this process send itself a signal inside the given step of a stage ("layerwise" or "distilled")."""
    original = RecoveryModule.training_step

    def training_step(self, batch, batch_idx):
        if self.stage == stage and self.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), signum)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(RecoveryModule, "training_step", training_step)


def weights(run: Path) -> bytes:
    """Returns the exported weights of a finished run, to the byte."""
    return (run / "export" / "model.safetensors").read_bytes()


def files(folder: Path) -> set[str]:
    """Returns the relative names of everything under ``folder``."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}
