"""A multimodal checkpoint of a published size goes through factorization and export, within a bound on memory.

The checkpoint has random weights in the shapes of the size, SigLIP included, in bfloat16 and sharded files; it is
written into a temporary folder, and so are pictures with texts. What is measured is what a user's run does: load,
calibrate, spend the budget, convert, export and read back. ``device_gib`` is the largest allocation during the stage,
``host_gib`` the largest resident size of the process, mapped files included.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpa_train.benchmarks.sizes import GIB, check_positive, first_layers, host_peak_gib, reset_host_peak
from tpa_train.checkpoints.export import export_model, load_export
from tpa_train.checkpoints.huggingface import huggingface_config
from tpa_train.checkpoints.shards import SHARD_BYTES, write_weights
from tpa_train.checkpoints.weights import PADDED_VOCAB_SIZE, VOCAB_SIZE, parameter_shapes
from tpa_train.cli import choose_device
from tpa_train.data.rows import collate_rows
from tpa_train.errors import UserError
from tpa_train.evaluation.report import table
from tpa_train.evaluation.suites import cache_report
from tpa_train.gemma3.config import SIZES, Gemma3Config
from tpa_train.gemma3.processing import pillow
from tpa_train.gemma3.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Tokenizer, sentencepiece_model
from tpa_train.gemma3.vision_config import VisionConfig
from tpa_train.pipeline import Session, check_against_model, factorize_model
from tpa_train.recipes import compose

BAR = 1.3  # times the weights, that the device may hold at most
MULTIMODAL = ("4b", "12b", "27b")
# One form and two widths: the benchmark is of memory, and allocating among all forms takes solving them all.
DEFAULTS = ("budget.forms=latent", "budget.bits=[16,8]", "budget.cache_ratio=4", "budget.context=32768")


@dataclass
class MultimodalSettings:
    """Options of ``benchmark.py multimodal``."""

    size: str = field(default="4b", metadata={"help": "whose shapes the checkpoint has.", "choices": MULTIMODAL})
    layers: int | None = field(default=None, metadata={"help": "only the first so many text layers; null: all."})
    offload: bool = field(
        default=True, metadata={"help": "keep the layers in the host's memory (trainer.offload of train.py)."}
    )
    context: int = field(default=1024, metadata={"help": "tokens of a row."})
    tokens: int = field(default=8192, metadata={"help": "tokens to calibrate on."})
    sensitivity_tokens: int = field(default=1024, metadata={"help": "tokens that sensitivities are measured on."})
    images: int = field(default=48, metadata={"help": "pictures, each with a text."})
    shard_bytes: int = field(default=SHARD_BYTES, metadata={"help": "of a file of the checkpoint and of the export."})
    options: list[str] = field(
        default_factory=list, metadata={"help": "more options of train.py, such as budget.cache_ratio=6."}
    )
    seed: int = field(default=0, metadata={"help": "decides weights and pictures."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; null: an accelerator if there is one."})


def run(settings: MultimodalSettings) -> list[dict[str, Any]]:
    """Measures ``settings.size``; returns a row a stage and a summary.

    Raises:
        UserError: an option is at fault, or Pillow is missing.
    """
    return measure(dataclasses.replace(SIZES[settings.size], vision=VisionConfig()), settings)


def measure(config: Gemma3Config, settings: MultimodalSettings) -> list[dict[str, Any]]:
    """As ``run``, with the shapes of ``config`` (vision side included) whatever ``settings.size`` says."""
    config, device = _cut(config, settings), choose_device(settings.device)
    pillow()
    meter = Meter(device)
    with TemporaryDirectory() as name:
        folder = Path(name)
        weights = meter("write", lambda: write_checkpoint(folder / "model", config, settings, device)) / GIB
        write_pictures(folder, config, settings)
        facts = _convert(folder, settings, device, meter)  # its models are gone when it returns
        meter("reload", lambda: load_export(folder / "export", torch.bfloat16, device))
    work = [row for row in meter.rows if row["stage"] in ("load", "factorize", "export")]
    summary = {
        "stage": "summary", "seconds": sum(row["seconds"] for row in work),
        "device_gib": max(row["device_gib"] for row in work) if device.type == "cuda" else None,
        "host_gib": max(row["host_gib"] for row in work), "weights_gib": weights, "offload": settings.offload, **facts,
    }  # fmt: skip
    if summary["device_gib"] is not None:
        summary["device_to_weights"], summary["bar"] = summary["device_gib"] / weights, BAR
        summary["within_bar"] = summary["device_to_weights"] < BAR
    return [*meter.rows, summary]


def _convert(folder: Path, settings: MultimodalSettings, device: torch.device, meter: Meter) -> dict[str, Any]:
    """Loads, factorizes and exports as a run does; returns what came out."""
    session = Session(compose(_options(folder, settings, device)), folder / "logs")
    meter("load", lambda: session.teacher)
    check_against_model(session.settings, session.config)
    student, cost, _, _ = meter("factorize", lambda: factorize_model(session))
    row = collate_rows([session.data.heldout_rows(settings.context)[0]])
    out, size = folder / "export", settings.shard_bytes
    meter("export", lambda: export_model(student, out, check_ids=row, shard_bytes=size))
    return {
        "files": len(list(out.glob("*.safetensors"))), "converted_layers": len(student.converted_layers),
        "cache_ratio": cache_report(session.teacher, student, session.settings.budget.context).ratio,
        "calibration_tokens": cost.tokens,
    }  # fmt: skip


def render(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a table with a line below."""
    *stages, summary = rows
    lines = [[r["stage"], f"{r['seconds']:.1f}", _gib(r["device_gib"]), _gib(r["host_gib"])] for r in stages]
    text = table(["stage", "s", "device GiB", "host GiB"], lines)
    text += (
        f"\n\nweights {summary['weights_gib']:.2f} GiB; {summary['converted_layers']} layers converted on "
        f"{summary['calibration_tokens']:,} tokens, cache {summary['cache_ratio']:.2f} times smaller."
    )
    if summary["device_gib"] is not None:
        verdict = "within" if summary["within_bar"] else "ABOVE"
        text += f" The device held {summary['device_to_weights']:.2f} times the weights: {verdict} the bar of {BAR}."
    return text


