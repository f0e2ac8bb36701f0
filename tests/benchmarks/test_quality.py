"""The quality benchmark on a tiny model: every cell measured, resumed, and stopped in time."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from quality_runs import prepare, without_times

from tpa_train.benchmarks import command, quality
from tpa_train.benchmarks.journal import Journal
from tpa_train.benchmarks.measuring import Measurements, copies_of, open_text, rows_of
from tpa_train.benchmarks.quality import CELL, FREE, QualitySettings, plan, render, run
from tpa_train.benchmarks.quality_plots import frontier_points, position_curves
from tpa_train.benchmarks.students import compose_settings, measure_all, open_session, solve
from tpa_train.checkpoints import load_pretrained
from tpa_train.data.compact import export_compact
from tpa_train.data.packing import pack
from tpa_train.data.settings import DataSettings
from tpa_train.errors import UserError
from tpa_train.evaluation.suites import Evaluator
from tpa_train.recovery import recover

OWN = dict(mixes=["rank+bits", "rank", "dense-int4"], ratios=[5.0], rank_ratios=[2.0, 50.0], distill_tokens=[0, 256],
           layerwise_tokens=256, copy=[20, 40], position_tokens=512, position_context=256)  # fmt: skip
CELLS = [("rank+bits", None, 5.0, 0), ("rank+bits", None, 5.0, 256), ("rank", None, 2.0, 0), ("rank", None, 2.0, 256),
         ("rank", None, 50.0, 0), ("rank", None, 50.0, 256), ("dense-int4", "global", None, 0),
         ("dense-int4", "all", None, 0)]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The finished benchmark's file, made through the command line; not to be changed."""
    tiny = prepare(tmp_path_factory.mktemp("quality"))
    tiny.own = dict(tiny.shared, **OWN, mcq=[tiny.questions])
    tiny.out = tiny.folder / "quality.json"
    lists = {key: [value] if isinstance(value, str) else value for key, value in tiny.own.items()}
    texts = [f"{key}={v}" for key in ("options", "mixes", "mcq", "texts") for v in lists[key]]
    others = [f"{k}={v}" for k, v in tiny.own.items() if k not in ("options", "mixes", "mcq", "texts")]
    command.main(["quality", *texts, *(o.replace(" ", "") for o in others), f"out={tiny.out}"])
    tiny.record = json.loads(tiny.out.read_text())
    tiny.rows = tiny.record["rows"]
    return tiny


def start(made, out, **changed):
    """Runs the benchmark on a file, as the command line would."""
    settings = QualitySettings(**(made.own | changed))
    record = lambda rows: {"settings": vars(settings), "rows": rows}  # noqa: E731
    return run(settings, Journal(out, record, CELL, FREE))


def row_of(made, *cell):
    return next(row for row in made.rows if tuple(row[name] for name in CELL) == cell)


def test_every_cell_has_a_row(made):
    assert [tuple(row[name] for name in CELL) for row in made.rows] == [("teacher", None, None, 0), *CELLS]
    assert plan(QualitySettings(**made.own)) == [quality.Cell(*cell) for cell in CELLS]
    for row in made.rows:
        if row["target_ratio"] == 50.0:
            assert row["error"].startswith("UserError: budget.cache_ratio=50 cannot be met") and "kl" not in row
            continue
        assert row["cache_ratio"] == row["dense_bytes"] / row["cache_bytes"] and row["cache_context"] == 512
        assert row["teacher_valid8k_ppl"] == made.rows[0]["valid8k_ppl"]
        assert row["valid8k_ppl_ratio"] == row["valid8k_ppl"] / row["teacher_valid8k_ppl"]
        assert row["wikitext2_ppl_ratio"] == row["wikitext2_ppl"] / row["teacher_wikitext2_ppl"]
        assert (row["valid_context"], row["wikitext2_context"]) == (128, 64)
        assert set(row["copy_accuracy"]) == set(row["teacher_copy_accuracy"]) == {"20", "40"}
        assert [part["to"] for part in row["perplexity_by_position"]] == [32, 64, 128, 256]
        assert set(row["mcq_delta_points_by_set"]) == {"colours"}
        delta = 100 * (row["mcq_accuracy"]["colours"] - row["teacher_mcq_accuracy"]["colours"])
        assert row["mcq_delta_points"] == pytest.approx(delta)
        seconds = sum(v for k, v in row.items() if k.endswith("_seconds") and k != "evaluation_seconds")
        assert row["minutes"] == pytest.approx(seconds / 60)
        assert row["train_ppl_ratio"] == row["train_ppl"] / row["teacher_train_ppl"] and row["train_tokens"] > 100
        assert (row["kl"] > 0) == (row["kl_wikitext2"] > 0) == (row["kl_train"] > 0) == (row["mix"] != "teacher")
        assert row["tokens"] == (512 if row["distill_tokens"] else 0), "layer-wise and end to end"


