"""The engine: answers in a ragged batch are those of each request alone, whoever comes and goes meanwhile."""

from __future__ import annotations

import random
import threading

import pytest
import torch
from multimodal_models import VISION, random_multimodal
from random_models import factors_for, random_model, small_config, specs_of
from serving_models import CharTokenizer, ReplayingDecoder, alone, mixed_student, random_prompt, same_answer

from tpa_train.errors import UserError
from tpa_train.gemma3.layers import MLP, RMSNorm
from tpa_train.serving import Engine, decoder, slots
from tpa_train.serving.decoder import STEPS_BEFORE_GRAPH, batch_sizes, fused
from tpa_train.serving.slots import SlotCache
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import cache_bytes


@pytest.fixture(scope="module")
def student():
    return mixed_student()


def test_a_ragged_batch_of_64_equals_each_alone():
    """In float32; where the two differ, the model itself must have a tie there."""
    model = mixed_student(torch.float32, bits=16)
    rng = random.Random(1)
    engine = Engine(model, max_batch=64, context=110, prefill_chunk=40)
    requests = [
        engine.submit(random_prompt(rng, 80), 5, repetition_penalty=1.2 if i % 5 == 0 else 1.0) for i in range(64)
    ]
    engine.run()
    assert all(r.finished for r in requests) and len({tuple(r.tokens) for r in requests}) > 50
    for request in requests:
        assert same_answer(model, request, alone(model, request, prefill_chunk=1024))


def test_sampled_answers_do_not_depend_on_the_batch(student):
    """In float64, where a quantized cache rounds the same in any batch."""
    rng = random.Random(2)
    engine = Engine(student, max_batch=5, context=80, prefill_chunk=16)
    requests = [
        engine.submit(
            random_prompt(rng, 60), 8, temperature=1.0, seed=i, top_k=30 if i % 2 else None, top_p=0.9, min_p=0.01
        )
        for i in range(12)
    ]  # fmt: skip
    engine.run()
    for request in requests:
        again = alone(student, request)
        assert (again.tokens, again.text) == (request.tokens, request.text)
    other = engine.submit(requests[0].prompt, 8, temperature=1.0, seed=77)
    unseeded = [engine.submit(requests[0].prompt, 8, temperature=1.0) for _ in range(2)]
    engine.run()
    assert len({tuple(r.tokens) for r in (requests[0], other, *unseeded)}) == 4


def test_others_go_on_while_a_long_prompt_is_read(student):
    engine = Engine(student, max_batch=2, context=200, prefill_chunk=10)
    first = engine.submit([2, 5], 30)
    engine.step()
    late = engine.submit(random_prompt(random.Random(3), 90) + [7] * 60, 4)
    steps = 0
    while not late.tokens:
        before = len(first.tokens)
        engine.step()
        steps += 1
        assert len(first.tokens) == before + 1 or first.finished
    assert steps == -(-len(late.prompt) // 10)
    engine.run()
    for request in (first, late):
        assert alone(student, request).tokens == request.tokens


def test_the_row_of_a_cancelled_request_serves_the_next(student):
    engine = Engine(student, max_batch=1, context=100, prefill_chunk=8)
    updates = []
    running = engine.submit(random_prompt(random.Random(4), 40), 40, on_update=updates.append)
    waiting, last = engine.submit([2, 8], 5), engine.submit([2, 9, 10], 5)
    while not running.tokens:
        engine.step()
    assert engine.load == (1, 2)
    assert engine.cancel(running) and engine.cancel(waiting.id)
    told = engine.step()
    assert {u.request.id: u.finish_reason for u in told[:2]} == {0: "cancelled", 1: "cancelled"}
    assert updates[-1].finish_reason == running.finish_reason == "cancelled" and waiting.tokens == []
    engine.run()
    assert last.tokens == alone(student, last).tokens and last.finish_reason == "length"
    assert not engine.cancel(running) and not engine.cancel("nobody") and engine.idle


def test_streams_of_text_and_stop_strings(student):
    engine = Engine(student, max_batch=3, context=100)
    whole = engine.submit([2, 30, 40], 40, stop_ids=())
    engine.run()
    stop = whole.text[5:9]
    assert whole.finish_reason == "length" and len(whole.tokens) == 40
    request, other = engine.submit([2, 30, 40], 40, stop=stop, stop_ids=()), engine.submit([2, 11], 50, stop_ids=())
    parts = [u.text for u in engine.stream(request)]
    assert "".join(parts) == request.text == whole.text[: whole.text.find(stop)] and request.finish_reason == "stop"
    assert not other.finished and engine.load == (1, 0)
    end = engine.submit([2, 30, 40], 40, stop_ids=[whole.tokens[6]])
    engine.run()
    assert end.tokens == whole.tokens[: whole.tokens.index(whole.tokens[6])] and end.finish_reason == "stop"


def test_images_in_the_batch():
    """Prompts with images at different places beside texts, read in chunks, as in a full forward."""
    config = small_config(num_kv_heads=4, vision=VISION)
    dense = random_multimodal(config)
    specs = specs_of(config, {1: (3, 5), 5: (8, 4)}, 8)
    model = Gemma3ForMultimodalLMwithTPA.from_dense(dense, specs, factors_for(dense, specs))
    image, rng = [91, *[90] * VISION.tokens_per_image, 92], random.Random(5)
    pixels = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    engine = Engine(model, max_batch=3, context=60, prefill_chunk=5)
    prompts = [
        ([2, 5, *image, 9, *image], pixels), ([2, *(rng.randrange(3, 90) for _ in range(30))], None),
        ([2, *image], pixels[:1]), ([2, 7], None), ([2, *[6] * 9, *image, 8], pixels[1:]),
    ]  # fmt: skip
    requests = [engine.submit(ids, 6, images=own, stop_ids=()) for ids, own in prompts]
    engine.run()
    for request in requests:
        with torch.no_grad():
            ids = torch.tensor([request.prompt + request.tokens])
            logits = model(ids, images=request.images)[0, len(request.prompt) - 1 : -1]
        logits[:, 90] = -torch.inf
        assert logits.argmax(-1).tolist() == request.tokens


def test_idle_places_of_a_graph_disturb_nobody(student, monkeypatch):
    """Free rows, and one whose prompt is half read, stand in for those that decode; batches shrink and grow. Kernels of
    each size are compiled first, in a step whose attention gives anything."""
    sizes, attend_new = [], slots.attend_new

    def compile_step(step, device):
        with monkeypatch.context() as patch:
            patch.setattr(slots, "attend_new", lambda *a: torch.full_like(attend_new(*a), torch.nan))
            sizes.append(len(step()))

    monkeypatch.setattr(decoder, "compile_step", compile_step)
    assert batch_sizes(1) == [1] and batch_sizes(6) == [1, 2, 4, 6] and batch_sizes(8) == [1, 2, 4, 8]
    engine = Engine(student, max_batch=6, context=120, prefill_chunk=20)
    engine.decoder = ReplayingDecoder(student, engine.cache)
    rng = random.Random(6)
    requests = [engine.submit(random_prompt(rng, 50), 6 + rng.randrange(4 * STEPS_BEFORE_GRAPH)) for _ in range(14)]
    engine.run()
    requests += [engine.submit(random_prompt(rng, 10), 3 * STEPS_BEFORE_GRAPH) for _ in range(2)]
    engine.run()
    for request in requests:
        assert alone(student, request).tokens == request.tokens
    assert set(engine.decoder._graphs) >= {2, 4, 6} and sorted(sizes) == [1, 2, 4, 6]


def test_fused_parts_are_put_back(student, monkeypatch):
    """torch.compile stands in for itself here; what it makes of the parts shows on a GPU (test_graphs)."""
    compiled = []

    def compile(function, dynamic):
        def run(*arguments):
            compiled.append(getattr(function, "__self__", function))
            return function(*arguments)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    with torch.no_grad(), fused(student):
        inside = student(torch.tensor([[2, 3, 4]]))
    assert {type(part) for part in compiled} == {RMSNorm, MLP}
    count = len(compiled)
    assert torch.equal(student(torch.tensor([[2, 3, 4]])), inside) and len(compiled) == count


def test_requests_come_from_other_threads(student):
    engine, made = Engine(student, max_batch=4, context=40), []

    def ask(number):
        for i in range(5):
            made.append(engine.submit([2, 3 + number, 4 + i], 4))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads) or not engine.idle:
        engine.step()
    assert len(made) == 20 and len({r.id for r in made}) == 20 and all(len(r.tokens) == 4 for r in made)


