"""Training speed and memory: the toolkit's stages beside a plain two-model transformers loop.

Both sides train on the same rows: KL(teacher ‖ student) over the full vocabulary, bfloat16 products, float32 weights
where something learns. The plain loop is what one would write with transformers alone: teacher and student next to each
other, keys and values of the student as two matrices of half the rank, all logits in memory, AdamW. It accumulates
micro-batches; each size that fits is a row, and its speed is that of the fastest.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpa_train.benchmarks.record import table_of
from tpa_train.checkpoints.huggingface import huggingface_config
from tpa_train.checks import STAGES
from tpa_train.errors import UserError
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.pipeline import Session, factorize_model
from tpa_train.recipes import compose
from tpa_train.recovery import recover
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA

PLAIN = "transformers"


@dataclass
class TrainBenchmark:
    """Options of ``benchmark.py train``."""

    model: str | None = field(default=None, metadata={"help": "checkpoint; null: the packaged Gemma 3 270M"})
    data: str | None = field(default=None, metadata={"help": "text, as data.path of train.py; null: Python's own"})
    context: int = field(default=4096, metadata={"help": "tokens of a row"})
    tokens: int = field(default=16_384, metadata={"help": "tokens of an optimizer step"})
    batch_size: int = field(default=4, metadata={"help": "rows of ours that run at a time"})
    layerwise_tokens: int = field(
        default=32_768, metadata={"help": "tokens of a step of the layer-wise stage, all at a time; it needs little"}
    )
    micro_batches: list[int] = field(
        default_factory=lambda: [1, 2, 4], metadata={"help": "rows of the plain loop that run at a time; tried in turn"}
    )
    steps: int = field(default=30, metadata={"help": "optimizer steps that are timed"})
    warmup: int = field(default=8, metadata={"help": "steps before those: compilation, the allocator's growth"})
    cache_ratio: float = field(default=4.0, metadata={"help": "budget of the student"})
    calibration_tokens: int = field(default=65_536, metadata={"help": "tokens that the student is calibrated on"})
    stages: list[str] = field(
        default_factory=lambda: ["layerwise", "distill"], metadata={"help": "stages of ours to time"}
    )
    plain: bool = field(default=True, metadata={"help": "time the plain transformers loop too"})
    options: list[str] = field(
        default_factory=list, metadata={"help": "options of train.py for ours, such as [recipe.distill.scope=factors]"}
    )
    trace: str | None = field(
        default=None, metadata={"help": "file for a table of the kernels of three steps of ours, by time"}
    )


def run(settings: TrainBenchmark) -> list[dict[str, Any]]:
    """Returns a row for each stage of ours, and for each micro-batch of the plain loop.

    Raises:
        UserError: an option is at fault, or transformers is missing.
    """
    rows = settings.tokens // settings.context
    if rows < 1 or rows % settings.batch_size:
        raise UserError(
            f"tokens={settings.tokens} are {rows} rows of context={settings.context}, which batch_size="
            f"{settings.batch_size} does not divide; choose sizes that fit each other."
        )
    for stage in settings.stages:
        if stage not in STAGES[1:]:
            raise UserError(f"stages: '{stage}' is not one of {', '.join(STAGES[1:])}.")
    found = []
    with TemporaryDirectory() as folder:
        session = _session(settings, Path(folder), settings.tokens, settings.batch_size)
        student = factorize_model(session)[0]
        for stage in settings.stages:
            own = session
            if stage == "layerwise":
                rows_of_step = max(1, settings.layerwise_tokens // settings.context)
                own = _session(settings, Path(folder), settings.context * rows_of_step, rows_of_step, session.teacher)
            found.append(time_stage(settings, own, student, stage))
        batches = [session.data.train_dataset[i] for i in range(rows)]
        if settings.plain:
            teacher = session.teacher.cpu()
            del session, own, student
            found += time_plain(settings, teacher, batches)
    return found


def _session(
    settings: TrainBenchmark, folder: Path, tokens: int, batch_size: int, teacher: Gemma3ForCausalLM | None = None
) -> Session:
    """Returns the session of a stage whose optimizer steps take ``tokens``, ``batch_size`` rows at a time."""
    steps = settings.steps + settings.warmup
    device = "gpu" if torch.cuda.is_available() else "cpu"
    data = [] if settings.data is None else ["data=text", f"data.path={settings.data}", "data.max_tokens=null"]
    composed = compose(
        [
            f"trainer={device}", f"model.path={settings.model or 'null'}", *data, "data.join_documents=true",
            f"trainer.context={settings.context}", f"trainer.batch_size={batch_size}",
            f"trainer.accumulate={tokens // settings.context // batch_size}",
            f"budget.cache_ratio={settings.cache_ratio}",
            f"recipe.calibration.tokens={settings.calibration_tokens}",
            f"recipe.calibration.sensitivity_tokens={min(4096, settings.calibration_tokens)}",
            f"recipe.layerwise.tokens={steps * tokens}", f"recipe.distill.tokens={steps * tokens}",
            "recipe.distill.kl_every=1", *settings.options,
        ]
    )  # fmt: skip
    return Session(composed, folder, teacher)


class Stopwatch(L.Callback):
    """Times the optimizer steps after the first ``warmup``, data loading and logging included.

    Its peak is that of the whole stage: passes that are recorded allocate nothing when they are replayed.
    """

    def __init__(self, device: torch.device, warmup: int, trace: str | None = None) -> None:
        self.device, self.warmup, self.trace = device, warmup, trace
        self.seconds, self.steps, self.peak_gib = 0.0, 0, 0.0
        self._profiler: torch.profiler.profile | None = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, index: int) -> None:
        if trainer.global_step == self.warmup and index % trainer.accumulate_grad_batches == 0:
            _synchronize(self.device)
            self._start = time.perf_counter()
        if self.trace and trainer.global_step == trainer.max_steps - 3 and self._profiler is None:
            self._stop(trainer)
            self._profiler = torch.profiler.profile()
            self._profiler.start()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._profiler is None:
            self._stop(trainer)
            return
        _synchronize(self.device)
        self._profiler.stop()
        table = self._profiler.key_averages().table(sort_by="self_device_time_total", row_limit=60)
        Path(self.trace).with_suffix(f".{module.stage}.txt").write_text(_idle(self._profiler) + table)

    def _stop(self, trainer: L.Trainer) -> None:
        _synchronize(self.device)
        self.seconds, self.steps = time.perf_counter() - self._start, trainer.global_step - self.warmup
        self.peak_gib = _peak_gib(self.device)


def _idle(profiler: torch.profiler.profile) -> str:
    """Returns how long the device waited inside the trace, and between which kernels it waited longest."""
    cuda = torch.autograd.DeviceType.CUDA
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == cuda and not event.is_user_annotation
    )
    if not spans:
        return ""
    gaps, (first, end, name) = [], spans[0]
    for start, stop, following in spans[1:]:
        if start > end:
            gaps.append((start - end, name, following))
        if stop > end:
            end, name = stop, following
    waited = sum(gap for gap, *_ in gaps)
    longest = [f"{gap:10.0f} us  {a[:60]}  ->  {b[:60]}" for gap, a, b in sorted(gaps, reverse=True)[:40]]
    return "\n".join([f"idle {waited:.0f} of {end - first:.0f} us in {len(gaps)} gaps", *longest, "", ""])


def time_stage(
    settings: TrainBenchmark, session: Session, student: Gemma3ForMultimodalLMwithTPA, stage: str
) -> dict[str, Any]:
    """Returns the row of one stage, as ``train.py`` runs it."""
    watch = Stopwatch(session.machine.device, settings.warmup, settings.trace)
    recover(session, student, stage, callbacks=[watch])
    name, trainer = ("ours" if stage == "distill" else "ours, layer-wise"), session.settings.trainer
    tokens = trainer.context * trainer.batch_size * trainer.accumulate
    return _row(settings, name, tokens, trainer.batch_size, watch.steps, watch.seconds, watch.peak_gib)


def _row(
    settings: TrainBenchmark, name: str, tokens: int, rows: int, steps: int, seconds: float, peak_gib: float | None
) -> dict[str, Any]:
    return {
        "name": name, "context": settings.context, "tokens_per_step": tokens, "rows_at_a_time": rows,
        "tokens_per_s": steps * tokens / seconds, "peak_gib": peak_gib, "steps": steps, "seconds": seconds,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------- the plain loop


def time_plain(
    settings: TrainBenchmark, teacher: Gemma3ForCausalLM, batches: list[dict[str, Tensor]]
) -> list[dict[str, Any]]:
    """Returns rows of the plain loop, one for each micro-batch; those that do not fit have no speed.

    Args:
        settings: of the benchmark.
        teacher: whose weights both models get.
        batches: the rows of a step, ``token_ids`` [L] each.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = (to_transformers(teacher, torch.bfloat16), low_rank(to_transformers(teacher, torch.float32), teacher))
    frozen, student = (model.to(device) for model in models)
    frozen.requires_grad_(False)
    found = []
    for size in settings.micro_batches:
        if len(batches) % size:
            continue
        ids = torch.stack([b["token_ids"] for b in batches]).to(device).split(size)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=device.type == "cuda")
        try:
            seconds, peak = _time_plain_steps(settings, frozen, student, optimizer, ids, device)
            found.append(_row(settings, PLAIN, settings.tokens, size, settings.steps, seconds, peak))
        except torch.OutOfMemoryError:
            found.append({
                "name": PLAIN, "context": settings.context, "tokens_per_step": settings.tokens,
                "rows_at_a_time": size, "tokens_per_s": None, "peak_gib": None, "na": "out of memory",
            })  # fmt: skip
        student.zero_grad(set_to_none=True)
        del optimizer
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _time_plain_steps(settings, teacher, student, optimizer, ids: tuple[Tensor, ...], device) -> tuple[float, float]:
    for step in range(settings.warmup + settings.steps):
        if step == settings.warmup:
            _synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
        for part in ids:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                with torch.no_grad():
                    expected = teacher(part, use_cache=False).logits
                logits = student(part, use_cache=False).logits
            loss = F.kl_div(
                F.log_softmax(logits.float().flatten(0, 1), -1), F.log_softmax(expected.float().flatten(0, 1), -1),
                log_target=True, reduction="batchmean",
            )  # fmt: skip
            (loss / len(ids)).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    _synchronize(device)
    return time.perf_counter() - start, _peak_gib(device)


