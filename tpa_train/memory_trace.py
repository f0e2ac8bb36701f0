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
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tpa_train.checkpoints.weights import parameter_shapes
from tpa_train.distillation.end_to_end import EndToEndModule
from tpa_train.distillation.losses import CHUNK_BYTES
from tpa_train.distillation.modules import RecoveryModule
from tpa_train.evaluation.metrics import compare_tokens
from tpa_train.factorization.calibration import CalibrationModule
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec

FUSED_BYTES = 14 << 27  # of logits that the fused loss keeps (divergence_kernel.CHUNK_BYTES)
LOSS_CHUNKS = 8  # of CHUNK_BYTES alive in the loss on a CPU: logits, probabilities, their ratio and the gradient
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
    with FakeTensorMode(), LiveBytes() as live:
        yield live


@dataclass(frozen=True)
class StageTrace:
    """One step of a stage. Bytes, and floating-point operations (a multiplication and an addition are two)."""

    trained: int  # parameters that learn
    weights: int  # bytes of the models and of the copies that learn
    optimizer: int  # bytes of Adam's moments and of gradients
    logits: int  # bytes of a chunk of logits, included in the peak
    peak: int
    flops: int

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

    def training(
        self, make: Callable[[Gemma3ForMultimodalLMwithTPA], RecoveryModule], batch: int, context: int, accumulate: int
    ) -> StageTrace:
        """Returns what a step of a recovery stage takes, from the second one on.

        Args:
            make: builds the stage's module around a student.
            batch, context: B, L.
            accumulate: batches of a step; gradients then stay between them. Operations are those of one batch.
        """
        module = make(self.student())
        parameters = list(module.trained_tensors().values())
        weights = self.live.mark()
        moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        learning = dict(module.student.named_parameters())
        learning = [learning[name] for name in module.trained]
        for p in learning:  # Lightning lets go of a step's gradients only after the next forward pass
            p.grad = torch.empty_like(p)
        optimizer = self.live.mark() - weights
        with self.autocast():
            loss, _ = module.losses({"token_ids": self.ids(batch, context)})
        if accumulate == 1:
            for p in learning:
                p.grad = None
        loss.backward()
        peak, flops = self.live.peak, self.live.flops
        # The optimizer's step keeps a copy of every factor (ScaledAdamW), when the activations are gone.
        factors = set(module.student.factor_names())
        copies = sum(p.numel() for n, p in zip(module.trained, learning, strict=True) if n in factors) * 4
        del moments
        end_to_end = isinstance(module, EndToEndModule)
        tokens = batch * context // module.kl_every if end_to_end else 0
        logits = loss_bytes(self.device, tokens, module.student.head_weight) if tokens else 0
        flops += 3 * 2 * tokens * self.config.vocab_size * self.config.hidden_size  # inside the loss
        return StageTrace(
            sum(p.numel() for p in learning), weights, optimizer, logits, max(peak, weights + optimizer + copies), flops
        )

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


def loss_bytes(device: torch.device, tokens: int, head: Tensor) -> int:
    """Returns what the output loss of ``tokens`` tokens holds at once, beside its result."""
    words, size = head.shape
    if device.type == "cuda":  # two 16-bit logits a token and word, and the head in float16 (divergence_kernel)
        return min(FUSED_BYTES, 4 * tokens * words) + 2 * words * size
    return LOSS_CHUNKS * min(CHUNK_BYTES["cpu"], 4 * tokens * words)


def _chunk_bytes(device: torch.device, tokens: int, config: Gemma3Config) -> int:
    """Returns the bytes of one chunk of float32 logits."""
    return min(CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]), max(1, tokens) * config.vocab_size * 4)
