"""Many requests on one model: continuous batching over a preallocated cache of sequences of different lengths.

    engine = Engine(model, max_batch=8, context=4096)
    request = engine.submit("The capital of France is", max_tokens=16, temperature=0.7, seed=1)
    for update in engine.stream(request):
        print(update.text, end="")

B sequences that decode together · L tokens of a prompt · V vocabulary
"""

from __future__ import annotations

from tpa_train.serving.engine import Engine
from tpa_train.serving.requests import Request, Update
from tpa_train.serving.sampling import Sampling

__all__ = ["Engine", "Request", "Sampling", "Update"]
