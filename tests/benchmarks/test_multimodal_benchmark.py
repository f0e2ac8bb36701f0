"""A tiny run of the multimodal benchmark on the CPU."""

import pytest
from multimodal_models import VISION
from random_models import small_config

from tpa_train.benchmarks import command
from tpa_train.benchmarks.multimodal import MultimodalSettings, byte_tokenizer, measure, render
from tpa_train.errors import UserError

TINY = dict(
    context=64, tokens=256, sensitivity_tokens=64, images=12, device="cpu", shard_bytes=60_000,
    options=["budget.context=512", "budget.cache_ratio=2"],
)  # fmt: skip


@pytest.mark.parametrize("offload", [True, False])
def test_a_tiny_run(offload):
    config = small_config(vocab_size=300, num_kv_heads=4, head_dim=32, vision=VISION)
    rows = measure(config, MultimodalSettings(offload=offload, **TINY))
    assert [row["stage"] for row in rows] == ["write", "load", "factorize", "export", "reload", "summary"]
    summary = rows[-1]
    assert summary["files"] > 1 and summary["converted_layers"] > 0 and summary["cache_ratio"] >= 2
    assert summary["device_gib"] is None and summary["calibration_tokens"] == 256
    assert all(row["seconds"] > 0 and row["host_gib"] > 0 for row in rows)
    text = render(rows)
    assert "layers converted on 256 tokens" in text and "factorize" in text


def test_any_text_is_readable():
    tokenizer = byte_tokenizer()
    text = "Picture 1: größer\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text, bos=False)) == len(text.encode())


@pytest.mark.parametrize("argv,message", [
    (["size=1b"], "size=1b is not a choice"), (["layers=35"], "between 1 and the 34"), (["images=2"], "at least 8"),
    (["context=0"], "context=0 must be at least 1"),
])  # fmt: skip
def test_mistakes_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        command.main(["multimodal", "device=cpu", *argv])
