"""``python scripts/export.py``: an inference folder from a run folder, finished or interrupted, in one of FORMATS."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tpa_train.cli import parse

# Logits are compared on this text (and it is long enough to leave the windows of small models).
CHECK_TEXT = (
    "The export is read back and compared with the model that was trained, word by word, before it gets its name. "
    "A folder that differs is thrown away, since nobody would notice later: the text still reads well, only worse. "
    "def check(a, b):\n    return all(abs(x - y) < 1e-3 for x, y in zip(a, b))\n\nDie Probe gilt auch für 中文. "
)


FORMATS = {
    "native": "for the scripts and the API of this package",
    "hf": "for transformers with trust_remote_code=True, the cache as small (text side only)",
    "dense": "stock Gemma 3 with the factors multiplied out, for whatever loads Gemma 3: the same quality but for the "
    "rounding of cached numbers, and a cache as large as the original's (text side only)",
}


@dataclass
class ExportArgs:
    checkpoint: str = field(metadata={"help": "folder of a run (scripts/train.py), finished or interrupted."})
    out: str = field(metadata={"help": "folder to write; must not exist or be empty."})
    dtype: str = field(
        default="auto",
        metadata={"help": "auto keeps every weight as it was trained.", "choices": ("auto", "float32", "bfloat16")},
    )
    format: str = field(
        default="native",
        metadata={"help": "; ".join(f"{name}: {text}" for name, text in FORMATS.items()), "choices": tuple(FORMATS)},
    )
    stage: str | None = field(
        default=None,
        metadata={"help": "export the model as it was after this stage; null: after the latest finished one.",
                  "choices": ("factorized", "layerwise", "distilled")},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of scripts/export.py.

    Raises:
        UserError: an argument or the run folder is at fault; nothing is written then.
    """
    args = parse(
        ExportArgs,
        sys.argv[1:] if argv is None else argv,
        "python scripts/export.py",
        """
        Writes the inference folder of a run: from its latest finished stage, or from the one that is named.
        """,
    )
    stage, folder = export_run(args.checkpoint, args.out, args.dtype, args.stage, args.format)
    print(f"exported the {stage} model to {folder}; format={args.format}: {FORMATS[args.format]}")


def export_run(
    run: str | Path, out: str | Path, dtype: str = "auto", stage: str | None = None, format: str = "native"
) -> tuple[str, Path]:
    """Rebuilds the student of the run folder ``run`` and exports it to ``out``; the teacher is loaded anew.

    ``format``: a key of ``FORMATS``.

    Returns:
        The reported name of the stage that was exported, and the folder.

    Raises:
        UserError: ``run`` is no run folder, nothing (or not ``stage``) is finished in it, ``out`` is in use, or the
            original model is no longer where it was.
    """
    from tpa_train.checkpoints.dense_export import check_linear, export_dense
    from tpa_train.checkpoints.export import check_free, export_model
    from tpa_train.checkpoints.transformers_export import export_transformers
    from tpa_train.evaluation.report import model_card
    from tpa_train.pipeline import Session, model_path
    from tpa_train.recipes import load_settings
    from tpa_train.results import check_finished, make_report, rebuild_student, recorded_results
    from tpa_train.runs import RunFolder

    # Everything that can be wrong is found before a model is loaded.
    settings = load_settings(run)
    folder = RunFolder(Path(run), resume=True)
    check_finished(folder, settings, stage)
    check_free(Path(out))
    # A run's GPUs and its logger's package are not needed to copy weights.
    settings.trainer.accelerator, settings.trainer.devices, settings.trainer.num_nodes = "cpu", 1, 1
    settings.logger.kind = "csv"
    session = Session(settings, folder.path / "logs")
    student, name = rebuild_student(folder, settings, session.teacher, stage)
    if format == "dense":
        check_linear(student)
    results = recorded_results(folder)
    names = [result.name for result in results]
    # Figures of the exported stage only: a card must not quote what a later stage reached.
    results = results[: names.index(name) + 1] if name in names else []
    card = model_card(make_report(folder, settings, session.teacher, student, results), export_format=format)
    ids = torch.tensor([session.teacher.tokenizer.encode(CHECK_TEXT)[: settings.trainer.context]])
    if format == "dense":
        return name, export_dense(student, out, dtype, card)
    if format == "hf":
        return name, export_transformers(student, out, dtype, card, ids)
    return name, export_model(student, out, dtype, card, str(model_path(settings).resolve()), check_ids=ids)
