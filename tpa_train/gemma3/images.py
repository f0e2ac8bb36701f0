"""Where images stand in a text, what is put there, and who sees whom inside of them.

B batch · L tokens · D hidden size · N images · T soft tokens of an image (256)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tpa_train.errors import UserError

if TYPE_CHECKING:
    from tpa_train.gemma3.attention import Documents

NO_IMAGE = -1  # image id of text


def image_blocks(token_ids: Tensor, image_token_id: int) -> Tensor:
    """Numbers the images of each row: int [B, L], ``NO_IMAGE`` at text.

    An image is a run of ``image_token_id``, as in gemma_pytorch and transformers; Gemma's processor keeps neighbouring
    images apart by its start and end tokens.
    """
    image = token_ids == image_token_id
    starts = image.clone()
    starts[:, 1:] &= ~image[:, :-1]
    return torch.where(image, starts.cumsum(1) - 1, NO_IMAGE)


def populate_image_embeddings(
    hidden: Tensor, token_ids: Tensor, image_embeddings: Tensor, image_token_id: int
) -> Tensor:
    """Returns ``hidden`` with the images' soft tokens in place of the image token's embeddings.

    Soft tokens go in as they are: ``hidden`` is scaled by √D already, they are not scaled. They fill the places in
    reading order, row after row. Out of place, and differentiable in both.

    Args:
        hidden: scaled embeddings of the text [B, L, D].
        token_ids: int [B, L].
        image_embeddings: [images, soft tokens of an image (256), D]; cast to ``hidden``'s type.
        image_token_id: marks the places.

    Raises:
        UserError: the shapes do not fit, or there are more or fewer places than soft tokens.
    """
    if hidden.dim() != 3 or token_ids.shape != hidden.shape[:2]:
        raise UserError(
            f"hidden must be [B, L, D] and token_ids [B, L], but they are {list(hidden.shape)} and "
            f"{list(token_ids.shape)}."
        )
    if image_embeddings.dim() != 3 or image_embeddings.shape[-1] != hidden.shape[-1]:
        raise UserError(
            f"image_embeddings must be [images, soft tokens, {hidden.shape[-1]}], not {list(image_embeddings.shape)}."
        )
    places = token_ids == image_token_id
    wanted, (images, each) = int(places.sum()), image_embeddings.shape[:2]
    if wanted != images * each:
        raise UserError(
            f"the text has {wanted} image tokens, but {images} images of {each} soft tokens make {images * each}; put "
            f"{each} image tokens in the text for every image."
        )
    return hidden.masked_scatter(places[..., None], image_embeddings.to(hidden.dtype))


@dataclass
class ImageBlocks:
    """The images of a batch: inside of one, tokens see each other whatever their order.

    ``ids``: int [B, L], as from ``image_blocks``; at least one image. ``documents``: of packed rows.
    """

    ids: Tensor
    documents: Documents | None = None

    @cached_property
    def spans(self) -> list[tuple[int, int, int, int]]:
        """(row, start, end, first token of its document) of every image in reading order, on the host."""
        before = torch.nn.functional.pad(self.ids, (1, 1), value=NO_IMAGE)
        # A cut stands before every token whose image differs from its left neighbour's; position L closes the row.
        cuts = (before[:, 1:] != before[:, :-1]).cpu()
        inside = torch.nn.functional.pad(self.ids >= 0, (0, 1)).cpu()
        starts = (cuts & inside).nonzero().tolist()
        opened = torch.nn.functional.pad(inside, (1, 0))[:, :-1]
        ends = (cuts & opened).nonzero().tolist()
        edges = [] if self.documents is None else self.documents.segments()
        spans = []
        for (row, start), (_, end) in zip(starts, ends, strict=True):
            first = next((a for r, a, b in edges if r == row and a <= start < b), 0)
            spans.append((row, start, end, first))
        return spans

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and positions of all image tokens in reading order, two int [image tokens]."""
        return (self.ids >= 0).nonzero(as_tuple=True)

    @property
    def text(self) -> Tensor:
        """Which tokens are text, bool [B, L]: what a model says at an image token nobody reads, nor was it trained."""
        return self.ids < 0

    @cached_property
    def future(self) -> Tensor:
        """What an image's tokens see besides the causal past: bool [B, 1, L, L], later tokens of the same image."""
        own, other = self.ids[:, :, None], self.ids[:, None, :]
        return ((own == other) & (own >= 0)).triu(1)[:, None]
