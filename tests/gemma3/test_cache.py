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


def _run(model, ids, chunks):
    cache = model.allocate_cache(ids.shape[0], ids.shape[1], dtype=torch.float64)
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
    """Five local layers keep min(L, W) tokens, the global one L; 2Gd numbers each."""
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the fused kernel needs a GPU")
@torch.no_grad()
@pytest.mark.parametrize("chunks", [[100, 28, 172], [7] + [1] * 3 + [290]])
def test_chunks_in_half_precision_on_a_gpu(chunks):
    """Chunks after the first go through flash attention, whose masks must align the ends of queries and keys."""
    from tpa_train.gemma3.attention import fuses

    config = small_config(num_kv_heads=2, head_dim=32, sliding_window=40, max_context=512)
    model = random_model(config, dtype=torch.bfloat16).cuda()
    ids = tokens(config, 2, 300).cuda()
    assert fuses(model.embed_tokens(ids))
    cache = model.allocate_cache(2, 300, dtype=torch.bfloat16)
    out = torch.cat([model(part, cache=cache) for part in ids.split(chunks, dim=1)], dim=1).float()
    exact = random_model(config, dtype=torch.float64).cuda()(ids).float()
    whole = model(ids).float()
    assert (out - exact).norm() < 1.5 * (whole - exact).norm() < 0.1 * exact.norm()
