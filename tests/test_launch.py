"""A whole run of recipe=distill on a tiny model: what it leaves behind, and what the scripts make of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_runs import ROOT, STEPS, files, weights

from tpa_train.checkpoints import load_pretrained
from tpa_train.checkpoints.command import MULTIPLIED_OUT, export_run
from tpa_train.checkpoints.command import main as export
from tpa_train.errors import UserError
from tpa_train.evaluation.command import main as evaluate
from tpa_train.launch import main
from tpa_train.recipes import load_settings
from tpa_train.results import finished_stages, rebuild_student
from tpa_train.runs import RunFolder
from tpa_train.tpa.command import main as generate
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.generation import generate as continue_text
from tpa_train.tpa.generation import stream_ids
from tpa_train.trainers import LOGGERS

IDS = torch.arange(2, 62)[None]


@pytest.fixture(scope="module")
def report(finished):
    return json.loads((finished / "report.json").read_text())


def rebuilt(run, stage=None):
    settings = load_settings(run)
    return rebuild_student(RunFolder(run, resume=True), settings, load_pretrained(settings.model.path), stage)


def test_report_has_the_documented_schema(report, tiny, finished):
    schema = {"model", "budget", "cache", "stages", "layers", "versions", "command"}
    assert schema <= set(report)
    assert report["budget"] == {"cache_ratio": 5.0, "context": 512} and report["model"] == str(tiny.model)
    assert {"context", "dense_bytes", "tpa_bytes", "ratio"} <= set(report["cache"])
    for stage in report["stages"]:
        assert {"name", "tokens", "seconds", "perplexity", "kl", "top1", "copy_accuracy"} <= set(stage)
        assert set(stage["copy_accuracy"]) == {"20", "40"}
    layer = {"index", "kind", "form_k", "rank_k", "form_v", "rank_v", "bits", "bytes_per_token"}
    assert len(report["layers"]) == 7 and all(layer <= set(row) for row in report["layers"])
    assert report["command"].startswith("python scripts/train.py recipe=distill") and "torch" in report["versions"]


def test_stages_are_measured_in_order(report):
    stages = report["stages"]
    assert [s["name"] for s in stages] == ["teacher", "factorized", "layerwise", "distilled"]
    assert stages[0]["kl"] == 0 and stages[0]["top1"] == 1
    assert [s["tokens"] for s in stages[2:]] == [64 * 2 * STEPS] * 2
    kl = [s["kl"] for s in stages]
    assert kl[1] > kl[2] > 0 and kl[1] > kl[3] > 0


def test_the_budget_is_kept(report):
    cache = report["cache"]
    assert cache["context"] == 512 and cache["ratio"] == cache["dense_bytes"] / cache["tpa_bytes"] >= 3
    tokens = {"global": 512, "local": 8}
    assert sum(row["bytes_per_token"] * tokens[row["kind"]] for row in report["layers"]) == cache["tpa_bytes"]


def test_the_run_folder(finished):
    assert {"report.md", "report.json", "run.yaml", "progress.json", "plots/quality.png", "plots/losses.png",
            "plots/ranks.png", "plots/layer_errors.png"} <= files(finished)  # fmt: skip
    assert files(finished / "export") == {"README.md", "config.json", "model.safetensors", "tokenizer.model"}
    assert not files(finished / "checkpoints"), "finished stages need no checkpoint"
    assert not [name for name in files(finished) if "partial" in name or name.endswith(".tmp")]
    card = (finished / "export" / "README.md").read_text()
    assert "https://ai.google.dev/gemma/terms" in card and "distilled" in card


def test_the_export_computes_what_the_student_computes(finished):
    student, stage = rebuilt(finished)
    loaded = Gemma3ForMultimodalLMwithTPA.from_pretrained(finished / "export")
    assert stage == "distilled" and loaded.converted_layers == student.converted_layers != []
    assert torch.equal(student(IDS), loaded(IDS))
    assert loaded.generate("hello world", max_tokens=5) == student.generate("hello world", max_tokens=5)


def test_the_same_run_twice_is_the_same(finished, tiny, tmp_path):
    assert main([*tiny.options, f"run_dir={tmp_path / 'again'}"]) == 0  # recipe=distill is the default
    assert weights(tmp_path / "again") == weights(finished)
    first, second = (json.loads((run / "report.json").read_text()) for run in (finished, tmp_path / "again"))
    for ours, theirs in zip(first["stages"], second["stages"], strict=True):
        assert (ours["kl"], ours["perplexity"]) == (theirs["kl"], theirs["perplexity"])


def test_bfloat16_and_all_layers(tiny, tmp_path):
    """The reduced precision of new CPUs, 4 bits, and a budget that reaches into the local layers."""
    run = tmp_path / "run"
    options = ["recipe=factorize", "trainer.precision=bf16", "budget.bits=4", "budget.cache_ratio=6"]
    assert main([*tiny.options, *options, f"run_dir={run}"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert report["cache"]["ratio"] >= 6 and {row["bits"] for row in report["layers"]} == {4}
    assert [s["name"] for s in report["stages"]] == ["teacher", "factorized"] and len(report["samples"]) == 3


def test_export_of_each_stage(finished, tmp_path, capsys):
    export([f"checkpoint={finished}", f"out={tmp_path / 'last'}"])
    assert "exported the distilled model" in capsys.readouterr().out
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == weights(finished)
    stage, folder = export_run(finished, tmp_path / "first", stage="factorized", dtype="float32")
    assert stage == "factorized"
    loaded = Gemma3ForMultimodalLMwithTPA.from_pretrained(folder)
    assert torch.equal(loaded(IDS), rebuilt(finished, "factorized")[0](IDS))
    card = (folder / "README.md").read_text()
    assert "factorized" in card and "**distilled**" not in card, "the card must not quote another stage's figures"


def test_exporting_needs_no_logger(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "run.yaml").write_text((run / "run.yaml").read_text().replace("kind: csv", "kind: wandb"))
    monkeypatch.setitem(LOGGERS, "wandb", ("no_such_package",))
    assert load_settings(run).logger.kind == "wandb" and export_run(run, tmp_path / "out")[0] == "distilled"


def load_native(folder):
    model = Gemma3ForMultimodalLMwithTPA.from_pretrained(folder)
    return model, lambda ids, n: torch.cat(list(stream_ids(model, ids.tolist(), n))).tolist()


def load_gguf(path):
    model = load_pretrained(path)
    return model, lambda ids, n: torch.cat(list(stream_ids(model, ids.tolist(), n))).tolist()


def load_transformers(folder):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=folder.name == "hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=folder.name == "hf")
    assert tokenizer("hello the world")["input_ids"] == load_native(folder.parent / "export")[0].tokenizer.encode(
        "hello the world"
    )

    def continued(ids, count):
        options = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
        return model.generate(ids, **options)[0, ids.shape[1] :].tolist()

    return (lambda ids: model(ids).logits), continued


def _same_but_for_ties(student, continued, count, tied):
    """Greedy tokens are the student's; after one that scores less than ``tied`` below its best, again from its own."""
    expected, done = torch.cat(list(stream_ids(student, IDS.tolist(), count))).tolist(), 0
    for _ in range(5):
        ids = torch.cat((IDS, torch.tensor([expected[:done]], dtype=IDS.dtype)), dim=1)
        found = continued(ids, count - done)
        if found == expected[done:]:
            return
        wrong = next(i for i, (a, b) in enumerate(zip(found, expected[done:], strict=True)) if a != b)
        ids = torch.cat((ids, torch.tensor([found[:wrong]], dtype=IDS.dtype)), dim=1)
        scores, own = student(ids)[0, -1], expected[done + wrong]
        assert scores[own] - scores[found[wrong]] < tied, (done + wrong, found[wrong], own)
        done += wrong + 1
        if done == count:
            return
    raise AssertionError("more ties than chance has")


