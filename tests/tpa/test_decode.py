"""The reference of decoding attention against attention of the whole sequence, and the door to it."""

import pytest
import torch
from decode_cases import FORMS, filled, layer

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import attend
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.decode import attend_cached


@torch.no_grad()
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_last_query_of_the_whole_sequence(form, local):
    """Ragged lengths, in rows of another order; rings that have wrapped, just begun or are just full."""
    attention = layer(2, FORMS[form], local)
    lengths, rows = [61, 1, 24, 0, 49], [3, 0, 1, 5, 2]
    queries, cached, x = filled(attention, lengths, 61, torch.float64, rows)
    out = attend_cached(attention, queries, cached, "reference")
    assert out.isfinite().all()
    for i, length in enumerate(lengths):
        if not length:
            continue
        text = x[i : i + 1, :length]
        rotary = tuple(t.double() for t in rotary_table(attention.config, attention.kind, torch.arange(length)))
        entries = attention.as_cached(attention.write(text, rotary))
        whole = attend(
            attention.queries(text, rotary), *attention.read(entries, rotary), attention.config.scale, attention.window
        )
        torch.testing.assert_close(out[i], whole[0, -1], rtol=0, atol=1e-9)


def test_the_door(monkeypatch):
    attention = layer(1, None)
    queries, cached, _ = filled(attention, [5], 8, torch.float64)
    expected = attend_cached(attention, queries, cached, "reference")
    torch.testing.assert_close(attend_cached(attention, queries, cached), expected, rtol=0, atol=1e-5)  # auto
    monkeypatch.setenv("TPA_DECODE", "tritn")
    with pytest.raises(UserError, match="'tritn'.*did you mean 'triton'"):
        attend_cached(attention, queries, cached)
    monkeypatch.setenv("TPA_DECODE", "triton")
    with pytest.raises(UserError, match="cannot serve this call: .*(float64|not installed)"):
        attend_cached(attention, queries, cached)
    assert torch.equal(attend_cached(attention, queries, cached, "reference"), expected)  # an argument counts more
