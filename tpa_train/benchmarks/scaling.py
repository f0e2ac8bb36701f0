"""Training end to end on one device and on several: tokens a second and memory by strategy.

Teacher and student have the shapes of a published size and random weights, made on the device, under fsdp2 in shards:
no process ever holds a whole model. In the student's global layers keys and values are latents of half of head_dim;
nothing is calibrated, as neither speed nor memory depends on values. Every row is measured by processes of its own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from tpa_train.benchmarks.journal import Journal
from tpa_train.benchmarks.sizes import check_positive
from tpa_train.cli import choose_device
from tpa_train.compilation import stage_forwards
from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.distillation.modules import SCOPES
from tpa_train.distributed.launching import joined, launch, one_voice
from tpa_train.distributed.processes import from_first, gathered, rank, world_size
from tpa_train.distributed.sharding import share_modules
from tpa_train.errors import UserError, nearest
from tpa_train.evaluation.atomic import write_text
from tpa_train.gemma3.config import SIZES, Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.settings import DistillSettings, TrainerSettings
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs
from tpa_train.trainers import Machine, choose_machine, make_trainer

STRATEGIES = ("single", "ddp", "fsdp2")
TINY = Gemma3Config(
    vocab_size=512, hidden_size=64, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=128,
    sliding_window=32,
)  # fmt: skip
MODELS = {"tiny": TINY} | SIZES
LARGE = ("4b", "12b", "27b")  # their activations at 8K context fill a device
OUT_OF_MEMORY = 3  # exit status of a measuring process
CELL = ("model", "strategy", "devices", "context", "batch_size", "compiled")
FREE = (
    "model", "devices", "strategies", "context", "batch_size", "compile", "steps", "warmup", "activation_checkpointing"
)


@dataclass
class ScalingSettings:
    """Options of ``benchmark.py scaling``."""

    model: str = field(default="270m", metadata={"help": "whose shapes the models have.", "choices": tuple(MODELS)})
    devices: int = field(default=2, metadata={"help": "processes of ddp and fsdp2, one device each."})
    strategies: list[str] = field(
        default_factory=lambda: list(STRATEGIES), metadata={"help": "out of single, ddp, fsdp2; all by default."}
    )
    context: int = field(default=8192, metadata={"help": "tokens of a row."})
    batch_size: int = field(default=1, metadata={"help": "rows a device and step."})
    steps: int = field(default=8, metadata={"help": "optimizer steps that are measured."})
    warmup: int = field(default=3, metadata={"help": "steps before them."})
    scope: str = field(default="all", metadata={"help": "what learns.", "choices": SCOPES})
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "recompute the student's activations; null: for 4b and larger."}
    )
    compile: bool = field(default=False, metadata={"help": "compile the layers."})
    precision: str = field(default="auto", metadata={"help": "as of train.py.", "choices": ("auto", "bf16", "float32")})
    seed: int = field(default=0, metadata={"help": "decides weights and tokens."})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; null: an accelerator if there is one."})


def run(settings: ScalingSettings, journal: Journal | None = None) -> list[dict[str, Any]]:
    """Measures the strategies that the journal has no row of; returns all of its rows.

    A strategy whose processes run out of memory gets a row that says so.

    Raises:
        UserError: an option is at fault, or the measuring processes failed.
    """
    for strategy in settings.strategies:
        if strategy not in STRATEGIES:
            raise UserError(f"strategies={strategy} is unknown{nearest(strategy, STRATEGIES)}")
    check_positive(settings, "devices", "batch_size", "steps", "warmup")
    if not 1 < settings.context <= MODELS[settings.model].max_context:
        raise UserError(f"context={settings.context} must be 2 to {MODELS[settings.model].max_context} tokens.")
    device = choose_device(settings.device)
    if device.type == "cuda" and settings.devices > torch.cuda.device_count():
        raise UserError(f"devices={settings.devices}, but PyTorch sees {torch.cuda.device_count()} CUDA devices.")
    journal = journal or Journal(None, lambda rows: {}, CELL)
    with tempfile.TemporaryDirectory() as folder:
        for strategy in dict.fromkeys(settings.strategies):
            cell = _cell(settings, strategy)
            if journal.done(**cell):
                continue
            journal.add(_measured_apart(settings, strategy, device, Path(folder)) | cell)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in journal.rows[-1].items()}, flush=True)
    for row in journal.rows:
        alone = {"strategy": "single", "devices": 1}
        alone = next((r for r in journal.rows if journal.key(r) == journal.key(row | alone)), {})
        if "tokens_per_s" in row and "tokens_per_s" in alone:
            row["speedup"] = row["tokens_per_s"] / alone["tokens_per_s"]
    return journal.rows


def _cell(settings: ScalingSettings, strategy: str) -> dict[str, Any]:
    return {
        "model": f"{settings.model}-random", "strategy": strategy,
        "devices": 1 if strategy == "single" else settings.devices, "context": settings.context,
        "batch_size": settings.batch_size, "compiled": settings.compile,
    }  # fmt: skip


def _measured_apart(settings: ScalingSettings, strategy: str, device: torch.device, folder: Path) -> dict[str, Any]:
    """Returns the row of ``strategy``, measured by new processes."""
    devices = 1 if strategy == "single" else settings.devices
    out = folder / f"{strategy}.json"
    task = {"settings": dataclasses.asdict(settings) | {"device": device.type}, "strategy": strategy, "out": str(out)}
    status = launch([sys.executable, "-m", __name__, json.dumps(task)], devices)
    if status == OUT_OF_MEMORY:
        return {"result": "out of memory"}
    if status:
        raise UserError(f"the processes that measure {strategy} ended with status {status}; see what they printed.")
    return json.loads(out.read_text())


# -------------------------------------------------------------------------------------------- in a measuring process


def main(argv: Sequence[str]) -> None:
    """Measures one strategy, as one of its processes."""
    task = json.loads(argv[0])
    settings = ScalingSettings(**task["settings"])
    with one_voice(), joined(settings.device == "cuda"):
        try:
            row = measure(settings, task["strategy"])
        except torch.OutOfMemoryError as error:
            print(f"process {rank()}: {error}", file=sys.stderr, flush=True)
            os._exit(OUT_OF_MEMORY)  # at once: the others wait in a collective
        from_first(lambda: write_text(Path(task["out"]), json.dumps(row)))


def measure(settings: ScalingSettings, strategy: str) -> dict[str, Any]:
    """Trains for ``warmup + steps`` steps and returns the row of ``strategy``."""
    recomputed = settings.activation_checkpointing
    options = TrainerSettings(
        accelerator="gpu" if settings.device == "cuda" else "cpu", devices=world_size(),
        strategy="auto" if strategy == "single" else strategy, precision=settings.precision, context=settings.context,
        batch_size=settings.batch_size, compile=settings.compile,
        activation_checkpointing=settings.model in LARGE if recomputed is None else recomputed,
    )  # fmt: skip
    machine = choose_machine(options)
    total = settings.warmup + settings.steps
    teacher, student = meta_models(MODELS[settings.model], machine.dtype)
    module = RandomDistillation(teacher, student, DistillSettings(), settings.scope, total)
    module.seed = settings.seed
    # Batches of one process; each has rows of its own.
    rows = RandomRows(teacher.config.vocab_size, settings.context, total * settings.batch_size, settings.seed + rank())
    clock = Clock(machine, settings.warmup)
    sharded = machine.strategy == "fsdp2"
    machine.reset_peak()
    with tempfile.TemporaryDirectory() as folder, stage_forwards(module, options, sharded, machine.device, alike=True):
        trainer = make_trainer(machine, Path(folder), total, callbacks=[clock], sharded=sharded)
        trainer.fit(module, DataLoader(rows, batch_size=settings.batch_size))
    return {
        **_cell(settings, strategy), "rows": settings.batch_size * world_size(), "steps": settings.steps,
        "scope": settings.scope,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "activation_checkpointing": options.activation_checkpointing,
        "seconds_per_step": clock.seconds / settings.steps,
        "tokens_per_s": settings.steps * settings.batch_size * settings.context * world_size() / clock.seconds,
        "peak_gib": [round(peak, 3) for peak in gathered(machine.peak_gib())],
    }  # fmt: skip


def meta_models(config: Gemma3Config, dtype: torch.dtype) -> tuple[Gemma3ForCausalLM, Gemma3ForMultimodalLMwithTPA]:
    """Returns a teacher, and a student with latent keys and values in global layers, both without memory."""
    rank_ = config.head_dim // 2
    specs = [
        LayerSpec("latent", rank_, "latent", rank_) if config.is_global(i) else spec
        for i, spec in enumerate(dense_specs(config))
    ]
    with torch.device("meta"):
        teacher = Gemma3ForCausalLM(config).to(dtype)
        # Factors are float32, as solved ones are.
        factors = {n: p.detach() for n, p in Gemma3ForMultimodalLMwithTPA(config, specs).named_parameters()}
    return teacher, Gemma3ForMultimodalLMwithTPA.from_dense(teacher, specs, factors)


class RandomDistillation(EndToEndModule):
    """The end-to-end stage of models on the meta device: random weights are made when they have been sharded."""

    seed = 0

    @torch.no_grad()
    def configure_model(self) -> None:
        super().configure_model()
        if not any(parameter.is_meta for parameter in self.parameters()):
            return
        share_modules(self.teacher, self.student)  # a parameter of two modules would become two
        device = self.trainer.strategy.root_device
        self.to_empty(device=device)
        generator = torch.Generator(device).manual_seed(self.seed + rank())
        for parameter in self.parameters():
            self._fill(parameter, generator)

    def _fill(self, parameter: nn.Parameter, generator: torch.Generator) -> None:
        """Matrices keep the size of what goes through (std 1/√inputs); norms have gain 1, centers are zero."""
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()
        if parameter.ndim < 2:
            local.zero_()
        else:
            local.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)


class RandomRows(Dataset):
    """``count`` rows of ``context`` random tokens."""

    def __init__(self, vocab_size: int, context: int, count: int, seed: int) -> None:
        self.vocab_size, self.context, self.count, self.seed = vocab_size, context, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + row)
        ids = torch.randint(self.vocab_size, (self.context,), generator=generator)
        return {"token_ids": ids, "document_ids": torch.zeros(self.context, dtype=torch.int32)}


class Clock(L.Callback):
    """Times the steps after the first ``warmup`` ones, the device's work included."""

    def __init__(self, machine: Machine, warmup: int) -> None:
        self.machine, self.warmup, self.seconds = machine, warmup, 0.0
        self._start = 0.0

    def _now(self) -> float:
        if self.machine.device.type == "cuda":
            torch.cuda.synchronize(self.machine.device)
        return time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.warmup:
            self._start = self._now()

    def on_train_end(self, trainer: L.Trainer, pl_module) -> None:
        self.seconds = self._now() - self._start


if __name__ == "__main__":
    main(sys.argv[1:])