def test_students_are_what_their_cells_say(made):
    assert row_of(made, "rank+bits", None, 5.0, 0)["cache_ratio"] >= 5
    rank = row_of(made, "rank", None, 2.0, 256)
    assert rank["cache_ratio"] >= 2 and rank["specs"] and all("@ 16" in spec for spec in rank["specs"].values())
    assert set(row_of(made, "dense-int4", "global", None, 0)["specs"]) == {"5"}
    everything = row_of(made, "dense-int4", "all", None, 0)
    assert len(everything["specs"]) == 7 and set(everything["specs"].values()) == {"K dense 32 @ 4   V dense 32 @ 4"}
    one_shot, recovered = (row_of(made, "rank", None, 2.0, tokens) for tokens in (0, 256))
    assert one_shot["specs"] == recovered["specs"] and one_shot["kl"] != recovered["kl"]


def test_a_cell_is_what_a_run_of_its_own_gives(made, tmp_path):
    """Sharing teacher, calibration and layer-wise stage changes nothing."""
    settings = QualitySettings(**made.own)
    options = ("budget.cache_ratio=5", "recipe.layerwise.tokens=256", "recipe.distill.tokens=256")
    session = open_session(compose_settings(settings, *options), tmp_path)
    measure_all(session)
    student = solve(session).student(session.teacher)
    for stage in ("layerwise", "distill"):
        recover(session, student, stage)
    result = Measurements(session, settings).measure(student)
    row = row_of(made, "rank+bits", None, 5.0, 256)
    for key in ("kl", "top1", "valid8k_ppl", "kl_wikitext2", "copy_accuracy"):
        assert row[key] == result[key], key


def test_a_half_written_benchmark_goes_on(made, tmp_path, monkeypatch):
    """Rows that are there are kept, failed ones tried again; minutes= stops after the first student of a start."""
    out, measured = tmp_path / "half.json", []
    half = [row for row in made.rows if row["mix"] in ("teacher", "dense-int4") or row["target_ratio"] == 50.0]
    out.write_text(json.dumps(made.record | {"rows": half}))
    own = Measurements.measure

    def watched(self, student, name="student"):
        measured.append(name)
        return own(self, student, name)

    monkeypatch.setattr(Measurements, "measure", watched)
    changed = {"rank_ratios": [2.0], "mixes": ["rank+bits", "dense-int4", "rank"]}
    assert len(start(made, out, minutes=1e-9, **changed)) == len(half) + 1
    assert measured == ["rank+bits ÷5, 0 tokens"]
    assert len(json.loads(out.read_text())["rows"]) == len(half) + 1
    measured.clear()
    rows = start(made, out, **changed)
    assert measured == ["rank+bits ÷5, 256 tokens", "rank ÷2, 0 tokens", "rank ÷2, 256 tokens"]
    key = lambda row: json.dumps([row[name] for name in CELL])  # noqa: E731
    assert sorted(without_times(rows), key=key) == sorted(without_times(made.rows), key=key)


