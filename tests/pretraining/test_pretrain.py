"""Pretraining a tiny model: the loss falls, the folder is what was trained, one command always gives the same bytes."""

from __future__ import annotations

import json
import math
import os
import pydoc_data.topics
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tpa_train.checkpoints import load_pretrained
from tpa_train.cli import run_main
from tpa_train.distillation.modules import schedule
from tpa_train.errors import UserError
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.pretraining import command, saving
from tpa_train.pretraining import module as module_file
from tpa_train.pretraining.command import main
from tpa_train.pretraining.module import PretrainModule, causal_loss, heldout_loss, new_model, next_targets
from tpa_train.pretraining.settings import OptimizerArgs, PretrainArgs, check, model_config

CONTEXT, BATCH, STEPS = 32, 4, 60
TINY = Gemma3Config(
    vocab_size=50, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=64,
    sliding_window=8, query_pre_attn_scalar=16.0, max_context=64, layer_kinds=("local", "local", "global"),
)  # fmt: skip
MODEL = [
    "model.hidden_size=32", "model.num_layers=3", "model.layers_per_global=3", "model.num_heads=4",
    "model.num_kv_heads=2", "model.head_dim=16", "model.intermediate_size=64", "model.sliding_window=8",
    "model.max_context=64",
]  # fmt: skip
TRAINING = [
    *MODEL, f"context={CONTEXT}", f"batch_size={BATCH}", f"tokens={CONTEXT * BATCH * STEPS}", "accelerator=cpu",
    "precision=float32", "optimizer.lr=1e-2", "validations=2", "validation_tokens=512",
]  # fmt: skip
FILES = {"config.json", "model.safetensors", "tokenizer.model", "pretraining.json"}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    topics = list(pydoc_data.topics.topics.values())[:20]
    path.write_text("".join(json.dumps({"text": topic}) + "\n" for topic in topics))
    return path


@pytest.fixture(scope="module")
def options(text, tmp_path_factory) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [f"data.path={text}", f"data.cache_dir={cache}", "vocab_size=600", *TRAINING]


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory) -> Path:
    """The folder of a finished training, float32; not to be changed."""
    out = tmp_path_factory.mktemp("trained") / "model"
    main([*options, "dtype=float32", f"out={out}"])
    return out


