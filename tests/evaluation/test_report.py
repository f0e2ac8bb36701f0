"""report.json's schema, report.md's words, plots, the model card, and atomic writing."""

import json
import math
import types
from pathlib import Path

import pytest

from tpa_train.errors import UserError
from tpa_train.evaluation.atomic import write_text
from tpa_train.evaluation.plots import plot_losses, plot_ranks, read_losses
from tpa_train.evaluation.report import Report, model_card, render_markdown, table, what_was_lost, write_report
from tpa_train.evaluation.suites import CacheReport, StageResult

PNG = b"\x89PNG\r\n\x1a\n"


def _stage(name, perplexity, kl, top1, copy, tokens=0, seconds=0.0):
    nll = math.log(perplexity)
    bins = [
        {
            "from": 1 + edge // 2, "to": edge, "tokens": 500, "nll": nll, "teacher_nll": math.log(13.9),
            "perplexity": perplexity, "teacher_perplexity": 13.9, "kl": kl * edge / 256, "top1": top1,
        }
        for edge in (64, 128, 256, 512)
    ]  # fmt: skip
    return StageResult(
        name, tokens, seconds, perplexity, 13.9, kl, top1, {"1000": copy, "3500": copy - 0.01}, bins, 999
    )


def _layers(bits=16):
    return [
        {
            "index": i, "kind": "global" if i % 6 == 5 else "local", "form_k": "latent" if i % 6 == 5 else "dense",
            "rank_k": 64 if i % 6 == 5 else 256, "form_v": "latent" if i % 6 == 5 else "dense",
            "rank_v": 72 if i % 6 == 5 else 256, "bits": bits, "bytes_per_token": 272,
        }
        for i in range(12)
    ]  # fmt: skip


def _report(**fields):
    stages = [
        _stage("teacher", 13.9, 0.0, 1.0, 0.976),
        _stage("factorized", 20.2, 0.329, 0.75, 0.53, 100_000, 10),
        _stage("layerwise", 17.2, 0.195, 0.81, 0.69, 1_600_000, 60),
        _stage("distilled", 14.1, 0.085, 0.867, 0.837, 9_800_000, 300),
    ]
    defaults = {
        "model": "gemma3_270m", "budget": {"cache_ratio": 4, "context": 32_768},
        "cache": CacheReport(32_768, 108_000_000, 27_000_000, 4.0, True), "stages": stages, "layers": _layers(),
        "command": "python scripts/train.py recipe=distill",
    }  # fmt: skip
    return Report(**(defaults | fields))


def test_json_has_the_schema(tmp_path):
    write_report(tmp_path, _report(extra={"tokens_per_second": 5, "model": "not replaced"}))
    content = json.loads((tmp_path / "report.json").read_text())
    assert {"model", "budget", "cache", "stages", "layers", "versions", "command"} <= set(content)
    assert content["model"] == "gemma3_270m" and content["tokens_per_second"] == 5
    assert set(content["budget"]) == {"cache_ratio", "context"}
    assert {"context", "dense_bytes", "tpa_bytes", "ratio"} <= set(content["cache"])
    assert [s["name"] for s in content["stages"]] == ["teacher", "factorized", "layerwise", "distilled"]
    for stage in content["stages"]:
        assert {"name", "tokens", "seconds", "perplexity", "kl", "top1", "copy_accuracy"} <= set(stage)
        assert isinstance(stage["copy_accuracy"]["1000"], float)
    for row in content["layers"]:
        assert {
            "index", "kind", "form_k", "rank_k", "form_v", "rank_v", "bits", "bytes_per_token",
        } <= set(row)  # fmt: skip
    assert "torch" in content["versions"] and content["command"].startswith("python ")


def test_everything_given_is_shown(tmp_path, drawn):
    csv = tmp_path / "metrics.csv"
    csv.write_text("epoch,step,lr,train/loss\n0,0,0.1,\n0,1,,0.5\n0,2,,0.25\n")
    report = _report(
        samples=[{"prompt": "Say", "teacher": "```\n# hi", "student": ""}],
        layer_errors={"layers": [5, 11], "before": [0.2, 0.3], "after": [0.1, 0.1]},
        losses={"layerwise": csv, "distilled": (range(1, 50), [1 / i for i in range(1, 50)]), "absent": tmp_path},
        evaluation={"text": "python_docs", "context": 8192},
        source="GGUF, Q4_K_M (dequantized)", weights_quantized=True,
    )  # fmt: skip
    path = write_report(tmp_path, report)
    text = path.read_text()
    pictures = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert pictures == ["layer_errors.png", "losses.png", "positions.png", "quality.png", "ranks.png"]
    for name in pictures:
        assert (tmp_path / "plots" / name).read_bytes().startswith(PNG) and f"plots/{name}" in text
    assert "4.00× smaller" in text and "quantized file: GGUF, Q4_K_M (dequantized)" in text
    assert "    # hi" in text and "context 8192" in text and "recipe=distill" in text
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")]


