"""What every checkpoint format has in common: named lazy weights in, a checked and filled model out.

An adapter (``gguf``, ``huggingface``, ``gemma_pytorch``) opens a file and returns a ``Checkpoint``: a configuration, a
tokenizer, and a map from our weight names to ``Weight`` objects that have a shape and can be read when their turn
comes. Everything that can be wrong with weights is checked here, once, for all formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tpa_train.errors import UserError
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.gemma3.tokenizer import Tokenizer
from tpa_train.tpa.spec import LayerSpec

VOCAB_SIZE = 262_144
PADDED_VOCAB_SIZE = 262_208  # multimodal checkpoints: 64 more rows, one an image placeholder, the others padding


@dataclass(frozen=True)
class Source:
    """Where a model's weights came from; reports and the model card quote ``description``."""

    path: Path
    format: str
    """"gguf", "huggingface" or "gemma_pytorch"."""
    description: str
    """For people, such as "GGUF, Q4_K_M (dequantized)"."""
    weights_quantized: bool
    """The weights were read from a quantized file: they are not the ones that were trained."""
    skipped: tuple[str, ...] = ()
    """Names of weights in the file that the model does not use (SigLIP's pooling head)."""
    adapter: Path | None = None
    """Folder of the LoRA adapter that was merged into the weights."""


@dataclass(frozen=True)
class Weight:
    """One tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[torch.dtype | None], Tensor]
    """Returns the tensor in the given dtype (None: as it is stored), in fresh memory (never a view of the file)."""
    stored_as: str
    """Its name in the file, for error messages."""

    def rows(self, count: int) -> Weight:
        """Returns the weight made of the first ``count`` rows."""
        if count == self.shape[0]:
            return self
        return Weight((count, *self.shape[1:]), lambda dtype: self.read(dtype)[:count].clone(), self.stored_as)


    def transposed(self) -> Weight:
        """Returns the weight [b, a] of this one, [a, b]."""
        return Weight(self.shape[::-1], lambda dtype: self.read(dtype).T.contiguous(), self.stored_as)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint, before any large tensor is read."""

    source: Source
    config: Gemma3Config
    weights: Mapping[str, Weight]
    """By our state-dict name."""
    tokenizer: Tokenizer | None = None
    unknown: tuple[str, ...] = field(default=())
    """Names in the file that the adapter could not place; a model that ignored them would not be the one saved."""
    specs: list[LayerSpec] | None = None
    """Of the layers, where the file holds what no original does; names are then those of the model with these."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turns whatever a nonsensical configuration value sets off into a ``UserError`` that names the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        if isinstance(error, UserError) and str(path) in str(error):
            raise
        detail = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} has a configuration that is not Gemma 3's ({detail}).") from error


def vocabulary_rows(rows: int) -> int:
    """Returns how many embedding rows to keep: the 64 padding rows of multimodal checkpoints are dropped."""
    return VOCAB_SIZE if rows == PADDED_VOCAB_SIZE else rows


def parameter_shapes(config: Gemma3Config) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every parameter of a model with this config; allocates nothing."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Gemma3ForCausalLM(config).state_dict().items()}


def _empty_model(checkpoint: Checkpoint) -> Gemma3ForCausalLM:
    """Returns the model that the checkpoint describes, without storage for its parameters."""
    from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA  # it imports this package

    with torch.device("meta"):
        if checkpoint.specs is None:
            return Gemma3ForCausalLM(checkpoint.config)
        return Gemma3ForMultimodalLMwithTPA(checkpoint.config, checkpoint.specs)


def build_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Gemma3ForCausalLM:
    """Builds the model and fills it tensor by tensor, so that memory holds the weights once, and only on ``device``.

    The vision side keeps the type that it is stored in: it is never trained, and an export holds its very bytes.

    Raises:
        UserError: weights are missing, unknown, of a wrong shape, or not finite; the tokenizer has more pieces than
            the embedding has rows.
    """
    where = checkpoint.source.path
    model = _empty_model(checkpoint)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    _check_names(checkpoint, expected)
    for name, shape in expected.items():
        weight = checkpoint.weights[name]
        if weight.shape != shape:
            raise UserError(
                f"{where}: weight {weight.stored_as} has shape {list(weight.shape)}, "
                f"but the model's configuration wants {list(shape)}."
            )
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None and tokenizer.vocab_size > checkpoint.config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} pieces but the embedding only "
            f"{checkpoint.config.vocab_size} rows; they do not belong together."
        )

    state = {}
    for name in expected:
        weight = checkpoint.weights[name]
        tensor = weight.read(None if name.startswith("vision.") else dtype)
        assert tuple(tensor.shape) == weight.shape, name
        # aminmax needs no temporary of the tensor's size, and NaN and ±Inf both show in it.
        if not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
            raise UserError(f"{where}: weight {weight.stored_as} holds NaN or Inf{_overflow_hint(dtype)}.")
        state[name] = tensor.to(device)
    model.load_state_dict(state, assign=True)
    model.tokenizer = tokenizer
    model.source = checkpoint.source
    return model.to(device).eval()  # constants of the forms, where there are any


def _check_names(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    where = checkpoint.source.path
    missing = [name for name in expected if name not in checkpoint.weights]
    if missing:
        raise UserError(f"{where}: weight {_first(missing)} missing from the file.")
    unknown = [*checkpoint.unknown, *(checkpoint.weights[n].stored_as for n in checkpoint.weights if n not in expected)]
    if unknown:
        raise UserError(f"{where}: weight {_first(unknown)} not part of a Gemma 3 model with this configuration.")


def _first(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _overflow_hint(dtype: torch.dtype) -> str:
    return " (float16 overflows beyond 65504: load as bfloat16 or float32)" if dtype == torch.float16 else ""
