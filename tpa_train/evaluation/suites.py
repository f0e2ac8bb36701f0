"""What is measured after each stage: teacher and student on the same held-out rows, copy texts and prompts.

B rows · L tokens of a row · D hidden size · C copied tokens
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tpa_train.data.rows import collate_rows
from tpa_train.distributed.processes import rank, world_size
from tpa_train.errors import UserError
from tpa_train.evaluation.metrics import (
    AccuracyMetric,
    QualityMetric,
    compare_tokens,
    next_token_mask,
    score_tokens,
)
from tpa_train.tpa.entries import mean_bits
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs

REAL_ALLOCATION_LIMIT = 2**30  # bytes; larger caches are counted on the meta device


@dataclass
class StageResult:
    """The model after one stage, measured. NLL and KL in nats a token.

    ``tokens`` and ``seconds`` are what the *stage* cost (training or calibration; 0 for the teacher), as given by the
    caller; ``evaluated_tokens`` and ``evaluation_seconds`` what measuring cost.

    All figures are of text; ``image_tokens`` has ``tokens``, ``kl`` and ``top1`` of the distributions at image tokens,
    where the rows have images. Nothing is predicted there; they show how well images get through.
    """

    name: str
    tokens: int = 0
    seconds: float = 0.0
    perplexity: float = float("nan")
    teacher_perplexity: float = float("nan")
    kl: float = float("nan")
    top1: float = float("nan")
    copy_accuracy: dict[str, float] = field(default_factory=dict)  # by copied tokens C
    by_position: list[dict[str, float]] = field(default_factory=list)  # see QualityMetric.compute
    evaluated_tokens: int = 0
    evaluation_seconds: float = 0.0
    head_dtype: str = "float32"
    image_tokens: dict[str, float] = field(default_factory=dict)
    masked: bool = False  # only positions that the rows' loss masks count were scored: the model's turns

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class CacheReport:
    """Bytes that one sequence's cache takes at ``context`` tokens, dense with windows beside TPA."""

    context: int
    dense_bytes: int
    tpa_bytes: int
    ratio: float
    allocated: bool  # False: too large to allocate for a count, so the same buffers were sized without memory

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Evaluator:
    """Measures students against one teacher on fixed text.

    The teacher runs over the rows once; its hidden states stay in host memory, in the precision they were computed in,
    and serve every stage. Under ``torch.distributed`` each process takes every n-th row and the metrics are reduced;
    all processes run equally many forward passes, so sharded models do not wait for each other.

    Args:
        teacher: the original model.
        rows: held-out rows ``{"token_ids": [L], "document_ids": [L]}``, and ``"images"`` [n, 3, S, S] for multimodal
            models, or int tensor [rows, L] of single documents. Rows with a ``"loss_mask"`` [L] are scored where it is
            True.
        copy_texts: C -> int [count, 1 + 2C]: BOS, a text, the same text again.
        batch_size: rows a forward pass (copy texts go one by one, they are long).
        head_dtype: of the vocabulary matmul's inputs (``metrics.score_tokens``). Scores are at least float32 unless
            a half type is asked for on a CPU, which rounds them; the result records the dtype.
        autocast: makes the context manager that the models (not the head) run under.
        max_copy_tokens: score only about this many evenly spaced tokens of each second copy; None scores all.
        progress: show a bar with the time left (on the first process).

    Raises:
        UserError: there are no rows, or a copy text is not two equal halves after its first token.
    """

    def __init__(
        self,
        teacher: Any,
        rows: Sequence[Mapping[str, Tensor]] | Tensor,
        copy_texts: Mapping[int | str, Tensor] | None = None,
        *,
        batch_size: int = 1,
        head_dtype: torch.dtype = torch.float32,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        max_copy_tokens: int | None = None,
        progress: bool = True,
    ) -> None:
        if len(rows) == 0:
            raise UserError("there is no held-out text to evaluate on.")
        self.teacher, self.rows, self.batch_size = teacher, rows, batch_size
        self.copy_texts = {str(c): texts for c, texts in sorted((copy_texts or {}).items(), key=lambda i: int(i[0]))}
        for distance, texts in self.copy_texts.items():
            middle = 1 + texts.shape[1] // 2
            if texts.shape[1] % 2 == 0 or not torch.equal(texts[:, 1:middle], texts[:, middle:]):
                raise UserError(f"copy text {distance} must be one token, a text, and the same text again.")
        self.head_dtype, self.autocast = head_dtype, autocast
        self.max_copy_tokens, self.progress = max_copy_tokens, progress
        first = [self._row(index) for index in range(len(rows))]
        self.context = max(row["token_ids"].shape[0] for row in first)
        vision = getattr(getattr(teacher, "config", None), "vision", None)
        self.image_token = None
        if vision is not None and any(bool((row["token_ids"] == vision.image_token_id).any()) for row in first):
            self.image_token = vision.image_token_id
        self._teacher_hidden: dict[int, Tensor] = {}  # by first row of the batch, [B, L, D] on the host

    def evaluate(self, student: Any | None, name: str, tokens: int = 0, seconds: float = 0.0) -> StageResult:
        """Measures one stage.

        Args:
            student: the model, or None for the teacher itself: its hidden states are then compared with themselves
                by the same code (the identical model is not run a second time).
            name: of the stage.
            tokens, seconds: what the stage cost; passed through to the result.

        Returns:
            The measurements, the same on every process.

        Raises:
            UserError: no token could be scored, or the vocabularies differ.
        """
        start = time.perf_counter()
        model = self.teacher if student is None else student
        models = [self.teacher] if student is None else [self.teacher, student]
        quality, images = (QualityMetric(self.context).to(_device(model)) for _ in range(2))
        copying = {distance: AccuracyMetric().to(_device(model)) for distance in self.copy_texts}
        with _evaluating(models), torch.no_grad(), self._bar(name) as bar:
            for first, batch, real in self._batches():
                self._score_rows(quality, images, student, first, batch, real)
                bar.update(batch["token_ids"].numel())
            for distance, texts in self.copy_texts.items():
                for text, real in _shard([text[None] for text in texts]):
                    self._score_copy(copying[distance], model, text, real)
                    bar.update(text.numel())
        measured = quality.compute()
        at_images = images.compute() if self.image_token is not None else {}
        return StageResult(
            name=name,
            tokens=tokens,
            seconds=seconds,
            perplexity=measured["perplexity"],
            teacher_perplexity=measured["teacher_perplexity"],
            kl=measured["kl"],
            top1=measured["top1"],
            copy_accuracy={distance: metric.compute() for distance, metric in copying.items()},
            by_position=measured["by_position"],
            evaluated_tokens=measured["tokens"],
            evaluation_seconds=time.perf_counter() - start,
            head_dtype=str(self.head_dtype).removeprefix("torch."),
            image_tokens={key: at_images[key] for key in ("tokens", "kl", "top1") if at_images},
            masked="loss_mask" in self._row(0),
        )

    def _score_rows(
        self,
        quality: QualityMetric,
        images: QualityMetric,
        student: Any,
        first: int,
        batch: Mapping[str, Tensor],
        real: bool,
    ) -> None:
        """Adds rows [B, L] to the metrics; rows that are there to keep processes in step are run, not counted."""
        device = _device(self.teacher if student is None else student)
        # The teacher may live elsewhere: its hidden states are fetched, not its activations.
        teacher_hidden = self._hidden_of_teacher(first, batch).to(device)
        student_hidden = teacher_hidden if student is None else self._run(student, batch)
        if not real:
            return
        batch = {name: tensor.to(device) for name, tensor in batch.items() if name != "images"}
        token_ids = batch["token_ids"]
        scored, seen = next_token_mask(token_ids, batch["document_ids"], batch.get("loss_mask"))
        targets = token_ids[:, 1:]
        counted = [(quality, scored)]
        if self.image_token is not None:
            here, next_ = token_ids[:, :-1] == self.image_token, targets == self.image_token
            counted = [(quality, scored & ~here & ~next_), (images, scored & here)]
            targets = targets.masked_fill(next_, 0)  # it may lie beyond the vocabulary; no figure uses it
        teacher_head = self.teacher.head_weight.to(device)
        for metric, places in counted:
            comparisons = compare_tokens(
                teacher_hidden[:, :-1][places],
                student_hidden[:, :-1][places],
                teacher_head,
                teacher_head if student is None else student.head_weight,
                targets[places],
                self.head_dtype,
            )
            for part, comparison in comparisons:
                metric.update(comparison, seen[places][part])

    def _score_copy(self, metric: AccuracyMetric, model: Any, text: Tensor, real: bool) -> None:
        """Adds one copy text [1, 1 + 2C]: is each token of the second copy the model's first choice?"""
        text = text.to(_device(model))
        copied = text.shape[1] // 2
        hidden = self._run(model, {"token_ids": text})
        if not real:
            return
        positions = torch.arange(copied, 2 * copied, device=text.device)  # each predicts the token after it
        if self.max_copy_tokens is not None and self.max_copy_tokens < copied:
            step = -(-copied // self.max_copy_tokens)
            # From half a step on: the first token of the copy cannot be known to be one, and must not weigh more.
            positions = positions[step // 2 :: step]
        targets = text[0, positions + 1]
        _, best = score_tokens(hidden[0, positions], model.head_weight, targets, self.head_dtype)
        metric.update(best == targets)

    def _hidden_of_teacher(self, first: int, batch: Mapping[str, Tensor]) -> Tensor:
        if first not in self._teacher_hidden:
            self._teacher_hidden[first] = self._run(self.teacher, batch).cpu()
        return self._teacher_hidden[first]

    def _run(self, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        device = _device(model)
        names = [name for name in ("token_ids", "document_ids", "images") if name in batch]
        with self.autocast():
            return model.hidden_states(**{name: batch[name].to(device) for name in names})

    def _row(self, index: int) -> Mapping[str, Tensor]:
        """Returns one row, of token and document ids [L] at the least."""
        row = self.rows[index]
        return {"token_ids": row, "document_ids": torch.zeros_like(row)} if isinstance(row, Tensor) else row

    def _batches(self) -> Iterator[tuple[int, dict[str, Tensor], bool]]:
        """Yields (number of the first row, batch of rows [B, L], count it) for this process.

        Either all rows have a loss mask or none has one, since they are cut from one stream.
        """
        starts = range(0, len(self.rows), self.batch_size)
        for first, real in _shard(starts):
            rows = [self._row(i) for i in range(first, min(first + self.batch_size, len(self.rows)))]
            yield first, collate_rows(rows), real

    def _bar(self, name: str) -> tqdm:
        total = len(self.rows) * self.context + sum(texts.numel() for texts in self.copy_texts.values())
        return tqdm(
            total=total // world_size(), desc=f"evaluate {name}", unit="tok", unit_scale=True, leave=False,
            disable=not self.progress or rank() > 0,
        )  # fmt: skip


def greedy_samples(
    teacher: Any,
    student: Any,
    prompts: Sequence[str],
    max_tokens: int = 48,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    chat: bool = False,
) -> list[dict[str, str]]:
    """Continues each prompt by both models, greedily and with their caches; with ``chat`` they answer it instead.

    Returns:
        one ``{"prompt", "teacher", "student"}`` a prompt, continuations without the prompt.

    Raises:
        UserError: a model has no tokenizer, or the text does not fit its context.
    """
    from tpa_train.tpa.generation import generate  # kept out of the import of the metrics

    samples = [{"prompt": prompt} for prompt in prompts]
    for key, model in (("teacher", teacher), ("student", student)):
        with _evaluating([model]), torch.no_grad(), autocast():
            device = _device(model).type
            # What write() returns under autocast is what the cache should hold.
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            options = {"temperature": 0.0, "cache_dtype": dtype, "chat": chat}
            texts = [generate(model, [p], max_tokens, **options)[0] for p in prompts]
        for sample, text in zip(samples, texts, strict=True):
            sample[key] = text
    return samples


def layer_rows(model: Any) -> list[dict[str, Any]]:
    """Returns the report's layer table: ``index, kind, form_k, rank_k, form_v, rank_v, bits, bytes_per_token``, and
    ``bits_k``, ``bits_v`` where a layer has several widths.

    A dense layer has form "dense" and head_dim as its rank. ``bits`` is the mean width of the groups of cached numbers.
    Bytes are those of the buffers that a bfloat16 cache sets aside for a token, quantization scales included.
    """
    rows = []
    # One token on the meta device: what allocate_cache does, at no cost.
    buffers = model.allocate_cache(1, 1, dtype=torch.bfloat16, device="meta").buffers
    specs = specs_of(model)
    for index, (layer, spec, tensors) in enumerate(zip(model.layers, specs, buffers, strict=True)):
        bits = (mean_bits(spec.bits_k) + mean_bits(spec.bits_v)) / 2
        rows.append(
            {
                "index": index, "kind": layer.self_attn.kind,
                "form_k": spec.form_k, "rank_k": spec.rank_k, "form_v": spec.form_v, "rank_v": spec.rank_v,
                "bits": int(bits) if bits == int(bits) else round(bits, 2),
                "bits_k": spec.bits_k, "bits_v": spec.bits_v,
                "bytes_per_token": sum(t.numel() * t.element_size() for t in tensors),
            }
        )  # fmt: skip
    return rows


def specs_of(model: Any) -> list[LayerSpec]:
    """Returns the layers' specifications, of a dense model too."""
    return getattr(model, "specs", None) or dense_specs(model.config)


def cache_report(teacher: Any, student: Any, context: int) -> CacheReport:
    """Allocates both caches for one sequence of ``context`` tokens in bfloat16 and compares their bytes.

    Caches beyond 1 GiB are sized without memory. Either way the bytes must equal ``spec.cache_bytes``.
    """
    bytes_of, allocated = [], True
    for model in (teacher, student):
        expected = cache_bytes(model.config, specs_of(model), context)
        device = "cpu" if expected <= REAL_ALLOCATION_LIMIT else "meta"
        allocated = allocated and device != "meta"
        actual = model.allocate_cache(1, context, dtype=torch.bfloat16, device=device).nbytes
        assert actual == expected, f"the cache takes {actual} bytes but the formula says {expected}"
        bytes_of.append(actual)
    dense, tpa = bytes_of
    return CacheReport(context, dense, tpa, dense / tpa, allocated)


def _shard(items: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
    """Yields this process's items; short processes repeat their first one with False, to stay in step with others."""
    for start in range(0, len(items), world_size()):
        index = start + rank()
        yield (items[index], True) if index < len(items) else (items[0], False)


def _device(model: Any) -> torch.device:
    return model.head_weight.device


@contextlib.contextmanager
def _evaluating(models: Sequence[Any]) -> Iterator[None]:
    """Eval mode, and afterwards each model's own mode again."""
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
