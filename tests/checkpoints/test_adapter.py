"""LoRA adapters that peft wrote: logits equal to peft's own, and everything that cannot be merged refused by name."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_huggingface import multimodal_model, text_model

from tpa_train.checkpoints import load_pretrained
from tpa_train.checkpoints.adapter import CONFIG, TENSORS
from tpa_train.errors import UserError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TEXT_ONLY = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
IDS = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(1))
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\.up_proj": 2, "^model.layers.0.self_attn.v_proj": 7},
        "alpha_pattern": {"down_proj": 3, r"layers.2.self_attn.k_proj": 32},
    },
    "norms trained whole": {"modules_to_save": ["input_layernorm", "norm"]},
    "some layers": {"layers_to_transform": [0, 5], "target_modules": ["q_proj", "down_proj"]},
    "transposed option and biases": {"fan_in_fan_out": True, "bias": "all", "init_lora_weights": "gaussian"},
}


def write_base(folder, model):
    model.save_pretrained(folder)
    return folder


def adapt(model, folder, **options):
    """Writes an adapter with nothing at zero into ``folder``; returns the logits of the adapted model."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "lora_dropout": 0.1} | options
    with pytest.warns() if options.get("fan_in_fan_out") else _quiet():
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(input_ids=IDS).logits


class _quiet:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "text", text_model())


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "tuned"
    adapt(transformers.Gemma3ForCausalLM.from_pretrained(base), folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_peft(base, tmp_path, kind):
    plain = load_pretrained(base)(IDS)
    expected = adapt(transformers.Gemma3ForCausalLM.from_pretrained(base), tmp_path / "tuned", **KINDS[kind])
    model = load_pretrained(base, adapter=tmp_path / "tuned")
    assert (model(IDS) - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    assert (plain - expected).abs().max() > 1e-2  # the adapter does something
    assert model.source.adapter == tmp_path / "tuned"
    assert f"{'DoRA' if 'dora' in kind.split() else 'LoRA'} adapter tuned" in model.source.description


def test_multimodal_base_and_adapter(tmp_path):
    base = write_base(tmp_path / "base", multimodal_model())
    expected = adapt(
        transformers.Gemma3ForConditionalGeneration.from_pretrained(base), tmp_path / "tuned", target_modules=TEXT_ONLY
    )
    model = load_pretrained(base, adapter=tmp_path / "tuned")
    vocabulary = model.config.vocab_size
    assert (model(IDS) - expected[..., :vocabulary]).abs().max() < 1e-5 * expected.abs().max()
    # An adapter of everything: what is the vision tower's is left out, and said so.
    whole = adapt(
        transformers.Gemma3ForConditionalGeneration.from_pretrained(base), tmp_path / "all", target_modules="all-linear"
    )
    model = load_pretrained(base, adapter=tmp_path / "all")
    assert (model(IDS) - whole[..., :vocabulary]).abs().max() < 1e-5 * whole.abs().max()
    assert any("vision_tower" in name and "lora_A" in name for name in model.source.skipped)


def test_a_half_precision_model_is_merged_in_float32_and_rounded_once(base, adapter):
    wide = load_pretrained(base, adapter=adapter).state_dict()
    half = load_pretrained(base, torch.bfloat16, adapter).state_dict()
    assert all(torch.equal(half[name], wide[name].bfloat16()) for name in wide)


def test_a_chat_template_of_the_adapter_comes_first(tiny, tmp_path):
    state = load_file(tiny.model / "model.safetensors")
    rank, weight = 2, state["model.layers.0.self_attn.q_proj.weight"]
    (tmp_path / "tuned").mkdir()
    parts = {"lora_A.weight": torch.ones(rank, weight.shape[1]), "lora_B.weight": torch.ones(weight.shape[0], rank)}
    save_file({f"base_model.model.model.layers.0.self_attn.q_proj.{k}": v for k, v in parts.items()},
              tmp_path / "tuned" / TENSORS)  # fmt: skip
    (tmp_path / "tuned" / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": 4}))
    (tmp_path / "tuned" / "chat_template.jinja").write_text("{{ bos_token }}tuned")
    model = load_pretrained(tiny.model, adapter=tmp_path / "tuned")
    assert model.tokenizer.chat_template == "{{ bos_token }}tuned"
    # By hand: B·A is rank everywhere, times 4 / rank.
    assert torch.allclose(model.layers[0].self_attn.q_proj.weight, weight + 4.0)


def test_an_embedding_trained_whole_must_stay_the_output_head(base, tmp_path):
    reference = transformers.Gemma3ForCausalLM.from_pretrained(base)
    embedding = torch.randn(reference.model.embed_tokens.weight.shape)
    for name, tensors, tied in (
        ("both", {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}, False),
        ("tied", {"model.embed_tokens.weight": embedding}, True),
    ):
        folder = write_adapter(tmp_path / name, tensors, ensure_weight_tying=tied)
        assert torch.equal(load_pretrained(base, adapter=folder).embed_tokens.weight, embedding)
    folder = write_adapter(tmp_path / "alone", {"model.embed_tokens.weight": embedding})
    with pytest.raises(UserError, match="embedding and the output head differ"):
        load_pretrained(base, adapter=folder)
    saved = {"model.embed_tokens.weight": reference.model.embed_tokens.weight.detach().clone()}
    load_pretrained(base, adapter=write_adapter(tmp_path / "unchanged", saved))


def write_adapter(folder, tensors, **config):
    folder.mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6, **config}))
    return folder


