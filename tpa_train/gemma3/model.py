"""Gemma 3 in plain PyTorch: the text side, and a vision side where the config has one.

State-dict names are Hugging Face's without the leading ``model.`` (and with ``vision.`` before the vision side's).

The residual stream is float32 (or wider) whatever the weights are stored in; the head is tied to the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.errors import UserError
from tpa_train.gemma3.attention import Attention, AttentionContext, Cache, Documents
from tpa_train.gemma3.cache import KVCache
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.images import ImageBlocks, image_blocks, populate_image_embeddings
from tpa_train.gemma3.layers import MLP, RMSNorm, accumulation_dtype, lent
from tpa_train.gemma3.vision import VisionModel


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
        [B, L, D]: as values, not through hooks, so that compiled code gives them too. A layer that waits in the host's
        memory (``trainer.offload``) is lent to the device of ``x`` meanwhile.
        """
        if self.mlp.gate_proj.weight.device != x.device:
            with lent(self, x.device):
                return self(x, context, trace)
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
        self.vision = None if config.vision is None else VisionModel(config.vision, config.hidden_size)
        self.tokenizer: Any = None
        self.source: Any = None

    def _build_attention(self, index: int) -> Attention:
        """Returns the attention of layer ``index``; subclasses swap in factorized ones."""
        return Attention(self.config, index)

    def context(
        self, token_ids: Tensor, document_ids: Tensor | Documents | None = None, cache: Cache | None = None
    ) -> AttentionContext:
        """Returns what all layers share in a forward pass over ``token_ids`` [B, L].

        ``document_ids`` int [B, L], or ``Documents``: packed texts that must not see each other (not with a cache).
        """
        length, documents = token_ids.shape[1], None
        if cache is not None:
            positions = cache.positions(length)
        else:
            positions = torch.arange(length, device=token_ids.device)[None]
            documents = Documents(document_ids) if isinstance(document_ids, Tensor) else document_ids
        images = None
        if self.vision is not None and length > 1:  # a token alone has nothing later to look at
            ids = image_blocks(token_ids, self.config.vision.image_token_id)
            images = ImageBlocks(ids, documents) if bool((ids >= 0).any()) else None
        return AttentionContext(self.config, positions, documents, cache, images)

    def embed(self, token_ids: Tensor, images: Tensor | None = None) -> Tensor:
        """Returns the start of the residual stream [B, L, D]: scaled embeddings, and soft tokens at image tokens.

        Args:
            token_ids: int [B, L].
            images: in reading order, row after row: bytes or pixel values [N, 3, S, S], or soft tokens [N, T, D] that
                ``vision`` made of them.

        Raises:
            UserError: this model has no vision side, or the images do not fit the image tokens.
        """
        if images is not None and self.vision is None:
            raise UserError("this model is text-only: it cannot be given images; use a multimodal one (4B, 12B, 27B).")
        wanted = token_ids
        if self.vision is not None and self.config.vision.image_token_id >= self.config.vocab_size:
            wanted = token_ids.masked_fill(token_ids == self.config.vision.image_token_id, 0)
        x = self.embed_tokens(wanted)
        x = x.to(accumulation_dtype(x.dtype)) * self.config.hidden_size**0.5
        if images is None:
            return x
        soft = images if images.dim() == 3 else self.vision(images, self.embed_tokens.weight.dtype)
        return populate_image_embeddings(x, token_ids, soft, self.config.vision.image_token_id)

    def begin(
        self, batch: Tensor | Mapping[str, Tensor], cache: Cache | None = None
    ) -> tuple[Tensor, AttentionContext]:
        """Returns the start of the residual stream [B, L, D] and what all layers share, of one forward pass.

        Args:
            batch: ``token_ids`` int [B, L] and, where there are any, ``document_ids`` int [B, L] (with ``cu_seqlens``,
                where it is known: ``Documents``) and ``images`` (as in ``embed``); or the token ids alone.
            cache: see ``context``.

        Raises:
            UserError: images and image tokens do not fit each other.
        """
        batch = {"token_ids": batch} if isinstance(batch, Tensor) else batch
        token_ids, images = batch["token_ids"], batch.get("images")
        documents = batch.get("document_ids")
        if isinstance(documents, Tensor) and cache is None:
            documents = Documents(documents, batch.get("cu_seqlens"))
        context = self.context(token_ids, documents, cache)
        if context.images is not None and images is None:
            raise UserError("the text has image tokens, but no image was given with it.")
        return self.embed(token_ids, images), context

    def run_layers(self, x: Tensor, context: AttentionContext, start: int = 0, stop: int | None = None) -> Tensor:
        """Runs the layers [start, stop) on the residual stream ``x`` [B, L, D]."""
        for layer in self.layers[start:stop]:
            x = layer(x, context)
        return x

    def hidden_states(
        self,
        token_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Returns the final normalised hidden states [B, L, D]; ``logits`` turns them into scores."""
        batch = {"token_ids": token_ids, "document_ids": document_ids, "images": images}
        x, context = self.begin(batch, cache)
        x = self.run_layers(x, context)
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
        self,
        token_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """Returns logits [B, L, V] of ``token_ids`` int [B, L]; with a cache, of the new tokens after the cached.

        ``images``: see ``embed``.
        """
        return self.logits(self.hidden_states(token_ids, document_ids, cache, images))

    def allocate_cache(self, batch: int, capacity: int, **kwargs: Any) -> KVCache:
        """Returns an empty ``KVCache`` for this model; arguments as there."""
        return KVCache(self, batch, capacity, **kwargs)
