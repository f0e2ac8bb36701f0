"""``--multirun``: planning, a whole sweep of a tiny model, going on with a stopped one, peers, and the frontier."""

from __future__ import annotations

import json
import shutil
import signal
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import files, send_signal_at, weights

from tpa_train import launch, pipeline, sweep
from tpa_train.errors import UserError
from tpa_train.evaluation.frontier import Frontier, frontier_row, frontier_table, write_frontier
from tpa_train.launch import main
from tpa_train.runs import RunFolder
from tpa_train.sweep import plan, split_values
from tpa_train.tpa.spec import LayerSpec

TWO, FIVE = "budget.cache_ratio=2", "budget.cache_ratio=5"
PNG = b"\x89PNG\r\n\x1a\n"


def without(options, *keys):
    return [option for option in options if not option.startswith(keys)]


def dense_at(config, bits):
    return [LayerSpec("dense", config.head_dim, "dense", config.head_dim, bits) for _ in range(config.num_layers)]


def fake_peers(session, budgets):
    """Two dense caches in fewer bits, one of them as a model; and a note of what was asked for."""
    from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA

    assert [(b.cache_ratio, b.context, b.bits) for b in budgets] == [(2.0, 512, (8,)), (5.0, 512, (8,))]
    yield "int8", "dense int8", dense_at(session.config, 8)
    four = Gemma3ForMultimodalLMwithTPA.from_dense(session.teacher, dense_at(session.config, 4), {})
    yield "int4", "dense int4", four


@pytest.fixture(autouse=True)
def no_peers(monkeypatch):
    """Only what a test asks for; the real peers have tests of their own."""
    monkeypatch.setattr(sweep, "frontier_peers", None)


@pytest.fixture(scope="module")
def options(tiny):
    """Of a sweep on the tiny model, its budgets left out."""
    return ["--multirun", "recipe=distill", *without(tiny.options, "budget.cache_ratio")]


@pytest.fixture(scope="module")
def swept(options, tmp_path_factory):
    """The folder of a finished sweep with peers, and how often the model was read; not to be changed."""
    folder, loads = tmp_path_factory.mktemp("swept") / "sweep", []
    with pytest.MonkeyPatch.context() as patch:
        original = pipeline.load_pretrained
        patch.setattr(pipeline, "load_pretrained", lambda *a, **k: loads.append(a) or original(*a, **k))
        patch.setattr(sweep, "frontier_peers", fake_peers)
        assert main([*options, "budget.cache_ratio=2,5", f"run_dir={folder}"]) == 0
    return SimpleNamespace(folder=folder, loads=loads)


def frontier(folder):
    return json.loads((folder / "frontier.json").read_text())


def resume(folder, *more):
    return main(["--multirun", f"run_dir={folder}", "resume=true", *more])


# ------------------------------------------------------------------------------------------------------------ planning


def test_values():
    assert split_values("2,3 ,4") == ["2", "3", "4"]
    assert split_values("[1000,[2,3]]") == ["[1000,[2,3]]"]
    assert split_values("[1],[2,3]") == ["[1]", "[2,3]"]
    assert split_values("'a,b',\"c,'d'\"") == ["'a,b'", "\"c,'d'\""]
    assert split_values("notes/*.{md,txt}") == ["notes/*.{md,txt}"]
    assert split_values("it's,mine") == ["it's", "mine"]
    assert split_values("") == [""]


@given(st.lists(st.lists(st.text("abc12.", min_size=1, max_size=3), min_size=1, max_size=3, unique=True), max_size=3))
def test_jobs_are_all_combinations(values):
    jobs = plan([f"option{i}={','.join(v)}" for i, v in enumerate(values)])
    expected = [()]
    for i, choices in enumerate(values):
        expected = [(*e, f"option{i}={choice}") for e in expected for choice in choices]
    assert [job.options for job in jobs] == expected
    assert len({job.name for job in jobs}) == len(jobs)


def test_names_and_mixes():
    jobs = plan(["seed=1", "budget.cache_ratio=2,4", "--budget.bits=8,16", "evaluation.copy=[1,2]"])
    assert [job.name for job in jobs] == [f"budget.cache_ratio={r},budget.bits={b}" for r in (2, 4) for b in (8, 16)]
    assert jobs[1].options == ("seed=1", "budget.cache_ratio=2", "budget.bits=16", "evaluation.copy=[1,2]")
    assert jobs[3].mix("distilled") == "ours, recovered, budget.bits=16"
    assert plan(["budget=ratio2,ratio4"])[0].mix("factorized") == "ours, one-shot"
    assert [job.name for job in plan(["seed=1"])] == ["run"]
    names = [job.name for job in plan(["model.path=/a/b,/a:b," + "x" * 300])]
    assert names[:2] == ["model.path=_a_b", "model.path=_a_b-1"] and len(names[2]) < 200


