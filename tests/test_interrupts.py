"""Checkpoints of a stage: the last one, and the best of those that were written."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tpa_train import interrupts
from tpa_train.interrupts import InterruptHandler, SaveAndStop, link_atomically


def test_the_checkpoint_of_the_lowest_smoothed_loss_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(interrupts, "SMOOTHING", 0.5)
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    written = []

    def save(trainer, path):
        written.append(trainer.step)
        other = path.with_suffix(".new")  # replaced as a whole, as save_atomically does
        other.write_text(str(trainer.step))
        other.replace(path)

    monkeypatch.setattr(interrupts, "save_atomically", save)

    def run(callback, losses, first=0):
        for step, metrics in enumerate(losses, first):
            trainer = SimpleNamespace(
                accumulate_grad_batches=1, step=step, global_step=step, log_every_n_steps=1, should_stop=False
            )
            trainer.callback_metrics = {name: torch.tensor(value) for name, value in metrics.items()}
            callback.on_train_batch_end(trainer, None, None, None, step)

    callback = SaveAndStop(last, InterruptHandler(), -1.0, best)  # a checkpoint after every step
    # The KL decides where there is one. Smoothed: 4, 2.67, 3.43, then 3.73 and 1.81.
    run(callback, [{"loss": 9.0, "kl": 4.0}, {"loss": 9.0, "kl": 2.0}, {"loss": 1.0, "kl": 4.0}])
    assert written == [0, 1, 2] and (last.read_text(), best.read_text()) == ("2", "1")
    resumed = SaveAndStop(last, InterruptHandler(), -1.0, best)
    resumed.load_state_dict(callback.state_dict())
    run(resumed, [{"kl": 4.0}], first=3)
    assert best.read_text() == "1", "a resumed run knows how good the best one was"
    run(resumed, [{"kl": 0.0}], first=4)
    assert best.read_text() == last.read_text() == "4"


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("old")
    monkeypatch.setattr(interrupts.os, "link", lambda *_: (_ for _ in ()).throw(OSError))
    link_atomically(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "a" and len(list(tmp_path.iterdir())) == 2
