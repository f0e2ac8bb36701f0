"""Multimodal Gemma 3 against transformers' own, through a folder that transformers wrote."""

from __future__ import annotations

import pytest
import torch
from multimodal_models import IMAGE_ID, T, image_processor, picture, transformers_model, write_multimodal

from tpa_train.checkpoints import load_pretrained
from tpa_train.errors import UserError
from tpa_train.gemma3.processing import encode_prompt

pytest.importorskip("transformers")

START = "<start_of_image>"
LONG = "hello the world or in the world hello there "  # past the window of 8 on its own
PROMPTS = {
    "no image": (LONG, 0),
    "one, text after": (f"{START}what is in the world", 1),
    "one, text before": (f"{LONG}{START}", 1),
    "three, text between": (f"hello {START} or {START}{LONG}{START} which one", 3),
    "three in a row, past the window": (f"{LONG}{START}{START}{START}{LONG}", 3),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_multimodal(tmp_path_factory.mktemp("multimodal") / "model")


@pytest.fixture(scope="module")
def ours(folder):
    return load_pretrained(folder)


def images(count: int) -> list:
    return [picture(i, 40 + 31 * i, 90 - 13 * i) for i in range(count)]


def theirs(model, ids: list[int], count: int) -> torch.Tensor:
    token_ids = torch.tensor([ids])
    pixels = image_processor(model.config.vision_config.image_size)(images(count), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(
            input_ids=token_ids, pixel_values=pixels if count else None,
            token_type_ids=(token_ids == model.config.image_token_index).long(),
        ).logits  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_logits_equal_transformers(prompt, ours):
    text, count = PROMPTS[prompt]
    ids, pixels = encode_prompt(ours.tokenizer, ours.config.vision, text, images(count))
    assert ids.count(IMAGE_ID) == count * T and len(ids) > 12
    with torch.no_grad():
        logits = ours(torch.tensor([ids]), images=pixels)
    torch.testing.assert_close(logits, theirs(transformers_model(), ids, count), atol=1e-4, rtol=1e-4)


def test_images_longer_than_the_window(tmp_path):
    """16 soft tokens, window 8: the window cuts an image token's past, never its own image's later tokens."""
    model = load_pretrained(write_multimodal(tmp_path / "model", tokens=16))
    text, count = PROMPTS["three, text between"]
    ids, pixels = encode_prompt(model.tokenizer, model.config.vision, text, images(count))
    with torch.no_grad():
        logits = model(torch.tensor([ids]), images=pixels)
    torch.testing.assert_close(logits, theirs(transformers_model(tokens=16), ids, count), atol=1e-4, rtol=1e-4)


def test_the_padded_vocabulary_of_released_checkpoints(tmp_path):
    """262 208 embedding rows, of which the last 64 are the image token's and padding: they are dropped."""
    sizes = {"vocab_size": 262_208, "image_id": 262_144, "hidden_size": 16, "num_hidden_layers": 2}
    model = load_pretrained(write_multimodal(tmp_path / "model", **sizes))
    assert model.config.vocab_size == 262_144 == model.config.vision.image_token_id
    ids, pixels = encode_prompt(model.tokenizer, model.config.vision, f"hello {START} or", images(1))
    with torch.no_grad():
        logits = model(torch.tensor([ids]), images=pixels)
    expected = theirs(transformers_model(**sizes), ids, 1)
    torch.testing.assert_close(logits, expected[..., :262_144], atol=1e-4, rtol=1e-4)


def test_an_image_changes_what_is_before_it_in_the_same_image_only(ours):
    """Later soft tokens reach earlier ones of their image, and nothing before the image."""
    text = f"hello world {START} or the world"
    ids, pixels = encode_prompt(ours.tokenizer, ours.config.vision, text, images(1))
    token_ids = torch.tensor([ids])
    first = ids.index(IMAGE_ID)
    soft = ours.vision(pixels)
    changed = soft.clone()
    changed[0, -1] += 1.0  # the last soft token
    with torch.no_grad():
        a, b = (ours.hidden_states(token_ids, images=s) for s in (soft, changed))
    assert torch.equal(a[:, :first], b[:, :first])
    assert not torch.isclose(a[:, first], b[:, first]).all()


def test_vision_keeps_the_stored_bytes(tmp_path):
    from safetensors.torch import load_file

    folder = write_multimodal(tmp_path / "model", dtype=torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, torch.bfloat16):
        model = load_pretrained(folder, dtype)
        assert model.embed_tokens.weight.dtype == dtype
        found = {n: p for n, p in model.named_parameters() if n.startswith("vision.")}
        expected = {n: t for n, t in stored.items() if "vision_tower" in n or "multi_modal" in n}
        assert len(found) == len(expected) and found
        for name, tensor in expected.items():
            tail = name.rsplit("vision_model.", 1)[-1].removeprefix("model.").removeprefix("vision_tower.")
            ours = next(p for n, p in found.items() if n.endswith("." + tail))
            assert ours.dtype == torch.bfloat16 and torch.equal(ours, tensor), name


def test_mistakes_are_named(ours, tmp_path):
    ids, pixels = encode_prompt(ours.tokenizer, ours.config.vision, f"hello {START}", images(1))
    token_ids = torch.tensor([ids])
    with pytest.raises(UserError, match="no image was given"):
        ours(token_ids)
    with pytest.raises(UserError, match="the text has 4 image tokens, but 2 images"):
        ours(token_ids, images=torch.cat((pixels, pixels)))
    with pytest.raises(UserError, match=r"must be \[N, 3, 56, 56\]"):
        ours(token_ids, images=pixels[:, :, :50])
    text_only = load_pretrained(write_text_only(tmp_path))
    with pytest.raises(UserError, match="text-only"):
        text_only(token_ids, images=pixels)
    with pytest.raises(UserError, match="text-only"):
        text_only.tokenizer = ours.tokenizer
        encode_prompt(text_only.tokenizer, text_only.config.vision, "hello", images(1))


def write_text_only(folder):
    from tiny_runs import write_model

    return write_model(folder / "text")
