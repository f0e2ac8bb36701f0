"""A whole run of a tuned model: an adapter on a base with a chat template, trained on conversations."""

from __future__ import annotations

import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny_runs import run_options, write_model

from tpa_train.checkpoints import load_pretrained
from tpa_train.checkpoints.command import main as export
from tpa_train.data.datamodule import PackedDataModule
from tpa_train.data.packed import PackedStream
from tpa_train.errors import UserError
from tpa_train.evaluation.command import main as evaluate
from tpa_train.gemma3.chat import ChatTemplate
from tpa_train.launch import main
from tpa_train.recipes import load_settings
from tpa_train.tpa.command import main as generate
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.generation import encode_prompts
from tpa_train.tpa.generation import generate as continue_text

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
WORDS = "the hello world in or a rank of keys and values".split()


def write_chats(path, count=250):
    words = random.Random(0)

    def say():
        return " ".join(words.choices(WORDS, k=words.randint(2, 8)))

    lines = [json.dumps({"prompt": say(), "completion": say()}) for _ in range(count)]
    path.write_text("\n".join(lines))
    return path


def write_adapter(folder):
    """Rank 2 on the queries of two layers, as peft would write it."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(3), {}
    for layer in (0, 5):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, 64, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(128, 2, generator=generator) * 0.1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "the/base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The folder of a finished run with data=chat and model.adapter, and what it was made from."""
    folder = tmp_path_factory.mktemp("chat")
    model, chats = write_model(folder / "model"), write_chats(folder / "chats.jsonl")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    adapter, cache = write_adapter(folder / "tuned"), folder / "cache"
    options = ["data=chat" if o == "data=text" else o for o in run_options(model, chats, cache)]
    options = [o for o in options if not o.startswith("data.split_chars")]
    run = folder / "run"
    assert main(["recipe=distill", *options, f"model.adapter={adapter}", f"run_dir={run}"]) == 0
    return SimpleNamespace(run=run, model=model, adapter=adapter, chats=chats, cache=cache, options=options)


def test_the_report_counts_the_models_turns_and_names_the_adapter(chat):
    report = json.loads((chat.run / "report.json").read_text())
    assert report["source"]["adapter"] == "tuned"
    assert "LoRA adapter tuned (trained on the/base) merged" in report["source"]["description"]
    data = PackedDataModule(load_settings(chat.run).data, load_pretrained(chat.model).tokenizer, 64, 1, progress=False)
    rows = data.heldout_rows(256)
    same = [r["loss_mask"][:-1] & (r["document_ids"][1:] == r["document_ids"][:-1]) for r in rows]
    for stage in report["stages"]:
        assert stage["masked"] and stage["evaluated_tokens"] == int(torch.stack(same).sum()) < 256
    text = (chat.run / "report.md").read_text()
    assert "held-out tokens of the model's turns" in text and "with the adapter `tuned` merged" in text
    card = (chat.run / "export" / "README.md").read_text()
    assert "the adapter `tuned` merged" in card


def test_the_teacher_is_the_adapted_model(chat):
    merged = load_pretrained(chat.model, adapter=chat.adapter)
    plain = load_pretrained(chat.model)
    exported = Gemma3ForMultimodalLMwithTPA.from_pretrained(chat.run / "export")
    query = merged.layers[0].self_attn.q_proj.weight
    assert not torch.equal(query, plain.layers[0].self_attn.q_proj.weight)
    ours = exported.layers[0].self_attn.q_proj.weight  # scope=all trained it, from the merged one
    assert (ours - query).norm() < 0.1 * (ours - plain.layers[0].self_attn.q_proj.weight).norm()
    source = json.loads((chat.run / "export" / "config.json").read_text())["source"]
    assert source["adapter"] == str(chat.adapter.resolve())


def test_samples_are_answers(chat):
    report = json.loads((chat.run / "report.json").read_text())
    teacher = load_pretrained(chat.model, adapter=chat.adapter)
    for sample in report["samples"]:
        assert sample["teacher"] == continue_text(teacher, sample["prompt"], 3, chat=True)[0]


