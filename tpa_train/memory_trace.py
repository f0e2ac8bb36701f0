"""What a stage allocates and computes, found by running the stage's own code on tensors that have shapes but no data.

PyTorch's fake tensors (meta tensors that claim to be on a device) take the code through the same branches, autocast and
autograd as real ones; ``LiveBytes`` sees every operation, keeps count of the storages that are alive and adds up
multiplications. So the counts follow the code as it changes, and there is no formula for activations.

B rows · L tokens of a row · D hidden size · V vocabulary
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tpa_train.checkpoints.weights import parameter_shapes
from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.distillation.losses import CHUNK_BYTES
from tpa_train.distillation.modules import RecoveryModule
from tpa_train.distillation.teacher_cache import TeacherCache
from tpa_train.distributed.sharding import stays_whole, wrapped_forwards
from tpa_train.evaluation.metrics import compare_tokens
from tpa_train.factorization.calibration import CalibrationModule
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.vision import IMAGES_PER_PASS, VisionModel
from tpa_train.gemma3.vision_config import VisionConfig
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA, set_parameter
from tpa_train.tpa.spec import LayerSpec

FUSED_BYTES = 14 << 27  # of logits that the fused loss keeps (divergence_kernel.CHUNK_BYTES)
UNITS = 3  # of sharded layers whole at once: one computes, another arrives in a buffer and leaves it for its weights
LOSS_CHUNKS = 5  # of CHUNK_BYTES alive in the loss on a CPU: logits of both and what compares some of them; measured
_ATTENTION = ("flash_attention", "efficient_attention", "varlen_attn")  # in the names of attention kernels


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside the context make, while they live, and operations.

    ``now``: bytes alive; ``peak``: the most that were since the start, or since ``mark``; ``flops``: since then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref] = {}

    def mark(self) -> int:
        """Begins a new peak and count; returns the bytes alive."""
        gc.collect()  # Lightning modules are reference cycles
        self.peak, self.flops = self.now, 0
        return self.now

    def add(self, tensor: Tensor) -> None:
        """Counts the tensor's storage, once, for as long as it lives."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self.add(leaf)
        name = getattr(func, "__name__", "")
        if any(kernel in name for kernel in _ATTENTION):
            self.flops += _attention_flops(name, args)
        elif (count := flop_registry.get(getattr(func, "_overloadpacket", None))) is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result


