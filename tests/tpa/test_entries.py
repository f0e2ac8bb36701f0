"""Cache entries with one width a group of 32: what training sees is what is stored, in the bytes that are counted."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import small_config
from torch.utils._python_dispatch import TorchDispatchMode

from tpa_train.errors import UserError
from tpa_train.tpa.entries import Entry, check_widths, describe_bits, mean_bits
from tpa_train.tpa.quantization import BITS, fake_quantize
from tpa_train.tpa.spec import LayerSpec, dense_specs, specs_to_dicts

# Full and partly filled last groups, mixed and equal neighbours, 16 bits first, between and last.
ENTRIES = [
    Entry(2, 96, (8, 4, 4)), Entry(1, 50, (16, 2)), Entry(3, 70, (8, 3, 16)), Entry(1, 100, (4, 4, 16, 6)),
    Entry(2, 33, (2, 2)), Entry(1, 40, (16, 16)), Entry(2, 31, (4,)), Entry(4, 40, 6), Entry(2, 7, 16),
]  # fmt: skip


def _numbers(entry, dtype=torch.float32):
    x = torch.randn(3, 5, entry.rows, entry.count, generator=torch.Generator().manual_seed(entry.count))
    return (x * torch.logspace(0, -3, entry.count) + 0.1).to(dtype)


def _groups(entry):
    """(start, stop, bits) of every group of 32, by itself."""
    bits = [entry.bits] * -(-entry.count // 32) if isinstance(entry.bits, int) else entry.bits
    return [(32 * i, min(32 * i + 32, entry.count), b) for i, b in enumerate(bits)]


def _bytes(entry):
    """Whole bytes of codes, of 6 and 3 bits in two planes, and a 16-bit scale and minimum a group."""
    planes = {6: (4, 2), 3: (2, 1)}

    def size(count, width):
        return 2 * count if width == 16 else 4 + sum(-(-count * part // 8) for part in planes.get(width, (width,)))

    return entry.rows * sum(size(b - a, w) for a, b, w in _groups(entry))


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_stored_is_what_training_saw(entry, dtype):
    x = _numbers(entry, dtype)
    stored = entry.pack(x)
    back = entry.unpack(stored, dtype)
    assert back.dtype == dtype and torch.equal(back, entry.rounded(x))
    # Every group as if it stood alone.
    alone = torch.cat([fake_quantize(x[..., a:b], bits) for a, b, bits in _groups(entry)], dim=-1)
    assert torch.equal(back, alone)
    for tensor, (shape, own) in zip(stored, entry.storage(), strict=True):
        assert tensor.shape == (3, 5, *shape) and tensor.dtype == (own or dtype)
    assert entry.exact == all(bits == 16 for *_, bits in _groups(entry)) == torch.equal(back, x)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_bytes_are_those_of_the_storage(entry):
    stored = entry.pack(_numbers(entry, torch.bfloat16))
    assert sum(t.contiguous().untyped_storage().nbytes() for t in stored) == 15 * entry.nbytes
    assert entry.nbytes == _bytes(entry)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_widths_that_alternate_are_stored_under_autocast_as_without(dtype):
    entry = Entry(2, 250, (8, 4, 16, 4, 6, 8, 3, 6))
    x = _numbers(entry, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        stored, rounded = entry.pack_rounded(x)
        back = entry.unpack(stored, dtype)
    assert all(torch.equal(a, b) for a, b in zip(stored, entry.pack(x), strict=True))
    assert torch.equal(back, rounded) and torch.equal(back, entry.rounded(x))


class _Operations(TorchDispatchMode):
    """Records the names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation.name())
        return operation(*args, **(kwargs or {}))


