"""A small multimodal checkpoint goes all the way: factorize, distil on images with text, export, answer."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from multimodal_models import IMAGE_ID, T, picture, write_multimodal
from safetensors.torch import load_file
from tiny_runs import send_signal_at, training_options, weights, write_text_file

from tpa_train.checkpoints import load_pretrained
from tpa_train.errors import UserError
from tpa_train.gemma3.processing import encode_prompt
from tpa_train.launch import main
from tpa_train.tpa.command import GenerateArgs, open_model, stream
from tpa_train.tpa.command import main as generate_main
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA

pytest.importorskip("transformers")


def write_image_text(folder, count: int = 40):
    """Examples with no, one and two images, text before, between and after."""
    lines = []
    for i in range(count):
        names = [f"{i}-{j}.png" for j in range(i % 3)]
        for j, name in enumerate(names):
            picture(10 * i + j, 30 + i, 64 - i).save(folder / name)
        text = " or ".join(["hello the world "] + ["<start_of_image> in the world "] * len(names))
        lines.append(json.dumps({"image": names, "text": text + "which one is it " * (i % 5)}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multimodal")
    write_multimodal(folder / "model", dtype=torch.bfloat16)
    return folder, write_image_text(folder), write_text_file(folder / "text.txt", 30_000)


def options(folder, text) -> list[str]:
    own = [
        f"model.path={folder / 'model'}", "evaluation.tokens=256", "evaluation.context=64", "evaluation.copy=[20]",
        "evaluation.copy_count=1", "evaluation.sample_tokens=2", "budget.cache_ratio=4",
    ]  # fmt: skip
    return [*training_options(text, folder / "cache"), *own]


@pytest.fixture(scope="module")
def distilled(made):
    folder, pairs, _ = made
    run = folder / "run"
    assert main(["recipe=distill", *options(folder, pairs), "data=image_text", f"run_dir={run}"]) == 0
    return run


def test_the_report_tells_text_and_image_tokens_apart(distilled):
    report = json.loads((distilled / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["teacher", "factorized", "layerwise", "distilled"]
    for stage in report["stages"]:
        assert stage["image_tokens"]["tokens"] >= T and stage["evaluated_tokens"] > 50
        assert (stage["image_tokens"]["kl"] == 0) == (stage["name"] == "teacher")
    assert report["stages"][3]["kl"] < report["stages"][1]["kl"]
    assert report["cache"]["ratio"] >= 4
    text = (distilled / "report.md").read_text()
    assert "### At image tokens" in text
    assert "image-text-to-text" in (distilled / "export" / "README.md").read_text()


def test_the_export_holds_the_vision_bytes_of_the_input(made, distilled):
    """The input is bfloat16, the run float32."""
    theirs = load_file(made[0] / "model" / "model.safetensors")
    ours = load_file(distilled / "export" / "model.safetensors")
    vision = {n.removeprefix("model.").replace("vision_model.", ""): t for n, t in theirs.items()}
    vision = {n: t for n, t in vision.items() if n.startswith(("vision_tower.", "multi_modal_projector."))}
    assert {n for n in ours if n.startswith("vision.")} == {f"vision.{n}" for n in vision} and len(vision) > 30
    for name, tensor in vision.items():
        assert tensor.dtype == ours[f"vision.{name}"].dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), ours[f"vision.{name}"].view(torch.int16)), name


def test_an_interrupted_run_ends_with_the_same_weights(made, distilled, tmp_path, monkeypatch):
    """Which is also the same run twice: rows, images and labels are drawn alike."""
    folder, pairs, _ = made
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_signal_at(patch, "distilled", 3)
        assert main(["recipe=distill", *options(folder, pairs), "data=image_text", f"run_dir={run}"]) == 143
    assert main([f"run_dir={run}", "resume=true"]) == 0
    assert weights(run) == weights(distilled)


def test_decoding_with_the_factored_cache_equals_the_full_forward(distilled):
    """The export of a budget of 4 in eight bits; float64, so that no number is rounded to another code by chance."""
    model = Gemma3ForMultimodalLMwithTPA.from_pretrained(distilled / "export", dtype=torch.float64)
    assert model.cache_bytes(512) * 4 <= Gemma3ForMultimodalLMwithTPA(model.config).cache_bytes(512)
    prompt = "hello <start_of_image> or <start_of_image> which in the world is it"
    images = [picture(5), picture(6, 33, 80)]
    ids, pixels = encode_prompt(model.tokenizer, model.config.vision, prompt, images)
    with torch.no_grad():
        whole = model.hidden_states(torch.tensor([ids]), images=pixels)
        cache = model.allocate_cache(1, len(ids), dtype=torch.float64)
        last = max(i for i, token in enumerate(ids) if token == IMAGE_ID) + 1
        parts = [model.hidden_states(torch.tensor([ids[:last]]), cache=cache, images=pixels)]
        parts += [model.hidden_states(torch.tensor([[token]]), cache=cache) for token in ids[last:]]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-7, rtol=1e-7)


def test_an_export_answers_about_an_image(distilled, tmp_path, capsys):
    picture(9, 90, 40).save(tmp_path / "one.png")
    model = open_model(distilled)
    seen = model.generate("the world <start_of_image> or", max_tokens=4, images=picture(9, 90, 40))
    assert model.generate([["the world ", picture(9, 90, 40), " or"]], max_tokens=4) == seen
    args = [f"model={distilled}", "prompt=the world <start_of_image> or", f"image={tmp_path / 'one.png'}"]
    generate_main([*args, "max_tokens=4", "device=cpu"])
    out = capsys.readouterr()
    assert out.out == seen[0] + "\n"
    figures = stream(model, "hello", GenerateArgs(str(distilled), "hello", [], max_tokens=2), open_null(tmp_path))
    assert figures["prompt_tokens"] == len(model.tokenizer.encode("hello"))
    for wrong, message in (
        (["prompt=<start_of_image><start_of_image>", f"image={tmp_path / 'one.png'}"], "has 2 <start_of_image>, but 1"),
        (["prompt=hello", f"image={tmp_path / 'none.png'}"], "there is no image at"),
    ):
        with pytest.raises(UserError, match=message):
            generate_main([f"model={distilled}", *wrong, "device=cpu"])


def open_null(folder):
    return open(folder / "null", "w")


def test_factorizing_on_text_keeps_the_images(made):
    """recipe=factorize with text data, at the width of the original: the same logits on an image prompt."""
    folder, _, text = made
    run = folder / "text-run"
    extra = ["budget.cache_ratio=1.01", "budget.bits=16", "budget.multiple=1", "evaluation.tokens=64"]
    assert main(["recipe=factorize", *options(folder, text), *extra, f"run_dir={run}"]) == 0
    report = json.loads((run / "report.json").read_text())
    assert all(stage["image_tokens"] == {} for stage in report["stages"])
    exported = Gemma3ForMultimodalLMwithTPA.from_pretrained(run / "export")
    assert exported.vision is not None and exported.converted_layers


def test_full_rank_gives_the_same_logits(made):
    teacher = load_pretrained(made[0] / "model")
    converted = Gemma3ForMultimodalLMwithTPA(dataclasses.replace(teacher.config, vision=None))
    converted.load_weights(made[0] / "model")
    converted.factorize_all_layers_with_shared_factors(max_error=0.0)
    assert len(converted.converted_layers) == 7
    ids, pixels = encode_prompt(teacher.tokenizer, teacher.config.vision, "the world<start_of_image> or", [picture(3)])
    with torch.no_grad():
        ours, theirs = (m(torch.tensor([ids]), images=pixels) for m in (converted, teacher))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_mistakes_are_named(made, tiny, tmp_path):
    folder, pairs, _ = made
    base = [*options(folder, pairs), "data=image_text", "recipe=factorize", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match="data=image_text needs a multimodal model, but this one is text-only"):
        main([*base, f"model.path={tiny.model}"])
    with pytest.raises(UserError, match="needs data.path .* or data.name"):
        main([*base, "data.path=null"])
    with pytest.raises(UserError, match="a row of 8 tokens cannot hold an image; it takes at least 10"):
        main([*base, "trainer.context=8"])
    for line, message in (
        ({"image": "none.png", "text": "a"}, "there is no image at .*none.png"),
        ({"image": "broken.png", "text": "a"}, "broken.png cannot be read as an image"),
        ({"image": [], "text": "a <start_of_image>"}, "line 1 of .* has 1 <start_of_image>, but 0 images came"),
        ({"imag": "a.png", "text": "a"}, r"no 'image' field \(data.image_key\); did you mean 'imag'"),
        ({"image": 7, "text": "a"}, "must name an image file"),
        ({"image": None, "txt": "a"}, r"no 'text' field"),
    ):
        wrong = tmp_path / "wrong"
        wrong.mkdir()
        (wrong / "broken.png").write_bytes(b"no picture")
        (wrong / "pairs.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(UserError, match=message):
            main([*base, f"data.path={wrong / 'pairs.jsonl'}"])
        shutil.rmtree(wrong)
    assert not (tmp_path / "run").exists()
