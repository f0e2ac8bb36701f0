"""Images and text to what a multimodal Gemma 3 reads: bytes of the tower's size, and token ids with places for them.

Every step is that of transformers' ``Gemma3ImageProcessorPil`` and ``Gemma3Processor``, to the last bit and id. Needs
Pillow, which the extra ``vision`` installs.

N images · S image size · T soft tokens of an image
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.vision import pixel_table
from tpa_train.gemma3.vision_config import VisionConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from tpa_train.gemma3.chat import ChatTemplate

    ImageLike = Image | str | Path

START_OF_IMAGE = "<start_of_image>"  # where an image stands in a text
_PLACE = "\ue00d"  # the same inside a chat template, where what a user types is spelled out; of the private use area
# Pan and scan: an image this much longer than high (or the other way round) is also shown in up to so many crops.
MIN_RATIO, MIN_CROP, MAX_CROPS = 1.2, 256, 4


def pillow() -> Any:
    """Returns Pillow's ``Image`` module.

    Raises:
        UserError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("images need Pillow, which is not installed; run: pip install -e '.[vision]'") from error
    return Image


def open_image(image: ImageLike, decode: bool = True) -> Image:
    """Returns a Pillow image, read from its file if a path is given; a file's EXIF rotation is undone.

    Args:
        image: a path or an image.
        decode: False reads no further than the file's header: it exists and is an image.

    Raises:
        UserError: the file is missing or broken, or this is no image.
    """
    module = pillow()
    if isinstance(image, module.Image):
        return image
    if not isinstance(image, (str, Path)):
        raise UserError(f"an image must be a path or a Pillow image, not {type(image).__name__}.")
    path = Path(image).expanduser()
    if not path.is_file():
        raise UserError(f"there is no image at {path}.")
    try:
        with module.open(path) as opened:
            if not decode:
                return opened
            from PIL import ImageOps

            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, module.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image ({error}); is it broken?") from error


def to_rgb(image: Image) -> Image:
    """Returns ``image`` in RGB; what is transparent becomes white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    background = pillow().new("RGBA", image.size, (255, 255, 255, 255))
    return pillow().alpha_composite(background, image).convert("RGB")


def crop_boxes(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """Returns the crops (left, top, right, bottom) that pan and scan adds to an image: none if it is not long.

    A long image is cut across its longer side into as many parts as that side is longer, 2 to ``MAX_CROPS``, unless
    they would be smaller than ``MIN_CROP`` pixels (Gemma 3 technical report, §2.1).
    """
    longer, shorter = max(width, height), min(width, height)
    if longer / shorter < MIN_RATIO:
        return []
    count = min(longer // MIN_CROP, math.floor(longer / shorter + 0.5))
    count = min(MAX_CROPS, max(2, count))
    across, down = (count, 1) if width >= height else (1, count)
    w, h = math.ceil(width / across), math.ceil(height / down)
    if min(w, h) < MIN_CROP:
        return []
    corners = itertools.product(range(down), range(across))
    return [(w * i, h * j, min(w * (i + 1), width), min(h * (j + 1), height)) for j, i in corners]


class ImageProcessor:
    """A checkpoint's preprocessing of images."""

    def __init__(self, config: VisionConfig) -> None:
        self.config = config

    def views(self, image: ImageLike, pan_and_scan: bool = False) -> Tensor:
        """Returns the image, and with ``pan_and_scan`` its crops after it, uint8 [1 + crops, 3, S, S].

        Raises:
            UserError: the image is missing or broken.
        """
        size = (self.config.image_size, self.config.image_size)
        try:
            whole = to_rgb(open_image(image))
            boxes = crop_boxes(*whole.size) if pan_and_scan else []
            resized = [v.resize(size, self.config.resample) for v in (whole, *map(whole.crop, boxes))]
        except OSError as error:  # Pillow decodes late: an image object may turn out to be cut short only here
            raise UserError(f"an image cannot be decoded ({error}); is it broken?") from error
        return torch.from_numpy(np.stack([np.asarray(v) for v in resized])).permute(0, 3, 1, 2).contiguous()

    def pixel_values(self, images: Sequence[ImageLike], pan_and_scan: bool = False) -> Tensor:
        """Returns transformers' ``pixel_values`` of the images, float32 [N, 3, S, S], crops after each image.

        Raises:
            UserError: an image is missing or broken.
        """
        pixels = torch.cat([self.views(image, pan_and_scan) for image in images])
        table = pixel_table(self.config)
        return torch.stack([row[channel.long()] for row, channel in zip(table, pixels.unbind(1), strict=True)], dim=1)