def _attention_flops(name: str, args: tuple) -> int:
    """Returns the operations of an attention kernel: two products forward, five backward, half of them masked out."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if "backward" in name:
        tensors = tensors[1:]  # the gradient comes first
    q, k = tensors[:2]
    if q.dim() == 3:  # [tokens, heads, d], documents one after the other
        keys = max((a for a in args if isinstance(a, int) and not isinstance(a, bool)), default=k.shape[0])
    else:  # [B, heads, L, d]
        keys = k.shape[-2]
    return (5 if "backward" in name else 2) * math.prod(q.shape) * keys


@contextmanager
def tracing() -> Iterator[LiveBytes]:
    """Makes new tensors fake inside the context, and counts them."""
    gc.freeze()  # ``mark`` collects often, and what was there before is none of its business
    try:
        with FakeTensorMode(), LiveBytes() as live:
            yield live
    finally:
        gc.unfreeze()


@dataclass(frozen=True)
class Step:
    """How one process of a recovery stage takes a step.

    ``accumulate``: batches of a step; ``sharded``: FSDP2, otherwise each of several processes holds everything (DDP);
    ``recomputed``: activation checkpointing.
    """

    batch: int  # B
    context: int  # L
    accumulate: int = 1
    processes: int = 1
    sharded: bool = False
    recomputed: bool = False


@dataclass(frozen=True)
class StageTrace:
    """One step of a stage on one device. Bytes, and operations (a multiplication and an addition are two)."""

    trained: int  # parameters that learn
    weights: int  # bytes of the models and of the copies that learn
    optimizer: int  # bytes of Adam's moments, of gradients, and of the weights' average
    logits: int  # bytes of a chunk of logits, included in the peak
    peak: int
    flops: int
    remade: int = 0  # bytes of gradients that go before a backward pass and are made anew in it
    ending: int = 0  # bytes at the stage's end, where shards are made whole (or saved) before the optimizer goes

    @property
    def activations(self) -> int:
        """Bytes of the peak that are neither weights, optimizer nor logits; in proportion to the tokens of a batch."""
        return max(0, self.peak - self.weights - self.optimizer - self.logits)


@dataclass
class TracedModels:
    """Teacher and student without data, and what they are run with.

    Use inside ``tracing``.
    """

    config: Gemma3Config
    specs: list[LayerSpec]
    dtype: torch.dtype
    device: torch.device
    live: LiveBytes
    autocast: Callable[[], AbstractContextManager]

    def __post_init__(self) -> None:
        with torch.device("meta"):
            self.teacher = Gemma3ForCausalLM(self.config)
            shapes = {n: p.shape for n, p in Gemma3ForMultimodalLMwithTPA(self.config, self.specs).named_parameters()}
        empty = {n: self._empty(s, self.dtype) for n, s in parameter_shapes(self.config).items()}
        self.teacher.load_state_dict(empty, assign=True)
        self.teacher.requires_grad_(False).eval()
        self.shapes = shapes

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def student(self) -> Gemma3ForMultimodalLMwithTPA:
        """Returns a student in the assumed forms; shares with the teacher what a real one does."""
        with torch.device("meta"):
            names = Gemma3ForMultimodalLMwithTPA(self.config, self.specs).factor_names()
        factors = {n: self._empty(self.shapes[n], torch.promote_types(self.dtype, torch.float32)) for n in names}
        student = Gemma3ForMultimodalLMwithTPA.from_dense(self.teacher, self.specs, factors)
        width = self.config.hidden_size
        student.output_metrics = {i: self._empty((width, width), torch.float32) for i in student.converted_layers}
        return student

    def ids(self, batch: int, context: int) -> Tensor:
        return torch.zeros(batch, context, dtype=torch.int64, device=self.device)

    def calibration(self, layers: list[int], batch: int, context: int) -> StageTrace:
        """Returns what one batch of the calibration takes; ``weights`` includes the moments."""
        module = TracedCalibration(self.teacher, layers)
        module.on_validation_start()
        weights = self.live.mark()
        with self.autocast():
            module.validation_step({"token_ids": self.ids(batch, context)}, 0)
        logits = 3 * _chunk_bytes(self.device, batch * context // module.score_every, self.config)
        return StageTrace(0, weights, 0, logits, self.live.peak, self.live.flops)

    def training(self, make: Callable[[Gemma3ForMultimodalLMwithTPA], RecoveryModule], step: Step) -> StageTrace:
        """Returns what a step of a recovery stage takes, from the second one on. Operations are those of one batch.

        ``make`` builds the stage's module around a student.
        """
        module = make(self.student())
        trained = module.trained_tensors()
        averaged = getattr(module, "average", None) is not None
        count = sum(p.numel() for p in trained.values())
        # The optimizer's step keeps a copy of every factor (ScaledAdamW), when the activations are gone.
        factors = set(module.student.factor_names())
        copies = 4 * sum(p.numel() for n, p in trained.items() if n in factors)
        if step.sharded:
            return self._sharded(module, step, count, averaged)
        weights = self.live.mark()
        state = [torch.empty_like(p) for p in trained.values() for _ in range(3 if averaged else 2)]
        learning = dict(module.student.named_parameters())
        learning = [learning[name] for name in module.trained]
        for p in learning:  # Lightning lets go of a step's gradients only after the next forward pass
            p.grad = torch.empty_like(p)
        optimizer = self.live.mark() - weights
        # Of several batches' gradients the sum stays between them, and DDP's buckets stay always.
        kept = step.accumulate > 1 or step.processes > 1
        logits = self._one_batch(module, step, [] if kept else learning)
        peak = max(self.live.peak, weights + optimizer + copies)
        flops = self.live.flops + self._loss_flops(module, step)
        del state
        remade = 0 if kept else sum(p.nbytes for p in learning)
        return StageTrace(count, weights, optimizer, logits, peak, flops, remade)

    def _one_batch(self, module: RecoveryModule, step: Step, dropped: list[nn.Parameter]) -> int:
        """Runs a batch forward, drops the gradients of ``dropped`` and runs it backward; returns the loss's bytes."""
        batch = {"token_ids": self.ids(step.batch, step.context), "row": self.ids(1, step.batch)[0]}
        layers = [*module.teacher.layers, *module.student.layers]
        with wrapped_forwards(layers, compiled=False, recomputed=step.recomputed):
            with self.autocast():
                loss, _ = module.losses(batch)
            for p in dropped:
                p.grad = None
            loss.backward()
        tokens = _loss_tokens(module, step)
        if not tokens:
            return 0
        if _keeps_classes(module):
            return 3 * _chunk_bytes(self.device, tokens, self.config)
        return loss_bytes(self.device, tokens, module.student.head_weight)

    def _loss_flops(self, module: RecoveryModule, step: Step) -> int:
        """Returns the operations inside the end-to-end loss, which ``TracedEndToEnd`` leaves out."""
        hidden = 0 if _keeps_classes(module) else 3 * 2 * self.config.vocab_size * self.config.hidden_size
        return hidden * _loss_tokens(module, step)

    def _sharded(self, module: RecoveryModule, step: Step, count: int, averaged: bool) -> StageTrace:
        """Returns what a step takes with both models and the optimizer in shards (``distributed.sharding``).

        What a process holds for good is its part of all weights, gradients and moments; embedding and head are whole
        throughout a step, layers while they compute. Activations are traced on whole weights in the dtype that they
        are gathered in. At the stage's end both models are made whole beside the shards.
        """
        models, half = (module.teacher, module.student), self.dtype == torch.bfloat16
        everything = {id(p): (n, p) for model in models for n, p in model.named_parameters()}
        cut = {i: p for i, (n, p) in everything.items() if not stays_whole(n, p)}

        def gathered(module: nn.Module) -> int:
            return sum(p.numel() * (2 if half else p.itemsize) for p in module.parameters() if id(p) in cut)

        layers = [layer for model in models for layer in model.layers]
        learns = max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers)
        unit, root = max(map(gathered, layers)), gathered(module.student.embed_tokens)
        alive = self.live.mark()
        whole = sum(p.nbytes for p in cut.values())
        always = alive - whole + -(-whole // step.processes)
        states = -(-4 * count * (4 if averaged else 3) // step.processes)
        for name, p in list(module.student.named_parameters()):
            if p.requires_grad:
                p = nn.Parameter(p.detach().to(self.dtype)) if half else p
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))  # reduced to its shard
                set_parameter(module.student, name, p)
        del p
        before = self.live.mark()
        logits = self._one_batch(module, step, [])
        activations, flops = self.live.peak - before - logits, self.live.flops + self._loss_flops(module, step)
        weights = always + root + UNITS * unit
        optimizer = states + learns * (4 + (2 if half else 4))  # a layer's gradients as computed, and being reduced
        ending = always + states + whole
        if self.device.type == "cpu":  # what the first process saves is whole, and in the same memory
            ending = max(ending, always + states + 4 * count * (4 if averaged else 3))
        return StageTrace(
            count, weights, optimizer, logits, weights + optimizer + max(0, activations) + logits, flops, ending=ending
        )

    def filling(self, cache: TracedCache, batch: int, context: int) -> StageTrace:
        """Returns what a batch of filling the teacher cache takes."""
        weights = self.live.mark()
        with torch.no_grad(), self.autocast():
            hidden = self.teacher.hidden_states(self.ids(batch, context))
        forward, flops = self.live.peak, self.live.flops
        self.live.mark()
        cache.kept(hidden, self.teacher.head_weight)
        logits = 3 * _chunk_bytes(self.device, batch * context, self.config) if cache.mode == "topk" else 0
        return StageTrace(0, weights, 0, logits, max(forward, self.live.peak), flops + self.live.flops)

    def images(self, config: VisionConfig, count: int) -> tuple[int, int]:
        """Returns the bytes and operations of making soft tokens of ``count`` images."""
        with torch.device("meta"):
            vision = VisionModel(config, self.config.hidden_size)
        state = {n: self._empty(tuple(p.shape), torch.bfloat16) for n, p in vision.state_dict().items()}
        vision.load_state_dict(state, assign=True)
        traced, size = min(count, IMAGES_PER_PASS), config.image_size
        pixels = self._empty((traced, 3, size, size), torch.uint8)
        before = self.live.mark() - pixels.nbytes
        vision(pixels, self.dtype)
        kept = (count - traced) * (pixels.nbytes // traced + 4 * config.tokens_per_image * self.config.hidden_size)
        return self.live.peak - before + kept, self.live.flops * count // traced

    def evaluation(self, batch: int, context: int, scored: int) -> StageTrace:
        """Returns what a forward pass of the student without gradients takes, and comparing ``scored`` tokens."""
        student = self.student()
        weights = self.live.mark()
        with torch.no_grad(), self.autocast():
            hidden = student.hidden_states(self.ids(batch, context)).flatten(0, 1)
        forward, flops = self.live.peak, self.live.flops
        before = self.live.mark()
        head, targets = student.head_weight, self.ids(1, scored)[0]
        for _ in compare_tokens(hidden[:scored], hidden[:scored], head, head, targets):
            pass
        logits = self.live.peak - before
        return StageTrace(0, weights, 0, logits, max(forward, self.live.peak), flops + self.live.flops)


class TracedCache(TeacherCache):
    """A teacher cache without a folder: rows are as large as real ones."""

    def __init__(self, mode: str, top_k: int, dtype: torch.dtype, config: Gemma3Config, context: int) -> None:
        self.mode, self.top_k, self.dtype, self.config, self.context = mode, top_k, dtype, config, context

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns what is kept of one row, by name: shape and dtype."""
        if self.mode == "hidden":
            return {"hidden": ((self.context, self.config.hidden_size), self.dtype)}
        classes = (self.context, self.top_k)
        return {
            "classes": (classes, torch.int32), "log_probabilities": (classes, self.dtype),
            "log_tail": ((self.context,), torch.float32),
        }  # fmt: skip

    def row_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.shapes().values())

    def read(self, rows: Tensor, pick: slice = slice(None)) -> dict[str, Tensor]:
        kept = {n: torch.empty(shape, dtype=dtype, device=rows.device) for n, (shape, dtype) in self.shapes().items()}
        return {name: torch.stack([tensor[pick]] * rows.shape[0]) for name, tensor in kept.items()}


class TracedCalibration(CalibrationModule):
    """The calibration without data, on the device that its tensors claim (they cannot be moved)."""

    @property
    def device(self) -> torch.device:
        return self.model.head_weight.device


class TracedEndToEnd(EndToEndModule):
    """The end-to-end stage without data. Its loss looks at numbers, so of that the chunks are counted."""

    def output_loss(self, student: Tensor, teacher: Tensor, *_rest: Tensor | None) -> Tensor:
        head = self.student.head_weight
        size = loss_bytes(student.device, student.shape[0], head)
        chunks = torch.empty(size, dtype=torch.uint8, device=head.device)
        del chunks
        # All that is kept for the backward pass is the gradient, of the hidden states' size.
        return (student.float() * torch.empty_like(student, dtype=torch.float32)).sum()


def _loss_tokens(module: RecoveryModule, step: Step) -> int:
    """Returns how many tokens of a batch the end-to-end loss looks at; 0 in the other stage."""
    return step.batch * step.context // module.kl_every if isinstance(module, EndToEndModule) else 0


def _keeps_classes(module: RecoveryModule) -> bool:
    """Whether the loss is that of the teacher's most likely tokens, which is traced as it is."""
    cache = getattr(module, "cache", None)
    return cache is not None and cache.mode == "topk"


def loss_bytes(device: torch.device, tokens: int, head: Tensor) -> int:
    """Returns what the output loss of ``tokens`` tokens holds at once, beside its result."""
    words, size = head.shape
    if device.type == "cuda":  # two 16-bit logits a token and word, and the head in float16 (divergence_kernel)
        return min(FUSED_BYTES, 4 * tokens * words) + 2 * words * size
    return LOSS_CHUNKS * min(CHUNK_BYTES["cpu"], 4 * tokens * words)


def _chunk_bytes(device: torch.device, tokens: int, config: Gemma3Config) -> int:
    """Returns the bytes of one chunk of float32 logits."""
    return min(CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]), max(1, tokens) * config.vocab_size * 4)