def test_exports_keep_the_template(chat, tmp_path):
    assert (chat.run / "export" / "chat_template.jinja").read_text() == TEMPLATE
    model = Gemma3ForMultimodalLMwithTPA.from_pretrained(chat.run / "export")
    assert model.tokenizer.chat_template == TEMPLATE
    export([f"checkpoint={chat.run}", f"out={tmp_path / 'again'}", "stage=factorized"])
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == TEMPLATE
    assert "adapter `tuned`" in (tmp_path / "again" / "README.md").read_text()


def test_evaluate_merges_the_recorded_adapter(chat, tmp_path, capsys):
    arguments = [f"model={chat.run}", "tokens=128", "context=64", "copy=none", "device=cpu", "json=true",
                 f"data.path={chat.chats}", "data.chat=true", f"data.cache_dir={tmp_path / 'cache'}"]  # fmt: skip
    evaluate(arguments)
    merged = json.loads(capsys.readouterr().out)
    assert merged["source"]["adapter"] == str(chat.adapter) and merged["stages"][1]["masked"]
    assert 0 < merged["stages"][1]["evaluated_tokens"] < 126
    evaluate([*arguments, f"teacher={chat.model}"])
    plain = json.loads(capsys.readouterr().out)
    assert plain["source"]["adapter"] is None
    assert plain["stages"][1]["teacher_perplexity"] != merged["stages"][1]["teacher_perplexity"]
    evaluate([*arguments, f"teacher={chat.model}", f"adapter={chat.adapter}"])
    assert json.loads(capsys.readouterr().out)["stages"][1]["kl"] == merged["stages"][1]["kl"]
    with pytest.raises(UserError, match="data.chat=true needs data.path"):
        evaluate([f"model={chat.run}", "data.chat=true", "device=cpu"])


def test_generate_wraps_the_prompt(chat, tiny, capsys):
    model = Gemma3ForMultimodalLMwithTPA.from_pretrained(chat.run / "export")
    answers = continue_text(model, ["hello <end_of_turn>"], max_tokens=6, chat=True)
    (ids,), _ = encode_prompts(model, ["hello <end_of_turn>"], chat=True)
    assert ids == ChatTemplate(model.tokenizer).encode_prompt("hello <end_of_turn>")
    assert ids.count(model.tokenizer.end_of_turn_id) == 1 and ids.count(model.tokenizer.bos_id) == 1
    for path, options, tokens in (
        (chat.run, ["chat=true"], len(ids)),
        (chat.run, ["chat=auto"], len(ids)),
        (chat.run, [], len(model.tokenizer.encode("hello <end_of_turn>"))),
        (tiny.model, ["chat=auto"], len(model.tokenizer.encode("hello <end_of_turn>"))),  # a base model: as it is
    ):
        generate([f"model={path}", "prompt=hello <end_of_turn>", "max_tokens=6", "device=cpu", *options])
        said = capsys.readouterr()
        assert f"[{tokens} prompt tokens" in said.err
        if options and path == chat.run:
            assert said.out == answers[0] + "\n"


def test_generate_merges_an_adapter(chat, capsys):
    outputs = []
    for options in ([], [f"adapter={chat.adapter}"]):
        generate([f"model={chat.model}", "prompt=hello", "max_tokens=12", "device=cpu", *options])
        outputs.append(capsys.readouterr().out)
    assert outputs[1] == continue_text(load_pretrained(chat.model, adapter=chat.adapter), "hello", 12)[0] + "\n"
    with pytest.raises(UserError, match="adapters are merged into originals only"):
        generate([f"model={chat.run}", f"adapter={chat.adapter}", "prompt=a"])


def test_packed_rows_are_those_of_the_template(chat):
    tokenizer = load_pretrained(chat.model).tokenizer
    folder = next(f for f in (chat.cache).iterdir() if f.is_dir())
    stream = PackedStream(folder, "train", tokenizer.fingerprint)
    starts = set(stream.starts[:20].tolist())
    assert all(stream.tokens[s] == tokenizer.bos_id for s in starts) and stream.manifest.masked
    assert stream.manifest.source["template"] == TEMPLATE


def test_a_missing_adapter_stops_before_anything_is_written(chat, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="model.adapter: there is no folder"):
        main(["recipe=distill", *chat.options, f"model.adapter={tmp_path / 'nowhere'}", f"run_dir={run}"])
    assert not run.exists()
