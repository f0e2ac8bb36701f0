"""Calibration with the layers on the host is that of the whole model, images included; layers are lent and returned."""

import pytest
import torch
from multimodal_models import VISION, random_multimodal
from random_models import small_config
from test_streaming import BATCH, SEED, _calibrated

from tpa_train.checks import check_settings
from tpa_train.errors import UserError
from tpa_train.factorization.streaming import calibrate_streaming
from tpa_train.gemma3.attention import AttentionContext
from tpa_train.gemma3.layers import lent
from tpa_train.recipes import compose


def test_streaming_calibration_sees_images(monkeypatch, tmp_path):
    model = random_multimodal(small_config(num_kv_heads=2, vision=VISION))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (4, 40), generator=generator)
    for row, start in enumerate((3, 11, 20, 33)):
        ids[row, start : start + 4] = VISION.image_token_id
    documents = (torch.arange(40)[None].expand(4, -1) >= torch.tensor([[9], [30], [20], [11]])).long()
    images = torch.randint(0, 256, (4, 3, 56, 56), generator=generator, dtype=torch.uint8)
    parts = zip(ids.split(BATCH), documents.split(BATCH), images.split(BATCH), strict=True)
    batches = [dict(zip(("token_ids", "document_ids", "images"), part, strict=True)) for part in parts]
    found = calibrate_streaming(model, batches, [5, 3], device="cpu", seed=SEED, score_every=3, progress=False)

    soft = model.vision(images, torch.float64)
    begin = model.begin

    def with_images(batch, cache=None):  # the reference's loader stacks rows; its images follow from their tokens
        rows = [int((ids == row).all(1).nonzero()) for row in batch["token_ids"]]
        return begin(batch | {"images": soft[rows]}, cache)

    monkeypatch.setattr(model, "begin", with_images)
    expected = _calibrated(model, [3, 5], ids, documents, monkeypatch, tmp_path)
    assert list(found.layers) == [3, 5] and found.tokens == expected.tokens == 160 and found.context == 40
    for index, reference in expected.layers.items():
        for name, tensor in reference.tensors().items():
            scale = float(tensor.abs().max())
            torch.testing.assert_close(
                getattr(found.layers[index], name) / scale, tensor / scale, rtol=0, atol=1e-9, msg=name
            )


def test_layers_are_lent_and_come_back():
    model = random_multimodal(small_config(vision=VISION))
    layer, before = model.layers[0], {n: p for n, p in model.layers[0].named_parameters()}
    places = {n: p.data_ptr() for n, p in before.items()}
    with pytest.raises(RuntimeError, match="on purpose"), lent(layer, torch.device("meta")):
        assert all(p.is_meta for p in layer.parameters())
        raise RuntimeError("on purpose")
    for name, parameter in layer.named_parameters():
        assert parameter is before[name] and parameter.data_ptr() == places[name]


def test_a_layer_follows_its_input_to_another_device():
    """The meta device stands for an accelerator; it computes nothing, so the pass is stopped at the first norm."""
    model = random_multimodal(small_config())
    layer = model.layers[0]
    x = torch.empty(1, 4, 24, dtype=torch.float64, device="meta")

    def stop(_module, _args):
        assert all(p.is_meta for p in layer.parameters())
        raise RuntimeError("on purpose")

    handle = layer.input_layernorm.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="on purpose"):
        layer(x, AttentionContext(model.config, torch.arange(4, device="meta")[None]))
    handle.remove()
    assert not any(p.is_meta for p in layer.parameters())


def test_offloading_is_for_factorizing_only():
    with pytest.raises(UserError, match="trainer.offload=true is for recipe=factorize"):
        check_settings(compose(["recipe=distill", "trainer.offload=true"]))
    check_settings(compose(["recipe=factorize", "trainer.offload=true"]))
