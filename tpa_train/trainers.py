"""The one place that knows about machines: devices, precision, strategies, loggers and Lightning's Trainer."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy

from tpa_train.distributed.launching import find_cluster
from tpa_train.distributed.processes import from_first, world_size
from tpa_train.distributed.sharding import ShardedStrategy
from tpa_train.errors import UserError, nearest
from tpa_train.machine_memory import host_memory
from tpa_train.settings import LoggerSettings, TrainerSettings

# kind -> modules, one of which Lightning's logger needs
STRATEGIES = ("auto", "ddp", "fsdp2")
LOGGERS = {
    "csv": ("csv",), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",),
    "mlflow": ("mlflow", "mlflow_skinny"),
}  # fmt: skip
# Optimizer steps between two lines of the log. Reading a loss waits for the device, which then has nothing to do until
# the next step's kernels arrive.
LOG_EVERY = {"cpu": 1, "cuda": 10}


COLLECT_ABOVE = 2 << 30  # bytes of this process; a full collection takes a quarter of a second


@dataclass
class Machine:
    """Where a run computes and how precisely.

    ``dtype``: of frozen weights; weights that learn are float32 and cast by ``autocast`` where dtype is bfloat16.
    """

    device: torch.device
    dtype: torch.dtype
    settings: TrainerSettings

    @property
    def autocast(self) -> Callable[[], AbstractContextManager]:
        """Makes the context manager that models run under outside of the Trainer."""
        if self.dtype == torch.bfloat16:
            return partial(torch.autocast, self.device.type, dtype=torch.bfloat16)
        return nullcontext

    def describe(self, count: int | None = None) -> str:
        """Returns what a person reads; ``count``: of the devices, where their processes have not been started."""
        on_gpu, count = self.device.type == "cuda", count or world_size()
        name = torch.cuda.get_device_name(self.device) if on_gpu else f"{torch.get_num_threads()} CPU threads"
        devices = f"{count} devices, {self._shared_strategy}" if count > 1 else "1 device"
        if count == 1 and self.settings.strategy != "auto":
            devices += f" (trainer.strategy={self.settings.strategy} is for several)"
        return f"{name}, {str(self.dtype).removeprefix('torch.')}, {devices}"

    @property
    def strategy(self) -> str:
        """How several processes train together, "ddp" or "fsdp2"; "single" for one."""
        return "single" if world_size() == 1 else self._shared_strategy

    @property
    def _shared_strategy(self) -> str:
        return "ddp" if self.settings.strategy == "auto" else self.settings.strategy

    def reset_peak(self) -> None:
        release_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float:
        """Returns peak memory in GiB: of the device since ``reset_peak``, or of the whole process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def trim_heap() -> None:
    """Returns what is free on this process's heap to the system, where the C library can (glibc).

    Tensors below 32 MB come from the heap, which keeps what it once had, and gaps between what outlives a step serve no
    later one: without this, calibrating the 270M leaves 2 GiB behind, and a step end to end takes a quarter more.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        pass


def release_memory() -> None:
    """Frees what only reference cycles hold (Lightning's loops, between stages), and the heap."""
    if (host_memory("/proc/self/status", "VmRSS") or 0) > COLLECT_ABOVE:
        gc.collect()
    trim_heap()


class TrimHeap(L.Callback):
    """Trims the heap after every batch; on a CPU, where activations are on it."""

    def on_train_batch_end(self, *_args) -> None:
        trim_heap()

    def on_validation_batch_end(self, *_args) -> None:
        trim_heap()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; elsewhere emulation is slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def choose_machine(settings: TrainerSettings) -> Machine:
    """Resolves ``auto`` to what this machine has.

    Raises:
        UserError: an accelerator was asked for and there is none, or an option has an unknown value.
    """
    for option, value, valid in (
        ("accelerator", settings.accelerator, ("auto", "cpu", "gpu")),
        ("precision", settings.precision, ("auto", "bf16", "float32")),
        ("strategy", settings.strategy, STRATEGIES),
    ):
        if value not in valid:
            raise UserError(f"trainer.{option}={value} is unknown{nearest(value, valid)}")
    has_gpu = torch.cuda.is_available()
    if settings.accelerator == "gpu" and not has_gpu:
        raise UserError("trainer=gpu was asked for, but PyTorch sees no CUDA device; use trainer=cpu.")
    use_gpu = has_gpu and settings.accelerator != "cpu"
    device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
    bf16 = settings.precision == "bf16" or (settings.precision == "auto" and (use_gpu or cpu_has_bf16()))
    return Machine(device, torch.bfloat16 if bf16 else torch.float32, settings)


def check_logger(settings: LoggerSettings) -> None:
    """Raises UserError if the logger is unknown or its package is not installed; nothing is written by then."""
    if settings.kind not in LOGGERS:
        raise UserError(f"logger={settings.kind} is unknown{nearest(settings.kind, LOGGERS)}")
    if not any(importlib.util.find_spec(module) for module in LOGGERS[settings.kind]):
        raise UserError(f"logger={settings.kind} needs a package: pip install {settings.kind}")


def make_loggers(
    settings: LoggerSettings, folder: Path, stage: str, hyperparameters: dict[str, Any] | None = None
) -> list[Logger]:
    """Returns the csv logger, which reports are drawn from, and the one that was asked for.

    Args:
        settings: which one.
        folder: where curves are kept, of those that keep files.
        stage: names the curves.
        hyperparameters: of the run, recorded beside them.

    Raises:
        UserError: the logger is unknown or its package is not installed.
    """
    check_logger(settings)
    # A resumed run writes the next part: nothing is overwritten.
    part = from_first(lambda: len(list((folder / stage).glob("part*"))))
    loggers: list[Logger] = [CSVLogger(folder, name=stage, version=f"part{part}", flush_logs_every_n_steps=20)]
    if settings.kind == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(folder, name=stage, version=f"part{part}"))
    elif settings.kind == "wandb":
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project=settings.project, name=f"{folder.parent.name}-{stage}", save_dir=folder))
    elif settings.kind == "mlflow":
        from lightning.pytorch.loggers import MLFlowLogger

        run_name = f"{folder.parent.name}-{stage}"
        loggers.append(MLFlowLogger(experiment_name=settings.project, run_name=run_name, save_dir=f"{folder}/mlruns"))
    for logger in loggers:
        logger.log_hyperparams(hyperparameters or {})
    return loggers


