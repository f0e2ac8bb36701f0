"""The Python API: the steps of a run as functions on models (``import tpa_train``).

Options are the strings that the command line of ``scripts/train.py`` takes ("budget=ratio6", "data=text",
"data.path=notes/*.md", "trainer.context=2048"). Nothing is written but packed text in the cache folder, and the
folder that ``export`` is asked for.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tpa_train.checkpoints import find_default
from tpa_train.checkpoints import load_pretrained as load_checkpoint
from tpa_train.checkpoints.export import export_model
from tpa_train.checkpoints.locate import is_packaged
from tpa_train.errors import UserError
from tpa_train.evaluation.report import Report, model_card
from tpa_train.evaluation.suites import cache_report, layer_rows
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.pipeline import Session, check_against_model, factorize_model
from tpa_train.recipes import compose
from tpa_train.recovery import recover
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA

# Options that only a run folder gives a meaning; accepting them silently would promise something.
_OF_RUNS = ("run_dir", "resume", "evaluation", "export", "logger", "model", "dry_run", "peers")


def load_pretrained(
    path: str | Path = "gemma3_270m", dtype: torch.dtype = torch.float32, adapter: str | Path | None = None
) -> Gemma3ForCausalLM:
    """Loads an original Gemma 3, on the CPU.

    Args:
        path: a GGUF or gemma_pytorch file, a Hugging Face folder, or the name of a packaged model.
        dtype: of the weights in memory.
        adapter: folder of a LoRA adapter to merge into the weights.

    Raises:
        UserError: nothing is there, it is not a readable Gemma 3, or the adapter does not fit it.
    """
    if is_packaged(str(path)) and not Path(path).exists():
        path = find_default(str(path))
    return load_checkpoint(path, dtype, adapter)


def factorize(teacher: Gemma3ForCausalLM, *options: str) -> Gemma3ForMultimodalLMwithTPA:
    """Calibrates on text, spends the byte budget on ranks, and converts.

    Args:
        teacher: from ``load_pretrained``; moved to the training device, otherwise unchanged.
        options: ``key=value`` strings.

    Returns:
        The student, which shares every unconverted weight with the teacher.

    Raises:
        UserError: an option, the text or the budget is at fault, or the teacher has no tokenizer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        student, *_ = factorize_model(_session(teacher, options, scratch))
    return student


def distill(
    teacher: Gemma3ForCausalLM, student: Gemma3ForMultimodalLMwithTPA, *options: str
) -> Gemma3ForMultimodalLMwithTPA:
    """Recovers quality by the recipe's stages after factorizing (layer-wise, then end to end).

    Args:
        teacher: the original.
        student: from ``factorize``; trained in place.
        options: ``key=value`` strings; give the same ``data`` and ``trainer`` ones as to ``factorize``. The budget is
            the student's already.

    Returns:
        ``student``.

    Raises:
        UserError: an option or the text is at fault, or the student is not the teacher's.
    """
    if student.config != teacher.config:
        raise UserError("the student was made from another model than this teacher: their sizes differ.")
    with tempfile.TemporaryDirectory() as scratch:
        session = _session(teacher, options, scratch)
        student.to(session.machine.device)
        for stage in session.settings.recipe.stages[1:]:
            if session.steps(stage) > 0:
                recover(session, student, stage)
    return student


def export(
    student: Gemma3ForMultimodalLMwithTPA,
    out: str | Path,
    dtype: str = "auto",
    context: int = 32_768,
    check_ids: Tensor | None = None,
) -> Path:
    """Writes the inference folder that ``Gemma3ForMultimodalLMwithTPA.from_pretrained`` and the scripts load.

    Args:
        student: from ``factorize`` or ``distill``.
        out: folder to make; must not exist or be empty.
        dtype: "auto" keeps every weight as it was trained, "float32" or "bfloat16" cast.
        context: at which the model card states the size of the cache; at most the model's.
        check_ids: int [1, L], the text on which the written folder is compared with ``student``.

    Returns:
        The folder.

    Raises:
        UserError: the folder is in use, a weight is not finite, or what was written computes something else.
    """
    context = min(context, student.config.max_context)
    with torch.device("meta"):
        dense = Gemma3ForMultimodalLMwithTPA(student.config)
    cache = cache_report(dense, student, context)
    source = student.source
    report = Report(
        model=str(source.path.name) if source is not None else "Gemma 3",
        budget={"cache_ratio": cache.ratio, "context": context},
        cache=cache,
        stages=[],
        layers=layer_rows(student),
        source=source.description if source is not None else "",
        weights_quantized=bool(source is not None and source.weights_quantized),
        multimodal=student.config.vision is not None,
        adapter=source.adapter.name if source is not None and source.adapter else "",
    )
    origin = str(Path(source.path).resolve()) if source is not None else None
    return export_model(student, out, dtype, model_card(report), origin, check_ids)


def _session(teacher: Gemma3ForCausalLM, options: tuple[str, ...], scratch: str) -> Session:
    """Returns a session around the teacher at hand; Lightning's scratch files go to ``scratch``."""
    for option in options:
        group = option.partition("=")[0].lstrip("+-~").partition(".")[0]
        if group in _OF_RUNS:
            raise UserError(f"'{option}' is an option of scripts/train.py only; leave it out of the Python API.")
    settings = compose(list(options))
    # Evaluation is not run here: its defaults must not refuse a model of small context.
    settings.evaluation.copy, settings.evaluation.context = [], 1
    session = Session(settings, Path(scratch) / "logs", teacher)
    check_against_model(settings, teacher.config)
    return session
