"""``python scripts/evaluate.py``: an exported model beside its teacher, as a table or as JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from tpa_train.cli import choose_device, parse
from tpa_train.errors import UserError
from tpa_train.evaluation.harness import load_harness, run_tasks
from tpa_train.evaluation.multiple_choice import ChoiceResult, Question, read_questions, score_questions
from tpa_train.evaluation.report import json_safe, table, versions
from tpa_train.evaluation.suites import CacheReport, Evaluator, StageResult, cache_report, layer_rows

DEFAULT_MODEL = "gemma3_270m"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The whole of them fits a coffee break on two CPU cores; accelerators get more, and longer distances.
CPU_TOKENS, ACCELERATOR_TOKENS = 16_384, 262_144
CPU_CONTEXT, ACCELERATOR_CONTEXT = 4096, 8192
CPU_COPY, ACCELERATOR_COPY = "1000", "1000,3500,8000,15000"
CPU_COPY_TOKENS = 512  # scored of each second copy


@dataclass
class DataArgs:
    path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "text to evaluate on: .txt, .md, .jsonl or .parquet (also .gz, .xz), a folder or a glob, all of "
            "which is used; without it the held-out part of the documentation that Python itself carries."
        },
    )
    chat: bool = field(
        default=False,
        metadata={"help": "data.path holds conversations (.jsonl, .json, .parquet): score the model's turns only."},
    )
    text_key: str = field(default="text", metadata={"help": "field that holds the text in .jsonl and .parquet."})
    control_names: bool = field(
        default=False,
        metadata={"help": "names such as <eos> or <unk> in the text become the control pieces, as with transformers."},
    )
    join_documents: bool = field(
        default=True,
        metadata={"help": "let attention cross documents inside a row, so that long context is really used."},
    )
    heldout: bool | None = field(
        default=None,
        metadata={"help": "score only the documents that training on the same path holds out; null: no with data.path "
        "(unless packed earlier), yes without."},
    )  # fmt: skip
    max_tokens: int = field(default=8_000_000, metadata={"help": "tokenise at most this much of the text."})
    cache_dir: str | None = field(default=None, metadata={"help": "where tokenised text is kept."})


@dataclass
class SuiteArgs:
    path: list[str] = field(
        default_factory=list,
        metadata={"help": "multiple-choice file: JSON lines with context, choices, label, or contexts, continuation, "
        "label."},
    )  # fmt: skip
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "a task of lm-evaluation-harness, e.g. arc_easy (pip install -e '.[eval]')."},
    )
    limit: int | None = field(
        default=None, metadata={"help": "use only the first so many questions of each file and task."}
    )


@dataclass
class EvaluateArgs:
    model: str = field(metadata={"help": "exported folder, or a run's folder (its export/ is used)."})
    teacher: str | None = field(
        default=None,
        metadata={"help": f"checkpoint to compare with; null: the one the export was made from, else {DEFAULT_MODEL}."},
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "LoRA adapter to merge into the teacher; null: the one that the export recorded, unless "
                  "teacher= is given."},
    )  # fmt: skip
    context: int | None = field(
        default=None,
        metadata={"help": f"tokens of a row; null: {CPU_CONTEXT} on a CPU, else {ACCELERATOR_CONTEXT}; at most the "
        "text's."},
    )  # fmt: skip
    tokens: int | None = field(
        default=None,
        metadata={"help": f"tokens to score (0: none); null: {CPU_TOKENS} on a CPU, else {ACCELERATOR_TOKENS}."},
    )
    copy: str | None = field(
        default=None,
        metadata={"help": f"copy distances in tokens, with commas; null: {CPU_COPY} on a CPU, else {ACCELERATOR_COPY}; "
        "'none' skips the test."},
    )  # fmt: skip
    copy_texts: int = field(default=2, metadata={"help": "texts for each copy distance."})
    cache_context: int = field(default=32_768, metadata={"help": "context at which cache bytes are compared."})
    data: DataArgs = field(default_factory=DataArgs)
    suite: SuiteArgs = field(default_factory=SuiteArgs)
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, …; null: an accelerator if there is one."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "of the weights and activations; null: float32 on a CPU, else bfloat16.",
                  "choices": tuple(DTYPES)},
    )  # fmt: skip
    json: bool = field(default=False, metadata={"help": "print JSON, and nothing else, on stdout."})


@dataclass
class SuiteResult:
    """One multiple-choice file, answered by both models."""

    path: str
    teacher: ChoiceResult
    student: ChoiceResult

    @property
    def agreement(self) -> float:
        """Share of the questions that both answer alike, right or wrong."""
        pairs = zip(self.teacher.choices, self.student.choices, strict=True)
        return sum(a == b for a, b in pairs) / self.teacher.questions


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of scripts/evaluate.py.

    Raises:
        UserError: an argument, a file or the text is at fault.
    """
    args = parse(
        EvaluateArgs,
        sys.argv[1:] if argv is None else argv,
        "python scripts/evaluate.py",
        """
        Measures an exported model beside its teacher: perplexity, KL(teacher ‖ student), top-1 agreement, long-range
        copying, cache bytes and, on request, multiple choice.
        """,
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    result = evaluate(args)
    print(json.dumps(result, indent=2, allow_nan=False) if args.json else render(result))


def evaluate(args: EvaluateArgs) -> dict[str, Any]:
    """Does what ``main`` prints; returns JSON's content.

    Raises:
        UserError: as ``main``.
    """
    # Everything that can be wrong with the arguments is found before a model is loaded.
    device = choose_device(args.device)
    distances = _distances(args.copy, device)
    _check(args)
    if args.suite.tasks:
        load_harness()
    suites = [(path, read_questions(path, args.suite.limit)) for path in args.suite.path]
    folder = export_folder(args.model)
    teacher, student, teacher_path = load_models(folder, args, device)
    with_bar = sys.stderr.isatty() or not args.json
    result: dict[str, Any] = {"model": str(folder), "teacher": teacher_path}
    result["source"] = {
        "description": getattr(teacher.source, "description", ""),
        "weights_quantized": bool(getattr(teacher.source, "weights_quantized", False)),
        "adapter": str(adapter) if (adapter := getattr(teacher.source, "adapter", None)) else None,
    }
    result["cache"] = cache_report(teacher, student, args.cache_context).to_dict()
    result["layers"] = layer_rows(student)
    result["stages"], result["evaluation"] = [], {}
    if args.tokens != 0:
        stages, result["evaluation"] = measure(teacher, student, args, device, distances, with_bar)
        result["stages"] = [stage.to_dict() for stage in stages]
    result["suites"] = [
        {
            "path": suite.path,
            "teacher": suite.teacher.to_dict(),
            "student": suite.student.to_dict(),
            "agreement": suite.agreement,
        }
        for suite in (answer(teacher, student, path, questions, with_bar) for path, questions in suites)
    ]
    result["tasks"] = {
        who: run_tasks(model, args.suite.tasks, args.suite.limit, with_bar) if args.suite.tasks else {}
        for who, model in (("teacher", teacher), ("student", student))
    }
    result["versions"] = versions()
    return json_safe(result)


def export_folder(path: str | Path) -> Path:
    """Returns the exported folder at ``path``, or the ``export`` inside the run folder at ``path``.

    Raises:
        UserError: neither is there.
    """
    path = Path(path).expanduser()
    for folder in (path, path / "export"):
        if (folder / "config.json").is_file():
            return folder
    if not path.exists():
        raise UserError(f"model={path}: there is no such folder.")
    raise UserError(f"model={path} holds no exported model (no config.json, and none in export/); did the run finish?")


def load_models(folder: Path, args: EvaluateArgs, device: torch.device) -> tuple[Any, Any, str]:
    """Loads teacher and student onto ``device``; returns them and the teacher's path.

    Raises:
        UserError: either cannot be loaded, or they are not of the same size.
    """
    from tpa_train.checkpoints import find_default, load_pretrained
    from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA

    dtype = DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
    path = args.teacher or recorded_source(folder)
    adapter = args.adapter or (None if args.teacher else recorded_adapter(folder))
    path = str(find_default(path or DEFAULT_MODEL)) if path in (None, DEFAULT_MODEL) else path
    student = Gemma3ForMultimodalLMwithTPA.from_pretrained(folder, dtype=dtype, device=device)
    teacher = load_pretrained(path, dtype, adapter).to(device)
    if teacher.config != student.config:
        raise UserError(f"{path} is not the original of {folder}: their sizes differ; name the right one as teacher=.")
    return teacher, student, path


def recorded_source(folder: Path) -> str | None:
    """Returns the teacher's path that the export recorded, if it is still there (or is a packaged model's name)."""
    source = _recorded(folder).get("path")
    if not isinstance(source, str) or not source:
        return None
    return source if source == DEFAULT_MODEL or Path(source).expanduser().exists() else None


def recorded_adapter(folder: Path) -> str | None:
    """Returns the folder of the adapter that the export's original was merged with, or None if there was none."""
    return _recorded(folder).get("adapter") or None


def _recorded(folder: Path) -> dict[str, Any]:
    """Returns what config.json says of the original; early exports have its path alone."""
    try:
        source = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("source")
    except (OSError, ValueError, AttributeError):
        return {}
    return source if isinstance(source, dict) else {"path": source}


def measure(
    teacher: Any, student: Any, args: EvaluateArgs, device: torch.device, distances: Sequence[int], progress: bool
) -> tuple[list[StageResult], dict[str, Any]]:
    """Runs the text measurements on both; returns the two stages, teacher first, and what they ran on.

    Raises:
        UserError: there is not enough text.
    """
    cpu = device.type == "cpu"
    context = args.context or (CPU_CONTEXT if cpu else ACCELERATOR_CONTEXT)
    tokens = args.tokens or (CPU_TOKENS if cpu else ACCELERATOR_TOKENS)
    rows, copies = evaluation_text(
        args.data, student.tokenizer, context, tokens, distances, args.copy_texts, progress,
        shorter=args.context is None, fewer=args.copy is None,
    )  # fmt: skip
    context = len(rows[0]["token_ids"])
    autocast: Callable[[], AbstractContextManager] = nullcontext  # the weights' own dtype decides
    evaluator = Evaluator(
        teacher, rows, copies, autocast=autocast, max_copy_tokens=CPU_COPY_TOKENS if cpu else None, progress=progress
    )
    stages = [evaluator.evaluate(None, "teacher"), evaluator.evaluate(student, "student")]
    about = {
        "text": ", ".join(args.data.path) or "python_docs, held-out",
        "rows": len(rows),
        "context": context,
        "joined_documents": args.data.join_documents,
        "copy_tokens_scored": CPU_COPY_TOKENS if cpu else None,
        "device": str(device),
        "dtype": str(student.head_weight.dtype).removeprefix("torch."),
    }
    return stages, about


def evaluation_text(
    data: DataArgs,
    tokenizer: Any,
    context: int,
    tokens: int,
    distances: Sequence[int],
    copies: int,
    progress: bool = True,
    shorter: bool = False,
    fewer: bool = False,
) -> tuple[Subset, dict[int, Tensor]]:
    """Packs the text to evaluate on.

    Args:
        data: which text; a path is used whole unless ``data.heldout``.
        tokenizer: the models'.
        context: L, tokens of a row.
        tokens: worth of rows, spread evenly over the text.
        distances: C of the copy texts.
        copies: copy texts of each distance.
        progress: show a progress line while packing.
        shorter: a text of fewer tokens is one row, and L what it has.
        fewer: leave out distances for which there is too little text.

    Returns:
        rows ``{"token_ids": [L], "document_ids": [L]}``, and C -> int64 [copies, 1 + 2C].

    Raises:
        UserError: the text is missing or too short.
    """
    from tpa_train.data.packed import is_packed, texts_twice, tokens_without_bos
    from tpa_train.data.packing import PackedDataset, PackedStream, pack
    from tpa_train.data.settings import DataSettings

    settings = DataSettings(
        max_tokens=data.max_tokens, cache_dir=data.cache_dir, text_key=data.text_key, control_names=data.control_names
    )
    heldout = data.heldout
    if heldout is None:  # data packed earlier has its own split, and its training part is no text to evaluate on
        heldout = not data.path or (len(data.path) == 1 and is_packed(Path(data.path[0]).expanduser()))
    if data.path:
        settings.kind = "chat" if data.chat else "text"
        settings.path = data.path[0] if len(data.path) == 1 else list(data.path)
        if not heldout:
            settings.heldout_fraction, settings.heldout_min_tokens = 0.0, 0
    stream = PackedStream(pack(settings, tokenizer, progress), "heldout" if heldout else "train", tokenizer.fingerprint)
    if len(stream) < 2:  # the first token predicts the second
        raise UserError("the text to evaluate on has not even two tokens; use more text.")
    if shorter:
        context = min(context, len(stream))
    if len(stream) < context:
        raise UserError(
            f"the text to evaluate on has {len(stream):,} tokens, less than one row; use context={len(stream)} "
            "or less, or more text."
        )
    every = PackedDataset(stream, context, data.join_documents)
    count = min(len(every), max(1, tokens // context))
    rows = Subset(every, [i * len(every) // count for i in range(count)])
    text = tokens_without_bos(stream)
    distances = [d for d in distances if not fewer or d <= len(text)]
    for distance in distances:
        if distance > len(text):
            raise UserError(f"copy={distance} needs {distance:,} tokens of text, there are {len(text):,}; copy less.")
    return rows, {distance: texts_twice(text, stream.manifest.bos_id, distance, copies) for distance in distances}


def answer(teacher: Any, student: Any, path: str, questions: list[Question], progress: bool) -> SuiteResult:
    """Answers one multiple-choice file by both models."""
    name = Path(path).stem
    results = (
        score_questions(model, questions, name=f"{name}, {who}", progress=progress)
        for who, model in (("teacher", teacher), ("student", student))
    )
    return SuiteResult(path, *results)


def render(result: dict[str, Any]) -> str:
    """Returns ``evaluate``'s result as text: teacher and student in two columns."""
    cache = CacheReport(**result["cache"])
    rows = []
    if result["stages"]:
        teacher, student = result["stages"]
        rows += [
            ["perplexity", _number(teacher["perplexity"]), _number(student["perplexity"])],
            ["KL(teacher ‖ model)", _number(teacher["kl"]), _number(student["kl"])],
            ["top-1 agreement", _share(teacher["top1"]), _share(student["top1"])],
        ]
        for distance, copied in student["copy_accuracy"].items():
            name = f"copy accuracy, {int(distance):,} apart"
            rows.append([name, _share(teacher["copy_accuracy"][distance]), _share(copied)])
    rows.append([f"cache bytes at {cache.context:,}", f"{cache.dense_bytes:,}", f"{cache.tpa_bytes:,}"])
    for suite in result["suites"]:
        a, b, name = suite["teacher"], suite["student"], Path(suite["path"]).stem
        rows.append([f"{name}: accuracy", f"{a['accuracy']:.1%}", f"{b['accuracy']:.1%}"])
        rows.append([f"{name}: per character", f"{a['acc_norm']:.1%}", f"{b['acc_norm']:.1%}"])
    for task, metrics in result["tasks"]["teacher"].items():
        for metric, value in metrics.items():
            other = result["tasks"]["student"][task].get(metric)
            rows.append([f"{task}: {metric.removesuffix(',none')}", _number(value), _number(other)])
    notes = [f"The cache is {cache.ratio:.2f} times smaller."]
    if result["stages"]:
        about, measured = result["evaluation"], result["stages"][1]
        what = "tokens of the model's turns" if measured["masked"] else "tokens"
        count = "one row" if about["rows"] == 1 else f"{about['rows']} rows"
        notes.append(
            f"{measured['evaluated_tokens']:,} {what} scored of {about['text']}, in {count} of {about['context']:,}; "
            "KL in nats a token."
        )
    for suite in result["suites"]:
        a = suite["teacher"]
        notes.append(
            f"{Path(suite['path']).stem}: {a['questions']:,} questions, standard error {a['stderr']:.1%}, guessing "
            f"{a['chance']:.1%}; both answer {suite['agreement']:.1%} of them alike."
        )
    if result["source"]["adapter"]:
        notes.append(f"The teacher has the adapter {result['source']['adapter']} merged into its weights.")
    if result["source"]["weights_quantized"]:
        notes.append(
            f"The teacher's weights were read from a quantized file ({result['source']['description']}): differences "
            "are to those, not to the published weights."
        )
    return table(["", "teacher", "model"], rows) + "\n\n" + "\n".join(notes)


def _check(args: EvaluateArgs) -> None:
    for name, least in (("context", 2), ("tokens", 0), ("copy_texts", 1), ("cache_context", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"{name}={value} must be at least {least}.")
    if args.data.chat and not args.data.path:
        raise UserError("data.chat=true needs data.path: a file of conversations.")
    if args.suite.limit is not None and args.suite.limit < 1:
        raise UserError(f"suite.limit={args.suite.limit} must be at least 1.")


def _distances(text: str | None, device: torch.device) -> list[int]:
    if text in ("none", "0", ""):
        return []
    text = text or (CPU_COPY if device.type == "cpu" else ACCELERATOR_COPY)
    try:
        distances = [int(part) for part in text.split(",")]
    except ValueError:
        distances = [0]
    if min(distances) < 1:
        raise UserError(f"copy={text}: expected whole numbers of tokens with commas between, or 'none'.")
    return distances


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"