@torch.no_grad()
@pytest.mark.parametrize(
    "form,load,said",
    [
        ("native", load_native, "for the scripts"),
        ("hf", load_transformers, "the cache as small"),
        ("dense", load_transformers, "a cache as large as the original's"),
        ("gguf", load_gguf, "llama.cpp"),
    ],
)
def test_every_format_says_what_the_trained_student_says(finished, tmp_path, capsys, form, load, said):
    """Logits, and 200 tokens; formats that are multiplied out round nothing, so neither does the student there."""
    (tmp_path / "export").symlink_to(finished / "export")
    out = tmp_path / ("m.gguf" if form == "gguf" else form)
    export([f"checkpoint={finished}", f"out={out}", f"format={form}"])
    assert said in capsys.readouterr().out
    student, _ = rebuilt(finished)
    if form in MULTIPLIED_OUT:
        specs = [dataclasses.replace(spec, bits_k=16, bits_v=16) for spec in student.specs]
        unrounded = Gemma3ForMultimodalLMwithTPA(student.config, specs).eval()
        unrounded.load_state_dict(student.state_dict())
        student = unrounded
    logits, continued = load(out)
    error = (logits(IDS) - student(IDS)).abs()
    # transformers sums in another order: a number between two codes of 8 bits may fall on either side.
    assert error.max() < (1e-2 if form == "hf" else 1e-3) and error.median() < 5e-4
    _same_but_for_ties(student, continued, 200, tied=1e-2 if form == "hf" else 0.0)
    if form in ("hf", "dense"):
        card = (out / "README.md").read_text()
        assert "Gemma Terms of Use" in card
        assert ("trust_remote_code=True" if form == "hf" else "cache is as large as the original's") in card