def encode_prompt(
    tokenizer: Any,
    config: VisionConfig | None,
    text: str,
    images: Sequence[ImageLike] = (),
    pan_and_scan: bool = False,
    chat: ChatTemplate | None = None,
) -> tuple[list[int], Tensor | None]:
    """Returns a prompt's token ids, and the bytes of its images, uint8 [N, 3, S, S] (None without images).

    Every ``<start_of_image>`` in the text becomes two line ends, ``<start_of_image>``, T image tokens,
    ``<end_of_image>`` and two line ends. Where the text has none, its images come before it.

    Args:
        tokenizer: of the model.
        config: of its vision side; None for a text-only model.
        text: with one ``<start_of_image>`` an image, or none at all.
        images: paths or Pillow images, in the order of the text.
        pan_and_scan: show long images in crops as well (T tokens each).
        chat: puts the text, with its images, into a user's turn that the model is to answer.

    Returns:
        The ids, ``<bos>`` first, and the bytes.

    Raises:
        UserError: there are more or fewer images than places, an image is missing or broken, or the model is text-only.
    """
    if config is None:
        if images:
            raise UserError("this model is text-only: it cannot be given images; use a multimodal one (4B, 12B, 27B).")
        return tokenizer.encode(text) if chat is None else chat.encode_prompt(text), None
    pieces = pieces_around(text, len(images))
    if not images:
        return tokenizer.encode(text) if chat is None else chat.encode_prompt(text), None
    processor = ImageProcessor(config)
    views = [processor.views(image, pan_and_scan) for image in images]
    crops = [len(v) - 1 for v in views]
    if chat is None:
        return place_images(tokenizer, config, pieces, crops), torch.cat(views)
    content = _PLACE.join(piece.replace(_PLACE, "") for piece in pieces)
    rendered = chat.prompt([{"role": "user", "content": content}]).split(_PLACE)
    if len(rendered) != len(pieces):
        raise UserError("the checkpoint's chat template does not keep the places of images; use chat=false.")
    ids = place_images(tokenizer, config, rendered, crops, lambda text: tokenizer.encode_rendered([text])[0])
    return chat.with_bos(ids), torch.cat(views)


def pieces_around(text: str, images: int, where: str = "the prompt") -> list[str]:
    """Returns the stretches of ``text`` before, between and after its images; a text that places none follows them.

    Raises:
        UserError: the text places another number of images.
    """
    if images and START_OF_IMAGE not in text:
        return [""] * images + [text]
    pieces = text.split(START_OF_IMAGE)
    if len(pieces) - 1 != images:
        raise UserError(
            f"{where} has {len(pieces) - 1} {START_OF_IMAGE}, but {images} image{'s' * (images != 1)} came with it; "
            "give one image for each."
        )
    return pieces


def place_images(
    tokenizer: Any,
    config: VisionConfig,
    pieces: Sequence[str],
    crops: Sequence[int],
    encode: Callable[[str], list[int]] | None = None,
) -> list[int]:
    """Returns the ids of ``pieces`` of text with an image, shown in ``crops`` more views, between each two of them.

    ``encode`` gives those of text; the tokenizer's own, after a ``<bos>``, when left out.
    """
    stretches = [pieces[0]]  # of text, with one view of an image between each two

    def add_view(before: str) -> None:
        stretches[-1] += before + "\n\n"
        stretches.append("\n\n")

    for count, after in zip(crops, pieces[1:], strict=True):
        if count:
            add_view("Here is the original image ")
            add_view(" and here are some crops to help you see better ")
            for _ in range(count - 1):
                add_view(" ")
        else:
            add_view("")
        stretches[-1] += after
    view = [config.start_token_id, *[config.image_token_id] * config.tokens_per_image, config.end_token_id]
    ids = encode(stretches[0]) if encode else tokenizer.encode(stretches[0])
    for stretch in stretches[1:]:
        ids += view + (encode(stretch) if encode else tokenizer.encode(stretch, bos=False))
    return ids


def interleaved(parts: Sequence[str | Path | Image]) -> tuple[str, list[ImageLike]]:
    """Returns text with ``<start_of_image>`` and the images, of a prompt like ``["Compare", image, "with", image]``.

    A str is text: name an image's file by a ``Path``.
    """
    text = "".join(part if isinstance(part, str) else START_OF_IMAGE for part in parts)
    return text, [part for part in parts if not isinstance(part, str)]
