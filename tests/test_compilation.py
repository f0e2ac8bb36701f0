"""Passes are compiled inside the context and plain methods after it; a layer's trace; offsets of documents on CUDA."""

import pytest
import torch
from random_models import random_model, small_config, tokens

from tpa_train import compilation
from tpa_train.settings import TrainerSettings


class Owner:
    def twice(self, x):
        return 2 * x


def test_methods_are_compiled_inside_the_context_only(monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_function(f, backend=backend, **options))
    owner = Owner()
    with pytest.raises(RuntimeError), compilation.compiled(owner, ("twice",)):
        assert owner.twice(torch.ones(3)).equal(torch.full((3,), 2.0)) and len(graphs) == 1
        for size in range(4, 20):  # more shapes than the default limit
            owner.twice(torch.ones(size))
        assert len(graphs) == 17
        raise RuntimeError
    assert owner.twice(torch.ones(50)).equal(torch.full((50,), 2.0)) and len(graphs) == 17
    assert not vars(owner)


@pytest.mark.parametrize("changed,device,records,alike,recorded", [
    ({}, "cuda", True, True, True), ({}, "cuda", False, True, False), ({}, "cpu", True, True, False),
    ({}, "cuda", True, False, False), ({"accumulate": 2}, "cuda", True, True, False),
    ({"activation_checkpointing": True}, "cuda", True, True, False),
])  # fmt: skip
def test_passes_are_recorded_where_they_can_be_replayed(monkeypatch, changed, device, records, alike, recorded):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: modes.append(options.get("mode")) or f)
    owner = Owner()
    owner.teacher = owner.student = random_model(small_config())
    owner.passes, owner.records = ("twice",), records
    options = TrainerSettings(compile=True, **changed)
    with compilation.stage_forwards(owner, options, False, torch.device(device), alike):
        pass
    assert modes == ["reduce-overhead" if recorded else None]


def test_the_trace_of_a_layer_is_what_enters_and_leaves_its_attention():
    config = small_config()
    model, ids = random_model(config), tokens(config, 1, 20)
    context, x = model.context(ids), model.embed(ids)
    for layer in model.layers:
        after, entering, queries, leaving = layer(x, context, trace=True)
        assert torch.equal(queries, layer.self_attn.queries(entering, context.rotary[layer.self_attn.kind]))
        assert torch.equal(entering, layer.input_layernorm(x))
        assert torch.equal(leaving, layer.self_attn(entering, context))
        assert torch.equal(after, layer(x, context))
        x = after
