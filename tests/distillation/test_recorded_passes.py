"""Recorded passes give what plain ones do, batch after batch, wherever documents begin in the rows."""

import pytest
import torch
from random_models import random_model, small_config, student_of, tokens

from tpa_train.compilation import stage_forwards
from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.distillation.modules import OptimizerSettings
from tpa_train.settings import TrainerSettings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
LENGTH, BATCHES = 256, 4


def _batch(config, seed):
    """Two rows of several documents, other ones in every batch."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.zeros(2, LENGTH, dtype=torch.long)
    starts[:, 1:] = torch.rand(2, LENGTH - 1, generator=generator) < 0.02 * seed
    return {"token_ids": tokens(config, 2, LENGTH, seed), "document_ids": starts.cumsum(1)}


def _steps(module, batches):
    """Returns the loss and the gradients of every batch."""
    found = []
    for batch in batches:
        torch.compiler.cudagraph_mark_step_begin()
        batch = {k: t.cuda() for k, t in module.on_before_batch_transfer(dict(batch), 0).items()}
        with torch.autocast("cuda", torch.bfloat16):
            loss, metrics = module.losses(batch)
        loss.backward()
        gradients = torch.cat([module.student.get_parameter(n).grad.flatten().float() for n in module.trained])
        found.append((loss.item(), metrics["kl"].item(), gradients.clone()))
        module.zero_grad(set_to_none=True)
    return found


def test_documents_of_every_batch_are_its_own():
    config = small_config(
        num_layers=2, layer_kinds=("local", "global"), hidden_size=64, head_dim=32, intermediate_size=96,
        sliding_window=40,
    )  # fmt: skip
    teacher = random_model(config, dtype=torch.float32)
    student = student_of(teacher, {0: (12, 8), 1: (16, 12)})
    module = EndToEndModule(teacher, student, OptimizerSettings(), "all", total_steps=BATCHES).cuda()
    batches = [_batch(config, seed) for seed in range(1, BATCHES + 1)]
    batches += batches[:2]  # seen again, after others were replayed
    plain = _steps(module, batches)
    assert len({round(kl, 6) for _, kl, _ in plain}) == BATCHES
    joined = _steps(module, [{"token_ids": b["token_ids"]} for b in batches[-2:]])
    with stage_forwards(module, TrainerSettings(compile=True), False, torch.device("cuda"), alike=True):
        found = _steps(module, batches)
    for (loss, kl, gradient), (expected, expected_kl, exact) in zip(found, plain, strict=True):
        assert loss == pytest.approx(expected, rel=0.02) and kl == pytest.approx(expected_kl, rel=0.02)
        assert torch.nn.functional.cosine_similarity(gradient, exact, dim=0) > 0.99
    for (*_, gradient), (*_, other) in zip(plain[-2:], joined, strict=True):  # else nothing above could have failed
        assert torch.nn.functional.cosine_similarity(gradient, other, dim=0) < 0.9
