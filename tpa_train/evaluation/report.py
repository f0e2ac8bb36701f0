"""What a run leaves for people and programs: report.md, report.json, plots, and the export's model card."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpa_train.evaluation import plots
from tpa_train.evaluation.atomic import write_text
from tpa_train.evaluation.suites import CacheReport, StageResult
from tpa_train.tpa.entries import describe_bits

PACKAGES = ("tpa-train", "torch", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy")
GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
COPY_LOSS_WORTH_A_WARNING = 0.05  # fallen copy accuracy, absolute, while perplexity stays within
PERPLEXITY_LOOKS_FINE = 1.05  # this factor of the teacher's


@dataclass
class Report:
    """Everything that the report shows. Only the first five fields are needed; the rest appears when given."""

    model: str  # name or path of the original
    budget: Mapping[str, float]  # {"cache_ratio", "context"}
    cache: CacheReport
    stages: Sequence[StageResult]  # in order, the first named "teacher"
    layers: Sequence[Mapping[str, Any]]  # suites.layer_rows(student)
    command: str = ""  # filled with this process's when empty
    versions: Mapping[str, str] = field(default_factory=dict)  # filled when empty
    source: str = ""  # the loader's words for the weights, model.source.description
    weights_quantized: bool = False  # the teacher's weights come from a quantized file
    adapter: str = ""  # name of the LoRA adapter that was merged into the teacher's weights
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # text, rows, context, as the caller describes it
    samples: Sequence[Mapping[str, str]] = ()  # suites.greedy_samples
    layer_errors: Mapping[str, Sequence[float]] = field(default_factory=dict)  # {"layers", "before", "after"?}
    losses: Mapping[str, plots.Curve | str | Path] = field(default_factory=dict)  # stage -> curve or metrics.csv
    multimodal: bool = False  # the model has a vision side
    extra: Mapping[str, Any] = field(default_factory=dict)  # more keys for report.json (tokens/s, peak memory, …)

    def __post_init__(self) -> None:
        self.command = self.command or command_line()
        self.versions = dict(self.versions) or versions()

    @classmethod
    def of(cls, teacher: Any, **fields: Any) -> Report:
        """Builds a report whose notes on the weights come from ``teacher.source`` (which may be None)."""
        source = getattr(teacher, "source", None)
        fields.setdefault("source", getattr(source, "description", "") or "")
        fields.setdefault("weights_quantized", bool(getattr(source, "weights_quantized", False)))
        fields.setdefault("multimodal", getattr(getattr(teacher, "config", None), "vision", None) is not None)
        adapter = getattr(source, "adapter", None)
        fields.setdefault("adapter", adapter.name if adapter is not None else "")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Returns report.json's content; numbers that JSON cannot hold (NaN, infinity) become null."""
        content = {
            "model": self.model,
            "budget": dict(self.budget),
            "cache": self.cache.to_dict(),
            "stages": [stage.to_dict() for stage in self.stages],
            "layers": [dict(row) for row in self.layers],
            "versions": dict(self.versions),
            "command": self.command,
            "source": {
                "description": self.source, "weights_quantized": self.weights_quantized,
                "adapter": self.adapter or None,
            },
            "evaluation": dict(self.evaluation),
            "layer_errors": {key: list(values) for key, values in self.layer_errors.items()},
            "samples": [dict(sample) for sample in self.samples],
        }
        return json_safe(content | {k: v for k, v in self.extra.items() if k not in content})