@pytest.mark.parametrize(
    "given_options,message",
    [
        (["seed=1,,2"], "seed=1,,2 has an empty value between its commas"),
        (["seed=1,2,"], "has an empty value"),
        (["seed=1,2,1"], "seed=1,2,1 names 1 twice"),
        (["seed=1,2", "seed=3"], "seed is given twice"),
    ],
)
def test_lists_that_are_refused(given_options, message):
    with pytest.raises(UserError, match=message):
        plan(given_options)


# --------------------------------------------------------------------------------------------------------------- sweep


def test_every_job_is_an_ordinary_run(swept, finished):
    """To the byte, although the second one got its teacher from the first."""
    assert len(swept.loads) == 1, "the teacher is read once"
    assert {p.name for p in swept.folder.iterdir() if p.is_dir()} - {"logs"} == {TWO, FIVE}
    for job in (TWO, FIVE):
        assert {"report.md", "report.json", "run.yaml", "export/model.safetensors"} <= files(swept.folder / job)
    assert weights(swept.folder / FIVE) == weights(finished) != weights(swept.folder / TWO)
    command = json.loads((swept.folder / FIVE / "report.json").read_text())["command"]
    assert command.startswith("python scripts/train.py recipe=distill") and command.endswith(str(swept.folder / FIVE))


def test_the_frontier_is_what_was_measured(swept):
    content = frontier(swept.folder)
    rows = content["rows"]
    assert [row["bytes"] for row in rows] == sorted(row["bytes"] for row in rows)
    assert {(row["name"], row["mix"], row["stage"]) for row in rows} == {
        (TWO, "ours, one-shot", "factorized"), (TWO, "ours, recovered", "distilled"),
        (FIVE, "ours, one-shot", "factorized"), (FIVE, "ours, recovered", "distilled"),
        ("int8", "dense int8", "factorized"), ("int4", "dense int4", "factorized"),
    }  # fmt: skip
    for row in rows:
        assert set(row) == {"name", "mix", "cache_ratio", "bytes", "perplexity", "teacher_perplexity", "kl", "top1",
                            "copy_accuracy", "tokens", "stage"}  # fmt: skip
        if not row["mix"].startswith("ours"):
            continue
        report = json.loads((swept.folder / row["name"] / "report.json").read_text())
        stage = next(s for s in report["stages"] if s["name"] == row["stage"])
        assert row["bytes"] == report["cache"]["tpa_bytes"] and row["cache_ratio"] == report["cache"]["ratio"]
        assert all(row[key] == stage[key] for key in set(row) & set(stage) - {"name"})
    assert content["context"] == 512 and content["teacher"]["kl"] == 0
    assert content["dense_bytes"] == next(r["bytes"] * r["cache_ratio"] for r in rows)
    assert (swept.folder / "frontier.png").read_bytes().startswith(PNG)
    assert f"teacher's perplexity {content['teacher']['perplexity']:.4g}" in (swept.folder / "frontier.md").read_text()


def test_peers_are_measured_as_the_runs_are(swept):
    """Bytes by the formula written out: 7 layers, 2 heads of 32 numbers, 512 tokens in one layer and 8 in six."""
    rows = {row["name"]: row for row in frontier(swept.folder)["rows"]}
    tokens = 512 + 6 * 8
    assert rows["int8"]["bytes"] == tokens * 2 * 2 * (32 + 4) and rows["int4"]["bytes"] == tokens * 2 * 2 * (16 + 4)
    assert rows["int8"]["cache_ratio"] == 64 / 36
    assert 0 < rows["int8"]["kl"] < rows["int4"]["kl"]
    for name in ("int8", "int4"):
        assert rows[name]["teacher_perplexity"] == rows[TWO]["teacher_perplexity"]
        assert set(rows[name]["copy_accuracy"]) == {"20", "40"}
        assert f"| {name} " in (swept.folder / "frontier.md").read_text()


