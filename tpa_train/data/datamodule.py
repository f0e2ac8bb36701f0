"""The LightningDataModule over packed rows: one disjoint share of them per stage, resumable to the exact batch.

Exact resume rests on four things together: rows addressed by number (`PackedDataset`), torchdata's
`StatefulDataLoader`, a sampler with state, and a Trainer with ``use_distributed_sampler=False``. The order of rows
depends on the seed, the stage's name and the epoch, on nothing that happened before.

    B rows of a batch and process · L context · C copied tokens
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from torch.utils.data import Dataset, Subset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from tpa_train.data.copies import CopyRows
from tpa_train.data.packed import texts_twice, tokens_without_bos
from tpa_train.data.packing import PackedDataset, PackedStream, TokenizerLike, pack
from tpa_train.data.rows import collate_rows
from tpa_train.data.settings import DataSettings
from tpa_train.errors import UserError, nearest

log = logging.getLogger(__name__)

STAGES = ("calibration", "layerwise", "distill")


class StageSampler(StatefulDistributedSampler):
    """One long pass over a stage's rows, shuffled anew each time they have all been seen.

    Lightning resumes exactly inside an epoch but not at its edges: a state saved after an epoch's last batch gives an
    empty epoch or repeats one, depending on who saved it. So a fit is a single epoch for Lightning, as long as its
    optimiser steps need, and the epochs of the data are counted here. As a consequence no step is cut short at the
    data's end either, whatever the gradient accumulation.

    The order depends on (seed, number of the pass over the rows): neither on Lightning's epoch nor on global state.
    """

    def __init__(
        self,
        rows: Dataset,
        num_replicas: int,
        rank: int,
        seed: int,
        shuffle: bool = True,
        length: int | None = None,
        batch_size: int = 1,
        start: int = 0,
    ) -> None:
        """Deals whole batches to the processes, so that N processes see the batches that one accumulates in N.

        Args:
            rows, num_replicas, rank, seed, shuffle: as above.
            length: number of rows that this process is to see; None: its part of one pass.
            batch_size: rows dealt at a time.
            start: rows of this process that an interrupted run has seen.
        """
        super().__init__(rows, num_replicas, rank, shuffle, seed)
        self.batch_size = batch_size
        self.next_yielded = start or None
        if length is not None:
            self.num_samples, self.total_size = length, length * num_replicas

    def __iter__(self) -> Iterator[int]:
        rows = len(self.dataset)
        self.yielded, self.next_yielded = self.next_yielded or 0, None
        current, order = -1, range(rows)
        for number in range(self.yielded, self.num_samples):
            batch, place = divmod(number, self.batch_size)
            number = (batch * self.num_replicas + self.rank) * self.batch_size + place  # of all processes' rows
            if self.shuffle and number // rows != current:
                current = number // rows
                generator = torch.Generator().manual_seed(_seed(self.seed, current))
                order = torch.randperm(rows, generator=generator).tolist()
            self.yielded += 1
            yield order[number % rows]

    def set_epoch(self, epoch: int) -> None:
        """Does nothing: Lightning's epochs do not count (it calls this one with 1 if a finished run is extended)."""


