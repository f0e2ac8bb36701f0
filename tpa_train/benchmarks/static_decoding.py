"""transformers' fastest way to decode a batch: a static cache, and the model compiled into CUDA graphs."""

from __future__ import annotations

import inspect

import torch

from tpa_train.benchmarks.journal import free_memory
from tpa_train.benchmarks.train import to_transformers
from tpa_train.gemma3.model import Gemma3ForCausalLM


class StaticDecoder:
    """transformers' model with the weights of ``model``.

    Args:
        model: the dense original, whose weights are copied.
        compile: compile with ``mode="reduce-overhead"``; else run it as it is.

    Raises:
        UserError: transformers is not installed.
    """

    def __init__(self, model: Gemma3ForCausalLM, compile: bool) -> None:
        self.compile, weight = compile, model.head_weight
        with torch.device(weight.device):
            self.theirs = to_transformers(model, weight.dtype).eval().requires_grad_(False)
        # Without data, to foresee what its cache will take: that of the original, of the same sizes.
        with torch.device("meta"):
            self.sizes = Gemma3ForCausalLM(model.config).to(weight.dtype)
        self.device = weight.device

    def decoding(self, batch: int, context: int, held: int) -> StaticDecoding:
        """Returns decoding of ``batch`` sequences that hold ``held`` of ``context`` tokens."""
        return StaticDecoding(self.theirs, batch, context, held, self.compile)


class StaticDecoding:
    """One batch; ``step`` decodes a token of each sequence and waits for them."""

    @torch.no_grad()
    def __init__(self, model: torch.nn.Module, batch: int, context: int, held: int, compile: bool) -> None:
        from transformers import StaticCache

        self.device = next(model.parameters()).device
        torch.compiler.reset()  # the graphs of an earlier batch keep their memory until they are forgotten
        free_memory()
        self.cache = StaticCache(config=model.config, max_cache_len=context)
        self.argument = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        self.tokens = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        self.forward = model
        self.step()  # allocates the layers' buffers
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
            # Whether a layer's length is a number or a tensor differs by version and by the kind of layer.
            for name in ("cumulative_length", "cumulative_length_int"):
                length = getattr(layer, name, None)
                if isinstance(length, torch.Tensor):
                    length.fill_(held)
                elif length is not None:
                    setattr(layer, name, held)
        self.position.fill_(held)
        self._keep_counts()
        if compile:
            free_memory()  # what the plain step left: graphs have a pool of their own
            self.forward = torch.compile(model, mode="reduce-overhead")

    @property
    def cache_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for layer in self.cache.layers for t in (layer.keys, layer.values))

    @torch.no_grad()
    def step(self) -> None:
        options = {self.argument: self.cache, "position_ids": self.position}
        logits = self.forward(input_ids=self.tokens, use_cache=True, **options).logits
        self.tokens = logits[:, -1:].argmax(-1)
        self.tokens.tolist()  # waits for the device
        self.position = self.position + 1
        self._keep_counts()

    def _keep_counts(self) -> None:
        """Holds the lengths of full rings, which are the same at every length.

        Some layers count their tokens in a Python number: one that grew would be compiled again, and then be a new CUDA
        graph in every step.
        """
        for layer in self.cache.layers:
            for name in ("cumulative_length", "cumulative_length_int"):
                count = getattr(layer, name, None)
                if isinstance(count, int):
                    setattr(layer, name, min(count, layer.max_cache_len))
