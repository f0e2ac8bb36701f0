"""Continuing texts: ragged batches, sampling options, stopping and refusals, with a stub tokenizer."""

import pytest
import torch
from random_models import ByteTokenizer, random_model, small_config, student_of, tokens

from tpa_train.errors import UserError
from tpa_train.serving import engine
from tpa_train.tpa.generation import generate, stop_ids, stream_ids

PROMPTS = ["a", "this one is longer than the window", "mid one", "hello"]


@pytest.fixture(params=[(1, 16), (4, 8)], ids=["G1-16", "G4-8"], scope="module")
def model(request):
    groups, bits = request.param
    dense = random_model(small_config(num_kv_heads=groups, max_context=200), seed=3)
    dense.tokenizer = ByteTokenizer(eos_id=-1)
    return student_of(dense, {0: (5, 3), 4: (0, 4), 5: (6, 5)}, bits)


def test_a_ragged_batch_equals_each_prompt_alone(model):
    together = model.generate(PROMPTS, max_tokens=20)
    assert together == [model.generate(p, max_tokens=20)[0] for p in PROMPTS]
    assert all(len(t.split()) == 20 for t in together) and len(set(together)) == 4


@pytest.mark.parametrize("chunk", [1, 5, 8, 13])
def test_the_prefills_chunks_do_not_matter(model, monkeypatch, chunk):
    expected = model.generate(PROMPTS, max_tokens=10)
    monkeypatch.setattr(engine, "PREFILL_CHUNK", chunk)
    assert model.generate(PROMPTS, max_tokens=10) == expected


@torch.inference_mode()
def test_greedy_equals_the_full_forward(model):
    ids = model.tokenizer.encode(PROMPTS[1])
    for token in model.generate(PROMPTS[1], max_tokens=20)[0].split():
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == int(token)
        ids.append(int(token))


def test_seeds_repeat_and_differ(model):
    def run(seed, **options):
        return model.generate(PROMPTS[:2], max_tokens=10, temperature=1.0, seed=seed, **options)

    assert run(0) == run(0) and run(1) == run(1) and run(0) != run(1)
    assert run(0, top_p=0.9) == run(0, top_p=0.9)
    # The i-th prompt is sampled with seed + i, whoever is beside it.
    assert model.generate(PROMPTS[1], max_tokens=10, temperature=1.0, seed=1)[0] == run(0)[1]


def test_top_k_of_one_is_greedy(model):
    greedy = model.generate(PROMPTS, max_tokens=20)
    assert model.generate(PROMPTS, max_tokens=20, temperature=5.0, top_k=1, seed=0) == greedy
    assert model.generate(PROMPTS, max_tokens=20, temperature=5.0, top_p=1e-9, seed=0) == greedy
    assert model.generate(PROMPTS, max_tokens=20, temperature=5.0, seed=0) != greedy


def test_stop_strings_and_penalties(model):
    texts = model.generate(PROMPTS, max_tokens=20)
    stop = texts[1][-9:]
    ended = model.generate(PROMPTS, max_tokens=20, stop=[stop, "never"])
    assert ended == [t[: t.find(stop)] if stop in t else t for t in texts] and ended[1] != texts[1]
    # A penalty that no logit survives lets no token come twice, nor one of the prompt's.
    ids = model.tokenizer.encode(PROMPTS[0])
    once = model.generate(PROMPTS[0], max_tokens=20, repetition_penalty=1e9)[0].split()
    assert len(set(once)) == 20 and not {int(t) for t in once} & set(ids)
    sampled = model.generate(PROMPTS, max_tokens=20, temperature=5.0, min_p=1.0, seed=0)
    assert sampled == texts  # nothing but the likeliest is as likely as the likeliest


def test_stop_ids_end_each_text_on_its_own(model, monkeypatch):
    texts = [t.split() for t in model.generate(PROMPTS, max_tokens=20)]
    stop = texts[0][7]
    for tokenizer in (ByteTokenizer(eos_id=int(stop)), ByteTokenizer(eos_id=-1, end_of_turn_id=int(stop))):
        monkeypatch.setattr(model, "tokenizer", tokenizer)
        assert int(stop) in stop_ids(model)
        steps: list[list[int | None]] = []
        stopped = [t.split() for t in model.generate(PROMPTS, max_tokens=20, on_tokens=steps.append)]
        assert stopped == [t[: t.index(stop)] if stop in t else t for t in texts]
        assert len(stopped[0]) <= 7
        # The callback saw the same tokens, and None once a text had ended.
        for row, text in enumerate(stopped):
            column = [step[row] for step in steps]
            assert [str(t) for t in column[: len(text)]] == text and set(column[len(text) :]) <= {None}


def test_it_ends_when_all_have_ended(model, monkeypatch):
    first = int(model.generate(PROMPTS[0], max_tokens=1)[0])
    monkeypatch.setattr(model, "tokenizer", ByteTokenizer(eos_id=first))
    steps = []
    assert model.generate(PROMPTS[0], max_tokens=20, on_tokens=steps.append) == [""]
    assert steps == [[None]]


def test_context_overflow_is_refused_and_the_edge_is_not(model):
    prompt = "x" * 189  # 190 tokens with the bos
    assert len(model.generate(prompt, max_tokens=10)[0].split()) == 10
    with pytest.raises(UserError, match="190 tokens.*max_tokens .11.*context of 200"):
        model.generate(prompt, max_tokens=11)


def test_empty_prompts_are_refused(model):
    with pytest.raises(UserError, match="at least one token"):
        next(stream_ids(model, [[5], []], 3))
    with pytest.raises(UserError, match="at least one token"):
        next(stream_ids(model, [], 3))


def test_a_model_without_tokenizer_is_refused():
    with pytest.raises(UserError, match="without a tokenizer"):
        generate(random_model(small_config()), "hello")


def test_the_dense_model_generates_too():
    dense = random_model(small_config())
    dense.tokenizer = ByteTokenizer(eos_id=-1)
    full = student_of(dense, {i: (8, 8) for i in range(6)})
    assert generate(dense, PROMPTS, max_tokens=15) == full.generate(PROMPTS, max_tokens=15)


def test_stream_yields_one_token_a_prompt_and_step(model):
    prompts = [row.tolist() for row in tokens(model.config, 2, 9)]
    out = list(stream_ids(model, prompts, 4))
    assert len(out) == 4 and all(t.shape == (2,) and t.dtype == torch.int64 for t in out)
    assert list(stream_ids(model, prompts, 0)) == []