def broken(adapter, tmp_path, config=None, tensors=None):
    """Returns a copy of the adapter whose config and tensors went through the given functions."""
    folder = tmp_path / "broken"
    shutil.copytree(adapter, folder)
    if config is not None:
        options = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(options | config))
    if tensors is not None:
        save_file(tensors(load_file(folder / TENSORS)), folder / TENSORS)
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj."
CONFIGS = {
    "'IA3' adapter; only LORA": {"peft_type": "IA3"},
    "init_lora_weights=pissa": {"init_lora_weights": "pissa"},
    "sets use_qalora": {"use_qalora": True},
    "sets trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "sets layer_replication": {"layer_replication": [[0, 2]]},
    "sets lora_bias": {"lora_bias": True},
    "sets some_new_option": {"some_new_option": "on"},
    "lora_magnitude_vector of layers.0.* is missing": {"use_dora": True},
    "at rank 5 wants": {"r": 5},
    "has rank 'x'": {"r": "x"},
    "not a regular expression": {"rank_pattern": {"(": 2}},
}
FILES = {
    "NaN": lambda t: t | {Q + "lora_B.weight": torch.full_like(t[Q + "lora_B.weight"], torch.nan)},
    "lora_B of layers.0.self_attn.q_proj is missing": lambda t: {k: t[k] for k in t if k != Q + "lora_B.weight"},
    "lora_A of layers.0.self_attn.q_proj has shape": lambda t: t | {Q + "lora_A.weight": torch.zeros(4, 3)},
    "adapts layers.40.* does not have; is it": lambda t: {k.replace(".0.", ".40."): v for k, v in t.items()},
    "transformer.h.0.attn.c_attn.lora_A.weight, which has no place": lambda t: {
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(4, 3)},
    "q_proj.bias": lambda t: t | {Q + "bias": torch.zeros(3)},
    "one matrix": lambda t: t | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 300),
                                 "base_model.model.model.embed_tokens.lora_embedding_B": torch.zeros(64, 4)},
    "is there, though adapter_config.json does not": lambda t: t | {Q + "lora_magnitude_vector": torch.ones(128)},
    "stored as torch.int64": lambda t: t | {Q + "lora_B.weight": torch.zeros(128, 4, dtype=torch.long)},
    "norm.weight has shape": lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(3)},
    "vision tower only": lambda t: {"base_model.model.model.vision_tower.x.lora_A.weight": torch.zeros(4, 3)},
    "is empty": lambda t: {},
}  # fmt: skip


@pytest.mark.parametrize("message", [*CONFIGS, *FILES])
def test_what_cannot_be_merged_is_refused(base, adapter, tmp_path, message):
    folder = broken(adapter, tmp_path, CONFIGS.get(message), FILES.get(message))
    with pytest.raises(UserError, match=message) as caught:
        load_pretrained(base, adapter=folder)
    assert str(caught.value).startswith("model.adapter: ") and "\n" not in str(caught.value)


def test_missing_and_damaged_files(base, adapter, tmp_path):
    def refused(folder, message):
        with pytest.raises(UserError, match=message):
            load_pretrained(base, adapter=folder)

    refused(tmp_path / "nowhere", "there is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no readable adapter_config.json")
    folder = broken(adapter, tmp_path)
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])
    refused(folder, "damaged or cut short")
    (folder / TENSORS).unlink()
    refused(folder, re.escape(f"{TENSORS} is missing."))
    torch.save({}, folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin is a pickle, which is not read")
    (folder / CONFIG).write_text("{")
    refused(folder, "not valid JSON")
    (folder / CONFIG).write_text("[]")
    refused(folder, "JSON object")
