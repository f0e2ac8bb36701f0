"""Parts are compiled inside the context, and plain modules after it."""

import torch
from random_models import random_model, small_config, tokens

from tpa_train import compilation


def test_parts_are_compiled_while_they_train_and_plain_afterwards(monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: compile_module(self, backend=backend, **kw))
    config = small_config(num_layers=2, layer_kinds=("local", "global"))
    model, ids = random_model(config), tokens(config, 1, 5)
    expected = model(ids)
    with compilation.compiled(model.layers):
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-10)
        traced = model.layers[0](model.embed(ids), model.context(ids), trace=True)
    assert len(traced) == 3 and graphs
    graphs.clear()
    assert model(ids).equal(expected) and not graphs


def test_the_trace_of_a_layer_is_what_enters_and_leaves_its_attention():
    config = small_config()
    model, ids = random_model(config), tokens(config, 1, 20)
    context, x = model.context(ids), model.embed(ids)
    for layer in model.layers:
        after, entering, leaving = layer(x, context, trace=True)
        assert torch.equal(entering, layer.input_layernorm(x))
        assert torch.equal(leaving, layer.self_attn(entering, context))
        assert torch.equal(after, layer(x, context))
        x = after
