"""What happens between the steps of pretraining: held-out measurements, lines to read, and stopping early."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import lightning as L
import torch

from tpa_train.errors import UserError
from tpa_train.interrupts import InterruptHandler

CURVE_POINTS = 100
# Compilation and warm-up are over by the first of these steps; the speed is judged from there to the second one.
SPEED_FROM, SPEED_TO = 10, 30


class Progress(L.Callback):
    """Measures now and then, keeps the loss curve, and stops training when its time is up or a signal asks for it.

    Args:
        steps: optimizer steps that are planned.
        tokens_per_step: of the whole batch.
        minutes: wall-clock time that training may take, measurements included.
        validations: how many measurements are spread evenly over the steps, none of them at the last.
        validate: returns the held-out loss in nats.
        handler: where signals arrive.

    Attributes:
        measured: ``{"step", "tokens", "seconds", "loss", "heldout"}`` of every measurement, losses in nats.
        stopped: what ended training before the last step ("minutes=8" or a signal's name), or None.
    """

    def __init__(
        self,
        steps: int,
        tokens_per_step: int,
        minutes: float,
        validations: int,
        validate: Callable[[], float],
        handler: InterruptHandler,
    ) -> None:
        self.steps, self.tokens_per_step, self.minutes = steps, tokens_per_step, minutes
        self.seconds_allowed = 60.0 * minutes
        self.at = {round(steps * (i + 1) / (validations + 1)) for i in range(validations)} - {0, steps}
        self.validate, self.handler = validate, handler
        self.measured: list[dict[str, float]] = []
        self.stopped: str | None = None
        self._losses: list[torch.Tensor] = []
        self._start = self._judged_from = 0.0
        self._line = (0, 0.0)  # step and time of the last line, without the time that measuring took

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.handler.install()  # Lightning has put its own in place by now
        self._start = time.perf_counter()
        self._line = (0, self._start)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx: int) -> None:
        step = trainer.global_step
        self._losses.append(outputs["loss"].detach())
        if step in (SPEED_FROM, SPEED_TO):
            self._judge_speed(trainer, step)
        if step in self.at:
            self._measure(trainer, step)
        if step < self.steps and time.perf_counter() - self._start > self.seconds_allowed:
            self.stopped = f"minutes={self.minutes:g}"
        if self.handler.requested is not None:
            self.stopped = signal.Signals(self.handler.requested).name
        trainer.should_stop = self.stopped is not None

    def _judge_speed(self, trainer: L.Trainer, step: int) -> None:
        """Says early that the time will not do, while nothing is lost by starting again with other options."""
        self._losses[-1].item()  # waits for the device
        now = time.perf_counter()
        if step == SPEED_FROM:
            self._judged_from = now
            return
        pace = (now - self._judged_from) / (SPEED_TO - SPEED_FROM)
        needed = now - self._start + pace * (self.steps - step)
        if needed > self.seconds_allowed:
            reached = step + int((self.seconds_allowed - (now - self._start)) / pace)
            tokens = f"{int(0.95 * max(1, reached)) * self.tokens_per_step:,}"
            trainer.progress_bar_callback.print(
                f"  at {self.tokens_per_step / pace:,.0f} tokens/s all steps take {needed / 60:.1f} minutes, more than "
                f"minutes={self.minutes:g}: the learning rate will not come down in time. "
                f"tokens={tokens.replace(',', '_')} would fit."
            )

    def _measure(self, trainer: L.Trainer, step: int) -> None:
        since, then = self._line
        recent = torch.stack(self._losses[since:]).mean().item()  # waits for the device
        now = time.perf_counter()
        heldout = self.validate()
        speed = (step - since) * self.tokens_per_step / (now - then)
        point = {
            "step": step, "tokens": step * self.tokens_per_step, "seconds": round(now - self._start, 2),
            "loss": recent, "heldout": heldout,
        }  # fmt: skip
        self.measured.append(point)
        trainer.progress_bar_callback.print(
            f"  step {step:,} of {self.steps:,}  {point['tokens'] / 1e6:.1f}M tokens  loss {recent:.4f}  held-out "
            f"{heldout:.4f}  {speed:,.0f} tokens/s"
        )
        self._line = (step, time.perf_counter())

    def curve(self) -> list[dict[str, float]]:
        """Returns training losses averaged over at most CURVE_POINTS stretches: ``{"step", "loss"}``, nats.

        Raises:
            UserError: the training diverged.
        """
        losses = torch.stack(self._losses).float().cpu()
        if not bool(torch.isfinite(losses).all()):
            raise UserError("the training diverged: a loss is not finite; lower optimizer.lr and start again.")
        points = min(CURVE_POINTS, len(losses))
        edges = [round(len(losses) * i / points) for i in range(points + 1)]
        return [
            {"step": end, "loss": losses[begin:end].mean().item()}
            for begin, end in zip(edges, edges[1:], strict=False)
        ]  # fmt: skip