def test_a_finished_benchmark_only_draws(made, tmp_path, monkeypatch):
    out = shutil.copy(made.out, tmp_path / "copy.json")
    monkeypatch.setattr(quality, "open_session", lambda *_: pytest.fail("the model was loaded"))
    assert start(made, out, rank_ratios=[2.0]) == made.rows
    for name in ("copy.png", "copy-positions.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_what_is_drawn(made):
    measured = [row for row in made.rows if "error" not in row]
    points = frontier_points(measured[1:])
    assert [p["mix"] for p in points][:2] == ["ours, rank+bits, one-shot", "ours, rank+bits, 0.0M tokens"]
    assert [(p["mix"], p["name"]) for p in points][-1] == ("dense int4, all", "int4, all")
    curves = position_curves(measured)
    assert [(r["mix"], r["tokens"]) for r in curves] == [
        ("rank+bits", 512), ("rank", 512), ("dense-int4", 0), ("dense-int4", 0)
    ]  # fmt: skip


def test_the_table(made):
    text = render(made.rows)
    assert len(text.split("\n\n")[0].splitlines()) == 2 + len(made.rows) - 2
    assert "| dense-int4 (all)    |" in text and "copy 20" in text
    assert "rank ÷50, 256 tokens: UserError: budget.cache_ratio=50 cannot be met" in text


def test_other_settings_are_another_benchmark(made):
    with pytest.raises(UserError, match="measured with copy_count=1, not 2"):
        start(made, made.out, copy_count=2)


@pytest.mark.parametrize("changed,message", [
    ({"mixes": ["ranks"]}, "did you mean 'rank'"), ({"ratios": [1.0]}, "above 1"),
    ({"distill_tokens": [-1]}, "must not be negative"), ({"copy_count": 0}, "copy_count=0"),
    ({"valid": "nowhere.txt"}, "no such file"), ({"texts": ["a/x.txt"]}, "no such file"),
    ({"mcq": ["nowhere.jsonl"]}, "cannot read the suite"),
    ({"options": ["recipe.distil.tokens=1"]}, "did you mean"), ({"valid_context": 100_000}, "context"),
])  # fmt: skip
def test_mistakes_are_found_before_anything_is_measured(made, tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        start(made, tmp_path / "new.json", **changed)
    assert not (tmp_path / "new.json").exists()


# ------------------------------------------------------------------------------------------------------------ measuring


def test_all_of_a_packed_text_is_used(made, tmp_path):
    """Both splits of a packed file are held-out text; a plain text is not split."""
    tokenizer = load_pretrained(made.shared["model"]).tokenizer
    whole = open_text(made.shared["valid"], tokenizer, str(tmp_path))
    assert [stream.split for stream in whole] == ["train"]
    settings = DataSettings(kind="text", path=made.shared["valid"], cache_dir=str(tmp_path), split_chars=4000)
    packed = export_compact(pack(settings, tokenizer, False), tmp_path / "valid.npz")
    streams = open_text(str(packed), tokenizer, str(tmp_path))
    assert [stream.split for stream in streams] == ["train", "heldout"]
    rows = rows_of(streams, 64, 10**9, "valid_context")
    assert len(rows) == sum(len(stream) // 64 for stream in streams)
    assert all(int(row["document_ids"].max()) == 0 for row in rows), "documents see each other"
    few = rows_of(streams, 64, 640, "valid_context")
    assert len(few) == 10 and few.indices[0] == 0 and few.indices[-1] >= len(streams[0]) // 64
    copies = copies_of(streams, 30, 3)
    assert copies.shape == (3, 61) and torch.equal(copies[:, 1:31], copies[:, 31:])
    with pytest.raises(UserError, match="copy=1000000"):
        copies_of(streams, 10**6, 1)


def test_teacher_is_measured_once(made, tmp_path, monkeypatch):
    """Its answers and copies serve every student."""
    settings = QualitySettings(**(made.own | {"mcq": []}))
    session = open_session(compose_settings(settings), tmp_path)
    measurements, names = Measurements(session, settings), []
    own = Evaluator.evaluate

    def watched(self, student, name, *args):
        names.append((name, student is None))
        return own(self, student, name, *args)

    monkeypatch.setattr(Evaluator, "evaluate", watched)
    row = measurements.measure(None, "teacher")
    assert names == 2 * [("teacher", True)], "WikiText-2 and the other text are left to measure"
    assert row["kl"] == 0 and row["top1"] == 1 and row["copy_accuracy"] == row["teacher_copy_accuracy"]
    assert "mcq_delta_points" not in row and "perplexity_by_position" not in row
