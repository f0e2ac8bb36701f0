"""Random requests, many of them: every token is the one that a full forward and the rules give, and nothing leaks.

REQUESTS=10000 in the environment makes it ten thousand.
"""

from __future__ import annotations

import gc
import os
import random

import pytest
import torch
from random_models import factors_for, random_model, small_config
from serving_models import CharTokenizer, ReplayingDecoder, random_prompt

from tpa_train.errors import UserError
from tpa_train.serving import Engine, Request
from tpa_train.serving.requests import TextStream
from tpa_train.serving.sampling import sample
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec

REQUESTS = int(os.environ.get("REQUESTS", "240"))
CONTEXT = 64


def small_student() -> Gemma3ForMultimodalLMwithTPA:
    """A quantized local and a joint global layer, in float64: rounding is then the same in any order of summation."""
    config = small_config(num_layers=2, layer_kinds=("local", "global"), num_kv_heads=2, max_context=CONTEXT)
    specs = [LayerSpec("latent", 6, "dense", 8, 8, 4), LayerSpec("joint", 20, "joint", 20, 8)]
    dense = random_model(config, seed=7)
    student = Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, factors_for(dense, specs))
    student.tokenizer = CharTokenizer()
    return student


@torch.no_grad()
def check(model, request: Request) -> None:
    """Chooses every token again, from one full forward over prompt and answer, and cuts the text again."""
    given, written = len(request.prompt), request.tokens
    if written:
        ids = torch.tensor([request.prompt + written])
        logits = model(ids)[0, given - 1 :]  # the last row is of the token that was not kept, if there was one
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        for step in range(len(logits)):
            seen[step, ids[0, : given + step]] = True
        again = sample(logits, [request.sampling] * len(logits), range(len(logits)), seen)
        assert again[:-1].tolist() == written
        if request.steps > len(written):
            assert int(again[-1]) in request.stop_ids
    stream, text = TextStream(model.tokenizer, request.stop), ""
    for place, token in enumerate(written):
        assert not stream.stopped and token not in request.stop_ids, "it went on after its end"
        text += stream.push(token)
        if stream.stopped:
            assert place == len(written) - 1
    assert request.text == text + stream.flush()
    if request.finish_reason == "length":
        assert request.steps == request.max_tokens == len(written) and not stream.stopped
    elif request.finish_reason == "stop":
        assert stream.stopped or request.steps == len(written) + 1
    else:
        assert request.finish_reason == "cancelled" and len(written) < request.max_tokens


def random_stop(rng: random.Random) -> str:
    return "".join(rng.choice(CharTokenizer.letters) for _ in range(rng.randrange(1, 4)))


def random_request(engine: Engine, rng: random.Random, told: dict) -> Request | None:
    """Submits one; None where it is one of the few that must be refused."""
    prompt = random_prompt(rng, 30)
    options = {
        "temperature": rng.choice([0.0, 0.0, 0.7, 1.5]), "top_k": rng.choice([None, None, 1, 5, 500]),
        "top_p": rng.choice([None, None, 0.5, 0.95, 1.0]), "min_p": rng.choice([None, None, 0.02]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.0, 1.3, 0.8]), "seed": rng.randrange(-5, 10**6),
        "stop": [random_stop(rng) for _ in range(rng.choice([0, 0, 1, 3]))],
        "stop_ids": rng.sample(range(97), rng.choice([0, 0, 2, 20])),
    }  # fmt: skip
    if rng.random() < 0.03:
        with pytest.raises(UserError):
            engine.submit(*rng.choice([(prompt, CONTEXT), ([], 3), ([2, 97], 3), (prompt, 0), ([-1], 4)]), **options)
        return None
    updates: list = []
    request = engine.submit(prompt, 1 + rng.randrange(16), on_update=updates.append, **options)
    told[request] = updates
    return request


@pytest.mark.parametrize("graphs", [False, True])
def test_random_requests(graphs):
    rng, model = random.Random(11 + graphs), small_student()
    engine = Engine(model, max_batch=6, context=CONTEXT, prefill_chunk=24)
    if graphs:
        engine.decoder = ReplayingDecoder(model, engine.cache)
    places = [t.data_ptr() for tensors in engine.cache.buffers for t in tensors]
    allocated, told, tensors, finished, cancelled = engine.cache.nbytes, {}, [], 0, 0
    for goal in (REQUESTS // 4, REQUESTS // 2):  # both times all requests are answered and memory is looked at
        while finished < goal:
            while len(told) < 12 and finished + len(told) < goal and rng.random() < 0.7:
                random_request(engine, rng, told)
            if told and rng.random() < 0.05:
                engine.cancel(rng.choice(list(told)))
            engine.step()
            assert len(engine._free) + engine.load[0] == 6 and len({r.row for r in engine._running}) == engine.load[0]
            for request in [r for r in told if r.finished]:
                updates = told.pop(request)
                assert [t for u in updates for t in u.tokens] == request.tokens
                assert "".join(u.text for u in updates) == request.text
                assert [u.finish_reason is None for u in updates] == [True] * (len(updates) - 1) + [False]
                check(model, request)
                finished += 1
                cancelled += request.finish_reason == "cancelled"
        assert engine.idle and engine.load == (0, 0) and engine._free == list(range(6))
        del updates, request
        gc.collect()
        tensors.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert tensors[1] <= tensors[0] + 2, "tensors are left behind"
    assert engine.cache.nbytes == allocated and 0 < cancelled < REQUESTS / 8
    assert places == [t.data_ptr() for tensors in engine.cache.buffers for t in tensors]
