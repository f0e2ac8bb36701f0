"""What a run folder holds: the student as of its last finished stage, and the report on it.

Training (``tpa_train.launch``) and ``scripts/export.py`` (``tpa_train.checkpoints.command``) share these, so that an
export made later is built from the same tensors in the same way as the one at the end of a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from tpa_train.errors import UserError
from tpa_train.evaluation.plots import read_losses
from tpa_train.evaluation.report import Report
from tpa_train.evaluation.suites import StageResult, cache_report, layer_rows
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.pipeline import student_factors
from tpa_train.recovery import load_trained
from tpa_train.runs import RunFolder
from tpa_train.settings import RunSettings
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, specs_to_dicts

FACTORS = "factors"  # state/factors.safetensors; the other stages' files have their reported names
METRIC = "output_metric."  # of a layer, in the same file
REPORTED_AS = {"factorize": "factorized", "layerwise": "layerwise", "distill": "distilled"}


def save_factorized(folder: RunFolder, student: Gemma3ForMultimodalLMwithTPA, **facts: Any) -> None:
    """Records the converted model; ``facts`` go into progress.json beside its specifications."""
    metrics = {f"{METRIC}{layer}": root for layer, root in student.output_metrics.items()}
    folder.save_tensors(FACTORS, student_factors(student) | metrics)
    folder.record(specs=specs_to_dicts(student.specs), **facts)


def load_factorized(folder: RunFolder, teacher: Gemma3ForCausalLM) -> Gemma3ForMultimodalLMwithTPA | None:
    """Returns the converted model that ``save_factorized`` recorded, on the teacher's device; None if there is none.

    Raises:
        UserError: the recorded factors are damaged or belong to another model.
    """
    if not _has_factors(folder):
        return None
    factors = folder.load_tensors(FACTORS, teacher.head_weight.device)
    specs = [LayerSpec(**spec) for spec in folder.progress["specs"]]
    student = Gemma3ForMultimodalLMwithTPA.from_dense(teacher, specs, factors)
    student.output_metrics = {
        int(name.removeprefix(METRIC)): root for name, root in factors.items() if name.startswith(METRIC)
    }
    return student


def load_stage(folder: RunFolder, student: Gemma3ForMultimodalLMwithTPA, stage: str) -> bool:
    """Puts into ``student`` what the finished ``stage`` ("layerwise", "distill") trained; False if it is unfinished.

    Raises:
        UserError: the tensors are damaged or belong to another model.
    """
    trained = folder.load_tensors(REPORTED_AS[stage], student.head_weight.device)
    if trained is None:
        return False
    load_trained(student, trained)
    return True


def finished_stages(folder: RunFolder, settings: RunSettings) -> list[str]:
    """Returns the finished stages in order, by their reported names ("factorized", "layerwise", "distilled")."""
    if not _has_factors(folder):
        return []
    recovered = [REPORTED_AS[stage] for stage in settings.recipe.stages[1:]]
    return ["factorized", *(name for name in recovered if folder.state_file(name).exists())]


def check_finished(folder: RunFolder, settings: RunSettings, stage: str | None = None) -> list[str]:
    """Returns ``finished_stages``.

    Raises:
        UserError: there are none, or ``stage`` (a reported name) is not among them.
    """
    finished = finished_stages(folder, settings)
    if not finished:
        raise UserError(f"{folder.path}: no stage of this run is finished yet; go on with it by resume=true.")
    if stage is not None and stage not in finished:
        raise UserError(f"{folder.path}: the stage '{stage}' is not finished; finished: {', '.join(finished)}.")
    return finished


def rebuild_student(
    folder: RunFolder, settings: RunSettings, teacher: Gemma3ForCausalLM, upto: str | None = None
) -> tuple[Gemma3ForMultimodalLMwithTPA, str]:
    """Returns the student as it was after a finished stage, and that stage's reported name.

    Args:
        folder: of the run.
        settings: the run's.
        teacher: the original model, which everything unconverted and untrained comes from.
        upto: reported name of the stage; the latest finished one when left out.

    Raises:
        UserError: no stage, or not that stage, is finished; or its tensors are damaged.
    """
    finished = check_finished(folder, settings, upto)
    last = upto or finished[-1]
    student = load_factorized(folder, teacher)
    for stage in settings.recipe.stages[1:]:
        name = REPORTED_AS[stage]
        if name in finished and finished.index(name) <= finished.index(last):
            load_stage(folder, student, stage)
    return student, last


def make_report(
    folder: RunFolder,
    settings: RunSettings,
    teacher: Gemma3ForCausalLM,
    student: Gemma3ForMultimodalLMwithTPA,
    results: Sequence[StageResult],
    command: str = "",
    machine: str = "",
) -> Report:
    """Returns the report on ``student``: measured ``results`` and whatever else the folder recorded."""
    progress, logs = folder.progress, folder.path / "logs"
    return Report.of(
        teacher,
        model=settings.model.path or settings.model.name,
        budget={"cache_ratio": settings.budget.cache_ratio, "context": settings.budget.context},
        cache=cache_report(teacher, student, settings.budget.context),
        stages=results,
        layers=layer_rows(student),
        command=progress.get("command", command),
        evaluation={
            "text": f"held-out part of data={settings.data.kind}", "context": settings.evaluation.context,
            "documents": "joined" if settings.data.join_documents else "kept apart",
        },
        samples=progress.get("samples", []),
        layer_errors=progress.get("layer_errors", {}),
        losses={stage: curve for stage in settings.recipe.stages[1:] if (curve := whole_curve(logs / stage))},
        extra={
            "costs": progress.get("costs", {}), "sensitivities": progress.get("sensitivities", {}),
            "machine": machine, "settings": OmegaConf.to_container(OmegaConf.structured(settings)),
        },
    )  # fmt: skip


def recorded_results(folder: RunFolder) -> list[StageResult]:
    """Returns the measurements of the finished stages, the teacher's first."""
    known = {item.name for item in dataclasses.fields(StageResult)}
    return [StageResult(**{k: v for k, v in stage.items() if k in known}) for stage in folder.progress["stages"]]


def whole_curve(folder) -> tuple[list[float], list[float]] | None:
    """Joins the loss curves of a stage's parts (a resumed run writes several), later parts replacing repeated steps."""
    points: dict[float, float] = {}
    for part in sorted(folder.glob("part*"), key=lambda p: int(p.name.removeprefix("part"))):
        curve = read_losses(part / "metrics.csv")
        if curve is not None:
            points.update(zip(*curve, strict=True))
    return (list(sorted(points)), [points[k] for k in sorted(points)]) if points else None


def _has_factors(folder: RunFolder) -> bool:
    return "specs" in folder.progress and folder.has(folder.state_file(FACTORS))