def test_only_what_is_needed(tmp_path, drawn):
    teacher = _report().stages[:1]
    write_report(tmp_path, _report(stages=teacher, layers=[]))
    assert "What was lost" not in (tmp_path / "report.md").read_text()
    write_report(tmp_path / "none", _report(stages=[], layers=[]))


def test_words_follow_the_numbers():
    text = " ".join(what_was_lost(_report().stages))
    assert "+1.4%" in text and "74%" in text and "average perplexity hides this" in text and "long context" in text
    healthy = [_stage("teacher", 13.9, 0, 1, 0.976), _stage("factorized", 14.0, 0.002, 0.99, 0.975)]
    text = " ".join(what_was_lost(healthy))
    assert "hides" not in text and "won back" not in text
    worse = [*healthy, _stage("distilled", 15.0, 0.004, 0.98, 0.97)]
    assert "did not help" in " ".join(what_was_lost(worse))
    broken = [_stage("teacher", 13.9, 0, 1, 0.9), _stage("factorized", 14.0, 0.1, 0.9, 0.9)]
    broken[1].kl = math.nan
    assert "do not use" in what_was_lost(broken)[0]


def test_numbers_json_cannot_hold(tmp_path):
    stages = _report().stages
    stages[1].perplexity, stages[1].kl = math.inf, math.nan
    write_report(tmp_path, _report(stages=stages))
    stage = json.loads((tmp_path / "report.json").read_text())["stages"][1]
    assert stage["perplexity"] is None and stage["kl"] is None


def test_quantized_layers_are_said_and_drawn(tmp_path):
    text = render_markdown(_report(layers=_layers(bits=4)))
    assert "12 cache in fewer bits" in text and "scales counted" in text
    assert plot_ranks(tmp_path / "ranks.png", _layers(bits=4)).read_bytes().startswith(PNG)


def test_source_notes_come_from_the_model():
    source = types.SimpleNamespace(description="GGUF, Q8_0", weights_quantized=True)
    fields = {k: v for k, v in vars(_report()).items() if k not in ("source", "weights_quantized")}
    report = Report.of(types.SimpleNamespace(source=source), **fields)
    assert report.weights_quantized and report.source == "GGUF, Q8_0"
    assert not Report.of(types.SimpleNamespace(source=None), **fields).weights_quantized


def test_model_card():
    card = model_card(_report(weights_quantized=True, source="GGUF, Q4_K_M"), base_model="google/gemma-3-270m")
    assert card.startswith("---\nlicense: gemma\n") and "base_model: google/gemma-3-270m" in card
    for part in ("https://ai.google.dev/gemma/terms", "from_pretrained", "GGUF, Q4_K_M", "distilled", "4.00× smaller"):
        assert part in card


def test_tables_are_aligned():
    lines = table(["", "a"], [["long name", "1"], ["x", "12,345"]]).splitlines()
    assert len({len(line) for line in lines}) == 1 and lines[1] == "|:----------|-------:|"


def test_loss_files_of_every_kind(tmp_path):
    path = tmp_path / "metrics.csv"
    assert read_losses(path) is None
    path.write_text("step,other\n1,2\n")
    assert read_losses(path) is None
    path.write_text("step,distill/kl_loss\n1,\n5,2.5\n")
    assert read_losses(path) == ([5.0], [2.5])
    path.write_text("")
    assert read_losses(path) is None
    plot_losses(tmp_path / "one.png", {"x": ([1, 2, 3], [0.0, math.nan, 1.0])})


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_text(path, "old")

    def fail(self, *_, **__):
        self.write_bytes(b"ha")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(UserError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_caches_that_are_slow_to_read_are_said_to_be():
    joint = [row | {"form_k": "joint", "form_v": "joint"} for row in _layers(bits=4)]
    exact = [row | {"bits": 16} for row in joint]
    for layers, told in ((joint, True), (_layers(bits=4), False), (exact, False)):
        for text in (render_markdown(_report(layers=layers)), model_card(_report(layers=layers))):
            assert ("`budget=fast`" in text) == told
    assert "`budget=fast`" not in model_card(_report(layers=joint), export_format="dense")