def facts(folder: Path) -> dict:
    return json.loads((folder / "pretraining.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_loss_falls(trained):
    losses = facts(trained)["losses"]
    curve = [point["loss"] for point in losses["training"]]
    assert len(curve) == STEPS and curve[0] == pytest.approx(math.log(600) + 0.5, abs=0.4)
    assert sum(curve[-10:]) / 10 < curve[0] - 1.5
    measured = [point["heldout"] for point in losses["measured"]]
    assert len(measured) == 2 and measured[0] > measured[1] > losses["heldout"]
    assert losses["heldout"] < math.log(600) - 1
    assert losses["heldout_at_max_context"] < math.log(600) - 1


def test_the_folder_is_whole_and_loads(trained):
    assert {p.name for p in trained.iterdir()} == FILES and list(trained.parent.iterdir()) == [trained]
    model = load_pretrained(trained)
    config = model.config
    assert (config.num_heads, config.num_kv_heads, config.vocab_size, config.max_context) == (4, 2, 600, 64)
    assert config.layer_kinds == ("local", "local", "global") and config.query_pre_attn_scalar == 16.0
    about = facts(trained)
    assert about["parameters"] == sum(p.numel() for p in model.parameters())
    assert about["training"]["steps"] == STEPS and about["training"]["stopped"] is None
    assert about["training"]["tokens"] == CONTEXT * BATCH * STEPS and about["training"]["tokens_per_second"] > 0
    assert about["command"].startswith("python scripts/pretrain.py data.path=") and "torch" in about["versions"]
    assert about["settings"]["model"]["num_kv_heads"] == 2 and about["text"]["tokens"]["train"] > 1000
    prompt = torch.tensor([model.tokenizer.encode("The statement ")])
    assert model(prompt).isfinite().all()


def test_logits_are_those_of_the_trained_model(options, tmp_path, monkeypatch):
    kept = {}

    def remember(model, tokenizer, out, dtype, facts):
        kept["model"] = model
        return saving.save_pretrained(model, tokenizer, out, dtype, facts)

    monkeypatch.setattr(command, "save_pretrained", remember)
    short = [f"tokens={CONTEXT * BATCH * 4}", "validations=0"]
    ids = torch.randint(4, 600, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    for dtype in ("float32", "bfloat16"):
        main([*options, *short, f"dtype={dtype}", f"out={tmp_path / dtype}"])
        loaded = load_pretrained(tmp_path / dtype, dtype=torch.float32)
        expected = kept["model"].to(getattr(torch, dtype)).float()
        with torch.no_grad():
            assert torch.equal(loaded(ids), expected(ids))


def test_transformers_computes_the_same(trained):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    ids = torch.randint(4, 600, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(trained)(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_same_command_gives_the_same_weights(options, trained, tmp_path):
    main([*options, "dtype=float32", f"out={tmp_path / 'again'}"])
    assert weights(tmp_path / "again") == weights(trained)
    assert facts(tmp_path / "again")["losses"]["training"] == facts(trained)["losses"]["training"]
    main([*options, "dtype=float32", f"tokens={CONTEXT * BATCH}", "seed=1", f"out={tmp_path / 'other'}"])
    assert weights(tmp_path / "other") != weights(trained)


def test_prepared_data_trains_the_same_model(text, trained, tmp_path, capsys):
    prepared, carried = tmp_path / "prepared", tmp_path / "elsewhere"
    main([f"data.path={text}", f"data.cache_dir={tmp_path / 'a'}", "vocab_size=600", "only=data", f"out={prepared}"])
    assert {p.name for p in prepared.iterdir()} == {"tokenizer.model", "train.npz"}
    assert "documents to train on" in capsys.readouterr().out
    prepared.rename(carried)
    main([
        f"data.path={carried / 'train.npz'}", f"data.cache_dir={tmp_path / 'b'}", *TRAINING, "dtype=float32",
        f"out={tmp_path / 'model'}",
    ])  # fmt: skip
    assert weights(tmp_path / "model") == weights(trained)
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == (trained / "tokenizer.model").read_bytes()


def test_the_time_limit_stops_and_saves(options, tmp_path, capsys):
    main([*options, "minutes=1e-4", f"out={tmp_path / 'model'}"])
    about = facts(tmp_path / "model")
    assert about["training"]["stopped"] == "minutes=0.0001" and 1 <= about["training"]["steps"] < STEPS
    assert "stopped by minutes=0.0001 after" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "model").config.num_kv_heads == 2


@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_stops_after_the_step_and_saves_a_second_one_at_once(times, options, tmp_path, capsys, monkeypatch):
    original = PretrainModule.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 5:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(PretrainModule, "training_step", training_step)
    assert main([*options, "validations=0", f"out={tmp_path / 'model'}"]) == 143
    if times == 2:
        assert list(tmp_path.iterdir()) == [] and "nothing was written" in capsys.readouterr().out
        return
    assert facts(tmp_path / "model")["training"]["stopped"] == "SIGTERM"
    assert facts(tmp_path / "model")["training"]["steps"] == 6
    assert "stopped by SIGTERM after 6 of 60 steps" in capsys.readouterr().out


def test_too_little_time_is_said_early(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tpa_train.pretraining.progress.SPEED_FROM", 2)
    monkeypatch.setattr("tpa_train.pretraining.progress.SPEED_TO", 4)
    main([*options, "tokens=1_000_000", "minutes=0.02", f"out={tmp_path / 'model'}"])
    assert "would fit" in capsys.readouterr().out


def test_nothing_is_left_of_a_diverged_training(options, tmp_path, monkeypatch):
    monkeypatch.setattr(module_file, "causal_loss", lambda hidden, *_: hidden.sum() * math.nan)
    with pytest.raises(UserError, match="diverged.*lower optimizer.lr"):
        main([*options, "validations=0", f"out={tmp_path / 'model'}"])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_first(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="already exists and is not empty"):
        main([f"out={tmp_path}", "data.path=missing.txt"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("model.num_kv_heads=3", "model.num_heads=4 must be a multiple of model.num_kv_heads=3"),
        ("model.head_dim=15", "model.head_dim=15 must be even"),
        ("model.layers_per_global=4", "leaves no global layer"),
        ("model.hidden_size=0", "model.hidden_size=0 must be at least 1"),
        ("model.query_pre_attn_scalar=0", "query_pre_attn_scalar=0 must be at least 1"),
        ("context=128", "context=128 must be between 2 and model.max_context=64"),
        ("tokens=100", "tokens=100 is less than one step"),
        ("minutes=0", "minutes=0 must be a positive number"),
        ("optimizer.lr=-1", "optimizer.lr=-1 must be"),
        ("optimizer.warmup=2", "optimizer.warmup=2 is a share"),
        ("optimizer.beta2=1", "optimizer.beta2=1 must be"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1 must not be negative"),
        ("validations=-1", "validations=-1 must not be negative"),
        ("vocab_size=10", "vocab_size=10 must be between"),
        ("data.heldout_fraction=0", "nothing to validate on"),
        ("data.heldout_fraction=1", "data.heldout_fraction=1 must be"),
        ("data.max_tokens=0", "data.max_tokens=0 must be at least 1"),
        ("data.max_tokens=100", "tokens are held out, less than one row"),
        ("only=tokens", "did you mean 'tokenizer'"),
        ("precision=fp16", "precision=fp16 is not a choice"),
        ("model.hiden_size=3", "did you mean 'model.hidden_size'"),
        ("tokenizer=missing.model", "cannot read the tokenizer missing.model"),
    ],
)
def test_bad_options_are_refused_with_one_sentence(options, bad, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        main([*options, bad, f"out={tmp_path / 'model'}"])
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_tokenised_text_must_fit_its_tokenizer(text, trained, tmp_path):
    out, cache = tmp_path / "out", f"data.cache_dir={tmp_path}"
    main([f"data.path={text}", cache, "vocab_size=520", "only=data", f"out={tmp_path / 'small'}"])
    npz, ours = tmp_path / "small" / "train.npz", trained / "tokenizer.model"
    cases = {
        "packed with another tokenizer": [f"data.path={npz}", f"tokenizer={ours}"],
        "vocab_size=700 contradicts": [f"data.path={npz}", "vocab_size=700"],
        "only=data reads text": [f"data.path={npz}", "only=data"],
        "tokenizer= names one": [f"data.path={text}", f"tokenizer={ours}", "only=tokenizer"],
    }
    for message, extra in cases.items():
        with pytest.raises(UserError, match=message):
            main([*TRAINING, cache, *extra, f"out={out}"])
    (tmp_path / "small" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="without a tokenizer.model beside it"):
        main([*TRAINING, cache, f"data.path={npz}", f"out={out}"])
    assert not out.exists()


def test_a_gpu_that_is_not_there(options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="accelerator=gpu was asked for"):
        main([*options, "accelerator=gpu", f"out={tmp_path / 'model'}"])


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(["--help"]))
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "model.num_kv_heads" in shown and "optimizer.lr" in shown


def test_the_defaults_make_a_gqa_model_of_20_to_50m():
    args = PretrainArgs(out="x")
    check(args)
    with torch.device("meta"):
        model = Gemma3ForCausalLM(model_config(args.model, 8192))
    assert 20e6 < sum(p.numel() for p in model.parameters()) < 50e6
    assert model.config.num_kv_heads == 8 and model.config.layer_kinds.count("global") == 2


# ------------------------------------------------------------------------------------------------------ the module


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (3, 20), generator=generator)
    documents = (torch.rand(3, 20, generator=generator) < 0.2).int().cumsum(1, dtype=torch.int32)
    return ids, documents


def test_new_model_has_sane_sizes():
    model, again = new_model(TINY, 0), new_model(TINY, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.head_weight, new_model(TINY, 1).head_weight)
    ids, _ = batch()
    assert model.embed(ids).std().item() == pytest.approx(1.0, rel=0.2)
    assert model(ids).std().item() == pytest.approx(1.0, rel=0.3)
    x = model.run_layers(model.embed(ids), model.context(ids))
    assert x.square().mean().sqrt().item() == pytest.approx(2**0.5, rel=0.1)  # all layers together add as much again
    layer = model.layers[0]
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(norm.weight.any() for norm in (layer.input_layernorm, layer.self_attn.k_norm, model.norm))


@pytest.mark.parametrize("join", [True, False])
def test_loss_in_pieces_is_the_plain_mean(join, monkeypatch):
    model = new_model(TINY, 0)
    ids, documents = batch()
    given = None if join else documents
    logits = model(ids, given)[:, :-1]
    every = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, 19)
    scored = torch.ones_like(every) if join else (documents[:, 1:] == documents[:, :-1]).float()
    expected = (every * scored).sum() / scored.sum()
    hidden = model.hidden_states(ids, given).flatten(0, 1)
    for tokens in (7, 10_000):
        monkeypatch.setattr(module_file, "LOSS_TOKENS", tokens)
        loss = causal_loss(hidden, model.head_weight, next_targets(ids, given))
        torch.testing.assert_close(loss, expected)
    rows = [{"token_ids": i, "document_ids": d} for i, d in zip(ids, documents, strict=True)]
    measured = heldout_loss(model, rows, 2, torch.no_grad, join)
    assert measured == pytest.approx(expected.item(), rel=1e-5)


def test_only_matrices_decay_and_the_schedule_is_the_projects():
    settings = OptimizerArgs(lr=1e-3, weight_decay=0.3, warmup=0.2, final_lr=0.1)
    module = PretrainModule(new_model(TINY, 0), settings, total_steps=10)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in module.parameters() if p.ndim == 2} == {0.3}
    assert {decays[id(p)] for p in module.parameters() if p.ndim == 1} == {0.0}
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    np.testing.assert_allclose(rates, [1e-3 * schedule(s, 10, settings.schedule()) for s in range(11)])
    assert rates[0] == pytest.approx(0.5e-3) and max(rates) == 1e-3 and rates[-1] == pytest.approx(1e-4)
