"""CUDA graphs of decoding steps against plain ones, on a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from serving_models import mixed_student, random_prompt

from tpa_train.serving import Engine
from tpa_train.serving.decoder import STEPS_BEFORE_GRAPH

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.mark.parametrize("dtype,fuse,bits", [
    (torch.float32, False, 16), (torch.float32, True, 16), (torch.bfloat16, False, 16), (torch.bfloat16, True, 4),
])  # fmt: skip
def test_graphs_give_what_plain_steps_give(dtype, fuse, bits):
    """Requests of many lengths through several batch sizes; in bfloat16 sums may fall either way at ties."""
    model = mixed_student(dtype, bits).cuda()
    answers = []
    for graphs in (False, True):
        rng = random.Random(0)
        engine = Engine(model, max_batch=6, context=120, prefill_chunk=32, graphs=graphs, fuse=fuse)
        requests = [engine.submit(random_prompt(rng, 60), 1 + rng.randrange(40), stop_ids=()) for _ in range(20)]
        engine.run()
        answers.append([r.tokens for r in requests])
        assert bool(engine.decoder._graphs) == graphs
    same = sum(a == b for a, b in zip(*answers, strict=True))
    assert same >= (19 if dtype == torch.float32 else 10)


def test_a_replay_reads_what_is_in_the_places_now():
    model = mixed_student(torch.float32, bits=16).cuda()
    engine = Engine(model, max_batch=4, context=60)
    decoder, graphs = engine.decoder, []
    for round in range(STEPS_BEFORE_GRAPH + 3):
        logits = decoder([3 + round], [round % 4], [0], [(row, 0) for row in range(4) if row != round % 4])
        expected = model(torch.tensor([[3 + round]], device="cuda"))[0, -1]
        torch.testing.assert_close(logits[0], expected, rtol=1e-3, atol=1e-3)
        graphs.append(len(decoder._graphs))
    assert graphs[0] == 0 and graphs[-1] == 1
