"""Students of a benchmark: converted once, kept as tensors, and recovered from there as often as it takes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tpa_train.benchmarks.measuring import MeasuredSettings
from tpa_train.checkpoints import load_pretrained
from tpa_train.errors import UserError
from tpa_train.evaluation.atomic import replacing
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.pipeline import Measured, Session, StageCost, factorize_model, measure, model_path, student_factors
from tpa_train.recipes import compose
from tpa_train.recovery import load_trained, recover
from tpa_train.settings import RunSettings
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, specs_to_dicts


def compose_settings(settings: MeasuredSettings, *options: str) -> RunSettings:
    """Returns the settings of a run of train.py on the benchmark's model and text.

    Args:
        settings: the benchmark's; its ``options`` come after the recipe's own.
        options: of one student; they come last.

    Raises:
        UserError: an option is unknown or has the wrong type.
    """
    model = [] if settings.model is None else [f"model.path={settings.model}"]
    return compose(
        [
            "recipe=distill", *model, "data=text", f"data.path={settings.train}",
            f"evaluation.context={settings.valid_context}", f"evaluation.copy={settings.copy}",
            f"seed={settings.seed}", f"data.seed={settings.seed}", *settings.options, *options,
        ]
    )  # fmt: skip


def open_session(
    settings: RunSettings, folder: Path, teacher: Gemma3ForCausalLM | None = None, measured: Measured | None = None
) -> Session:
    """Returns a session, with the teacher loaded."""
    session = Session(settings, folder, teacher, measured)
    if teacher is None:
        loaded = load_pretrained(model_path(settings), dtype=session.machine.dtype)
        session = Session(settings, folder, loaded, measured)
    return session


def measure_all(session: Session) -> Measured:
    """Calibrates every layer and measures what any budget of the session's forms asks for; once for all students."""
    return measure(session, {}, {}, replace(session.budget, bits=(16, 8)))


def solve(session: Session) -> Start:
    """Spends the session's budget and converts; what ``session.measured`` holds is not measured again."""
    student, *_ = factorize_model(session)
    return Start.of(student)


@dataclass
class Start:
    """A student as tensors; nothing that is trained from it changes them.

    ``factors``: what conversion introduced, by name; ``metrics``: the layers' output metrics; ``trained``: what a
    recovery stage has changed since.
    """

    specs: list[LayerSpec]
    factors: dict[str, Tensor]
    metrics: dict[int, Tensor]
    trained: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, student: Gemma3ForMultimodalLMwithTPA) -> Start:
        return cls(student.specs, student_factors(student), dict(student.output_metrics))

    def save(self, path: Path, made_by: str) -> None:
        """Writes the student as solved; ``made_by`` tells whether a later start may use it."""
        tensors = {f"factor:{name}": tensor for name, tensor in self.factors.items()}
        tensors |= {f"metric:{layer}": root for layer, root in self.metrics.items()}
        about = {"specs": json.dumps(specs_to_dicts(self.specs)), "made_by": made_by}
        with replacing(path) as temporary:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, about)

    @classmethod
    def load(cls, path: Path, made_by: str, device: torch.device) -> Start:
        """Reads what ``save`` wrote.

        Raises:
            UserError: the file is damaged, or was solved with other settings.
        """
        try:
            with safe_open(path, "pt", device=str(device)) as file:
                about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            specs = [LayerSpec(**spec) for spec in json.loads(about["specs"])]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"solved={path} is damaged ({error}); delete it to solve the budget again.") from error
        if about.get("made_by") != made_by:
            raise UserError(f"solved={path} was solved with other settings; name another file.")
        parts = {kind: {} for kind in ("factor", "metric")}
        for name, tensor in tensors.items():
            kind, _, own = name.partition(":")
            parts[kind][own] = tensor
        return cls(specs, parts["factor"], {int(layer): root for layer, root in parts["metric"].items()})

    def student(self, teacher: Gemma3ForCausalLM) -> Gemma3ForMultimodalLMwithTPA:
        """Returns the student; whatever is neither factor nor trained is shared with the teacher."""
        student = Gemma3ForMultimodalLMwithTPA.from_dense(teacher, self.specs, self.factors)
        student.output_metrics = dict(self.metrics)
        load_trained(student, self.trained)
        return student

    def recover(self, session: Session, stage: str) -> tuple[Start, Gemma3ForMultimodalLMwithTPA, StageCost]:
        """Trains a student from here through ``stage``; one whose stage has no tokens stays as it is.

        Returns:
            where it arrived, the student itself, and what it cost.
        """
        student = self.student(session.teacher)
        if session.steps(stage) == 0:
            return self, student, StageCost(0, 0.0, 0.0)
        module, cost = recover(session, student, stage)
        return replace(self, trained=self.trained | module.trained_tensors()), student, cost
