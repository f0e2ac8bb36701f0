"""Decoding with a cache, for the dense and the converted model alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.chat import ChatTemplate
from tpa_train.gemma3.images import image_blocks
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.processing import encode_prompt, interleaved

PREFILL_CHUNK = 1024  # tokens a prefill step; bounds the mask and the scores of long prompts


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Returns one token id [B] from logits [B, V]; greedy at temperature 0.

    ``top_k`` keeps the k likeliest tokens; ``top_p`` the smallest set with that much probability (nucleus sampling,
    arXiv:1904.09751).
    """
    if temperature <= 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        beyond = probabilities.cumsum(-1) - probabilities >= top_p  # the likeliest token always stays
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


@torch.inference_mode()
def stream_ids(
    model: Gemma3ForCausalLM,
    prompts: list[list[int]],
    max_tokens: int,
    cache_dtype: torch.dtype | None = None,
    images: Sequence[Tensor | None] | None = None,
    **sampling,
) -> Iterator[Tensor]:
    """Yields the next token of every prompt, int64 [B] a step; other keyword arguments go to ``sample``.

    Prompts of different lengths are padded on the left and see neither each other's padding nor positions. An image
    token is never written: it stands for an image that is given.
    ``images``: of each prompt, as ``processing.encode_prompt`` returns them.

    Raises:
        UserError: prompt and continuation do not fit the model's context, or a prompt is empty.
    """
    lengths = [len(p) for p in prompts]
    longest = max(lengths, default=0)
    if not prompts or min(lengths) == 0:
        raise UserError("every prompt needs at least one token.")
    if longest + max_tokens > model.config.max_context:
        raise UserError(
            f"the prompt ({longest} tokens) and max_tokens ({max_tokens}) exceed the model's context of "
            f"{model.config.max_context} tokens; shorten one of them."
        )
    weight = model.head_weight
    padding = torch.tensor([longest - n for n in lengths], device=weight.device)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=weight.device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=weight.device)
    cache = model.allocate_cache(
        len(prompts), longest + max_tokens, dtype=cache_dtype or weight.dtype, padding=padding
    )
    for chunk in prefill_chunks(model, ids, images or []):
        hidden = model.hidden_states(**chunk, cache=cache)
    for step in range(max_tokens):
        logits = model.logits(hidden[:, -1])
        if model.vision is not None:
            logits[:, model.config.vision.image_token_id :][:, :1] = -torch.inf  # nothing, where it is beyond them
        token = sample(logits, **sampling)
        yield token
        if step + 1 < max_tokens:
            hidden = model.hidden_states(token[:, None], cache=cache)


def prefill_chunks(
    model: Gemma3ForCausalLM, ids: Tensor, images: Sequence[Tensor | None]
) -> Iterator[dict[str, Tensor | None]]:
    """Yields ``token_ids`` [B, n] and ``images`` (soft tokens, or None) of each prefill step over ``ids`` [B, L].

    A step ends between images: inside of one, tokens see later ones, which must come with them. It is shorter than
    ``PREFILL_CHUNK`` for that, and longer only where images of the rows overlap without a gap.
    """
    given = [part for part in images if part is not None and len(part)]
    length, blocks, soft = ids.shape[1], None, None
    cuts = torch.ones(length + 1, dtype=torch.bool)  # where a step may end
    if given:
        # Once for the whole prompt: T soft tokens are small, an image's way through the tower is not.
        soft = model.vision(torch.cat(given), model.embed_tokens.weight.dtype)
        blocks = image_blocks(ids, model.config.vision.image_token_id).cpu()
        cuts[1:-1] = ~((blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0)).any(0)
        counts = blocks.amax(1) + 1
        if int(counts.sum()) * soft.shape[1] != int((blocks >= 0).sum()) or int(counts.sum()) != len(soft):
            raise UserError(f"the prompts have places for {int(counts.sum())} images, but {len(soft)} were given.")
        first = counts.cumsum(0) - counts  # number of each row's first image among all
    start = 0
    while start < length:
        ends = cuts[start + 1 :].nonzero().flatten() + start + 1
        within = ends[ends <= start + PREFILL_CHUNK]
        stop = int(within[-1] if len(within) else ends[0])
        part = None
        if blocks is not None:
            here = blocks[:, start:stop]
            numbers = [int(n) for row, f in zip(here, first, strict=True) for n in row[row >= 0].unique() + f]
            part = soft[numbers] if numbers else None
        yield {"token_ids": ids[:, start:stop], "images": part}
        start = stop


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
    """Returns ids, ``<bos>`` first, and image bytes of every prompt; arguments as in ``generate``.

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


def generate(
    model: Gemma3ForCausalLM,
    prompts: list[Any] | str,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    cache_dtype: torch.dtype | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
    chat: bool = False,
    images: Any = None,
    pan_and_scan: bool = False,
) -> list[str]:
    """Continues each prompt until it ends or ``max_tokens`` are written.

    Args:
        model: dense or converted model with a tokenizer.
        prompts: texts; a single string counts as one prompt. A prompt may also be a list of texts and images
            (Pillow images or ``Path``s) in their order, for a multimodal model.
        max_tokens: at most this many new tokens each.
        temperature: 0 is greedy.
        top_k, top_p: restrict sampling, see ``sample``.
        seed: makes sampling repeatable.
        cache_dtype: of the cache; the weights' own when left out.
        on_tokens: called each step with one new token id a prompt, None for prompts that have ended.
        chat: put each prompt into the model's chat template, as a user's turn to be answered.
        images: of each prompt (a path, a Pillow image, a list of them or None); for a single prompt, its own. They
            stand where the text says ``<start_of_image>``, or before a text that says it nowhere.
        pan_and_scan: show long images in crops as well.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: the model has no tokenizer, the texts do not fit its context, or the images do not fit the texts.
    """
    if model.tokenizer is None:
        raise UserError("this model was loaded without a tokenizer; put tokenizer.model beside its weights.")
    encoded, pixels = encode_prompts(model, prompts, chat, images, pan_and_scan)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=model.head_weight.device).manual_seed(seed)
    ends = stop_ids(model)
    written: list[list[int]] = [[] for _ in encoded]
    done = [False] * len(encoded)
    steps = stream_ids(
        model, encoded, max_tokens, cache_dtype, pixels,
        temperature=temperature, top_k=top_k, top_p=top_p, generator=generator,
    )  # fmt: skip
    for tokens in steps:
        fresh: list[int | None] = []
        for row, token in enumerate(tokens.tolist()):
            done[row] = done[row] or token in ends
            fresh.append(None if done[row] else token)
            if not done[row]:
                written[row].append(token)
        if on_tokens is not None:
            on_tokens(fresh)
        if all(done):
            break
    return [model.tokenizer.decode(ids) for ids in written]