def make_trainer(
    machine: Machine,
    folder: Path,
    steps: int | None = None,
    loggers: list[Logger] | None = None,
    callbacks: list[L.Callback] | None = None,
    sharded: bool = False,
) -> L.Trainer:
    """Returns a Trainer for one stage.

    Args:
        machine: devices and precision.
        folder: Lightning's root folder.
        steps: optimizer steps; None for a pass that does not train (calibration).
        loggers, callbacks: as given.
        sharded: the module shards itself (``distributed.sharding``); otherwise every process holds all of it.
    """
    settings = machine.settings
    quiet_lightning()
    cluster = find_cluster() if world_size() > 1 else None
    several: dict = {"devices": 1, "strategy": "auto"}
    if world_size() > 1:
        several = {
            "devices": settings.devices, "num_nodes": settings.num_nodes, "plugins": [cluster] if cluster else None,
            "strategy": ShardedStrategy(world_size()) if sharded else DDPStrategy(
                gradient_as_bucket_view=True, broadcast_buffers=False  # buffers are constants
            ),
        }  # fmt: skip
    trainer = L.Trainer(
        accelerator="gpu" if machine.device.type == "cuda" else "cpu",
        **several,
        precision="bf16-mixed" if machine.dtype == torch.bfloat16 else "32-true",
        max_steps=steps if steps is not None else -1,
        max_epochs=-1 if steps is not None else 1,
        accumulate_grad_batches=settings.accumulate,
        use_distributed_sampler=False,  # the data module's own sampler can resume
        inference_mode=False,  # calibration differentiates attention
        enable_checkpointing=False,  # SaveAndStop writes them, atomically
        enable_model_summary=False,
        log_every_n_steps=LOG_EVERY.get(machine.device.type, 1),
        logger=loggers or False,
        callbacks=[StageBar(), *([TrimHeap()] if machine.device.type == "cpu" else []), *(callbacks or [])],
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    if world_size() > 1:
        # Before every batch Lightning asks the first process for a SIGTERM, and waits for the device to know. Here
        # signals reach every process (``launching``), and ``SaveAndStop`` has all agree.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


class StageBar(TQDMProgressBar):
    """Lightning's bar with the stage's name and the time left; seldom redrawn where nobody watches (a log file)."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=(10 if torch.cuda.is_available() else 1) if sys.stdout.isatty() else 50)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def on_train_epoch_start(self, trainer: L.Trainer, *_args) -> None:
        super().on_train_epoch_start(trainer, *_args)
        self.train_progress_bar.set_description(getattr(trainer.lightning_module, "stage", "training"))

    @property
    def validation_description(self) -> str:
        return "calibrating"


def quiet_lightning() -> None:
    """Silences Lightning's advertisements; its errors stay."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (".*does not have many workers.*", ".*LeafSpec.*", ".*TreeSpec.*", ".*`isinstance.treespec.*",
                    ".*Experiment logs directory.*", ".*lr_scheduler.step.*", ".*set_training_mode.*",
                    ".*set_vital.*", ".*on_before_batch_transfer.*", ".*module\\(s\\) in eval mode.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message=pattern)


@contextlib.contextmanager
def seeded(seed: int):
    """Seeds every generator that a stage may touch, and restores PyTorch's afterwards."""
    # Of this process's own device: a look at the others' generators would take memory there.
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        L.seed_everything(seed, verbose=False)
        yield
