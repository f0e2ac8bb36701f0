"""Prompts: from texts, images and chat templates to ids, what ends an answer, and the steps that read a prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.chat import ChatTemplate
from tpa_train.gemma3.images import NO_IMAGE, image_blocks
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.processing import encode_prompt, interleaved


def stop_ids(model: Gemma3ForCausalLM) -> set[int]:
    """Returns the ids that end a text: end of sequence and, in tuned models, end of turn."""
    tokenizer = model.tokenizer
    return {i for i in (tokenizer.eos_id, getattr(tokenizer, "end_of_turn_id", None)) if i is not None}


def encode_prompts(
    model: Gemma3ForCausalLM,
    prompts: list[Any] | str,
    chat: bool = False,
    images: Any = None,
    pan_and_scan: bool = False,
) -> tuple[list[list[int]], list[Tensor | None]]:
    """Returns ids, ``<bos>`` first, and image bytes of every prompt; arguments as in ``generation.generate``.

    Raises:
        UserError: images and texts do not fit each other, or an image is missing or broken.
    """
    if isinstance(prompts, str):
        prompts, images = [prompts], [images]
    images = [None] * len(prompts) if images is None else list(images)
    if len(images) != len(prompts):
        raise UserError(f"images= names those of {len(images)} prompts, but there are {len(prompts)} prompts.")
    template = ChatTemplate(model.tokenizer) if chat else None
    encoded = []
    for prompt, own in zip(prompts, images, strict=True):
        own = list(own) if isinstance(own, (list, tuple)) else [] if own is None else [own]
        if not isinstance(prompt, str):
            prompt, inside = interleaved(prompt)
            own = inside + own
        encoded.append(encode_prompt(model.tokenizer, model.config.vision, prompt, own, pan_and_scan, template))
    return [ids for ids, _ in encoded], [pixels for _, pixels in encoded]


def check_prompt(model: Gemma3ForCausalLM, ids: list[int], images: Tensor | None) -> None:
    """Refuses a prompt that the model cannot read, before it is among others.

    Raises:
        UserError: the prompt is empty, has ids that there are not, or not as many images as places for them.
    """
    if not ids:
        raise UserError("every prompt needs at least one token.")
    vision = model.config.vision
    special = None if vision is None else vision.image_token_id
    wrong = [i for i in ids if not 0 <= i < model.config.vocab_size and i != special]
    if wrong:
        raise UserError(f"the prompt has the id {wrong[0]}, but the vocabulary ends at {model.config.vocab_size - 1}.")
    given = 0 if images is None else len(images)
    if vision is None:
        if given:
            raise UserError("this model is text-only: it cannot be given images; use a multimodal one (4B, 12B, 27B).")
        return
    places = int(image_blocks(torch.tensor([ids]), vision.image_token_id).max()) + 1
    if places != given:
        raise UserError(f"the prompts have places for {places} images, but {given} were given.")
    tokens = ids.count(vision.image_token_id)
    if tokens != places * vision.tokens_per_image:
        raise UserError(
            f"the prompt has {tokens} image tokens, but {places} images take {places * vision.tokens_per_image}; put "
            f"{vision.tokens_per_image} image tokens for every image."
        )


def prefill_chunks(
    model: Gemma3ForCausalLM, ids: list[int], images: Tensor | None, chunk: int
) -> Iterator[dict[str, Tensor | None]]:
    """Yields ``token_ids`` [1, n] and ``images`` (soft tokens, or None) of each step that reads the prompt ``ids``.

    A step has at most ``chunk`` tokens, and ends between images: inside of one, tokens see later ones, which must come
    with them. It is longer only where one image is longer.
    """
    device, length = model.head_weight.device, len(ids)
    tokens, numbers, soft = torch.tensor([ids], device=device), [NO_IMAGE] * length, None
    if images is not None and len(images):
        # Once for the whole prompt: T soft tokens are small, an image's way through the tower is not.
        soft = model.vision(images.to(device), model.embed_tokens.weight.dtype)
        numbers = image_blocks(torch.tensor([ids]), model.config.vision.image_token_id)[0].tolist()

    def inside(end: int) -> bool:
        return end < length and numbers[end] == numbers[end - 1] != NO_IMAGE

    start = 0
    while start < length:
        stop = min(start + chunk, length)
        while stop > start and inside(stop):
            stop -= 1
        if stop == start:
            stop = min(start + chunk, length)
            while inside(stop):
                stop += 1
        here = sorted(set(numbers[start:stop]) - {NO_IMAGE})
        yield {"token_ids": tokens[:, start:stop], "images": soft[here] if here else None}
        start = stop