class Meter:
    """Runs stages and keeps their seconds and peak memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rows = device, []
        torch.empty(0, device=device)  # a device that nothing has used yet has no peak to reset

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        reset_host_peak()
        start = time.perf_counter()
        result = work()
        if cuda:
            torch.cuda.synchronize(self.device)
        self.rows.append(
            {
                "stage": stage, "seconds": time.perf_counter() - start,
                "device_gib": torch.cuda.max_memory_allocated(self.device) / GIB if cuda else None,
                "host_gib": host_peak_gib(),
            }
        )  # fmt: skip
        return result


def write_checkpoint(folder: Path, config: Gemma3Config, settings: MultimodalSettings, device: torch.device) -> int:
    """Writes a Hugging Face folder as the released ones are laid out; returns the bytes of its weights."""
    folder.mkdir()
    shapes = {_stored_name(name): shape for name, shape in parameter_shapes(config).items()}
    embedding = "model.language_model.embed_tokens.weight"
    if config.vocab_size == VOCAB_SIZE:
        shapes[embedding] = (PADDED_VOCAB_SIZE, config.hidden_size)
    numbers = {name: number for number, name in enumerate(shapes)}

    def make(name: str) -> Tensor:
        """Keeps the size of what goes through: std 1/√inputs; norms have gain 1."""
        shape = shapes[name]
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        if len(shape) == 1:  # the tower's layer norms multiply by w, Gemma's norms by 1 + w
            return tensor.fill_(1.0 if "vision_tower" in name and name.endswith(".weight") else 0.0).cpu()
        generator = torch.Generator(device).manual_seed(settings.seed * 4096 + numbers[name])
        return tensor.normal_(0.0, math.prod(shape[1:]) ** -0.5, generator=generator).cpu()

    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    write_weights(folder, sizes, make, settings.shard_bytes)
    tokenizer, vision = byte_tokenizer(), config.vision
    (folder / "tokenizer.model").write_bytes(tokenizer.model_proto)
    described = {
        "model_type": "gemma3", "text_config": huggingface_config(config, tokenizer, torch.bfloat16),
        "vision_config": {
            "image_size": vision.image_size, "patch_size": vision.patch_size, "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size, "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
        },
        "mm_tokens_per_image": vision.tokens_per_image, "image_token_index": vision.image_token_id,
        "boi_token_index": vision.start_token_id, "eoi_token_index": vision.end_token_id,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    return sum(sizes.values())


def _stored_name(name: str) -> str:
    return f"model.{name.removeprefix('vision.')}" if name.startswith("vision.") else f"model.language_model.{name}"


def byte_tokenizer() -> Tokenizer:
    """One id a byte: any text can be read, whatever vocabulary the weights have."""
    special = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN), ("<mask>", USER_DEFINED)]
    pieces = [*special, *((f"<0x{byte:02X}>", BYTE) for byte in range(256)), ("▁", NORMAL)]  # the space
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}
    proto = sentencepiece_model([p for p, _ in pieces], [0.0] * len(pieces), [k for _, k in pieces], ids)
    return Tokenizer.from_model_proto(proto)


def write_pictures(folder: Path, config: Gemma3Config, settings: MultimodalSettings) -> None:
    """Writes noise of several sizes, and a .jsonl that gives each a text."""
    rng, lines = np.random.default_rng(settings.seed), []
    side = config.vision.image_size
    for number in range(settings.images):
        width, height = (int(side * factor) for factor in rng.uniform(0.4, 1.2, 2))
        picture = pillow().fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.png")
        words = " ".join(str(n) for n in rng.integers(0, 1000, 24))
        lines.append(json.dumps({"image": f"{number}.png", "text": f"Picture {number}: <start_of_image> {words}"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")


def _options(folder: Path, settings: MultimodalSettings, device: torch.device) -> list[str]:
    return [
        "recipe=factorize", "data=image_text", f"data.path={folder / 'pairs.jsonl'}", f"model.path={folder / 'model'}",
        "trainer.batch_size=1", f"trainer.context={settings.context}", "trainer.precision=bf16",
        f"trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}",
        f"trainer.offload={str(settings.offload).lower()}", f"recipe.calibration.tokens={settings.tokens}",
        f"recipe.calibration.sensitivity_tokens={settings.sensitivity_tokens}",
        f"evaluation.context={settings.context}", "evaluation.copy=[]", "data.heldout_min_tokens=1",
        f"seed={settings.seed}", *DEFAULTS, *settings.options,
    ]  # fmt: skip


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cut(config: Gemma3Config, settings: MultimodalSettings) -> Gemma3Config:
    """Checks the options and returns ``config`` with as many layers as asked for."""
    check_positive(settings, "context", "tokens", "sensitivity_tokens", "shard_bytes")
    if settings.images < 8:
        raise UserError(f"images={settings.images} must be at least 8: some are held out.")
    return first_layers(config, settings.layers)