def test_export_refuses(finished, tiny, tmp_path):
    before = files(finished)
    with pytest.raises(UserError, match="not a run folder"):
        export([f"checkpoint={tiny.model}", f"out={tmp_path / 'x'}"])
    for options, message in (
        (["format=onnx"], "format"),
        (["dtype=float16"], "dtype=float16 is for format=gguf"),
        (["format=gguf"], "ends in .gguf"),
    ):
        with pytest.raises(UserError, match=message):
            export([f"checkpoint={finished}", f"out={tmp_path / 'x'}", *options])
    with pytest.raises(UserError, match="already exists and is not empty"):
        export([f"checkpoint={finished}", f"out={finished}"])
    begun = tmp_path / "begun"
    RunFolder(begun).start(load_settings(finished), "")
    with pytest.raises(UserError, match="no stage of this run is finished yet"):
        export([f"checkpoint={begun}", f"out={tmp_path / 'x'}"])
    assert finished_stages(RunFolder(begun, resume=True), load_settings(begun)) == []
    assert not (tmp_path / "x").exists() and files(finished) == before


def test_evaluate_reads_a_run_folder(finished, tiny, capsys):
    evaluate([f"model={finished}", f"data.path={tiny.text}", f"data.cache_dir={tiny.cache}", "context=64",
              "tokens=256", "copy=20", "cache_context=512", "device=cpu", "json=true"])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert result["teacher"] == str(tiny.model) and result["stages"][1]["kl"] > 0 and result["cache"]["ratio"] >= 3


def test_generate_streams_what_the_model_writes(finished, capsys):
    expected = Gemma3ForMultimodalLMwithTPA.from_pretrained(finished / "export").generate("the hello", max_tokens=9)[0]
    for model in (finished, finished / "export"):
        generate([f"model={model}", "prompt=the hello", "max_tokens=9", "device=cpu"])
        printed = capsys.readouterr()
        assert printed.out == expected + "\n" and "tokens/s" in printed.err and "bytes" in printed.err
    stop = expected[2:6]
    generate([f"model={finished}", "prompt=the hello", "max_tokens=9", "device=cpu", f"stop={stop}", "stop=never"])
    assert capsys.readouterr().out == expected[: expected.find(stop)] + "\n"
    for wrong in ("max_tokens=0", "temperature=-1", "top_k=0", "top_p=2", "min_p=-1", "repetition_penalty=0", "stop=",
                  "dtype=int8", "device=toaster"):  # fmt: skip
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            generate([f"model={finished}", "prompt=x", wrong])


def script(name, *arguments, stdin=""):
    return subprocess.run([sys.executable, ROOT / "scripts" / name, *arguments], input=stdin, capture_output=True,
                          text=True, timeout=120)  # fmt: skip


def test_scripts_as_a_person_runs_them(finished, tiny, tmp_path):
    done = script("generate.py", f"model={tiny.model}", "prompt=-", "max_tokens=4", "device=cpu", stdin="the hello\n")
    expected = continue_text(load_pretrained(tiny.model), "the hello", max_tokens=4)[0]
    assert done.returncode == 0 and done.stdout == expected + "\n", done.stderr
    done = script("export.py", f"checkpoint={tmp_path}", f"out={tmp_path / 'x'}")
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} is not a run folder: there is no run.yaml in it.\n"


def test_help_lists_what_can_be_chosen(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    for part in ("recipe=distill", "budget=ratio4", "model=gemma3_270m", "budget.cache_ratio", "resume=true"):
        assert part in said
