"""`attend` against a dense softmax written out by the definition, and the memory that it must not take."""

import pytest
import torch
from random_models import LargestTensor, naive_attention, random_model, small_config, tokens

from tpa_train.gemma3 import attention
from tpa_train.gemma3.attention import Documents, attend

B, H, D = 2, 4, 8


def _inputs(groups, length, value_dim=D, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return randn(B, length, H, D), randn(B, length, groups, D), randn(B, length, groups, value_dim)


def _ids(length, edges):
    """Document ids per row; ``edges`` of a row are where a new document begins."""
    ids = torch.zeros(len(edges), length, dtype=torch.int64)
    for row, starts in enumerate(edges):
        for start in starts:
            ids[row, start:] += 1
    return ids


def _naive(q, k, v, scale, window, ids=None):
    return torch.einsum(
        "bhts,bshe->bthe", naive_attention(q, k, scale, window, ids), v.repeat_interleave(H // v.shape[2], dim=2)
    )


@pytest.fixture(params=[3, 4, None], ids=["blocks of 3", "blocks of 4", "own blocks"])
def block(request, monkeypatch):
    """Blocks of queries smaller than the window, which its size is or is not a multiple of, and the real ones."""
    if request.param is not None:
        monkeypatch.setattr(attention, "BAND_BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 8, 16, 23, 24, 100])
def test_equals_the_dense_softmax(block, groups, window):
    """Lengths of 24 with windows that divide it, do not divide it, equal it and exceed it."""
    q, k, v = _inputs(groups, 24)
    torch.testing.assert_close(attend(q, k, v, 0.37, window), _naive(q, k, v, 0.37, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("window", [None, 1, 5, 8, 64])
@pytest.mark.parametrize(
    "edges", [([], []), ([10], []), ([1, 2, 3, 23], [8, 16]), ([5, 13], [5, 13])], ids=["one", "two", "many", "same"]
)
def test_documents_do_not_see_each_other(block, groups, window, edges):
    q, k, v = _inputs(groups, 24, seed=1)
    ids = _ids(24, edges)
    torch.testing.assert_close(
        attend(q, k, v, 0.37, window, Documents(ids)), _naive(q, k, v, 0.37, window, ids), rtol=0, atol=1e-12
    )


def test_neighbouring_rows_with_one_id_are_two_documents():
    """The flattened batch must be cut between rows even where the id goes on."""
    documents = Documents(torch.tensor([[0, 0, 7, 7], [7, 7, 7, 8]]))
    assert documents.cu_seqlens.tolist() == [0, 2, 4, 7, 8]
    assert documents.segments() == [(0, 0, 2), (0, 2, 4), (1, 0, 3), (1, 3, 4)]


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("value_dim", [1, 3, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_values_may_be_narrower_than_keys(block, window, value_dim, packed):
    q, k, v = _inputs(2, 19, value_dim, seed=2)
    ids = _ids(19, ([4], [11, 12])) if packed else None
    out = attend(q, k, v, 0.5, window, None if ids is None else Documents(ids))
    assert out.shape == (B, 19, H, value_dim)
    torch.testing.assert_close(out, _naive(q, k, v, 0.5, window, ids), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 6])
def test_gradients_equal_the_dense_ones(block, window):
    ids = _ids(20, ([9], []))
    leaves = [t.requires_grad_() for t in _inputs(2, 20, seed=3)]
    direction = _inputs(2, 20, seed=4)[0]
    ours = torch.autograd.grad(attend(*leaves, 0.4, window, Documents(ids)), leaves, direction)
    reference = torch.autograd.grad(_naive(*leaves, 0.4, window, ids), leaves, direction)
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


LONG, WINDOW = 2048, 32


def test_a_window_above_the_real_blocks():
    length, window = 5 * attention.BAND_BLOCK // 2 + 3, attention.BAND_BLOCK + 17
    q, k, v = _inputs(2, length)
    torch.testing.assert_close(attend(q, k, v, 0.37, window), _naive(q, k, v, 0.37, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_a_window_builds_nothing_quadratic(packed):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, LONG, 2, 4, generator=generator)
    k, v = (torch.randn(1, LONG, 1, 4, generator=generator) for _ in range(2))
    documents = Documents((torch.arange(LONG)[None] >= 700).long()) if packed else None
    with LargestTensor() as watch:
        attend(q, k, v, 0.5, WINDOW, documents)
    assert 0 < watch.numel <= 4 * WINDOW * LONG < LONG * LONG / 8


def test_the_watch_sees_a_quadratic_tensor():
    """Without this the test above could not fail."""
    q = torch.randn(1, LONG, 1, 4)
    with LargestTensor() as watch:
        naive_attention(q, q, 0.5, WINDOW)
    assert watch.numel >= LONG * LONG


@pytest.mark.parametrize("groups", [1, 4])
def test_a_whole_model_builds_nothing_quadratic(groups):
    """Global layers too: their causal path needs no mask."""
    config = small_config(num_kv_heads=groups, sliding_window=WINDOW, intermediate_size=16)
    model, ids = random_model(config, dtype=torch.float32), tokens(config, 1, LONG)
    with torch.no_grad(), LargestTensor() as watch:
        model.hidden_states(ids, (torch.arange(LONG)[None] >= 900).long())
    assert watch.numel < LONG * LONG / 8


@pytest.mark.parametrize("groups", [1, 4])
def test_a_packed_model_equals_each_document_alone(groups):
    config = small_config(num_kv_heads=groups)
    model, ids = random_model(config), tokens(config, 1, 50)
    # RoPE only sees differences of positions, so a document may begin anywhere.
    packed = model(ids, (torch.arange(50)[None] >= 21).long())
    alone = torch.cat((model(ids[:, :21]), model(ids[:, 21:])), dim=1)
    torch.testing.assert_close(packed, alone, rtol=0, atol=3e-5)  # the rotary tables are float32
    assert (packed - model(ids)).abs().max() > 1e-3


@pytest.mark.parametrize("groups", [1, 4])
def test_each_layer_sees_exactly_its_reach(groups):
    """One local layer: the past beyond the window has no influence, its edge has."""
    config = small_config(num_layers=1, num_kv_heads=groups, layer_kinds=("local",))
    model, ids = random_model(config), tokens(config, 1, 30)
    base = model(ids)[0, -1]

    def change(position):
        other = ids.clone()
        other[0, position] = (other[0, position] + 1) % config.vocab_size
        return (model(other)[0, -1] - base).abs().max()

    assert change(30 - 8 - 1) == 0 and change(30 - 8) > 1e-6
    wide = random_model(small_config(num_layers=1, num_kv_heads=groups, layer_kinds=("global",)))
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % config.vocab_size
    assert (wide(other)[0, -1] - wide(ids)[0, -1]).abs().max() > 1e-6
