"""Reading pretrained Gemma 3 checkpoints: Hugging Face folders, Google's gemma_pytorch files, and GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tpa_train.checkpoints.adapter import merge_adapter
from tpa_train.checkpoints.gemma_pytorch import open_gemma_pytorch
from tpa_train.checkpoints.gguf import open_gguf
from tpa_train.checkpoints.huggingface import open_huggingface
from tpa_train.checkpoints.locate import find_default
from tpa_train.checkpoints.weights import Checkpoint, Source, build_model
from tpa_train.errors import UserError
from tpa_train.gemma3.model import Gemma3ForCausalLM

__all__ = ["Source", "find_default", "load_pretrained", "open_checkpoint"]

_BY_SUFFIX: dict[str, Callable[[Path], Checkpoint]] = {
    ".gguf": open_gguf,
    ".ckpt": open_gemma_pytorch,
    ".pt": open_gemma_pytorch,
    ".pth": open_gemma_pytorch,
    ".safetensors": lambda path: open_huggingface(path.parent),
}


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a checkpoint of any supported format without reading its large tensors.

    A folder is a Hugging Face one if it has a ``config.json``; else it must hold exactly one checkpoint file (as the
    downloads of gemma_pytorch and GGUF do).

    Raises:
        UserError: nothing is there, or it is not a readable Gemma 3 checkpoint; the sentence says which and why.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}.")
    if path.is_dir():
        path = _in_folder(path)
    opener = open_huggingface if path.is_dir() else _BY_SUFFIX.get(path.suffix.lower())
    if opener is None:
        raise UserError(f"{path} has an unsupported extension; supported: {', '.join(_BY_SUFFIX)}, or a folder.")
    try:
        return opener(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from error


def load_pretrained(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    adapter: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Gemma3ForCausalLM:
    """Loads a pretrained or fine-tuned Gemma 3 from any supported format, in eval mode.

    Args:
        path: a ``.gguf`` or ``.ckpt`` file, or a Hugging Face folder.
        dtype: of the weights in memory, whatever the file stores; a vision side keeps the type that it is stored in.
        adapter: folder of a LoRA adapter that is merged into the weights (``adapter.merge_adapter``).
        device: where the weights go, one tensor after the other.

    Returns:
        The model, with ``model.tokenizer`` (None if the checkpoint has no SentencePiece model) and ``model.source``.

    Raises:
        UserError: the checkpoint is missing, damaged, of another family, or its weights do not fit together; or the
            adapter is, or is one of another model.
    """
    checkpoint = open_checkpoint(path)
    return build_model(checkpoint if adapter is None else merge_adapter(checkpoint, adapter), dtype, device)


def _in_folder(folder: Path) -> Path:
    if (folder / "config.json").exists():
        return folder
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in _BY_SUFFIX and p.suffix != ".safetensors")
    if len(files) == 1:
        return files[0]
    if files:
        raise UserError(f"{folder} holds several checkpoints ({', '.join(p.name for p in files)}); name one of them.")
    raise UserError(f"{folder} holds no checkpoint: no config.json and no {' or '.join(list(_BY_SUFFIX)[:2])} file.")
