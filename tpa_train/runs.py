"""The run folder: what is finished is recorded there, so that an interrupted run goes on where it stopped.

    run.yaml           the settings          progress.json   measured results of finished stages
    state/             tensors of finished stages (safetensors)
    checkpoints/       of the stage that is under way
    logs/  plots/  report.md  report.json  export/
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tpa_train.distributed.processes import from_first, is_first
from tpa_train.errors import UserError
from tpa_train.evaluation.atomic import replacing, write_text
from tpa_train.settings import RunSettings


class RunFolder:
    """One run's folder. Of several processes only the first writes; all of them know the progress.

    Args:
        path: made if need be.
        resume: the folder must hold an interrupted run, instead of nothing.

    Raises:
        UserError: the folder is in use, or there is nothing to resume.
    """

    def __init__(self, path: Path, resume: bool = False) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"run_dir={self.path} is a file; name a folder.")
        started = self.started
        if resume and not started:
            raise UserError(f"resume=true, but there is no run in {self.path}; leave resume out to start one.")
        if not resume and self.path.exists() and any(self.path.iterdir()):
            hint = "add resume=true to go on with it, or " if started else ""
            raise UserError(f"run_dir={self.path} already exists and is not empty; {hint}choose another run_dir.")
        self.progress: dict[str, Any] = {"stages": []}
        if resume and (self.path / "progress.json").exists():
            self.progress |= self._read_progress()

    @property
    def started(self) -> bool:
        """Whether a run has begun here."""
        return (self.path / "run.yaml").exists()

    def _read_progress(self) -> dict[str, Any]:
        path = self.path / "progress.json"
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); start a new run.") from error
        if not isinstance(progress, dict):
            raise UserError(f"{path} is damaged (not a JSON object); start a new run.")
        return progress

    def start(self, settings: RunSettings, command: str) -> None:
        """Creates the folder and records what it was started with."""
        if not is_first():
            return
        for name in ("state", "checkpoints", "logs"):
            (self.path / name).mkdir(parents=True, exist_ok=True)
        if not (self.path / "run.yaml").exists():
            self.progress["command"] = command
            self.save()
            write_text(self.path / "run.yaml", OmegaConf.to_yaml(OmegaConf.structured(settings)))

    def record(self, **values: Any) -> None:
        """Adds to progress.json; dataclasses become dicts."""
        for key, value in values.items():
            self.progress[key] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        self.save()

    def save(self) -> None:
        if not is_first():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "progress.json", json.dumps(self.progress, indent=1))

    def checkpoint(self, stage: str) -> Path:
        """Returns where the checkpoint of an unfinished stage is kept."""
        return self.path / "checkpoints" / f"{stage}.ckpt"

    def state_file(self, name: str) -> Path:
        return self.path / "state" / f"{name}.safetensors"

    def best_checkpoint(self, stage: str) -> Path:
        """Returns where the checkpoint of the lowest smoothed training loss is kept (``interrupts.SaveAndStop``)."""
        return self.path / "checkpoints" / f"{stage}.best.ckpt"

    def has(self, path: Path) -> bool:
        """Returns whether ``path`` exists, the same on all processes: a file may be appearing or going."""
        return from_first(path.exists)

    def drop_checkpoints(self, stage: str) -> None:
        """Deletes the checkpoints of a finished stage."""
        if is_first():
            self.checkpoint(stage).unlink(missing_ok=True)
            self.best_checkpoint(stage).unlink(missing_ok=True)

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        if not is_first():
            return
        with replacing(self.state_file(name)) as temporary:
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, temporary)

    def load_tensors(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
        """Returns the tensors saved under ``name``, or None if that stage has not been finished.

        Raises:
            UserError: the file is damaged.
        """
        path = self.state_file(name)
        if not self.has(path):
            return None
        try:
            return load_file(path, device=str(device))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to redo that stage.") from error


def default_folder(settings: RunSettings) -> Path:
    """Returns ``runs/<model>-<recipe>-<time>``."""
    model = Path(settings.model.path).stem if settings.model.path else settings.model.name
    return Path("runs") / f"{model}-{settings.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