def test_packing_and_unpacking_copy_nothing_from_the_host():
    """CUDA graphs record them: an index or a constant that is made on the host could not be."""
    entry = Entry(2, 250, (8, 4, 16, 4, 6, 8, 3, 6))
    x, levels = _numbers(entry), entry.levels()
    with _Operations() as seen:
        entry.unpack(entry.pack(x, levels), x.dtype)
    assert "aten::cat" in seen.names
    assert not {"aten::index.Tensor", "aten::lift_fresh", "aten::index_select"} & set(seen.names)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_widths(data):
    """Groups of one width are stored together: in no more tensors than there are widths."""
    count = data.draw(st.integers(1, 200))
    bits = tuple(data.draw(st.lists(st.sampled_from(BITS), min_size=-(-count // 32), max_size=-(-count // 32))))
    entry = Entry(2, count, bits)
    x = _numbers(entry)
    assert torch.equal(entry.unpack(entry.pack(x), x.dtype), entry.rounded(x))
    assert entry.nbytes == _bytes(entry)
    assert sorted(g for s in entry.segments for g in s.groups) == list(range(len(bits)))
    assert all(bits[g] == s.bits for s in entry.segments for g in s.groups)
    assert len({s.bits for s in entry.segments}) == len(entry.segments)
    assert [run.start for run in entry.runs] == [0, *itertools.accumulate(run.count for run in entry.runs)][:-1]
    for run in entry.runs:
        assert entry.segments[run.segment].groups[run.within // 32] == run.start // 32
        assert {bits[g] for g in range(run.groups.start, run.groups.stop)} == {run.bits}


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_the_gradient_passes_straight_through(entry):
    x = _numbers(entry).requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(entry.rounded(x), x, direction)
    assert torch.equal(gradient, direction)
    assert torch.equal(entry.rounded(x).detach(), entry.rounded(x.detach()))


@pytest.mark.parametrize("count,bits", [(96, (8, 4)), (64, (8, 4, 4)), (33, (8,)), (32, (8, 4)), (1, ())])
def test_a_width_for_every_group(count, bits):
    message = f"^{len(bits)} widths were given for {count} cached numbers, one a group of 32 is needed\\.$"
    with pytest.raises(UserError, match=message):
        check_widths(bits, count)
    config = small_config(num_kv_heads=2, head_dim=96)
    for spec in (LayerSpec("latent", count, "dense", 96, bits, 16), LayerSpec("joint", count, "joint", count, bits)):
        with pytest.raises(UserError, match=message):
            spec.key_entries(config)


def test_widths_that_the_cache_cannot_store():
    for bits in (5, (8, 5), [8, 5]):
        with pytest.raises(UserError, match="cache bits must be one of 16, 8, 6, 4, 3, 2, not 5"):
            LayerSpec("latent", 64, "latent", 64, bits)


@pytest.mark.parametrize(
    "bits,text,mean", [(4, "4", 4), ((4,), "4", 4), ((8, 4, 4, 4), "8+4×3", 5), ((16, 2, 16), "16+2+16", 34 / 3)]
)
def test_widths_for_a_person(bits, text, mean):
    assert describe_bits(bits) == text and mean_bits(bits) == pytest.approx(mean)


# ------------------------------------------------------------------------------------------------------ specifications


@pytest.mark.parametrize(
    "spec",
    [
        LayerSpec("latent", 96, "latent", 40, (8, 4, 4), (16, 2)),
        LayerSpec("joint", 50, "joint", 50, (16, 2)),
        LayerSpec("joint", 50, "joint", 50, 8, cached_norm=True),
        LayerSpec("dense", 96, "dense", 96, 8, 4),
        LayerSpec("contextual", 2, "constant_a", 3, (8, 4, 2)),
        LayerSpec("tucker", 24, "tucker", 24, 16, form_q="tucker", rank_q=24, form_o="tucker", heads_k=1, hidden=16,
                  shared_features=True),
    ],
)  # fmt: skip
def test_specifications_survive_json(spec):
    (values,) = json.loads(json.dumps(specs_to_dicts([spec])))
    assert isinstance(values["bits_k"], int | list) and ("cached_norm" in values) == spec.cached_norm
    back = LayerSpec(**values)
    assert back == spec and hash(back) == hash(spec) and isinstance(back.bits_k, int | tuple)


def test_values_take_the_widths_of_keys_where_left_out():
    spec = LayerSpec("latent", 64, "latent", 64, [8, 4])
    assert spec.bits_k == spec.bits_v == (8, 4)
    assert LayerSpec("latent", 64, "latent", 64, 8, 16).bits_v == 16


@pytest.mark.parametrize(
    "values",
    [
        dict(form_k="joint", rank_k=8, form_v="latent", rank_v=8), dict(form_k="dense", rank_k=8, form_v="joint"),
        dict(form_k="joint", rank_k=8, form_v="joint", rank_v=16),
    ],
)  # fmt: skip
def test_a_joint_latent_serves_both(values):
    with pytest.raises(UserError, match="serves keys and values at once: both need the form 'joint' and one rank"):
        LayerSpec(**values)


def test_a_joint_latent_is_cached_once():
    config = small_config(num_kv_heads=4, head_dim=96)
    spec = LayerSpec("joint", 70, "joint", 70, (8, 4, 4))
    assert spec.key_entries(config) == [Entry(1, 70, (8, 4, 4))] and spec.value_entries(config) == []
    assert spec.bytes_per_token(config) == (32 + 4) + (16 + 4) + (3 + 4)
    assert spec.describe() == "K joint 70 @ 8+4×2   V joint 70 @ 8+4×2"
    spec = replace(spec, cached_norm=True)
    assert spec.key_entries(config) == [Entry(1, 70, (8, 4, 4)), Entry(1, 4)] and spec.value_entries(config) == []
    assert spec.bytes_per_token(config) == 36 + 20 + 7 + 2 * 4 and "cached norms" in spec.describe()
    with pytest.raises(UserError, match="cached_norm is of joint latents"):
        replace(spec, form_k="latent", form_v="latent")


def test_norms_are_cached_where_they_add_little_to_a_global_layer():
    one, four = (small_config(num_kv_heads=groups, head_dim=96) for groups in (1, 4))
    joint = LayerSpec("joint", 96, "joint", 96, 4)
    assert joint.bytes_per_token(one) == 60
    assert not joint.with_norms(one, 5).cached_norm  # 2 bytes are more than a 32nd of 60
    wider = LayerSpec("joint", 104, "joint", 104, 4)
    assert wider.bytes_per_token(one) == 68 and wider.with_norms(one, 5) == replace(wider, cached_norm=True)
    assert not wider.with_norms(four, 5).cached_norm  # 8 bytes
    assert wider.with_norms(one, 5).with_norms(one, 0) == wider, "keys of a local layer are rebuilt anyway"
    assert LayerSpec("latent", 96, "latent", 96).with_norms(one, 5) == LayerSpec("latent", 96, "latent", 96)


def test_what_counts_as_converted():
    dense = dense_specs(small_config())[0]
    assert not dense.converted
    for values in (dict(bits_k=8), dict(bits_k=16, bits_v=4), dict(form_q="contextual"), dict(form_v="latent")):
        assert LayerSpec(rank_k=8, rank_v=8, **values).converted
