"""Whatever is wrong is said in one clear sentence, before anything is written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import TINY, files, random_state, write_model

from tpa_train.errors import UserError
from tpa_train.launch import main
from tpa_train.tpa.command import main as generate
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA


@pytest.fixture
def refused(tiny, tmp_path):
    """Runs recipe=distill with more options; it must be refused with the message, in one sentence, writing nothing."""

    def run(message: str, *options: str) -> None:
        inputs = files(tmp_path)
        with pytest.raises(UserError, match=re.escape(message)) as raised:
            main([*tiny.options, f"run_dir={tmp_path / 'run'}", *options])
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
        assert files(tmp_path) == inputs
        assert not [n for n in os.listdir(tiny.cache) if n.startswith(".")] if tiny.cache.exists() else True

    return run


@pytest.mark.parametrize(
    "option,message",
    [
        ("recipe=distil", "recipe=distil is unknown; did you mean 'distill'?"),
        ("budget=ratio5000", "budget=ratio5000 is unknown; did you mean"),
        ("trainer=tpu", "trainer=tpu is unknown; did you mean"),
        ("budget.cache_ration=4", "unknown option 'budget.cache_ration'; did you mean 'budget.cache_ratio'?"),
        ("cache_ratio=4", "did you mean 'budget.cache_ratio'?"),
        ("+budget.new=4", "unknown option 'budget.new'"),
        ("resum=true", "did you mean 'resume'?"),
        ("distill", "'distill' is not of the form key=value"),
        ("budget.cache_ratio=four", "budget.cache_ratio"),
        ("trainer.batch_size=2.5", "trainer.batch_size"),
        ("resume=maybe", "resume: "),
        ("seed=", "seed= has no value"),
        ("evaluation.copy=[a]", "evaluation.copy"),
        ("recipe.stages=[factorise]", "did you mean 'factorize'?"),
        ("recipe.stages=[distill]", "must begin with factorize"),
        ("recipe.distill.scope=everything", "recipe.distill.scope=everything is unknown"),
        ("recipe.distill.divergence=jd", "recipe.distill.divergence=jd is unknown; did you mean 'jsd'?"),
        ("recipe.distill.temperature=0", "recipe.distill.temperature=0.0 must be a positive number"),
        ("export.dtype=int8", "export.dtype=int8 is unknown"),
        ("logger.kind=print", "logger=print is unknown"),
        ("trainer.precision=fp8", "trainer.precision=fp8 is unknown"),
        ("trainer.context=0", "trainer.context=0 must be at least 1"),
        ("trainer.context=1024", "trainer.context needs 1024 tokens, but the model's context is 512"),
        ("evaluation.copy=[300]", "evaluation.copy needs 601 tokens"),
        ("budget.cache_ratio=500", "budget.cache_ratio=500 cannot be met"),
        ("budget.cache_ratio=0.5", "would enlarge the cache"),
        ("budget.cache_ratio=nan", "budget.cache_ratio=nan is no ratio"),
        ("budget.cache_ratio=inf", "budget.cache_ratio=inf is no ratio"),
        ("budget.cache_ratio=-4", "budget.cache_ratio=-4 is no ratio"),
        ("budget.forms=null", "budget.forms=None must be auto, a form, or a list of them"),
        ("budget.forms=[4]", "budget.forms=[4] must be auto, a form, or a list of them"),
        ("budget.bits=5", "16, 8, 6, 4, 3, 2, not 5"),
        ("model.path=missing", "there is no checkpoint at missing"),
        ("model.name=gemma3_1b", "no packaged model 'gemma3_1b'"),
        ("data.path=missing.txt", "missing.txt"),
        ("data.max_tokens=-1", "data.max_tokens=-1"),
    ],
)
def test_options(option, message, refused):
    extra = ["model.path=null"] if option.startswith("model.name") else []
    refused(message, *extra, option)


def test_gpu_without_gpu(refused):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused("PyTorch sees no CUDA device", "trainer=gpu")


@pytest.mark.parametrize("content", ["", " \n\n \t "])
def test_empty_data(content, refused, tmp_path):
    (tmp_path / "empty.txt").write_text(content)
    refused("empty.txt", f"data.path={tmp_path / 'empty.txt'}")


def test_too_little_data(refused, tmp_path):
    (tmp_path / "short.txt").write_text("hello world")
    refused("tokens", f"data.path={tmp_path / 'short.txt'}")


def test_existing_run_folder(finished, tiny, tmp_path):
    before = files(finished)
    with pytest.raises(UserError, match="already exists and is not empty; add resume=true"):
        main([*tiny.options, f"run_dir={finished}"])
    assert files(finished) == before
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UserError, match="already exists and is not empty; choose another"):
        main([*tiny.options, f"run_dir={tmp_path}"])
    with pytest.raises(UserError, match="is a file"):
        main([*tiny.options, f"run_dir={tmp_path / 'mine'}"])
    assert files(tmp_path) == {"mine"}


def test_resume_without_a_run(tiny, tmp_path, finished):
    with pytest.raises(UserError, match="there is no run in"):
        main([f"run_dir={tmp_path / 'none'}", "resume=true"])
    with pytest.raises(UserError, match="resume=true needs run_dir="):
        main(["resume=true"])
    with pytest.raises(UserError, match="budget.cache_ratio=4 contradicts the interrupted run"):
        main([f"run_dir={finished}", "resume=true", "budget.cache_ratio=4"])
    assert files(tmp_path) == set()


def test_nan_weights(refused, tmp_path):
    state = random_state(TINY)
    state["layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    refused("up_proj.weight holds NaN or Inf", f"model.path={write_model(tmp_path / 'nan', state)}")


def test_truncated_model(refused, tmp_path):
    path = write_model(tmp_path / "model") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused("model.safetensors is damaged, cut short", f"model.path={path.parent}")


def test_wrong_family(refused, tmp_path):
    folder = write_model(tmp_path / "model")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    refused("holds a 'llama' model, not Gemma 3", f"model.path={folder}")


def test_a_pickle_that_runs_code(refused, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trap"),)

    (tmp_path / "model.ckpt").write_bytes(pickle.dumps({"model_state_dict": Trap()}))
    refused("model.ckpt", f"model.path={tmp_path / 'model.ckpt'}")
    torch.save({"model_state_dict": Trap()}, tmp_path / "model.ckpt")
    refused("model.ckpt", f"model.path={tmp_path / 'model.ckpt'}")


def test_no_tokenizer(refused, tmp_path):
    folder = write_model(tmp_path / "model", tokenizer=False)
    refused("has no tokenizer", f"model.path={folder}")
    with pytest.raises(UserError, match="has no tokenizer"):
        generate([f"model={folder}", "prompt=hello", "device=cpu"])


def _change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def _truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _poison(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "damage,message",
    [
        (_truncate, "model.safetensors is damaged or truncated"),
        (_poison, "'norm.weight' holds NaN"),
        (lambda folder: _change_config(folder, format_version=999), "has format version 999"),
        (lambda folder: _change_config(folder, layers=[]), "0 layer specifications were given for 7 layers"),
        (lambda folder: _change_config(folder, architecture={"depth": 3}), "unknown Gemma 3 config key 'depth'"),
        (lambda folder: _change_config(folder, layers=[{"form": "x"}]), "is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"x"), "not a SentencePiece model"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "has no tokenizer"),
    ],
)
def test_damaged_exports(damage, message, finished, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(finished / "export", folder)
    damage(folder)
    with pytest.raises(UserError, match=message):
        generate([f"model={folder}", "prompt=hello", "max_tokens=2", "device=cpu"])
    if "tokenizer" not in message:
        with pytest.raises(UserError, match=message):
            Gemma3ForMultimodalLMwithTPA.from_pretrained(folder)


def test_generate_without_a_model(tmp_path, finished):
    with pytest.raises(UserError, match="there is no checkpoint at"):
        generate([f"model={tmp_path / 'none'}", "prompt=x"])
    shutil.copy(finished / "run.yaml", tmp_path / "run.yaml")
    with pytest.raises(UserError, match="this run has no export yet"):
        generate([f"model={tmp_path}", "prompt=x"])
    with pytest.raises(UserError, match="exceed the model's context"):
        generate([f"model={finished}", "prompt=x", "max_tokens=512"])
    with pytest.raises(UserError, match="did you mean 'max_tokens'"):
        generate([f"model={finished}", "prompt=x", "max_token=512"])
