"""What the teacher said of every training row, computed once and read back, so that training needs no teacher forward.

A cache folder holds ``teacher_cache.json`` (what decided the content) and shards ``rows-<number>.safetensors``, each
with the numbers of its rows and, in one of two modes, of every position

    hidden   final hidden states [n, L, D]: with the tied head that both models share, enough for the exact loss
    topk     classes, log_probabilities [n, L, k] and log_tail [n, L] (``distillation.topk_loss``)

n rows of a shard · L context · D hidden size · k kept classes
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tpa_train.distillation.losses import chunk_tokens, head_logits
from tpa_train.distillation.topk_loss import top_log_probabilities
from tpa_train.errors import UserError
from tpa_train.evaluation.atomic import replacing, write_text
from tpa_train.gemma3.model import Gemma3ForCausalLM

MODES = ("none", "hidden", "topk")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MANIFEST = "teacher_cache.json"
VERSION = 1
SHARD_BYTES = 256 << 20
SAMPLED = 65_536  # numbers of each weight that the fingerprint reads, evenly spread
# key of the manifest -> what a person calls it
_MEANING = {
    "version": "the format", "teacher": "the teacher's weights", "precision": "trainer.precision",
    "tokenizer": "the tokenizer", "data": "the text (data.*)", "join_documents": "data.join_documents",
    "context": "trainer.context", "mode": "teacher.cache", "top_k": "teacher.top_k", "dtype": "teacher.dtype",
}  # fmt: skip


def weights_fingerprint(model: Gemma3ForCausalLM) -> str:
    """Returns a hash of the names, shapes and types of all weights, and of up to ``SAMPLED`` numbers of each."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLED)].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TeacherCache:
    """One cache folder, opened or begun.

    Args:
        folder: of the cache; made when something is written.
        mode: "hidden" or "topk".
        top_k: k, for "topk".
        dtype: of hidden states or log-probabilities. The loss starts from the difference of both models' hidden states,
            which rounded ones would spoil where the student is close.
        identity: what else decides the content: the values of ``_MEANING``'s other keys.

    Raises:
        UserError: the folder holds something else, or a cache that other settings made, or a damaged one.
    """

    def __init__(
        self, folder: Path, mode: str, dtype: torch.dtype, identity: dict[str, Any], top_k: int | None = None
    ) -> None:
        self.folder, self.mode, self.dtype = Path(folder), mode, dtype
        self.top_k = top_k if mode == "topk" else None
        self.identity = {
            "version": VERSION, **identity, "mode": mode, "top_k": self.top_k,
            "dtype": str(dtype).removeprefix("torch."),
        }  # fmt: skip
        self._where: dict[int, tuple[Path, int]] = {}  # row -> shard and place in it
        self._open: dict[Path, Any] = {}
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self._check_manifest()
            for path in sorted(self.folder.glob("rows-*.safetensors")):
                self._index(path)

    def _check_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.is_file():
            raise UserError(f"teacher.folder={self.folder} is not empty and no teacher cache; name another folder.")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            assert isinstance(found, dict)
        except (OSError, ValueError, AssertionError) as error:
            raise UserError(f"{path} is damaged; delete the folder to fill the cache anew.") from error
        for key, ours in self.identity.items():
            if found.get(key) != ours:
                was, now = (str(value)[:12] for value in (found.get(key), ours))
                raise UserError(
                    f"the teacher cache in {self.folder} was made with another value of {_MEANING.get(key, key)} "
                    f"({was}, now {now}); name another teacher.folder, or delete it to fill it anew."
                )

    def _index(self, path: Path) -> None:
        """Notes which rows a shard holds; a shard that was cut short is refused by its header."""
        try:
            file = safe_open(path, framework="pt")
            rows = file.get_tensor("rows").tolist()
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it, and its rows are computed again.") from error
        context = self.identity["context"]
        if any(shape[0] != len(rows) or (len(shape) > 1 and shape[1] != context) for shape in shapes.values()):
            raise UserError(f"{path} is damaged (its shapes differ); delete it, and its rows are computed again.")
        self._open[path] = file
        self._where |= {row: (path, place) for place, row in enumerate(rows)}

    def missing(self, rows: Iterable[int]) -> list[int]:
        """Returns the rows that are not in the cache, in the given order, each once."""
        return [row for row in dict.fromkeys(rows) if row not in self._where]

    # ----------------------------------------------------------------------------------------------------------- fill

    @torch.no_grad()
    def fill(
        self,
        teacher: Gemma3ForCausalLM,
        dataset: Dataset,
        rows: Sequence[int],
        batch_size: int,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        """Computes what is missing of ``rows``, shard by shard; a stopped fill goes on behind the last whole shard.

        Args:
            teacher: the model.
            dataset: rows by number (``PackedDataset``).
            rows: numbers of the rows that training will read.
            batch_size: rows of a forward pass.
            autocast: what the teacher runs under in training.
        """
        missing = self.missing(rows)
        if not missing:
            return
        if not (self.folder / MANIFEST).exists():
            write_text(self.folder / MANIFEST, json.dumps(self.identity, indent=1))
        device = teacher.head_weight.device
        width = teacher.config.hidden_size if self.mode == "hidden" else 4 * self.top_k
        per_shard = max(1, SHARD_BYTES // (self.identity["context"] * width * self.dtype.itemsize))
        numbers = [int(path.stem.removeprefix("rows-")) for path in self._open]
        number = max(numbers, default=-1) + 1
        with tqdm(total=len(missing), desc="teacher cache", unit="row") as bar:
            for start in range(0, len(missing), per_shard):
                shard, parts = missing[start : start + per_shard], []
                for first in range(0, len(shard), batch_size):
                    items = [dataset[row] for row in shard[first : first + batch_size]]
                    ids, documents = (
                        torch.stack([item[key] for item in items]).to(device) for key in ("token_ids", "document_ids")
                    )
                    with autocast():
                        hidden = teacher.hidden_states(ids, documents)
                    parts.append({name: t.cpu() for name, t in self.kept(hidden, teacher.head_weight).items()})
                    bar.update(len(items))
                tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                path = self.folder / f"rows-{number:05d}.safetensors"
                with replacing(path) as temporary:
                    save_file({"rows": torch.tensor(shard), **tensors}, temporary)
                self._index(path)
                number += 1

    def kept(self, hidden: Tensor, head: Tensor) -> dict[str, Tensor]:
        """Returns what is stored of final hidden states [B, L, D]."""
        if self.mode == "hidden":
            return {"hidden": hidden.to(self.dtype)}
        with torch.autocast(hidden.device.type, enabled=False):
            step = chunk_tokens(head.shape[0], hidden.device, head.dtype)
            parts = [
                top_log_probabilities(head_logits(part, head), self.top_k) for part in hidden.flatten(0, 1).split(step)
            ]
        columns = zip(*parts, strict=True)
        classes, values, tail = (torch.cat(list(column)).unflatten(0, hidden.shape[:2]) for column in columns)
        return {
            "classes": classes.to(torch.int32), "log_probabilities": values.to(self.dtype), "log_tail": tail.float(),
        }  # fmt: skip

    # ----------------------------------------------------------------------------------------------------------- read

    def read(self, rows: Tensor, pick: slice = slice(None)) -> dict[str, Tensor]:
        """Returns what is stored of ``rows`` int [B] at the positions ``pick``, as [B, positions, ...] on rows' device.

        Raises:
            UserError: a row is not in the cache.
        """
        found: dict[str, list[Tensor]] = {}
        for row in rows.tolist():
            if row not in self._where:
                raise UserError(f"the teacher cache in {self.folder} lacks row {row}; fill it for this run.")
            path, place = self._where[row]
            file = self._open[path]
            for name in file.keys():
                if name != "rows":  # a slice reads one row of the mapped file
                    found.setdefault(name, []).append(file.get_slice(name)[place][pick])
        return {name: torch.stack(tensors).to(rows.device) for name, tensors in found.items()}
