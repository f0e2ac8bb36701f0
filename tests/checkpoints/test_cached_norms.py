"""Exports of joint latents with and without cached norms: older folders load as they were, newer ones say so."""

import dataclasses
import json

import pytest
import torch
from form_students import random_student
from small_models import TINY

from tpa_train.checkpoints.export import export_model, load_export
from tpa_train.tpa.spec import TEXT_VERSION, LayerSpec, dense_specs

IDS = torch.arange(40)[None] % TINY.vocab_size


@torch.no_grad()
@pytest.mark.parametrize("cached_norm,version", [(False, TEXT_VERSION), (True, 4)])
def test_export_and_load(tmp_path, cached_norm, version):
    specs = dense_specs(TINY)
    specs[5] = LayerSpec("joint", 40, "joint", 40, (8, 4), cached_norm=cached_norm)
    student = random_student(specs)
    folder = export_model(student, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["format_version"] == version
    assert [layer.get("cached_norm") for layer in config["layers"]] == [None] * 5 + [cached_norm or None] + [None]
    loaded = load_export(folder)
    assert loaded.specs == specs and torch.equal(loaded(IDS), student(IDS))
    cache = loaded.allocate_cache(1, 40, dtype=torch.float32)
    parts = [loaded(part, cache=cache) for part in IDS.split([20, 1, 1, 18], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), student(IDS), rtol=0, atol=1e-4)


def test_a_folder_of_before_has_no_norms(tmp_path):
    """Its layers have no such key; with it, the same weights are another model of the same function."""
    specs = dense_specs(TINY)
    specs[5] = LayerSpec("joint", 40, "joint", 40)
    folder = export_model(random_student(specs), tmp_path / "out")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    old = load_export(folder)
    assert len(old.layers[5].self_attn.storage()) == 1
    config["layers"][5]["cached_norm"] = True
    path.write_text(json.dumps(config))
    new = load_export(folder)
    assert new.specs[5] == dataclasses.replace(specs[5], cached_norm=True)
    assert new.cache_bytes(40) == old.cache_bytes(40) + 40 * 2 * TINY.num_kv_heads
    with torch.no_grad():
        torch.testing.assert_close(new(IDS), old(IDS), rtol=0, atol=1e-4)
