"""Rows in which a part of the text comes again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stub_tokenizer import StubTokenizer
from test_packing import documents, settings_for

from tpa_train.data.copies import SHORTEST, CopyRows, repeat_part
from tpa_train.data.datamodule import PackedDataModule
from tpa_train.errors import UserError

BOS = 2


@given(st.lists(st.integers(1, 120), min_size=1, max_size=6), st.integers(0, 60), st.integers(0, 2**32), st.booleans())
def test_a_part_comes_again_beyond_the_window(lengths, window, seed, joined):
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    ids = torch.arange(100, 100 + len(documents))  # every token is another one
    ids[torch.tensor([0, *np.cumsum(lengths)[:-1]])] = BOS
    documents = torch.zeros_like(documents) if joined else documents
    before = ids.clone()
    found = repeat_part(ids, documents, window, BOS, np.random.default_rng(seed))
    if found is None:
        assert torch.equal(ids, before)
        longest = len(ids) if joined else max(lengths)
        assert joined or longest - 1 < 5 * SHORTEST + window
        return
    part, copy, n = found
    assert n >= SHORTEST and copy - part > window and copy >= part + n and copy + n <= len(ids)
    assert torch.equal(ids[copy : copy + n], before[part : part + n])
    assert not (before[part : part + n] == BOS).any()
    assert documents[part] == documents[copy + n - 1]
    changed = ids != before
    changed[copy : copy + n] = False
    assert not changed.any(), "nothing else is touched"


@pytest.fixture
def data(tmp_path):
    def make(**options):
        settings = settings_for(tmp_path, documents(400), heldout_fraction=0.0, join_documents=True, **options)
        module = PackedDataModule(settings, StubTokenizer(), 128, 2, progress=False, window=20)
        module.setup()
        return module

    return make


def _rows(loader):
    return torch.cat([batch["token_ids"] for batch in loader])


def test_the_share_of_the_rows_and_the_same_ones_each_time(data):
    plain, half = data().train_dataset, data(copy_share=0.5)
    rows = CopyRows(plain, 0.5, 20, 7)
    changed = [i for i in range(len(rows)) if not torch.equal(rows[i]["token_ids"], plain[i]["token_ids"])]
    assert 0.3 * len(rows) < len(changed) < 0.7 * len(rows) and len(rows) > 40
    assert all(torch.equal(rows[i]["token_ids"], CopyRows(plain, 0.5, 20, 7)[i]["token_ids"]) for i in changed)
    other = CopyRows(plain, 0.5, 20, 8)
    assert any(not torch.equal(rows[i]["token_ids"], other[i]["token_ids"]) for i in changed)
    every = CopyRows(plain, 1.0, 20, 7)
    assert all(torch.equal(every[i]["document_ids"], plain[i]["document_ids"]) for i in range(len(every)))
    for stage in ("layerwise", "distill"):
        ours, theirs = (_rows(module.stage_dataloader(stage)) for module in (half, data()))
        assert ours.shape == theirs.shape and not torch.equal(ours, theirs)
    calibration = (_rows(module.calibration_dataloader()) for module in (half, data()))
    assert torch.equal(*calibration), "calibration sees the text as it is"


def test_resuming_with_another_share_is_refused(data):
    state = data().state_dict()
    assert "copy_share" not in state
    with pytest.raises(UserError, match="data.copy_share is 0.5"):
        data(copy_share=0.5).load_state_dict(state)


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_shares_out_of_range(data, share):
    with pytest.raises(UserError, match="data.copy_share"):
        data(copy_share=share)
