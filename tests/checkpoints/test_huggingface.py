"""Hugging Face folders: logits equal to transformers' own, whatever spelling the folder uses."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tpa_train.checkpoints import load_pretrained, open_checkpoint
from tpa_train.checkpoints.huggingface import read_config
from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES

transformers = pytest.importorskip("transformers")

LENGTH = 40  # longer than every window below, so that windows matter

SHAPES = {
    "one KV head, scaled RoPE": {"num_attention_heads": 4, "num_key_value_heads": 1, "factor": 8.0},
    "four KV heads, score scale": {"num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 20},
}


def text_config(factor=1.0, **changes):
    rope = {"rope_type": "linear", "factor": factor} if factor != 1.0 else {"rope_type": "default"}
    values = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "head_dim": 32,
        "query_pre_attn_scalar": 32, "sliding_window": 8, "max_position_embeddings": 512, "pad_token_id": 0,
        "rope_parameters": {
            "full_attention": {**rope, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **changes,
    }  # fmt: skip
    return transformers.Gemma3TextConfig(**values)


def randomize(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    return model.eval()


def text_model(**changes):
    return randomize(transformers.Gemma3ForCausalLM(text_config(**changes)))


def multimodal_model(**changes):
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text_config(**changes), vision_config=vision, mm_tokens_per_image=4)
    return randomize(transformers.Gemma3ForConditionalGeneration(config))


def assert_same_logits(reference, folder):
    model = load_pretrained(folder)
    ids = torch.randint(3, model.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_ids=ids).logits[..., : model.config.vocab_size]
        torch.testing.assert_close(model(ids), expected, atol=1e-4, rtol=1e-4)
    return model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("build", [text_model, multimodal_model])
def test_logits_equal_transformers(build, shape, tmp_path):
    reference = build(**shape)
    reference.save_pretrained(tmp_path)
    model = assert_same_logits(reference, tmp_path)
    assert not model.training and model.tokenizer is None and not model.source.weights_quantized
    assert (model.vision is not None) == ("multimodal" in model.source.description) == (build is multimodal_model)
    assert bool(model.source.skipped) == (build is multimodal_model)
    assert all("vision" in name and ".head." in name for name in model.source.skipped)  # SigLIP's pooling is not used


def test_sharded_folder(tmp_path):
    reference = text_model(**SHAPES["one KV head, scaled RoPE"])
    reference.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(reference, tmp_path)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"model-00002.* is missing"):
        load_pretrained(tmp_path)


def test_irregular_layer_types(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    reference = text_model(num_hidden_layers=3, layer_types=kinds)
    reference.save_pretrained(tmp_path)
    assert assert_same_logits(reference, tmp_path).config.layer_kinds == ("global", "local", "global")


def test_configuration_as_transformers_4_wrote_it(tmp_path):
    reference = text_model(**SHAPES["one KV head, scaled RoPE"])
    reference.save_pretrained(tmp_path)
    new = open_checkpoint(tmp_path).config
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"], config["layer_types"]
    config.update(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8.0},
                  sliding_window_pattern=6)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).config == new
    assert_same_logits(reference, tmp_path)


def test_released_4b_configuration_leaves_most_keys_out(tmp_path):
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}  # fmt: skip
    assert read_config(tmp_path, text, 262_144) == SIZES["4b"]


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
def test_every_place_where_the_text_weights_have_lived(prefix, tmp_path):
    reference = text_model()
    reference.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    assert_same_logits(reference, tmp_path)


def test_padding_rows_of_the_embedding_are_dropped(tmp_path):
    reference = text_model(vocab_size=262_208, hidden_size=8, intermediate_size=8, head_dim=8, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    reference.save_pretrained(tmp_path)
    assert assert_same_logits(reference, tmp_path).config.vocab_size == 262_144


def test_dtype_and_independence_of_the_file(tmp_path):
    text_model().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_pretrained(tmp_path / "model.safetensors", dtype)
        assert {p.dtype for p in model.parameters()} == {dtype}
    before = model.norm.weight.clone()
    size = (tmp_path / "model.safetensors").stat().st_size
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(b"\0" * size)
    assert torch.equal(model.norm.weight, before)


def test_tied_head_is_accepted_and_another_refused(tmp_path):
    text_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, tmp_path / "model.safetensors")
    load_pretrained(tmp_path)
    save_file({**weights, "lm_head.weight": head + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        load_pretrained(tmp_path)


def test_tokenizer_and_chat_template(tokenizer, tmp_path):
    text_model(vocab_size=400).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model_proto)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ bos_token }}"}))
    loaded = load_pretrained(tmp_path).tokenizer
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.chat_template == "{{ bos_token }}"
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert load_pretrained(tmp_path).tokenizer.chat_template == "newer"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "'llama' model"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"layer_types": ["chunked"] * 7}, "chunked"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2}}}, "RoPE"),
        ({"num_hidden_layers": 8, "layer_types": None}, "missing"),
        ({"num_hidden_layers": 6, "layer_types": None}, "not part of"),
        ({"hidden_size": 32}, "shape"),
        ({"num_key_value_heads": 3}, "multiple"),
        ({"head_dim": "many"}, "many"),
        ({"num_key_value_heads": 0}, "ZeroDivision"),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear"}}}, "factor"),
        ({"rope_parameters": [1]}, "config.json"),
    ],
)
def test_configurations_that_are_not_gemma_3_are_refused(change, message, tmp_path):
    text_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message) as raised:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_config_dataclass_round_trip(tmp_path):
    text_model().save_pretrained(tmp_path)
    config = open_checkpoint(tmp_path).config
    assert type(config).from_dict(config.to_dict()) == config
    assert dataclasses.replace(config, vocab_size=1).vocab_size == 1


def test_chat_templates_wherever_transformers_put_them(tmp_path):
    from tpa_train.checkpoints.huggingface import read_chat_template

    assert read_chat_template(tmp_path) is None
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for name, content, expected in (  # later ones come first
        ("tokenizer_config.json", json.dumps({"chat_template": named}), "plain"),
        ("tokenizer_config.json", json.dumps({"chat_template": "single"}), "single"),
        ("chat_template.json", json.dumps({"chat_template": "processor"}), "processor"),
        ("chat_template.jinja", "own\n", "own\n"),
    ):
        (tmp_path / name).write_text(content)
        assert read_chat_template(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat_template.jinja"):
        read_chat_template(tmp_path)