def test_resuming_a_finished_sweep_repeats_nothing(swept, options, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("there is nothing left to do")

    before = {p: p.read_bytes() for p in swept.folder.rglob("*") if p.is_file() and p.parent != swept.folder}
    table, measured = (swept.folder / "frontier.md").read_text(), (swept.folder / "peers.json").read_text()
    monkeypatch.setattr(pipeline, "load_pretrained", never)
    monkeypatch.setattr(sweep, "frontier_peers", never)
    (swept.folder / "frontier.md").unlink()
    assert resume(swept.folder) == 0
    assert resume(swept.folder, *options[1:], "budget.cache_ratio=2,5") == 0, "options may be repeated"
    assert capsys.readouterr().out.count("is finished") == 4
    assert {p: p.read_bytes() for p in swept.folder.rglob("*") if p.is_file() and p.parent != swept.folder} == before
    assert (swept.folder / "frontier.md").read_text() == table
    assert (swept.folder / "peers.json").read_text() == measured


def test_a_stopped_sweep_goes_on(swept, options, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a sweep"
    with monkeypatch.context() as patch:
        original = launch.Run.execute

        def execute(run):  # the signal comes in the second job
            if run.settings.budget.cache_ratio == 5:
                send_signal_at(patch, "distilled", 4)
            return original(run)

        patch.setattr(launch.Run, "execute", execute)
        assert main([*options, "budget.cache_ratio=2,5", f"run_dir={folder}"]) == 128 + signal.SIGTERM
    said = capsys.readouterr().out
    assert f"go on with: python scripts/train.py --multirun 'run_dir={folder}' resume=true" in said
    assert (folder / TWO / "report.json").exists() and not (folder / FIVE / "report.json").exists()
    first = {p: p.stat().st_mtime_ns for p in (folder / TWO).rglob("*")}
    assert resume(folder) == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / TWO).rglob("*")} == first
    assert weights(folder / FIVE) == weights(swept.folder / FIVE)
    ours = [row for row in frontier(swept.folder)["rows"] if row["mix"].startswith("ours")]
    assert frontier(folder)["rows"] == ours, "without peers, which nobody asked for"


def test_stopped_between_two_peers(swept, tmp_path, monkeypatch):
    folder = tmp_path / "sweep"
    shutil.copytree(swept.folder, folder)
    (folder / "peers.json").unlink()

    def half(session, budgets):
        yield next(iter(fake_peers(session, budgets)))
        raise UserError("the second one went wrong.")

    monkeypatch.setattr(sweep, "frontier_peers", half)
    with pytest.raises(UserError, match="peers: the second one went wrong"):
        resume(folder)
    assert [row["name"] for row in json.loads((folder / "peers.json").read_text())["rows"]] == ["int8"]
    assert "int8" not in (folder / "frontier.md").read_text(), "the table of the jobs is there all the same"
    evaluated, original = [], launch.Evaluator.evaluate
    monkeypatch.setattr(
        launch.Evaluator, "evaluate", lambda self, m, name, *a: evaluated.append(name) or original(self, m, name, *a)
    )
    monkeypatch.setattr(sweep, "frontier_peers", fake_peers)
    assert resume(folder) == 0
    assert evaluated == ["int4"], "what was measured is not measured again"
    assert frontier(folder)["rows"] == frontier(swept.folder)["rows"]


def test_jobs_that_were_not_measured_alike(tiny, options, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("no peer can be compared with both")

    monkeypatch.setattr(sweep, "frontier_peers", never)
    own, folder = without(options, "recipe=", "evaluation.tokens", "evaluation.copy="), tmp_path / "sweep"
    more = ["recipe=factorize", TWO, "evaluation.tokens=64,128", "evaluation.copy=[]"]
    assert main([*own, *more, f"run_dir={folder}"]) == 0
    rows = frontier(folder)["rows"]
    assert {row["mix"] for row in rows} == {f"ours, one-shot, evaluation.tokens={n}" for n in (64, 128)}
    assert rows[0]["kl"] != rows[1]["kl"]
    assert "The runs differ in evaluation" in (folder / "frontier.md").read_text()


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "more,message",
    [
        (["budget.cache_ration=2,5"], "unknown option 'budget.cache_ration'; did you mean 'budget.cache_ratio'?"),
        (["budget.cache_ratio=2,three"], "budget.cache_ratio: "),
        (["budget=ratio2,ratio33"], "budget=ratio33 is unknown; did you mean"),
        (["budget.cache_ratio=2,500"], "budget.cache_ratio=500: budget.cache_ratio=500 cannot be met"),
        (["budget.bits=8,5"], "budget.bits=5"),
        (["recipe.distill.scope=all,everything"], "recipe.distill.scope=everything: recipe.distill.scope=everything"),
        (["seed=1,1"], "seed=1,1 names 1 twice"),
        (["data.path=missing.txt,gone.txt"], "data.path=missing.txt: "),
        (["resume=perhaps"], "resume=perhaps: expected true or false"),
        (["resume=true"], "there is no sweep in"),
    ],
)
def test_refused_before_anything_runs(more, message, tiny, options, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.Run, "execute", lambda _: pytest.fail("a job ran"))
    with pytest.raises(UserError) as raised:
        main([*without(options, more[0].partition("=")[0] + "="), f"run_dir={tmp_path / 'sweep'}", *more])
    assert message in str(raised.value) and "\n" not in str(raised.value) and not files(tmp_path)