def write_report(folder: str | Path, report: Report) -> Path:
    """Writes plots/*.png, report.md and last report.json, whose presence therefore means a whole report.

    Args:
        folder: the run's; made if need be.
        report: what to write.

    Returns:
        the path of report.md.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = Path(folder)
    pictures = _write_plots(folder / "plots", report)
    markdown = render_markdown(report, {title: f"plots/{path.name}" for title, path in pictures.items()})
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.json", json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    return folder / "report.md"


def _write_plots(folder: Path, report: Report) -> dict[str, Path]:
    """Draws what there is data for; returns title -> file."""
    pictures: dict[str, Path] = {}
    if any(stage.name != "teacher" for stage in report.stages):
        pictures["Quality by stage"] = plots.plot_quality(folder / "quality.png", report.stages)
    if any(stage.by_position for stage in report.stages):
        pictures["Perplexity by context"] = plots.plot_positions(folder / "positions.png", report.stages)
    curves = {}
    for name, curve in report.losses.items():
        curve = plots.read_losses(curve) if isinstance(curve, (str, Path)) else curve
        if curve is not None and len(curve[0]):
            curves[name] = curve
    if curves:
        pictures["Loss curves"] = plots.plot_losses(folder / "losses.png", curves)
    if report.layers:
        pictures["Rank by layer"] = plots.plot_ranks(folder / "ranks.png", report.layers)
    errors = report.layer_errors
    if errors.get("layers"):
        kind = {row["index"]: row["kind"] for row in report.layers}
        kinds = [kind[i] for i in errors["layers"]] if all(i in kind for i in errors["layers"]) else None
        pictures["Error by layer"] = plots.plot_layer_errors(
            folder / "layer_errors.png", errors["layers"], errors["before"], errors.get("after"), kinds
        )
    return pictures


def render_markdown(report: Report, pictures: Mapping[str, str] | None = None) -> str:
    """Returns report.md; ``pictures`` maps titles to paths relative to it."""
    cache, last = report.cache, report.stages[-1] if report.stages else None
    touched = sum(row["form_k"] != "dense" or row["form_v"] != "dense" for row in report.layers)
    quantized = sum(row["bits"] != 16 for row in report.layers)
    parts = [
        f"# {report.model} in Tensor Product Attention form",
        (
            f"{touched} of {len(report.layers)} attention layers were factorized"
            + (f" and {quantized} cache in fewer bits" if quantized else "")
            + f", so that the KV cache at "
            f"{cache.context:,} tokens takes **{_bytes(cache.tpa_bytes)} instead of {_bytes(cache.dense_bytes)}: "
            f"{cache.ratio:.2f}× smaller** (asked for: {report.budget['cache_ratio']:g}× at "
            f"{int(report.budget['context']):,}). Both are one sequence in bfloat16"
            + (" where not quantized (scales counted)" if quantized else "")
            + ", the original with its own sliding windows"
            + (
                ", bytes of buffers really allocated."
                if cache.allocated
                else "; at this size the buffers were sized without being allocated."
            )
        ),
    ]
    if report.weights_quantized:
        parts.append(
            f"> **Note:** the original's weights were read from a quantized file: {report.source or 'format unknown'}. "
            "The student is compared with them, not with the weights that were published."
        )
    if report.adapter:
        parts.append(
            f"The original is {report.model} with the adapter `{report.adapter}` merged into it ({report.source})."
        )
    if report.stages:
        parts += ["## Teacher beside student", stage_table(report.stages), _evaluation_line(report)]
    if any(stage.image_tokens for stage in report.stages):
        parts += ["### At image tokens", image_table(report.stages), IMAGE_TOKENS_NOTE]
    if last is not None and last.name != "teacher":
        parts += ["## What was lost", "\n".join(f"- {line}" for line in what_was_lost(report.stages))]
    if report.layers:
        parts += ["## Layers", layer_table(report.layers), _reading(report.layers)]
    if pictures:
        parts += ["## Plots", *(f"### {title}\n\n![{title}]({path})" for title, path in pictures.items())]
    if report.samples:
        parts += ["## Samples", "Greedy continuations, not selected.", *map(_sample, report.samples)]
    parts += [
        "## How this was made",
        f"```\n{report.command}\n```",
        ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def stage_table(stages: Sequence[StageResult]) -> str:
    """Returns the Markdown table of all stages, the teacher first."""
    distances = sorted({d for stage in stages for d in stage.copy_accuracy}, key=int)
    head = ["", "perplexity", "× teacher", "KL", "top-1", *(f"copy {int(d):,}" for d in distances), "tokens", "time"]
    rows = []
    for stage in stages:
        rows.append(
            [
                f"**{stage.name}**", f"{stage.perplexity:.4g}", f"{_ratio(stage.perplexity, stage.teacher_perplexity)}",
                f"{stage.kl:.4f}", _percent(stage.top1),
                *(_percent(stage.copy_accuracy.get(d, math.nan)) for d in distances),
                _count(stage.tokens), _time(stage.seconds),
            ]
        )  # fmt: skip
    return table(head, rows)


IMAGE_TOKENS_NOTE = (
    "The figures above are of text, images in its view included; these compare the models' distributions at the image "
    "tokens themselves, where nothing is predicted."
)


def image_table(stages: Sequence[StageResult]) -> str:
    """Returns the Markdown table of what was measured at image tokens."""
    rows = [
        [f"**{s.name}**", f"{images['kl']:.4f}", _percent(images["top1"]), _count(images["tokens"])]
        for s in stages
        if (images := s.image_tokens)
    ]
    return table(["", "KL", "top-1", "image tokens"], rows)


def layer_table(layers: Sequence[Mapping[str, Any]]) -> str:
    """Returns the Markdown table of layers; neighbours that are alike share a row."""
    rows: list[list[str]] = []
    groups: list[list[Mapping[str, Any]]] = []
    keys = ("kind", "form_k", "rank_k", "form_v", "rank_v", "bits", "bits_k", "bits_v", "bytes_per_token")
    for row in layers:
        if groups and all(groups[-1][-1].get(key) == row.get(key) for key in keys):
            groups[-1].append(row)
        else:
            groups.append([row])
    for group in groups:
        first, last = group[0], group[-1]
        span = f"{first['index']}" if len(group) == 1 else f"{first['index']}–{last['index']}"
        rows.append(
            [
                span, first["kind"], *(f"{first[f'form_{k}']} {first[f'rank_{k}']}" for k in "kv"),
                " / ".join(dict.fromkeys(describe_bits(first.get(f"bits_{k}", first["bits"])) for k in "kv")),
                f"{first['bytes_per_token']:,}",
            ]
        )  # fmt: skip
    return table(["layer", "kind", "K: form, rank", "V: form, rank", "bits", "bytes a token"], rows)


def _reading(layers: Sequence[Mapping[str, Any]]) -> str:
    """One sentence where what global layers cache is slow to read, else nothing."""
    if not any(row["kind"] == "global" and row["form_k"] == "joint" and row["bits"] != 16 for row in layers):
        return ""
    return (
        "On a GPU long contexts are decoded more slowly from this cache than from the original's, since keys are "
        "rebuilt from its joint latents whenever they are read: it saves memory. `budget=fast` makes a faster one."
    )


def _making(stages: Sequence[StageResult]) -> str:
    """Returns how the weights came about: a model that was only factorized must not claim more."""
    if not stages:
        return "made from the original"
    trained = {"layerwise", "distilled"} & {stage.name for stage in stages}
    return "factorized and distilled from the original" if trained else "factorized from the original, not retrained"


def what_was_lost(stages: Sequence[StageResult]) -> list[str]:
    """Returns plain sentences on the last stage against the teacher, every figure from the measurements."""
    last = stages[-1]
    teacher = next((stage for stage in stages if stage.name == "teacher"), None)
    if not math.isfinite(last.kl):
        return ["The student's scores are not finite numbers: something went wrong, do not use this model."]
    ratio = last.perplexity / last.teacher_perplexity
    lines = [
        f"Perplexity on held-out text is {last.perplexity:.4g} against the teacher's {last.teacher_perplexity:.4g} "
        + (f"({(ratio - 1):+.1%})." if ratio < 2 else f"({ratio:.1f} times as high)."),
        f"At {last.top1:.1%} of the tokens both rank the same token first{_one_in(1 - last.top1)}. "
        f"The KL divergence is {last.kl:.3f} nats a token.",
    ]
    students = [stage for stage in stages if stage.name != "teacher"]
    if len(students) > 1 and students[0].kl > 0:
        lines.append(
            f"Training won back {1 - last.kl / students[0].kl:.0%} of the KL divergence that factorizing caused "
            f"({students[0].kl:.3f} → {last.kl:.3f})."
            if last.kl < students[0].kl
            else f"Training did not help: KL went from {students[0].kl:.3f} to {last.kl:.3f}."
        )
    if teacher is not None and last.copy_accuracy:
        drops = {d: teacher.copy_accuracy[d] - a for d, a in last.copy_accuracy.items() if d in teacher.copy_accuracy}
        drops = {d: drop for d, drop in drops.items() if math.isfinite(drop)}
        if drops:
            worst = max(drops, key=drops.__getitem__)
            lines.append(
                f"Copying a text from {int(worst):,} tokens back: {last.copy_accuracy[worst]:.1%} of the tokens right, "
                f"the teacher {teacher.copy_accuracy[worst]:.1%}"
                + (" (the worst distance measured)." if len(drops) > 1 else ".")
            )
            if drops[worst] > COPY_LOSS_WORTH_A_WARNING and ratio < PERPLEXITY_LOOKS_FINE:
                lines.append(
                    "The average perplexity hides this: uses that quote or look up distant text will suffer more than "
                    "it suggests. More training, longer contexts or a smaller cache ratio help."
                )
    position = _worst_position(last)
    if position:
        lines.append(position)
    return lines


def _worst_position(stage: StageResult) -> str:
    """One sentence if the loss grows with context, else nothing."""
    bins = [b for b in stage.by_position if math.isfinite(b["kl"]) and b["tokens"] >= 100]
    if len(bins) < 2 or bins[-1]["kl"] < 1.25 * stage.kl:
        return ""
    b = bins[-1]
    return (
        f"The loss is largest at long context: KL {b['kl']:.3f} where {int(b['from']):,} to {int(b['to']):,} tokens "
        f"are in view, {stage.kl:.3f} on average."
    )


def _one_in(share: float) -> str:
    return f"; one in {round(1 / share):,} differs" if 0 < share < 0.4 else ""


def model_card(
    report: Report, base_model: str | None = None, license_name: str = "gemma", export_format: str = "native"
) -> str:
    """Returns README.md for the export folder.

    Args:
        report: of the run.
        base_model: Hugging Face id of the original, if known, for the front matter.
        license_name: of the weights.
        export_format: what the folder is, a key of ``checkpoints.command.FORMATS``.
    """
    native = export_format == "native"
    task = "image-text-to-text" if report.multimodal and native else "text-generation"
    library = "tpa-train" if native else "transformers"
    front = ["---", f"license: {license_name}", f"pipeline_tag: {task}", f"library_name: {library}"]
    front += [f"base_model: {base_model}"] if base_model else []
    front += ["tags:", "- gemma3", "- tensor-product-attention", "- kv-cache-compression", "---"]
    cache, dense = report.cache, export_format == "dense"
    copied = (
        "The factors of a TPA model multiplied out into a stock Gemma 3, which any program loads. **Its KV cache is as "
        f"large as the original's** ({_bytes(cache.dense_bytes)} at {cache.context:,} tokens): no gain. All below "
        "is about the TPA model:"
    )
    parts = [
        "\n".join(front),
        f"# {report.model}, " + ("dense copy of its " if dense else "") + "Tensor Product Attention form",
        copied * dense,
        f"Gemma 3 whose KV cache takes {_bytes(cache.tpa_bytes)} at {cache.context:,} tokens instead of "
        f"{_bytes(cache.dense_bytes)} ({cache.ratio:.2f}× smaller), {_making(report.stages)}."
        + (f" The original had the adapter `{report.adapter}` merged into it." if report.adapter else ""),
        "## Terms",
        f"The weights are a derivative of Gemma: their use and distribution are subject to the Gemma Terms of Use at "
        f"{GEMMA_TERMS}. Gemma is provided under and subject to those terms.",
        "## Use",
        *_usage(report, export_format),
    ]
    if report.stages:
        parts += ["## Figures", stage_table(report.stages), _evaluation_line(report)]
        if any(stage.image_tokens for stage in report.stages):
            parts += ["At image tokens:", image_table(report.stages)]
        if report.stages[-1].name != "teacher":
            parts.append("\n".join(f"- {line}" for line in what_was_lost(report.stages)))
    limits = []
    if report.weights_quantized:
        limits.append(
            f"The teacher's weights were read from a quantized file ({report.source or 'format unknown'}); the figures "
            "compare with it, not with the published weights."
        )
    limits.append("Whatever Gemma 3 may get wrong (facts, bias), this model may get wrong too, and it was not "
                  "evaluated for safety anew.")  # fmt: skip
    limits += [line] if native and (line := _reading(report.layers)) else []
    parts += ["## Limits", "\n".join(f"- {line}" for line in limits)]
    if report.layers:
        parts += ["## Layers", layer_table(report.layers)]
    parts += ["## Made by", f"```\n{report.command}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(report: Report, export_format: str) -> list[str]:
    """Returns how to load the folder, in paragraphs."""
    if export_format == "native":
        return [
            "```python\n"
            "from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA\n\n"
            'model = Gemma3ForMultimodalLMwithTPA.from_pretrained("path/to/this/folder")\n'
            'print(model.generate("The capital of France is", max_tokens=32)[0])\n'
            + 'print(model.generate("What is this? ", max_tokens=32, images="photo.jpg")[0])\n' * report.multimodal
            + "```",
            'or `python scripts/generate.py model=path/to/this/folder prompt="…"`. Other libraries cannot load this '
            "folder: its attention is not theirs.",
        ]
    trust = ", trust_remote_code=True" if export_format == "hf" else ""
    how = (
        "The attention is in `modeling_gemma3_tpa.py` beside this file, for transformers 4.57 or newer; its code is "
        "what `trust_remote_code=True` agrees to run. Batches are padded on the left, the cache is transformers' "
        "dynamic one and holds the bytes given above. Text only, and for inference only."
        if export_format == "hf" else
        "The figures below were measured through the TPA model's rounded cache, which this copy does not have. Where "
        "`attention_bias` in config.json is true, the output projections have a bias, which llama.cpp's Gemma 3 "
        "does not: use format=gguf for it."
    )  # fmt: skip
    return [
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "path/to/this/folder"\n'
        f"model = AutoModelForCausalLM.from_pretrained(folder{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trust})\n"
        'prompt = tokenizer("The capital of France is", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=32)[0], skip_special_tokens=True))\n"
        "```",
        how,
    ]


def _evaluation_line(report: Report) -> str:
    """What the figures were measured on."""
    last = report.stages[-1]
    about = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in report.evaluation.items())
    head = "" if last.head_dtype in ("float32", "float64") else f"; vocabulary scores in {last.head_dtype}"
    what = "held-out tokens of the model's turns" if last.masked else "held-out tokens"
    measured = f"Measured on {last.evaluated_tokens:,} {what}" + (f" ({about})" if about else "")
    return (
        f"{measured}{head}. KL(teacher ‖ student) in nats a token; top-1: both rank the same token first; copy N: of a "
        "text repeated after N tokens, the tokens of the second copy predicted right; tokens and time: what the stage "
        "itself took."
    )


def _sample(sample: Mapping[str, str]) -> str:
    def quote(text: str) -> str:
        # Indented code: whatever the model wrote is shown as it is, fences and Markdown included.
        return "\n".join("    " + line for line in (text.splitlines() or [""]))

    return "\n\n".join(f"{who}:\n\n{quote(sample[key])}" for key, who in
                       (("prompt", "**Prompt**"), ("teacher", "Teacher"), ("student", "Student")))  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table that also reads well as plain text; the first column is left-aligned."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]) + " |"

    rule = "|" + "|".join(":" + "-" * (w + 1) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of the packages that shape a result; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """Returns the command that started this process, quoted so that a shell takes it back."""
    return shlex.join(["python", *sys.argv])


def json_safe(value: Any) -> Any:
    """Returns ``value`` with NaN and infinities as None, scalars as Python's, and anything unknown as text."""
    if isinstance(value, Mapping):
        return {str(k): json_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, bool)) or value is None:
        return value
    return json_safe(value.item()) if hasattr(value, "item") else str(value)


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _percent(share: float) -> str:
    return f"{share:.1%}" if math.isfinite(share) else "–"


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.3f}" if math.isfinite(a) and math.isfinite(b) and b else "–"


def _count(tokens: int) -> str:
    if not tokens:
        return "–"
    return f"{tokens / 1e6:.1f}M" if tokens >= 1e6 else f"{tokens / 1e3:.0f}K" if tokens >= 1e4 else f"{tokens:,}"


def _time(seconds: float) -> str:
    if not seconds:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