def to_transformers(model: Gemma3ForCausalLM, dtype: torch.dtype) -> nn.Module:
    """Returns transformers' ``Gemma3ForCausalLM`` with the weights of ``model``.

    Raises:
        UserError: transformers is not installed.
    """
    try:
        from transformers import Gemma3ForCausalLM as Theirs
        from transformers import Gemma3TextConfig
    except ImportError as error:
        raise UserError("the plain loop needs transformers: pip install -e '.[hf]', or plain=false.") from error
    config = huggingface_config(model.config, model.tokenizer, dtype)
    config = Gemma3TextConfig(**{k: v for k, v in config.items() if k not in ("rope_scaling", "torch_dtype")})
    theirs = Theirs(config).to(dtype)
    state = {f"model.{name}": tensor.to(dtype) for name, tensor in model.state_dict().items()}
    missing = theirs.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}, missing
    return theirs.train()


def low_rank(theirs: nn.Module, model: Gemma3ForCausalLM) -> nn.Module:
    """Puts two matrices of half the rank in place of every key and value projection; random ones serve for timing."""
    c = model.config
    for layer in theirs.model.layers:
        for name in ("k_proj", "v_proj"):
            full = getattr(layer.self_attn, name)
            middle = max(1, c.head_dim // 2)
            pair = nn.Sequential(
                nn.Linear(c.hidden_size, c.num_kv_heads * middle, bias=False),
                nn.Linear(c.num_kv_heads * middle, c.num_kv_heads * c.head_dim, bias=False),
            )
            setattr(layer.self_attn, name, pair.to(full.weight.dtype))
    return theirs


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_gib(device: torch.device) -> float | None:
    """Returns the device's peak; nothing on a CPU, where a process has one peak for all that it ever did."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def render(rows: list[dict[str, Any]]) -> str:
    """Returns the table, and ours against the fastest plain row in words."""
    lines = [table_of(rows)]
    ours = next((r for r in rows if r["name"] == "ours"), None)
    plain = [r for r in rows if r["name"] == PLAIN and r["tokens_per_s"]]
    if ours and plain:
        fastest = max(plain, key=lambda r: r["tokens_per_s"])
        lines.append(f"ours trains {ours['tokens_per_s'] / fastest['tokens_per_s']:.2f} times as many tokens a second")
        if ours["peak_gib"]:
            lines[-1] += f", in {ours['peak_gib'] / fastest['peak_gib']:.2f} of the memory"
    return "\n\n".join(lines)
