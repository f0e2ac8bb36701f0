"""Gemma 3, text side, in plain PyTorch. State-dict names are Hugging Face's without the leading ``model.``.

The residual stream is float32 (or wider) whatever the weights are stored in; the head is tied to the embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.gemma3.attention import Attention, AttentionContext, Documents
from tpa_train.gemma3.cache import KVCache
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.layers import MLP, RMSNorm, accumulation_dtype


class DecoderLayer(nn.Module):
    """One block: attention and MLP, each between two norms ("sandwich" norms)."""

    def __init__(self, config: Gemma3Config, attention: Attention) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = MLP(config)
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            self.register_module(f"{name}_layernorm", RMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(
        self, x: Tensor, context: AttentionContext, trace: bool = False
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps the residual stream [B, L, D] to the next one.

        With ``trace`` also returns what enters the attention [B, L, D], its queries [B, L, H, d], and what leaves it
        [B, L, D]: as values, not through hooks, so that compiled code gives them too.
        """
        normed = self.input_layernorm(x)
        queries = self.self_attn.queries(normed, context.rotary[self.self_attn.kind])
        attended = self.self_attn(normed, context, queries)
        x = x + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
        return (x, normed, queries, attended) if trace else x


class Gemma3ForCausalLM(nn.Module):
    """``model(token_ids [B, L]) -> logits [B, L, V]``.

    Attributes set by the loaders: ``tokenizer`` (or None) and ``source`` (where the weights came from).
    """

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(config, self._build_attention(index)) for index in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.tokenizer: Any = None
        self.source: Any = None

    def _build_attention(self, index: int) -> Attention:
        """Returns the attention of layer ``index``; subclasses swap in factorized ones."""
        return Attention(self.config, index)

    def context(
        self, token_ids: Tensor, document_ids: Tensor | Documents | None = None, cache: KVCache | None = None
    ) -> AttentionContext:
        """Returns what all layers share in a forward pass over ``token_ids`` [B, L].

        ``document_ids`` int [B, L], or ``Documents``: packed texts that must not see each other (not with a cache).
        """
        length = token_ids.shape[1]
        if cache is not None:
            return AttentionContext(self.config, cache.positions(length), cache=cache)
        positions = torch.arange(length, device=token_ids.device)[None]
        if isinstance(document_ids, Tensor):
            document_ids = Documents(document_ids)
        return AttentionContext(self.config, positions, document_ids)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Returns scaled embeddings [B, L, D], the start of the residual stream."""
        x = self.embed_tokens(token_ids)
        return x.to(accumulation_dtype(x.dtype)) * self.config.hidden_size**0.5

    def run_layers(self, x: Tensor, context: AttentionContext, start: int = 0, stop: int | None = None) -> Tensor:
        """Runs the layers [start, stop) on the residual stream ``x`` [B, L, D]."""
        for layer in self.layers[start:stop]:
            x = layer(x, context)
        return x

    def hidden_states(
        self, token_ids: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Returns the final normalised hidden states [B, L, D]; ``logits`` turns them into scores."""
        context = self.context(token_ids, document_ids, cache)
        x = self.run_layers(self.embed(token_ids), context)
        if cache is not None:
            cache.advance(token_ids.shape[1])
        return self.norm(x)

    @property
    def head_weight(self) -> Tensor:
        """Output matrix [V, D], tied to the embedding."""
        return self.embed_tokens.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns scores [..., V] of final hidden states [..., D], in the head's dtype."""
        if not torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(self.head_weight.dtype)
        return F.linear(hidden, self.head_weight)

    def forward(
        self, token_ids: Tensor, document_ids: Tensor | None = None, cache: KVCache | None = None
    ) -> Tensor:
        """Returns logits [B, L, V] of ``token_ids`` int [B, L]; with a cache, of the new tokens after the cached."""
        return self.logits(self.hidden_states(token_ids, document_ids, cache))

    def allocate_cache(self, batch: int, capacity: int, **kwargs: Any) -> KVCache:
        """Returns an empty ``KVCache`` for this model; arguments as there."""
        return KVCache(self, batch, capacity, **kwargs)