def test_a_job_that_fails_is_named(options, tmp_path, monkeypatch):
    original = launch.factorize_model

    def factorize(session, *arguments):
        if session.settings.budget.cache_ratio == 5:
            raise UserError("this text is too short.")
        return original(session, *arguments)

    monkeypatch.setattr(launch, "factorize_model", factorize)
    own = without(options, "recipe=")
    with pytest.raises(UserError, match=r"^budget.cache_ratio=5: this text is too short\.$"):
        main([*own, "recipe=factorize", "budget.cache_ratio=2,5", f"run_dir={tmp_path / 'sweep'}"])
    assert (tmp_path / "sweep" / TWO / "report.json").exists()


def test_folders_of_another_kind(swept, options, finished, tmp_path):
    with pytest.raises(UserError, match="already exists and is not empty; add resume=true to go on with it, or"):
        main([*options, "budget.cache_ratio=2,5", f"run_dir={swept.folder}"])
    with pytest.raises(UserError, match="contradicts the interrupted sweep, where it is budget.cache_ratio=2,5"):
        resume(swept.folder, "budget.cache_ratio=2,4")
    with pytest.raises(UserError, match="seed=3 contradicts the interrupted sweep, where it is not given"):
        resume(swept.folder, "seed=3")
    with pytest.raises(UserError, match="it holds a single run: leave --multirun out"):
        resume(finished)
    with pytest.raises(UserError, match="it holds a sweep: add --multirun"):
        main([f"run_dir={swept.folder}", "resume=true"])
    with pytest.raises(UserError, match="resume=true needs run_dir="):
        main(["--multirun", "resume=true"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        main([*options, f"run_dir={tmp_path / 'file'}"])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "sweep.json").write_text("[")
    with pytest.raises(UserError, match="sweep.json is damaged .*; start a new sweep"):
        resume(damaged)


@pytest.mark.parametrize("option", ["budget.cache_ratio=2,5", "recipe=distill,factorize", "evaluation.copy=[20],[40]"])
def test_several_values_without_multirun(option, tiny, tmp_path):
    with pytest.raises(UserError) as raised:
        main([*tiny.options, f"run_dir={tmp_path / 'run'}", option])
    assert str(raised.value) == f"{option} has several values; add --multirun to run them one after another."
    assert not files(tmp_path)


def test_the_default_folder(tiny, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep.Sweep, "execute", lambda self: RunFolder(self.folder).start(self._settings[0], ""))
    assert main([*options, "budget.cache_ratio=2,5"]) == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("model-distill-sweep-")


# ------------------------------------------------------------------------------------------------------------ frontier


def row(name, mix, cache_bytes, kl):
    measured = {"perplexity": 20.0, "teacher_perplexity": 16.0, "kl": kl, "top1": 0.875, "tokens": 12_345,
                "copy_accuracy": {"1000": 0.5, "200": float("nan")}}  # fmt: skip
    return frontier_row(name, mix, "distilled", cache_bytes, 4096, measured)


def test_the_table():
    lines = frontier_table([row("x", "ours", 1024, 0.25), row("y", "other", 2048, float("nan"))]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "mix", "cache", "×", "KL", "perplexity", "× teacher", "top-1", "copy 200",
                        "copy 1,000", "stage", "tokens"]  # fmt: skip
    assert cells[2] == ["x", "ours", "1.0 KiB", "4.00", "0.2500", "20", "1.250", "87.5%", "–", "50.0%", "distilled",
                        "12K"]  # fmt: skip
    assert cells[3][4] == "–"


@pytest.mark.parametrize("dense_bytes", [4096, None])
def test_what_cannot_be_drawn_is_left_out(dense_bytes, tmp_path):
    """Exact, broken and single points; and nothing at all to draw."""
    rows = [row("a", "ours, recovered", 1024, 0.1), row("b", "ours, recovered", 2000, 0.01),
            row("c", "exact", 4096, 0.0), row("d", "broken", 10, float("inf")),
            row("e", "dense int8", 2048, 0.003)]  # fmt: skip
    write_frontier(tmp_path, Frontier("m", rows, {"perplexity": 16.0}, dense_bytes=dense_bytes))
    assert (tmp_path / "frontier.png").read_bytes().startswith(PNG)
    assert [r["name"] for r in frontier(tmp_path)["rows"]] == ["d", "a", "b", "e", "c"]
    empty = tmp_path / "empty"
    write_frontier(empty, Frontier("m", rows[2:4], {"perplexity": None}))
    assert files(empty) == {"frontier.md", "frontier.json"}
    text = (empty / "frontier.md").read_text()
    assert "![" not in text and "teacher's perplexity –" in text
