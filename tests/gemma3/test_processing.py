"""Pixel values and ids equal transformers' Gemma 3 processor, and mistakes in images are one sentence."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from multimodal_models import SIZE, VISION, image_processor, picture
from PIL import Image

from tpa_train.errors import UserError
from tpa_train.gemma3.processing import ImageProcessor, crop_boxes, encode_prompt, interleaved, open_image

pytest.importorskip("transformers")

MODES = ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK", "I;16", "YCbCr")
SIZES = ((1, 1), (3, 200), (57, 55), (56, 56), (300, 17), (896, 640), (129, 131))


def generated() -> list[Image.Image]:
    """20 images of odd sizes and modes."""
    made = []
    for i in range(20):
        mode, (width, height) = MODES[i % len(MODES)], SIZES[i % len(SIZES)]
        image = picture(i, width, height, "RGBA")
        made.append(image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode))
    made[2].info["transparency"] = 0  # a palette with a transparent colour
    return made


def composites_alpha() -> bool:
    """Whether this transformers puts transparent images on white, as 5.24 does; earlier ones dropped the alpha."""
    clear = Image.new("RGBA", (SIZE, SIZE), (0, 0, 0, 0))
    return float(torch.as_tensor(image_processor(SIZE)(clear, return_tensors="pt")["pixel_values"]).max()) > 0


def has_alpha(image: Image.Image) -> bool:
    return "A" in image.getbands() or image.info.get("transparency") is not None


@pytest.mark.parametrize("pan_and_scan", [False, True])
def test_pixel_values_equal_transformers(pan_and_scan):
    ours, reference = ImageProcessor(VISION), image_processor(SIZE)
    options = {
        "do_pan_and_scan": pan_and_scan, "pan_and_scan_min_crop_size": 256, "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2, "do_convert_rgb": True, "return_tensors": "pt",
    }  # fmt: skip
    images = generated()
    if pan_and_scan:
        images += [picture(30, 1100, 300), picture(31, 280, 2000), picture(32, 1400, 600, "L")]
    crops = 0
    for image in images:
        if has_alpha(image) and not composites_alpha():
            continue
        expected = reference(image, **options)["pixel_values"]
        found = ours.pixel_values([image], pan_and_scan)
        assert torch.equal(found, torch.as_tensor(expected)), (image.mode, image.size)
        crops += len(found) - 1
    assert crops > 8 if pan_and_scan else crops == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_files_are_turned_upright(orientation, tmp_path):
    from transformers.image_utils import load_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    picture(orientation, 61, 33).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    expected = image_processor(SIZE)(load_image(str(tmp_path / "turned.jpg")), return_tensors="pt")["pixel_values"]
    assert torch.equal(ImageProcessor(VISION).pixel_values([tmp_path / "turned.jpg"]), torch.as_tensor(expected))


def test_the_checkpoint_own_preprocessing(tmp_path):
    """Means, deviations and filter come from preprocessor_config.json."""
    from tpa_train.checkpoints.vision import read_vision

    processor = image_processor(SIZE, resample=3)
    processor.image_mean, processor.image_std, processor.rescale_factor = [0.48, 0.45, 0.4], [0.27, 0.26, 0.28], 0.0039
    processor.save_pretrained(tmp_path)
    config = read_vision(tmp_path, {"vision_config": {"image_size": SIZE, "patch_size": 14}, "mm_tokens_per_image": 4})
    image = picture(5, 99, 40)
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(ImageProcessor(config).pixel_values([image]), torch.as_tensor(expected))


def test_crops_cover_the_image():
    assert crop_boxes(500, 500) == [] and crop_boxes(600, 510) == [] and crop_boxes(400, 100) == []
    for width, height in ((1000, 300), (301, 1003), (513, 300), (4000, 300)):
        boxes = crop_boxes(width, height)
        assert 2 <= len(boxes) <= 4
        assert sum((r - left) * (b - t) for left, t, r, b in boxes) == width * height


class CharacterTokenizer:
    """One id a character, and the ids of the image pieces where they are written."""

    def encode(self, text: str, bos: bool = True) -> list[int]:
        return [2] * bos + [1000 + ord(c) for c in text]


def as_text(ids: list[int]) -> str:
    pieces = {2: "", 90: "<image_soft_token>", 91: "<start_of_image>", 92: "<end_of_image>"}
    return "".join(pieces[i] if i in pieces else chr(i - 1000) for i in ids)


def reference_text(text: str, images: list) -> str:
    """What transformers' Gemma3Processor gives to the tokenizer, with pan and scan.

    Written down from its ``replace_image_token``: the processor itself cannot be built without a Gemma tokenizer.
    """
    full = "\n\n<start_of_image>" + "<image_soft_token>" * 4 + "<end_of_image>\n\n"
    for image in images:
        crops, shown = len(crop_boxes(*image.size)), full
        if crops:
            shown = f"Here is the original image {full} and here are some crops to help you see better " + " ".join(
                [full] * crops
            )
        text = text.replace("<start_of_image>", shown.replace("<start_of_image>", "<BOI>"), 1)
    return text.replace("<BOI>", "<start_of_image>")


@pytest.mark.parametrize("text", [
    "<start_of_image>", "a<start_of_image>b", "a <start_of_image> and\n<start_of_image>\n\nb",
])  # fmt: skip
def test_prompts_expand_as_transformers(text):
    images = [picture(0, 900, 300), picture(1, 50, 50)][: text.count("<start_of_image>")]
    ids, pixels = encode_prompt(CharacterTokenizer(), VISION, text, images, pan_and_scan=True)
    assert ids[0] == 2 and as_text(ids) == reference_text(text, images)
    assert ids.count(90) == 4 * len(pixels)


def test_a_chat_puts_the_images_into_the_turn():
    from multimodal_models import END_ID, IMAGE_ID, START_ID, image_tokenizer

    from tpa_train.gemma3.chat import ChatTemplate

    tokenizer = image_tokenizer()
    config = dataclasses.replace(VISION, image_token_id=IMAGE_ID, start_token_id=START_ID, end_token_id=END_ID)
    text = "hello <start_of_image> world <end_of_turn>"
    ids, pixels = encode_prompt(tokenizer, config, text, [picture()], chat=ChatTemplate(tokenizer))
    first, last = ids.index(START_ID), ids.index(END_ID)
    assert len(pixels) == 1 and last - first == 5 and ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id
    turn, end = (tokenizer.piece_id(name) for name in ("<start_of_turn>", "<end_of_turn>"))
    assert ids.index(turn) < first and ids.count(end) == 1 and ids.index(end) > last  # the typed one is text
    without = encode_prompt(tokenizer, config, "hello", chat=ChatTemplate(tokenizer))[0]
    assert without == ChatTemplate(tokenizer).encode_prompt("hello")


def test_images_come_before_a_text_that_does_not_place_them():
    one, two = picture(0), picture(1)
    found = encode_prompt(CharacterTokenizer(), VISION, "what?", [one, two])
    expected = encode_prompt(CharacterTokenizer(), VISION, "<start_of_image><start_of_image>what?", [one, two])
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])
    assert interleaved(["a", one, "b", two]) == ("a<start_of_image>b<start_of_image>", [one, two])


def test_mistakes_are_named(tmp_path, monkeypatch):
    tokenizer = CharacterTokenizer()
    with pytest.raises(UserError, match="has 1 <start_of_image>, but 2 images came"):
        encode_prompt(tokenizer, VISION, "<start_of_image>", [picture(), picture()])
    with pytest.raises(UserError, match="has 2 <start_of_image>, but 0 images came"):
        encode_prompt(tokenizer, VISION, "<start_of_image><start_of_image>")
    with pytest.raises(UserError, match="there is no image at .*none.png"):
        open_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="text.png cannot be read as an image"):
        open_image(str(tmp_path / "text.png"))
    picture(0, 200, 200).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:900])
    open_image(tmp_path / "cut.png", decode=False)  # its header is whole
    with pytest.raises(UserError, match="cut.png cannot be read as an image"):
        encode_prompt(tokenizer, VISION, "what?", [tmp_path / "cut.png"])
    with pytest.raises(UserError, match="cannot be decoded"):  # as an image object, decoded only here
        ImageProcessor(VISION).views(Image.open(tmp_path / "cut.png"))
    with pytest.raises(UserError, match="a path or a Pillow image, not int"):
        encode_prompt(tokenizer, VISION, "what?", [7])
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UserError, match=r"need Pillow.*\[vision\]"):
        open_image(tmp_path / "whole.png")