class PackedDataModule(lightning.LightningDataModule):
    """Batches ``{"token_ids": int64 [B, L], "document_ids": int32 [B, L], "row": int64 [B]}`` for the stages of a run.

    Batches of conversations also hold ``"loss_mask"`` bool [B, L], see `PackedDataset`.

    ``prepare_data`` packs (once per machine), ``setup`` opens. Both may also be called without a Trainer.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: TokenizerLike,
        context: int,
        batch_size: int,
        stage_rows: Mapping[str, int | None] | None = None,
        stage: str = "distill",
        progress: bool = True,
        window: int = 0,
    ) -> None:
        """Remembers what to load.

        Args:
            settings: the text.
            tokenizer: the model's tokenizer.
            context: L, tokens of a row.
            batch_size: B, rows of one batch on one process.
            stage_rows: rows that each stage wants for itself, such as ``{"calibration": 64, "layerwise": 400}``;
                stage: the stage that ``train_dataloader`` serves; assign ``datamodule.stage`` between fits.
            progress: show a progress line while packing.
            window: tokens that the model's sliding-window layers see; repeated text is further away (``copies``).

        Raises:
            UserError: a stage or a size makes no sense.
        """
        super().__init__()
        if batch_size < 1:
            raise UserError(f"the batch size must be at least 1 row, not {batch_size}.")
        if not 0 <= settings.copy_share <= 1:
            raise UserError(f"data.copy_share={settings.copy_share:g} must lie between 0 (none) and 1 (every row).")
        self.settings, self.tokenizer, self.context, self.batch_size = settings, tokenizer, context, batch_size
        self.stage_rows = {name: None for name in STAGES} | dict(stage_rows or {})
        for name, rows in self.stage_rows.items():
            if name not in STAGES:
                raise UserError(f"stage_rows: '{name}' is no stage{nearest(name, STAGES)}")
            if rows is not None and rows < 1:
                raise UserError(f"stage_rows.{name}={rows} must be at least 1 row.")
        self.stage = stage
        self.progress = progress
        self.window = window
        self.folder: Path | None = None
        self._start = 0  # rows that this process has seen of the stage in which a run with other processes stopped
        self._train: PackedDataset | None = None

    # ------------------------------------------------------------------------------------------------- preparation

    def prepare_data(self) -> None:
        """Packs the text, or finds it packed."""
        self.folder = pack(self.settings, self.tokenizer, self.progress)

    def setup(self, stage: str | None = None) -> None:
        """Opens the packed training rows (``stage`` is Lightning's, not one of STAGES)."""
        if self._train is None:
            if self.folder is None:  # processes other than the first of a machine: a cache hit
                self.prepare_data()
            stream = PackedStream(self.folder, "train", self.tokenizer.fingerprint)
            self._train = PackedDataset(stream, self.context, self.settings.join_documents)

    @property
    def fingerprint(self) -> str:
        """Of everything that decided the text and its order."""
        return PackedStream(self.folder).manifest.fingerprint

    @property
    def train_dataset(self) -> PackedDataset:
        """All training rows, whatever the stage."""
        self.setup()
        return self._train

    def rows_of(self, stage: str) -> np.ndarray:
        """Returns the numbers of the rows that belong to ``stage``, int64 [rows].

        Rows are dealt from one seeded permutation, so a stage's share is spread over the whole text.
        """
        if stage not in STAGES:
            raise UserError(f"'{stage}' is no stage{nearest(stage, STAGES)}")
        generator = np.random.default_rng(_seed(self.settings.seed, "deal"))
        dealt = generator.permutation(len(self.train_dataset))
        fixed = [(name, rows) for name in STAGES if (rows := self.stage_rows[name]) is not None]
        wanted = sum(rows for _, rows in fixed)
        if wanted > len(dealt) * (0.5 if len(fixed) < len(STAGES) else 1):
            log.warning("the stages want %d rows of their own, there are %d: they share them", wanted, len(dealt))
            return dealt[: self.stage_rows[stage]]
        begin = 0
        for name, rows in fixed:
            if name == stage:
                return dealt[begin : begin + rows]
            begin += rows
        return dealt[begin:]  # stages without a number share the rest

    # ------------------------------------------------------------------------------------------------------ loaders

    def train_dataloader(self) -> StatefulDataLoader:
        """The loader of ``self.stage``, shuffled, with as many batches as the trainer's ``max_steps`` need."""
        return self.stage_dataloader(self.stage)

    def calibration_dataloader(self) -> StatefulDataLoader:
        """The calibration rows once, in order; all of them on every process (``CalibrationModule`` deals batches)."""
        return self.stage_dataloader("calibration", shuffle=False)

    def stage_dataloader(self, stage: str, shuffle: bool = True) -> StatefulDataLoader:
        """Returns a resumable loader over the rows of ``stage``.

        Args:
            stage: one of STAGES.
            shuffle: give this process's shuffled batches for all steps of the trainer (without a trainer: one pass);
                otherwise one pass over all rows in order, whose last batch may be smaller.
        """
        rows = Subset(self._rows_for(stage), self.rows_of(stage).tolist())
        replicas, rank = self._replicas() if shuffle else (1, 0)
        length = None
        if shuffle and self.trainer is not None:
            if self.trainer.max_steps < 1:
                raise UserError("set the trainer's max_steps: training is counted in steps, not in epochs.")
            length = self.trainer.max_steps * self.trainer.accumulate_grad_batches * self.batch_size
        sampler = StageSampler(
            rows, replicas, rank, _seed(self.settings.seed, stage), shuffle, length, self.batch_size, self._start
        )
        return StatefulDataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.settings.num_workers,
            collate_fn=collate_rows,
            pin_memory=torch.cuda.is_available(),
            drop_last=shuffle,
        )

    def _rows_for(self, stage: str) -> Dataset:
        """All training rows as ``stage`` sees them: calibration sees the text as it is."""
        share, seed = self.settings.copy_share, _seed(self.settings.seed, "copies")
        if share == 0 or stage == "calibration":
            return self.train_dataset
        return CopyRows(self.train_dataset, share, self.window, seed)

    def rows_in_order(self, stage: str, count: int) -> list[int]:
        """Returns the numbers of the rows that ``stage`` reads first, each once; ``count`` with repetitions."""
        rows = Subset(self.train_dataset, self.rows_of(stage).tolist())
        sampler = StageSampler(rows, 1, 0, _seed(self.settings.seed, stage), length=count)
        return list(dict.fromkeys(rows.indices[place] for place in sampler))

    def _replicas(self) -> tuple[int, int]:
        """(processes that see different data, this one's number); processes of a tensor-parallel group share data."""
        if self.trainer is not None:
            kwargs = getattr(self.trainer.strategy, "distributed_sampler_kwargs", None)
            return (kwargs["num_replicas"], kwargs["rank"]) if kwargs else (1, 0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_world_size(), torch.distributed.get_rank()
        return 1, 0

    # ------------------------------------------------------------------------------------------------------- resume

    def state_dict(self) -> dict[str, Any]:
        """What decides the order of rows; Lightning stores it in every checkpoint."""
        copies = {"copy_share": self.settings.copy_share} if self.settings.copy_share else {}
        return copies | {
            "data": self.fingerprint,
            "context": self.context,
            "seed": self.settings.seed,
            "stage": self.stage,
            "stage_rows": dict(self.stage_rows),
            "batch_size": self.batch_size,
            "processes": self._replicas()[0],
            "accumulate": self._accumulated(),
        }

    def rows_per_step(self) -> int:
        """Returns the rows of all processes that one optimizer step takes."""
        return self.batch_size * self._replicas()[0] * self._accumulated()

    def start_at(self, step: int) -> None:
        """Makes the next loader begin with the first row of optimizer step ``step``.

        For a run that goes on with other processes than it began with; otherwise the loader's own state is exact.
        """
        self._start = step * self.batch_size * self._accumulated()

    def _accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer is not None else 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses to resume where the rows would be others than those of the interrupted run.

        Raises:
            UserError: the text, context, seed, stage or shares differ, or the rows of an optimizer step.
        """
        self.setup()
        options = {
            "copy_share": "data.copy_share", "data": "the text (data.*)", "context": "the context", "seed": "data.seed",
            "stage": "the stage", "stage_rows": "stage_rows",
        }  # fmt: skip
        current = self.state_dict()
        for key, name in options.items():
            if state_dict.get(key) != current.get(key):
                raise UserError(
                    f"{name} is {current.get(key)} but the checkpoint was saved with {state_dict.get(key)}; resume "
                    f"with the same one, or start anew from the exported weights."
                )
        saved = math.prod(state_dict[key] for key in ("batch_size", "processes", "accumulate"))
        if saved != self.rows_per_step():
            raise UserError(
                f"an optimizer step takes {self.rows_per_step()} rows (processes × batch size × accumulated batches) "
                f"but {saved} when the checkpoint was saved; change one of them so that it takes {saved} again."
            )

    # ----------------------------------------------------------------------------------------------------- held out

    def heldout_rows(self, num_tokens: int, context: int | None = None, join_documents: bool | None = None) -> Dataset:
        """Returns rows of held-out text worth ``num_tokens`` (at least one row), spread evenly over it.

        Args:
            num_tokens: tokens wanted; fewer come back when less text is held out.
            context: L of these rows; the training context if None.
            join_documents: as in `DataSettings`, which decides if None.

        Raises:
            UserError: the held-out text does not fill one row.
        """
        join = self.settings.join_documents if join_documents is None else join_documents
        rows = PackedDataset(self._heldout(), context or self.context, join)
        count = min(len(rows), max(1, num_tokens // rows.context))
        return Subset(rows, [i * len(rows) // count for i in range(count)])

    def copy_texts(self, distance: int, count: int) -> torch.Tensor:
        """Returns texts for the long-range copy test: BOS, then the same ``distance`` held-out tokens twice.

        Document boundaries are ignored, and BOS ids inside the text left out: they would mark positions to attend to.

        Args:
            distance: C, tokens between a token and its copy.
            count: number of texts; they start at evenly spaced places and overlap when held-out text is short.

        Returns:
            int64 [count, 1 + 2C].

        Raises:
            UserError: fewer than C + count - 1 tokens are held out.
        """
        stream = self._heldout()
        tokens = tokens_without_bos(stream)
        if distance < 1 or count < 1 or len(tokens) - distance < count - 1:
            raise UserError(
                f"{count} copy texts of {distance:,} tokens do not fit the {len(tokens):,} tokens held out; raise "
                f"data.heldout_min_tokens (and data.max_tokens) or copy shorter texts."
            )
        return texts_twice(tokens, stream.manifest.bos_id, distance, count)

    def _heldout(self) -> PackedStream:
        self.setup()
        return PackedStream(self.folder, "heldout", self.tokenizer.fingerprint)


def _seed(*parts: object) -> int:
    """A 31-bit seed from anything printable, the same in every process and Python."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1
