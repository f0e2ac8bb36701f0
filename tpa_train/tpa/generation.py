"""Decoding with a cache, for the dense and the converted model alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.chat import ChatTemplate
from tpa_train.gemma3.model import Gemma3ForCausalLM

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
    **sampling,
) -> Iterator[Tensor]:
    """Yields the next token of every prompt, int64 [B] a step; keyword arguments go to ``sample``.

    Prompts of different lengths are padded on the left and see neither each other's padding nor positions.

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
    for start in range(0, longest, PREFILL_CHUNK):
        hidden = model.hidden_states(ids[:, start : start + PREFILL_CHUNK], cache=cache)
    for step in range(max_tokens):
        token = sample(model.logits(hidden[:, -1]), **sampling)
        yield token
        if step + 1 < max_tokens:
            hidden = model.hidden_states(token[:, None], cache=cache)


def stop_ids(model: Gemma3ForCausalLM) -> set[int]:
    """Returns the ids that end a text: end of sequence and, in tuned models, end of turn."""
    tokenizer = model.tokenizer
    return {i for i in (tokenizer.eos_id, getattr(tokenizer, "end_of_turn_id", None)) if i is not None}


def encode_prompts(model: Gemma3ForCausalLM, prompts: list[str], chat: bool = False) -> list[list[int]]:
    """Returns the ids of each prompt, ``<bos>`` first; with ``chat`` as a user's turn that the model is to answer."""
    if chat:
        template = ChatTemplate(model.tokenizer)
        return [template.encode_prompt(prompt) for prompt in prompts]
    return [model.tokenizer.encode(prompt) for prompt in prompts]


def generate(
    model: Gemma3ForCausalLM,
    prompts: list[str] | str,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    cache_dtype: torch.dtype | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
    chat: bool = False,
) -> list[str]:
    """Continues each prompt until it ends or ``max_tokens`` are written.

    Args:
        model: dense or converted model with a tokenizer.
        prompts: texts; a single string counts as one prompt.
        max_tokens: at most this many new tokens each.
        temperature: 0 is greedy.
        top_k, top_p: restrict sampling, see ``sample``.
        seed: makes sampling repeatable.
        cache_dtype: of the cache; the weights' own when left out.
        on_tokens: called each step with one new token id a prompt, None for prompts that have ended.
        chat: put each prompt into the model's chat template, as a user's turn to be answered.

    Returns:
        The continuations, without the prompts.

    Raises:
        UserError: the model has no tokenizer, or the texts do not fit its context.
    """
    if model.tokenizer is None:
        raise UserError("this model was loaded without a tokenizer; put tokenizer.model beside its weights.")
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    generator = None
    if seed is not None:
        generator = torch.Generator(device=model.head_weight.device).manual_seed(seed)
    ends = stop_ids(model)
    written: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    encoded = encode_prompts(model, prompts, chat)
    steps = stream_ids(
        model, encoded, max_tokens, cache_dtype,
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
