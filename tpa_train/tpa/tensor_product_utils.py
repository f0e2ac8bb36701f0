"""The helpers that a TPA fork of Google's gemma_pytorch expects by name: rotation factors, masks, image embeddings.

They are doors to the same definitions that the toolkit computes with (``gemma3.layers``), for code that is written
against complex rotation factors and explicit masks. The toolkit's own kernels need neither: ``gemma3.attention.attend``
never builds an [L, L] mask. What concerns images is defined in ``gemma3.images``.
"""

from __future__ import annotations

import typing

import torch
from torch import Tensor, nn

from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.config import Gemma3Config, LayerKind
from tpa_train.gemma3.images import NO_IMAGE, image_blocks, populate_image_embeddings
from tpa_train.gemma3.layers import rotary_table

__all__ = [
    "NO_IMAGE", "create_attention_mask", "image_blocks", "populate_image_embeddings", "register_freqs_cis",
    "reshape_for_broadcast",
]  # fmt: skip


def register_freqs_cis(module: nn.Module, name: str, config: Gemma3Config, kind: LayerKind, max_length: int) -> None:
    """Registers e^{i t θ} for the positions t below ``max_length`` as the buffer ``name``, complex64 [max_length, d/2].

    θ is ``rope_frequencies(config, kind)``: global layers have the large base and the linear position scaling. The
    numbers are those of ``rotary_table``, to the bit. The buffer is not saved. ``module.to(some_float_dtype)`` would
    cast it to that type and lose the sine: register it after such casts.

    Raises:
        UserError: the kind is unknown or there is no position.
    """
    kinds = typing.get_args(LayerKind)
    if kind not in kinds:
        raise UserError(f"unknown layer kind '{kind}'{nearest(kind, kinds)}")
    if max_length < 1:
        raise UserError(f"max_length={max_length} must be at least 1 position.")
    tensor = next(iter([*module.parameters(), *module.buffers()]), None)
    positions = torch.arange(max_length, device=None if tensor is None else tensor.device)
    cos, sin = rotary_table(config, kind, positions)  # [max_length, 1, d/2]
    module.register_buffer(name, torch.complex(cos, sin).squeeze(1), persistent=False)


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """Returns a view of rotation factors that multiplies ``x``.

    Args:
        freqs_cis: [L, d/2], or [B, L, d/2] where the rows stand at different positions.
        x: queries or keys as complex pairs (i, i + d/2), [B, L, heads, d/2].

    Returns:
        [1, L, 1, d/2] or [B, L, 1, d/2].

    Raises:
        UserError: the shapes do not fit.
    """
    if x.dim() != 4:
        raise UserError(f"x must be [B, L, heads, d/2], but its shape is {list(x.shape)}.")
    batch, length, _, pairs = x.shape
    if list(freqs_cis.shape) not in ([length, pairs], [1, length, pairs], [batch, length, pairs]):
        raise UserError(
            f"freqs_cis has shape {list(freqs_cis.shape)}, but x of shape {list(x.shape)} needs [{length}, {pairs}] or "
            f"[{batch}, {length}, {pairs}]: take the rows of x's positions, and view x as complex pairs."
        )
    factors = freqs_cis[None] if freqs_cis.dim() == 2 else freqs_cis
    return factors[:, :, None]


def create_attention_mask(
    positions: int | Tensor,
    *,
    queries: int | None = None,
    window: int | None = None,
    image_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Returns who may look at whom, bool [B or 1, 1, L, S], True where attention is allowed.

    A query sees itself and what came before it, and all of the image that it is part of; in a local layer only what of
    these is later than ``window`` tokens ago; and never another document. That the window also cuts what an image token
    sees of its own image's past is Gemma 3's rule (gemma_pytorch's ``create_attention_mask``, transformers'
    ``create_masks_for_vision_model``); an image has 256 tokens, windows 512 and more, so that they do not meet.

    Args:
        positions: of all S tokens: their number, or int [S] or [B, S] in any order (a cache's slots). Negative ones are
            padding: they are seen by nobody but themselves, which keeps every row of the softmax non-empty.
        queries: the last so many tokens are the queries (L; a cached prefix is before them); all if left out.
        window: W, of a local layer: a query sees itself and the W - 1 tokens before it; None in a global one.
        image_ids: int [S] or [B, S], as from ``image_blocks``: an image's number, negative at text.
        document_ids: int [S] or [B, S], equal inside a packed document; positions may restart in each.
        device: of the mask when everything else is plain numbers.

    Raises:
        UserError: the shapes do not fit, or a number is out of range.
    """
    given = [t for t in (positions, image_ids, document_ids) if isinstance(t, Tensor)]
    if not isinstance(positions, Tensor):
        positions = torch.arange(positions, device=given[0].device if given else device)
    length = positions.shape[-1] if positions.dim() else 0
    ids = {"positions": positions, "image_ids": image_ids, "document_ids": document_ids}
    rows = {name: _rows(name, t, length) for name, t in ids.items() if t is not None}
    batches = {t.shape[0] for t in rows.values()} - {1}
    if len(batches) > 1:
        shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in rows.items())
        raise UserError(f"the mask's inputs have different numbers of rows: {shapes}.")
    count = length if queries is None else queries
    if not 1 <= count <= length:
        raise UserError(f"queries={queries} must lie between 1 and the number of tokens, {length}.")
    if window is not None and window < 1:
        raise UserError(f"window={window} must be at least 1 token: a query sees itself.")

    def pair(name: str) -> tuple[Tensor, Tensor]:  # of queries [B, L, 1] and keys [B, 1, S]
        return rows[name][:, -count:, None], rows[name][:, None, :]

    query, key = pair("positions")
    allowed = key <= query
    if image_ids is not None:
        own, other = pair("image_ids")
        allowed = allowed | ((own == other) & (own >= 0))
    if window is not None:
        allowed = allowed & (key > query - window)
    if document_ids is not None:
        own, other = pair("document_ids")
        allowed = allowed & (own == other)
    slots = torch.arange(length, device=key.device)
    itself = slots[-count:, None] == slots
    return ((allowed & (key >= 0) & (query >= 0)) | itself)[:, None]


def _rows(name: str, ids: Tensor, length: int) -> Tensor:
    """Returns ``ids`` as [B or 1, S]."""
    if ids.dim() not in (1, 2) or ids.shape[-1] != length or ids.is_floating_point() or ids.dtype == torch.bool:
        raise UserError(f"{name} must be whole numbers [{length}] or [B, {length}], not {ids.dtype} {list(ids.shape)}.")
    return ids if ids.dim() == 2 else ids[None]
