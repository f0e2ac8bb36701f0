"""Recovery on rows with images: what is matched at image tokens, and what is not."""

from __future__ import annotations

import dataclasses

import torch
from multimodal_models import VISION, random_multimodal
from random_models import factors_for, small_config, specs_of

from tpa_train.distillation.divergence import Divergence
from tpa_train.distillation.end_to_end import EndToEndModule, next_tokens
from tpa_train.distillation.losses import linear_divergence
from tpa_train.distillation.modules import OptimizerSettings, trainable_names
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA


def test_outputs_at_image_tokens_are_not_trained_on():
    """What the teacher says there may be anything; labels there are none (the image token is not in the vocabulary)."""
    config = small_config(num_kv_heads=2, vision=dataclasses.replace(VISION, image_token_id=97))
    teacher = random_multimodal(config, dtype=torch.float32)
    specs = specs_of(config, {5: (3, 4)})
    student = Gemma3ForMultimodalLMwithTPA.from_dense(teacher, specs, factors_for(teacher, specs))
    divergence = Divergence(ce_weight=0.3)
    module = EndToEndModule(
        teacher, student, OptimizerSettings(), "factors", 4, hidden_weight=0.0, divergence=divergence
    )  # fmt: skip
    ids = torch.tensor([[2, 5, 91, 97, 97, 97, 97, 92, 6, 7, 8, 9]])
    batch = {"token_ids": ids, "images": torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8)}
    loss, _ = module.losses(batch)
    hidden = [m.hidden_states(ids, images=batch["images"])[0] for m in (student, teacher)]
    text = ids[0] != 97
    labels = next_tokens(batch)[0]
    labels[labels == 97] = -1
    expected, _ = linear_divergence(
        *(h[text] for h in hidden), student.head_weight, teacher.head_weight, divergence=divergence,
        labels=labels[text],
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None for n, p in student.named_parameters() if n.startswith("vision."))
    assert all(bool(p.grad.isfinite().all()) for n, p in student.named_parameters() if p.requires_grad)


def test_tokens_of_rows_with_and_without_images_count_alike():
    """Two accumulated batches give the gradients of one batch of both rows, of which one has no image."""
    config = small_config(num_kv_heads=2, vision=VISION)
    teacher = random_multimodal(config)
    specs = specs_of(config, {5: (3, 4)})
    student = Gemma3ForMultimodalLMwithTPA.from_dense(teacher, specs, factors_for(teacher, specs))
    module = EndToEndModule(teacher, student, OptimizerSettings(), "factors", 4, hidden_weight=0.0, kl_every=2)
    image, none = torch.randint(0, 256, (1, 3, 56, 56), dtype=torch.uint8), torch.empty(0, 3, 56, 56, dtype=torch.uint8)
    rows = torch.tensor([[2, 5, 91, 90, 90, 90, 90, 92, 6, 7, 8, 9], [2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]])

    def gradients(*batches: dict) -> list[torch.Tensor]:
        student.zero_grad()
        for batch in batches:
            (module._weighted(module.losses(batch)[0]) / len(batches)).backward()
        learning = [p for p in student.parameters() if p.requires_grad]
        module._normalise_by_tokens(learning)
        return [p.grad.clone() for p in learning]

    apart = gradients({"token_ids": rows[:1], "images": image}, {"token_ids": rows[1:], "images": none})
    together = gradients({"token_ids": rows, "images": image})
    assert len(apart) == len(together) > 2
    for ours, theirs in zip(apart, together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13)


def test_the_vision_side_never_learns():
    teacher = random_multimodal(small_config(vision=VISION))
    student = Gemma3ForMultimodalLMwithTPA.from_dense(
        teacher, specs_of(teacher.config, {5: (3, 4)}), factors_for(teacher, specs_of(teacher.config, {5: (3, 4)}))
    )
    for scope in ("factors", "attention", "above", "all"):
        names = trainable_names(student, scope)
        assert names and not any(name.startswith("vision.") for name in names)
