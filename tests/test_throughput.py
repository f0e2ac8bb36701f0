"""Operations counted for MFU against those that PyTorch counts, and what reaches the loggers."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.distillation.layerwise import LayerwiseModule
from tpa_train.distillation.modules import OptimizerSettings
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.settings import LoggerSettings
from tpa_train.throughput import attention_flops, peak_flops, training_flops
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec
from tpa_train.trainers import make_loggers

CONTEXT = 64
CONFIG = Gemma3Config(
    vocab_size=512, hidden_size=128, num_layers=6, num_heads=2, num_kv_heads=1, head_dim=32, intermediate_size=384,
    sliding_window=CONTEXT,
)  # fmt: skip


@pytest.fixture
def pair():
    torch.manual_seed(0)
    teacher = Gemma3ForCausalLM(CONFIG).requires_grad_(False)
    specs = [LayerSpec("latent", 16, "latent", 16)] * 6
    with torch.device("meta"):
        shapes = dict(Gemma3ForMultimodalLMwithTPA(CONFIG, specs).named_parameters())
    student = Gemma3ForMultimodalLMwithTPA(CONFIG, specs)
    factors = {n: 0.1 * torch.randn(shapes[n].shape) for n in student.factor_names()}
    return teacher, Gemma3ForMultimodalLMwithTPA.from_dense(teacher, specs, factors)


@pytest.mark.parametrize("kind", ["layerwise", "attention", "all"])
def test_operations_are_those_that_pytorch_counts(pair, kind):
    """Products with weights; attention is small here, and counted by PyTorch's kernels or not, by version."""
    settings = OptimizerSettings()
    if kind == "layerwise":
        module = LayerwiseModule(*pair, settings, 1, dict.fromkeys(range(6), 1.0))
    else:
        module = EndToEndModule(*pair, settings, kind, 1, hidden_weight=0.0, kl_every=2)
    ids = torch.randint(0, 512, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        module.losses({"token_ids": ids})[0].backward()
    assert training_flops(module, CONTEXT) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.12)


def test_a_cached_teacher_is_not_counted(pair):
    module = EndToEndModule(*pair, OptimizerSettings(), "all", 1, hidden_weight=0.0)
    live = training_flops(module, CONTEXT)
    module.cache = type("Cache", (), {"mode": "hidden"})()
    body = sum(2 * p.numel() for n, p in pair[0].named_parameters() if n.startswith("layers.") and p.dim() == 2)
    attention = sum(attention_flops(CONFIG, i, CONTEXT) for i in range(6))
    assert live - training_flops(module, CONTEXT) == pytest.approx(body + attention)


def test_attention_sees_what_came_before_and_no_more_than_the_window():
    config = Gemma3Config(sliding_window=512)
    unit = 4 * config.num_heads * config.head_dim
    assert attention_flops(config, 5, 2048) == unit * (2048 + 1) / 2  # global: the mean of 1 … L
    mean = sum(min(i + 1, 512) for i in range(2048)) / 2048
    assert attention_flops(config, 0, 2048) == pytest.approx(unit * mean)


def test_cards_are_known_by_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("NVIDIA GeForce GT 710") is None


def test_both_stages_log_speed_memory_and_layers(finished):
    for stage, layered in (("layerwise", "error/layer_0"), ("distill", "hidden_error/layer_0")):
        with (finished / "logs" / stage / "part0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert float(rows[1]["tokens_per_second"]) > 0 and float(rows[1]["peak_gib"]) > 0.1
        assert float(rows[0][layered]) > 0 and "mfu" not in rows[0]  # no peak is known of a CPU
        settings = yaml.safe_load((finished / "logs" / stage / "part0" / "hparams.yaml").read_text())
        assert settings["budget"]["cache_ratio"] == 5.0 and settings["trainer"]["context"] == 64


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is an extra")
def test_tensorboard_gets_the_settings(tmp_path: Path):
    loggers = make_loggers(LoggerSettings(kind="tensorboard"), tmp_path, "distill", {"budget": {"cache_ratio": 4.0}})
    assert len(loggers) == 2
    assert "cache_ratio" in str(loggers[1].hparams)
