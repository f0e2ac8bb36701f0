"""Tiny models for the engine, a character tokenizer, and how answers are compared."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
from random_models import factors_for, random_model, small_config

from tpa_train.serving import Engine, Request
from tpa_train.serving.decoder import Decoder
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

TIE = 1e-4  # of logits: closer than this, another order of summation may choose either


class CharTokenizer:
    """One character an id, so that random ids make texts in which stop strings occur."""

    pad_id, eos_id, bos_id, end_of_turn_id = 0, 1, 2, None
    letters = "abcdefgh "

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [self.bos_id] * bos + [4 + self.letters.index(c) for c in text]

    def piece_text(self, index: int) -> str:
        return self.letters[index % len(self.letters)] * (1 + index % 3)

    def byte_value(self, index: int) -> int | None:
        return 0xC3 if index == 90 else 0xA9 if index == 91 else None


def mixed_student(dtype: torch.dtype = torch.float64, bits: int = 8, **changes) -> Gemma3ForMultimodalLMwithTPA:
    """Latent, joint and quantized dense layers beside an untouched one, local and global, four KV heads."""
    config = small_config(num_kv_heads=4, max_context=256, **changes)
    d = config.head_dim
    specs = dense_specs(config)
    specs[1] = LayerSpec("latent", 5, "latent", 3, bits)
    specs[2] = LayerSpec("joint", 20, "joint", 20, bits)
    specs[4] = LayerSpec("dense", d, "latent", 4, bits, 16)
    specs[5] = LayerSpec("joint", 40, "joint", 40, bits, cached_norm=True)
    dense = random_model(config, seed=3, dtype=dtype)
    student = Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, factors_for(dense, specs))
    student.tokenizer = CharTokenizer()
    return student


def random_prompt(rng: random.Random, longest: int) -> list[int]:
    return [2, *(rng.randrange(3, 97) for _ in range(rng.randrange(longest)))]


def alone(model, request: Request, **options) -> Request:
    """The same request on an engine of its own, of another size: everything about the batch is different."""
    engine = Engine(model, max_batch=1, context=len(request.prompt) + request.max_tokens, **options)
    again = engine.submit(
        request.prompt, request.max_tokens, sampling=request.sampling, stop=request.stop, stop_ids=request.stop_ids,
        images=request.images,
    )  # fmt: skip
    engine.run()
    return again


@torch.no_grad()
def same_answer(model, one: Request, other: Request) -> bool:
    """Whether two greedy answers are equal, up to where the model itself has a tie."""
    count = min(len(one.tokens), len(other.tokens))
    differ = next((i for i in range(count) if one.tokens[i] != other.tokens[i]), None)
    if differ is None:
        return (one.tokens, one.text, one.finish_reason) == (other.tokens, other.text, other.finish_reason)
    logits = model(torch.tensor([one.prompt + one.tokens[:differ]]))[0, -1]
    return float(abs(logits[one.tokens[differ]] - logits[other.tokens[differ]])) < TIE


class ReplayingDecoder(Decoder):
    """A decoder that goes through the steps of graphs on a CPU: a "graph" runs what was recorded on the same places."""

    def _can_record(self) -> bool:
        return True

    def _prepare(self) -> None:
        pass

    def _record(self, size: int) -> None:
        def replay() -> None:
            self._logits[:size].copy_(self._run(self._inputs[:, :size]))

        self._graphs[size] = SimpleNamespace(replay=replay)
