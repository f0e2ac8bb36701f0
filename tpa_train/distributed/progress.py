"""Going on from a training checkpoint with other processes, batch size or accumulation, but the same global batch.

Where a training stands is told by its number of optimizer steps: each took the same rows, in the same order, whoever
read them (``data.datamodule.StageSampler`` deals whole batches). What Lightning and the loader count besides, batches
of one process, follows from it.
"""

from __future__ import annotations

from typing import Any

import lightning as L

LAYOUT = ("batch_size", "processes", "accumulate")


def adapt_progress(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Rewrites what ``checkpoint`` counts in batches, if it was made with another layout; the data starts at its step.

    The global batch must be the same: the data module has refused others by now.
    """
    data = trainer.datamodule
    saved = checkpoint.get(type(data).__qualname__)
    if saved is None or not hasattr(data, "start_at"):
        return
    current = data.state_dict()
    if all(saved.get(key, 1) == current[key] for key in LAYOUT):
        return  # the loader's own state is exact, to the batch
    step = checkpoint["global_step"]
    data.start_at(step)
    fit_loop = checkpoint["loops"]["fit_loop"]
    fit_loop["state_dict"].pop("combined_loader", None)
    batches = step * current["accumulate"]
    for counts in ("total", "current"):
        progress = fit_loop["epoch_loop.batch_progress"][counts]
        progress.update({key: batches for key, count in progress.items() if isinstance(count, int)})
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step
