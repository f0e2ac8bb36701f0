"""What is foreseen against what is allocated, and what is said where it does not fit."""

from __future__ import annotations

import re

import pytest
import torch
from random_models import random_model, small_config
from serving_models import mixed_student

from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES
from tpa_train.memory_trace import LiveBytes
from tpa_train.serving import Engine, memory, sampling
from tpa_train.tpa.decode import native
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec


def roomier(model, rows):
    """Whether the engine's workspace stays within what is foreseen, and how much of it is used."""
    context, chunk = 120, 32
    engine = Engine(model, max_batch=rows, context=context, prefill_chunk=chunk)
    assert engine.cache.nbytes == memory.slot_bytes(model, rows, context, model.head_weight.dtype)
    for i in range(rows):
        engine.submit([2, *[5 + i] * 90], 4, temperature=1.0, top_p=0.9, repetition_penalty=1.1)
    native._workspace.memory = None  # what larger models of other tests left
    with LiveBytes() as live:
        engine.run()
    return live.peak / memory.workspace_bytes(model, rows, context, chunk)


@pytest.mark.parametrize("make,rows", [
    (lambda: mixed_student(torch.float32, 8), 1), (lambda: mixed_student(torch.float32, 3), 6),
    (lambda: mixed_student(torch.bfloat16, 16), 4),
    (lambda: random_model(small_config(num_kv_heads=2, max_context=256), dtype=torch.float32), 3),
    (lambda: random_model(small_config(max_context=256, vocab_size=5000), dtype=torch.float32), 8),
])  # fmt: skip
def test_the_workspace_is_bounded_by_the_forecast(make, rows):
    assert 0.1 < roomier(make(), rows) <= 1.0


def test_sequences_share_the_room_that_choosing_takes(monkeypatch):
    model = random_model(small_config(max_context=256, vocab_size=5000), dtype=torch.float32)
    alone = memory.workspace_bytes(model, 8, 120, 32)
    monkeypatch.setattr(sampling, "BLOCK", 2 * 5000)
    assert memory.workspace_bytes(model, 8, 120, 32) < 0.6 * alone and 0.1 < roomier(model, 8) <= 1.0


def test_the_designs_own_sizes():
    """The 4B's dense cache at 128K: 5 global layers of 131,072 and 29 local ones of 1,024 tokens, 4 KB each."""
    with torch.device("meta"):
        model = Gemma3ForMultimodalLMwithTPA("4b").to(torch.bfloat16)
    assert memory.slot_bytes(model, 2, 131_072, torch.bfloat16) == 2 * 4096 * (5 * 131_072 + 29 * 1024)
    assert memory.weight_bytes(model) == pytest.approx(2 * 3.88e9, rel=0.01)
    free = 80 * 10**9
    rows = memory.largest_batch(model, 131_072, 1024, free=free)
    assert 20 <= rows < 80e9 / (4096 * (5 * 131_072 + 29 * 1024))
    assert memory.foresee(model, rows, 131_072, 1024, free=free).fits
    assert not memory.foresee(model, rows + 1, 131_072, 1024, free=free).fits
    smaller = [LayerSpec("joint", 256, "joint", 256, 8)] * SIZES["4b"].num_layers
    with torch.device("meta"):
        student = Gemma3ForMultimodalLMwithTPA("4b", smaller).to(torch.bfloat16)
    assert memory.largest_batch(student, 131_072, 1024, free=free) > 5 * rows


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    model = random_model(small_config(num_kv_heads=4, max_context=4000), dtype=torch.float32)
    need = memory.foresee(model, 10, 1000, 64, free=0).needed
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(need / (1 - memory.RESERVE)) + 1)
    assert Engine(model, 10, 1000, prefill_chunk=64).max_batch == 10
    with pytest.raises(UserError) as refused:
        Engine(model, 11, 1000, prefill_chunk=64)
    said = re.search(r"max_batch=11 sequences of context=1000 .*; max_batch=(\d+) at this context or context=(\d+) at",
                     str(refused.value))  # fmt: skip
    rows, context = int(said[1]), int(said[2])
    assert rows == 10 and Engine(model, 11, context, prefill_chunk=64).context == context
    with pytest.raises(UserError):
        Engine(model, 11, context + 1, prefill_chunk=64)
    # Left to itself it takes what fits, up to its bound.
    assert Engine(model, context=1000, prefill_chunk=64).max_batch == 10
    assert Engine(model, context=20, prefill_chunk=64).max_batch == memory.DEFAULT_ROWS
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="a sequence of context=1000 .*nothing would fit"):
        Engine(model, context=1000)
