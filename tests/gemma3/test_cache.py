"""Decoding with the cache equals the full forward; bytes and refusals."""

import pytest
import torch
from random_models import random_model, small_config, tokens

from tpa_train.errors import UserError

LENGTH = 40  # windows of 8 are passed five times
CHUNKINGS = {
    "whole": [40],
    "one by one": [1] * 40,
    "window": [8] * 5,
    "below the window": [7, 7, 7, 7, 7, 5],
    "above the window": [19, 21],
    "across its edge": [6, 4, 1, 1, 9, 1, 18],
    "edge exactly": [8, 1, 8, 23],
}


@pytest.fixture(params=[1, 4], ids=["G1", "G4"], scope="module")
def model(request):
    return random_model(small_config(num_kv_heads=request.param))


def _run(model, ids, chunks, **options):
    cache = model.allocate_cache(ids.shape[0], ids.shape[1], dtype=torch.float64, **options)
    out = []
    for part in ids.split(chunks, dim=1):
        out.append(model(part, cache=cache))
    assert cache.length == ids.shape[1]
    return torch.cat(out, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("name", CHUNKINGS)
def test_any_chunking_equals_the_full_forward(model, name):
    ids = tokens(model.config, 2, LENGTH)
    torch.testing.assert_close(_run(model, ids, CHUNKINGS[name]), model(ids), rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", CHUNKINGS)
def test_left_padded_rows_equal_each_alone(model, name):
    """Paddings below, at and beyond the window, and one row without any."""
    ids, padding = tokens(model.config, 5, LENGTH, seed=1), torch.tensor([0, 3, 8, 9, 31])
    out = _run(model, ids, CHUNKINGS[name], padding=padding)
    assert torch.isfinite(out).all()
    for row, missing in enumerate(padding.tolist()):
        alone = model(ids[row : row + 1, missing:])[0]
        torch.testing.assert_close(out[row, missing:], alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 20])
def test_no_query_is_left_without_a_key(model, chunk):
    """Padding queries see themselves: some kernels give NaN for an empty softmax, whoever reads it."""
    padding = torch.tensor([0, 13, 19])
    cache = model.allocate_cache(3, 20, dtype=torch.float64, padding=padding)
    for _ in range(20 // chunk):
        for layer in (0, 5):
            new = torch.zeros(3, chunk, model.config.num_kv_heads, 8, dtype=torch.float64)
            mask = cache.update(layer, (new, new)).mask
            assert mask is not None and mask.any(-1).all()
        cache.advance(chunk)


@torch.no_grad()
def test_padding_content_does_not_matter(model):
    ids, padding = tokens(model.config, 2, 20, seed=2), torch.tensor([0, 6])
    other = ids.clone()
    other[1, :6] = 0
    assert torch.equal(_run(model, ids, [20], padding=padding)[1, 6:], _run(model, other, [20], padding=padding)[1, 6:])


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_reorder_keeps_and_copies_rows(model, padded):
    ids = tokens(model.config, 3, LENGTH, seed=3)
    padding = torch.tensor([4, 0, 11]) if padded else None
    cache = model.allocate_cache(3, LENGTH, dtype=torch.float64, padding=padding)
    model(ids[:, :25], cache=cache)
    rows = torch.tensor([2, 0, 2, 2])
    cache.reorder(rows)
    out = torch.cat([model(part, cache=cache) for part in ids[rows, 25:].split([1, 1, 13], dim=1)], dim=1)
    for place, row in enumerate(rows.tolist()):
        missing = int(padding[row]) if padded else 0
        alone = model(ids[row : row + 1, missing:])[0, 25 - missing :]
        torch.testing.assert_close(out[place], alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [[11], [10, 1], [3, 8]])
def test_overflow_is_refused_in_words(model, chunks):
    cache = model.allocate_cache(1, 10, dtype=torch.float64)
    ids = tokens(model.config, 1, sum(chunks))
    parts = ids.split(chunks, dim=1)
    for part in parts[:-1]:
        model(part, cache=cache)
    with pytest.raises(UserError, match="holds 10 tokens but 11 are needed"):
        model(parts[-1], cache=cache)


@pytest.mark.parametrize("capacity", [1, 7, 8, 9, 100])
@pytest.mark.parametrize("dtype,size", [(torch.bfloat16, 2), (torch.float64, 8)])
def test_bytes_equal_the_formula(model, capacity, dtype, size):
    """Five local layers keep min(L, W) tokens, the global one L; 2Gd numbers each (DESIGN §2)."""
    config = model.config
    expected = (5 * min(capacity, 8) + capacity) * 2 * config.num_kv_heads * config.head_dim * size
    cache = model.allocate_cache(3, capacity, dtype=dtype)
    assert cache.nbytes == 3 * expected
    storage = sum(t.untyped_storage().nbytes() for buffers in cache.buffers for t in buffers)
    assert storage == cache.nbytes
    assert model.allocate_cache(3, capacity, dtype=dtype, device="meta").nbytes == cache.nbytes


@torch.no_grad()
def test_the_cache_does_not_grow(model):
    cache = model.allocate_cache(1, LENGTH, dtype=torch.float64)
    before = [t.data_ptr() for buffers in cache.buffers for t in buffers], cache.nbytes
    for part in tokens(model.config, 1, LENGTH).split([13, 1, 1, 25], dim=1):
        model(part, cache=cache)
    assert before == ([t.data_ptr() for buffers in cache.buffers for t in buffers], cache.nbytes)