def test_a_failing_step_ends_all_requests_and_leaves_the_engine_usable(student, monkeypatch):
    engine, told = Engine(student, max_batch=2, context=40), []
    requests = [engine.submit([2, 3], 5, on_update=told.append) for _ in range(3)]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(student, "logits", lambda hidden: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert {r.finish_reason for r in requests} == {"cancelled"} == {u.finish_reason for u in told[-3:]}
    assert engine.idle and engine.load == (0, 0)
    again = engine.submit([2, 3], 5)
    engine.run()
    assert again.tokens == alone(student, again).tokens


@pytest.mark.parametrize("arguments,message", [
    (([2] * 30, 11), "30 tokens.*max_tokens .11. exceed the engine's context of 40.*raise context= .*256"),
    (([2] * 30, 300), "exceed the engine's context of 40 tokens; shorten one of them\\.$"), (([2], 0), "max_tokens=0"),
    (([], 3), "at least one token"), (([2, 97], 3), "has the id 97"), (([-1], 3), "has the id -1"),
])  # fmt: skip
def test_requests_that_cannot_be_served_are_refused(student, arguments, message):
    engine = Engine(student, max_batch=1, context=40)
    with pytest.raises(UserError, match=message):
        engine.submit(*arguments)
    assert engine.idle


def test_options_that_make_no_sense_are_refused(student):
    engine = Engine(student, max_batch=1, context=40)
    for options, message in (
        ({"stop": ["x", ""]}, "empty string"), ({"temperature": -1.0}, "temperature=-1"), ({"top_k": 0}, "top_k=0"),
        ({"images": torch.zeros(1, 3, 56, 56)}, "text-only"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            engine.submit([2], 3, **options)
    engine.submit([2], 3, id="mine")
    with pytest.raises(UserError, match="id=mine"):
        engine.submit([2], 3, id="mine")
    for options in ({"context": 0}, {"context": 257}, {"max_batch": 0}, {"prefill_chunk": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            Engine(student, **options)
    with pytest.raises(UserError, match="without a tokenizer"):
        Engine(random_model(small_config()), max_batch=1, context=20).submit([2], 3, stop="x")
    assert CharTokenizer().encode("ab") == Engine(student, max_batch=1, context=20).submit("ab", 3).prompt


def test_bytes_are_those_of_the_formula(student):
    for context in (1, 8, 9, 100):
        cache = SlotCache(student, 3, context, torch.bfloat16)
        assert cache.nbytes == 3 * cache_bytes(student.config, student.specs, context)
        assert cache.nbytes == sum(t.untyped_storage().nbytes() for layer in cache.buffers for t in layer)
