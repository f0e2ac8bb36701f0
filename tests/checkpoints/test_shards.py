"""Weights in several files: written a file's worth at a time, read by name, damage named."""

import pytest
import torch

from tpa_train.checkpoints.shards import INDEX, SINGLE, StoredWeights, nbytes, write_weights
from tpa_train.errors import UserError

TENSORS = {f"w{i}": torch.arange(10 * (i + 1), dtype=torch.float32) for i in range(5)}
SIZES = {name: nbytes(tensor) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("limit,files", [(10_000, 1), (200, 4), (1, 5)])
def test_what_is_written_is_read(limit, files, tmp_path):
    held = []

    def read(name):
        held.append(name)
        return TENSORS[name].clone()

    write_weights(tmp_path, SIZES, read, limit)
    assert held == list(TENSORS)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / SINGLE).exists() == (files == 1) != (tmp_path / INDEX).exists()
    stored = StoredWeights.of(tmp_path)
    assert stored.files.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(stored.read(name), tensor)


def test_bytes_follow_the_type():
    assert nbytes(TENSORS["w0"]) == 40 and nbytes(TENSORS["w0"], torch.bfloat16) == 20


def test_damage_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no model.safetensors in it"):
        StoredWeights.of(tmp_path)
    write_weights(tmp_path, SIZES, TENSORS.__getitem__, 200)
    second = tmp_path / "model-00002-of-00004.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:20])
    with pytest.raises(UserError, match="model-00002-of-00004.safetensors is damaged or truncated"):
        StoredWeights.of(tmp_path)
    second.unlink()
    with pytest.raises(UserError, match="there is no model-00002-of-00004.safetensors in it"):
        StoredWeights.of(tmp_path)
