"""The evaluate script from arguments to table and JSON, on tiny models."""

import json

import pytest
import torch
from evaluation_models import dense_model, tpa_model

from tpa_train.errors import UserError
from tpa_train.evaluation import command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run folder whose export loads as a tiny model."""
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    teacher = dense_model()
    monkeypatch.setattr(command, "load_models", lambda *_: (teacher, tpa_model(teacher), "the/teacher"))
    return tmp_path / "run"


@pytest.fixture
def arguments(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes a long text. " * 60)
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"context": "a", "choices": ["b", "c"], "label": 1}\n' * 3)
    return [
        f"model={folder}", f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}", "context=64", "tokens=256",
        "copy=20,40", f"suite.path={suite}", "cache_context=1000", "device=cpu",
    ]  # fmt: skip


def test_json_only(arguments, capsys):
    command.main([*arguments, "json=true"])
    result = json.loads(capsys.readouterr().out)
    teacher, student = result["stages"]
    assert (teacher["kl"], teacher["top1"]) == (0.0, 1.0) and student["kl"] > 0
    assert student["evaluated_tokens"] == 4 * 63 and set(student["copy_accuracy"]) == {"20", "40"}
    assert result["suites"][0]["teacher"]["questions"] == 3
    assert result["cache"]["ratio"] > 1 and result["teacher"] == "the/teacher"
    assert result["evaluation"]["joined_documents"] is True


def test_table(arguments, capsys):
    command.main(arguments)
    text = capsys.readouterr().out
    for part in ("| teacher |", "perplexity", "copy accuracy, 20 apart", "cache bytes at 1,000", "suite: accuracy",
                 "times smaller", "252 tokens scored"):  # fmt: skip
        assert part in text or part.replace("| ", "") in text, part


def test_without_text(arguments, capsys):
    command.main([*arguments, "tokens=0", "json=true"])
    result = json.loads(capsys.readouterr().out)
    assert result["stages"] == [] and len(result["suites"]) == 1


def test_tasks_of_the_harness_stand_side_by_side(arguments, capsys, monkeypatch):
    """With a stand-in for lm_eval's run; ``test_harness`` has the rest."""
    seen = []

    def run_tasks(model, tasks, limit, progress):
        seen.append((type(model).__name__, tasks, limit))
        return {"arc": {"acc,none": 0.25 * len(seen)}}

    monkeypatch.setattr(command, "run_tasks", run_tasks)
    monkeypatch.setattr(command, "load_harness", lambda: None)
    extra = ["suite.tasks=arc", "suite.tasks=piqa", "suite.limit=2", "tokens=0"]
    command.main([*arguments, *extra, "json=true"])
    result = json.loads(capsys.readouterr().out)
    assert result["tasks"] == {"teacher": {"arc": {"acc,none": 0.25}}, "student": {"arc": {"acc,none": 0.5}}}
    assert seen == [("Gemma3ForCausalLM", ["arc", "piqa"], 2), ("Gemma3ForMultimodalLMwithTPA", ["arc", "piqa"], 2)]
    command.main([*arguments, *extra])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "arc: acc" in line]
    assert [cell.strip() for cell in row.split("|")[2:4]] == ["0.75", "1"]


@pytest.mark.parametrize(
    "extra,message",
    [
        ("context=1", "context=1 must be at least 2"),
        ("context=100000", "less than one row"),
        ("copy=1K", "copy=1K: expected whole numbers"),
        ("copy=100000", "copy=100000 needs 100,000 tokens"),
        ("tokens=-1", "tokens=-1"),
        ("suite.limit=0", "suite.limit=0"),
        ("suite.path=missing.jsonl", "missing.jsonl"),
        ("data.path=missing.txt", "missing.txt"),
        ("device=toaster", "device=toaster"),
        ("dtype=float8", "not a choice"),
    ],
)
def test_mistakes(arguments, extra, message):
    with pytest.raises(UserError, match=message):
        command.main([*arguments, extra])


def test_the_export_is_found(folder, tmp_path):
    assert command.export_folder(folder) == command.export_folder(folder / "export") == folder / "export"
    with pytest.raises(UserError, match="no such folder"):
        command.export_folder(tmp_path / "nothing")
    with pytest.raises(UserError, match="no exported model"):
        command.export_folder(tmp_path)


def test_the_recorded_teacher(tmp_path):
    config = tmp_path / "config.json"
    for source, expected in (
        (None, None), ("gemma3_270m", "gemma3_270m"), (str(config), str(config)), ("/gone/away", None),
        ({"path": str(config)}, str(config)),
    ):  # fmt: skip
        config.write_text(json.dumps({"source": source}))
        assert command.recorded_source(tmp_path) == expected
    config.write_text("not json")
    assert command.recorded_source(tmp_path) is None


@pytest.mark.parametrize("words,row,distances", [(100, 101, [100]), (99, 100, []), (1, 2, [])])
def test_a_short_text_is_one_row_where_no_context_was_asked_for(words, row, distances, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a" * words)
    data = command.DataArgs(path=[str(path)], cache_dir=str(tmp_path / "cache"))
    options = (data, dense_model().tokenizer, 4096, 10**6, [100], 1, False)
    rows, copies = command.evaluation_text(*options, shorter=True, fewer=True)
    assert [r["token_ids"].shape[0] for r in rows] == [row] and list(copies) == distances
    with pytest.raises(UserError, match=f"has {row} tokens, less than one row; use context={row} or less"):
        command.evaluation_text(*options)


def test_copy_texts_repeat_themselves(arguments, tmp_path):
    data = command.DataArgs(path=[str(tmp_path / "text.txt")], cache_dir=str(tmp_path / "cache"))
    rows, copies = command.evaluation_text(data, dense_model().tokenizer, 64, 10**6, [30], 3, progress=False)
    text = copies[30]
    assert text.shape == (3, 61) and torch.equal(text[:, 1:31], text[:, 31:]) and bool((text[:, 0] == 2).all())
    assert rows[0]["token_ids"].shape == (64,) and len(rows) == 2401 // 64  # all of the text, not a held-out part
