"""Rows on disk, what is left to do, and the time that a benchmark may take."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpa_train.benchmarks.journal import Allowance, Journal, forget
from tpa_train.errors import UserError


def journal(path, **settings):
    return Journal(path, lambda rows: {"settings": {"tokens": 5, "cells": 1} | settings, "rows": rows}, ("name",),
                   ("cells",))  # fmt: skip


def test_rows_are_on_disk_at_once_and_found_again(tmp_path):
    path = tmp_path / "made" / "b.json"
    first = journal(path)
    assert not first.done(name="a")
    first.add({"name": "a", "kl": float("nan")})
    assert json.loads(path.read_text())["rows"] == [{"name": "a", "kl": None}]
    first.add_error(RuntimeError("out of\nmemory"), name="b")
    again = journal(path, cells=7)
    assert again.done(name="a") and not again.done(name="b"), "what failed is tried again"
    assert again.rows[1] == {"name": "b", "error": "RuntimeError: out of"}
    again.add({"name": "c"})
    again.add({"name": "b", "kl": 1.0})
    assert [row["name"] for row in json.loads(path.read_text())["rows"]] == ["a", "b", "c"]
    assert journal(path).done(name="b")


@pytest.mark.parametrize("text,message", [
    ("{", "cannot be gone on with"), ('{"rows": []}', "cannot be gone on with"),
    ('{"rows": [{"other": 1}], "settings": {}}', "another benchmark's"),
    ('{"rows": [], "settings": {"tokens": 4}}', "tokens=4, not 5"),
])  # fmt: skip
def test_files_that_cannot_be_gone_on_with(tmp_path, text, message):
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        journal(path)
    assert path.read_text() == text


def test_without_a_file_rows_stay_in_memory():
    rows = journal(None)
    rows.add({"name": "a"})
    assert rows.done(name="a") and rows.rows == [{"name": "a"}]


def test_what_a_failed_cell_held_is_let_go_while_its_error_is_kept():
    held = []

    def fails():
        cache = torch.zeros(3)
        held.append(weakref.ref(cache))
        raise RuntimeError("a kernel failed")

    def wraps():
        try:
            fails()
        except RuntimeError as error:
            raise ValueError("it was not compiled") from error

    try:
        wraps()
    except ValueError as error:
        kept = error
        assert held[0]() is not None
        forget(error)
    assert held[0]() is None and isinstance(kept.__cause__, RuntimeError)


def test_what_would_not_fit_is_not_begun():
    now = 0.0
    allowance = Allowance(10, lambda: now)  # 600 s
    assert allowance.fits(10**9), "nothing is known of the first one"
    now = 130.0
    allowance.learn(130.0, 100.0, 1000)  # 30 s besides, 0.1 s a token
    assert allowance.fits(4400) and not allowance.fits(4401)
    allowance.learn(20.0, 0.0, 0)  # the rate of the last one that trained stays
    assert allowance.fits(4500) and not allowance.fits(4501)
    assert Allowance(None, lambda: 1e12).fits(10**12)
    for minutes in (0, -1, float("nan")):
        with pytest.raises(UserError, match="must be positive"):
            Allowance(minutes)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.floats(0.1, 3))
def test_cells_that_cost_alike_end_in_time(cells, minutes):
    """Only the first, of which nothing is known, can take longer than all of it."""
    now, ends = 0.0, []
    allowance = Allowance(minutes, lambda: now)
    for number, tokens in enumerate(cells):
        if number and not allowance.fits(tokens):
            break
        now += 2.0 + 0.7 * tokens
        ends.append(now)
        allowance.learn(2.0 + 0.7 * tokens, 0.7 * tokens, tokens)
    assert all(end <= 60 * minutes + 1e-6 for end in ends[1:])
    left = cells[len(ends) :]
    assert not left or now + 2.0 + 0.7 * left[0] > 60 * minutes - 1e-6, "what fits is begun"
