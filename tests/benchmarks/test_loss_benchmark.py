"""The benchmark of the loss on a CPU, at tiny sizes."""

import importlib.util
import json

import pytest
import torch

from tpa_train.benchmarks import command, loss
from tpa_train.benchmarks.loss import LossSettings, dense_loss, inputs, our_loss
from tpa_train.distillation.divergence import KINDS, Divergence
from tpa_train.errors import UserError

TINY = {"vocab": 60, "hidden_size": 16, "repeats": 1, "checked": 5, "device": "cpu"}


def test_tiny_run(tmp_path, capsys):
    out = tmp_path / "loss.json"
    command.main(["loss", "tokens=[4,9]", *(f"{k}={v}" for k, v in TINY.items()), f"out={out}"])
    assert "dense_float32" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    liger, rows = rows[-1], rows[:-1]
    wanted = "needs CUDA" if importlib.util.find_spec("liger_kernel") else "is not installed"
    assert liger["name"] == "liger" and wanted in liger["note"]
    found = {tuple(row[k] for k in ("name", "divergence", "dtype", "case", "tokens")) for row in rows}
    assert len(found) == len(rows) == 2 * (3 * (3 + 1) + 3 * 2 + 2 * 2)  # names by precision, divergences by size
    assert ("ours", "forward_kl", "mixed", "near", 9) in found and ("ours", "jsd", "bfloat16", "far", 4) in found
    for row in rows:
        assert row["ms"] > 0 and row["loss"] > 0 and row["peak_gib"] is None
        assert 0 < row["grad_error"] < (0.05 if row["name"] != "dense_autocast" else 2)
        if row["name"] == "dense_float32":
            assert row["grad_error"] == pytest.approx(row["grad_error_dense"], rel=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_implementations_compute_the_same(kind):
    settings = LossSettings(tokens=[7], **TINY)
    tensors = inputs(settings, "float32", "far", torch.device("cpu"))
    results = [f(*tensors) for f in (our_loss(Divergence(kind)), dense_loss(Divergence(kind), torch.float64, 7))]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("argv,message", [
    (["tokens=[]"], "must be a list of positive"), (["tokens=[0]"], "must be a list of positive"),
    (["vocab=0"], "vocab=0 must be at least 1"), (["dtypes=bfloat61"], "did you mean 'bfloat16'"),
])  # fmt: skip
def test_mistakes_are_named(argv, message, monkeypatch):
    monkeypatch.setattr(loss, "measure", lambda *_: pytest.fail("it ran"))
    with pytest.raises(UserError, match=message):
        command.main(["loss", *argv])
