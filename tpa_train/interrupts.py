"""Ctrl-C and SIGTERM: training stops after the current optimizer step and saves; other work stops at once."""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L

from tpa_train.distributed.processes import is_first, raised_anywhere

SMOOTHING = 0.98  # of the training loss, a step: what a checkpoint is judged by looks back on some fifty steps


class Interrupted(BaseException):
    """The run was asked to stop; what was finished is on disk.

    Not an ``Exception``: it may arrive inside any library, whose ``except Exception`` must not swallow it.
    ``status`` is the shell's exit status for the signal (130 for Ctrl-C, 143 for SIGTERM).
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.status = 128 + signum


class InterruptHandler:
    """Turns signals into a request that training honours between steps, or into ``Interrupted`` elsewhere.

    A second signal raises ``Interrupted`` in the middle of a step too: somebody is in a hurry. (KeyboardInterrupt would
    make Lightning end the process itself, with a status that says nothing.)
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: int | None = None
        self._deferred = False

    @contextmanager
    def installed(self):
        """Handles signals inside the context; restores the previous handlers after it."""
        previous = {s: signal.getsignal(s) for s in self.SIGNALS}
        self.install()
        try:
            yield self
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)

    def install(self) -> None:
        for signum in self.SIGNALS:
            signal.signal(signum, self._handle)

    @contextmanager
    def deferred(self):
        """Inside the context a signal only sets ``requested``; after it the request raises ``Interrupted``."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()

    def check(self) -> None:
        """Raises ``Interrupted`` if a signal has come."""
        if self.requested is not None:
            raise Interrupted(self.requested)

    def _handle(self, signum: int, _frame) -> None:
        hurried = self.requested is not None
        self.requested = signum
        if hurried or not self._deferred:
            raise Interrupted(signum)
        message = f"\n{signal.Signals(signum).name}: stopping after this step and saving; again to stop at once\n"
        os.write(2, message.encode())  # print() is not allowed inside another print(), and signals come anywhere


class SaveAndStop(L.Callback):
    """Writes the stage's checkpoint every so many minutes and when a signal asks the run to stop.

    The last one is what a run goes on from. Of all that were written, the one with the lowest smoothed training loss
    (the KL, where there is one: the hidden-state loss beside it decays by itself) is kept too, for a training that
    diverges: under the last one's name it is gone on from.

    Args:
        path: of the checkpoint; written to a temporary name and renamed.
        handler: where requests arrive.
        minutes: between periodic checkpoints.
        best: path of the best one; None keeps none.
    """

    def __init__(self, path: Path, handler: InterruptHandler, minutes: float, best: Path | None = None) -> None:
        self.path, self.handler, self.seconds = Path(path), handler, 60.0 * minutes
        self.best = best
        self._saved_at = time.monotonic()
        self._sum = self._weight = 0.0  # of the losses and of their weights: together their smoothed mean
        self._lowest = math.inf  # smoothed mean at the best checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "weight": self._weight, "lowest": self._lowest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sum, self._weight, self._lowest = (state_dict[key] for key in ("sum", "weight", "lowest"))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning has put its own SIGTERM handler in place by now; it would raise in the middle of a step.
        self.handler.install()
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module, outputs, batch, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # half an accumulated step cannot be resumed
        self._observe(trainer)
        # All processes must agree, or one would wait for the others in the next collective.
        late = is_first() and time.monotonic() - self._saved_at > self.seconds
        stop, due = raised_anywhere(self.handler.requested is not None, late)
        if stop or due:
            self._save(trainer)
            self._saved_at = time.monotonic()
        if stop:
            trainer.should_stop = True

    def _observe(self, trainer: L.Trainer) -> None:
        if trainer.global_step % trainer.log_every_n_steps:
            return  # nothing new was logged, and reading a loss waits for the device
        metrics = trainer.callback_metrics
        loss = next((metrics[name] for name in ("kl", "output_loss", "loss") if name in metrics), None)
        if loss is not None and is_first():
            self._sum = SMOOTHING * self._sum + (1 - SMOOTHING) * float(loss)
            self._weight = SMOOTHING * self._weight + (1 - SMOOTHING)

    def _save(self, trainer: L.Trainer) -> None:
        smoothed = self._sum / self._weight if self._weight else math.inf
        is_best = smoothed < self._lowest
        self._lowest = min(smoothed, self._lowest)
        save_atomically(trainer, self.path)
        if is_best and self.best is not None and is_first():
            link_atomically(self.path, self.best)


def link_atomically(path: Path, other: Path) -> None:
    """Makes ``other`` the same file as ``path``, which is replaced and never changed: no second copy on disk."""
    temporary = other.with_name(f".{other.name}.partial")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    os.replace(temporary, other)


def save_atomically(trainer: L.Trainer, path: Path) -> None:
    """Writes a Lightning checkpoint to a temporary name beside ``path`` and renames it."""
    temporary = path.with_name(f".{path.name}.partial")
    trainer.save_checkpoint(temporary, weights_only=False)
    if trainer.is_global_zero:
        os.replace(temporary, path)
