"""Continuing texts, for the dense and the converted model alike: the engine (``tpa_train.serving``) for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.serving.engine import Engine
from tpa_train.serving.memory import DEFAULT_ROWS
from tpa_train.serving.prompts import encode_prompts, stop_ids
from tpa_train.serving.requests import Request

__all__ = ["encode_prompts", "engine_for", "generate", "stop_ids", "stream_ids"]


def engine_for(
    model: Gemma3ForCausalLM, prompts: Sequence[Sequence[int]], max_tokens: int, cache_dtype: torch.dtype | None = None
) -> Engine:
    """Returns an engine whose cache is just large enough for these prompts (ids), or has fewer rows if memory is short.

    Raises:
        UserError: prompt and continuation do not fit the model's context or the memory, or a prompt is empty.
    """
    lengths = [len(p) for p in prompts]
    if not lengths or min(lengths) == 0:
        raise UserError("every prompt needs at least one token.")
    if max(lengths) + max_tokens > model.config.max_context:
        raise UserError(
            f"the prompt ({max(lengths)} tokens) and max_tokens ({max_tokens}) exceed the model's context of "
            f"{model.config.max_context} tokens; shorten one of them."
        )
    return Engine(model, context=max(lengths) + max_tokens, dtype=cache_dtype, at_most=min(len(prompts), DEFAULT_ROWS))


def _submit_all(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    images: Sequence[Tensor | None] | None,
    seed: int | None,
    rules: dict[str, Any],
    **ends: Any,
) -> list[Request]:
    """Submits every prompt; the i-th is sampled with ``seed`` + i."""
    return [
        engine.submit(
            prompt, max_tokens, images=None if images is None else images[i],
            seed=None if seed is None else seed + i, **ends, **rules,
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip


def _in_step(engine: Engine, requests: list[Request]) -> Iterator[list[int | None]]:
    """Yields one token of every request a step, None where it has ended; they may be read at different times."""
    done = 0
    while True:
        while any(not r.finished and r.steps <= done for r in requests):
            engine.step()
        if done == max(r.steps for r in requests):
            return
        yield [r.tokens[done] if done < len(r.tokens) else None for r in requests]
        done += 1


def stream_ids(
    model: Gemma3ForCausalLM,
    prompts: list[list[int]],
    max_tokens: int,
    cache_dtype: torch.dtype | None = None,
    images: Sequence[Tensor | None] | None = None,
    seed: int | None = None,
    **rules: Any,
) -> Iterator[Tensor]:
    """Yields the next token of every prompt, int64 [B] a step, for ``max_tokens`` steps.

    An image token is never written: it stands for an image that is given.

    Args:
        images: of each prompt, as ``processing.encode_prompt`` returns them.
        seed: as in ``generate``.
        rules: other fields of ``serving.Sampling``.

    Raises:
        UserError: prompt and continuation do not fit the model's context, or a prompt is empty.
    """
    engine = engine_for(model, prompts, max_tokens, cache_dtype)
    if max_tokens < 1:
        return
    for tokens in _in_step(engine, _submit_all(engine, prompts, max_tokens, images, seed, rules, stop_ids=())):
        yield torch.tensor(tokens, device=model.head_weight.device)


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
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: str | Sequence[str] = (),
) -> list[str]:
    """Continues each prompt until it ends or ``max_tokens`` are written.

    Args:
        model: dense or converted model with a tokenizer.
        prompts: texts; a single string counts as one prompt. A prompt may also be a list of texts and images
            (Pillow images or ``Path``s) in their order, for a multimodal model.
        max_tokens: at most this many new tokens each.
        temperature: 0 is greedy.
        top_k, top_p, min_p, repetition_penalty: see ``serving.Sampling``.
        seed: makes sampling repeatable; prompt i is sampled with seed + i, whoever is beside it.
        cache_dtype: of the cache; the weights' own when left out.
        on_tokens: called each step with one new token id a prompt, None for prompts that have ended. Those of a stop
            string are among them.
        chat: put each prompt into the model's chat template, as a user's turn to be answered.
        images: of each prompt (a path, a Pillow image, a list of them or None); for a single prompt, its own. They
            stand where the text says ``<start_of_image>``, or before a text that says it nowhere.
        pan_and_scan: show long images in crops as well.
        stop: a continuation ends before the first of these strings.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: the model has no tokenizer, the texts do not fit its context, or the images do not fit the texts.
    """
    if model.tokenizer is None:
        raise UserError("this model was loaded without a tokenizer; put tokenizer.model beside its weights.")
    encoded, pixels = encode_prompts(model, prompts, chat, images, pan_and_scan)
    engine = engine_for(model, encoded, max_tokens, cache_dtype)
    if max_tokens < 1:
        return [""] * len(encoded)
    rules = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty,
    }  # fmt: skip
    requests = _submit_all(engine, encoded, max_tokens, pixels, seed, rules, stop=stop)
    for tokens in _in_step(engine, requests):
        if on_tokens is not None:
            on_tokens(tokens)
    return [request.text for request in requests]
