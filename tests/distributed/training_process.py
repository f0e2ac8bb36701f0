"""One of two processes (or the only one) that trains a small student; run by test_training.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.append(str(TESTS))

import lightning as L  # noqa: E402
import torch  # noqa: E402
from random_models import random_model, small_config, student_of, tokens  # noqa: E402
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402

from tpa_train.benchmarks.scaling import ScalingSettings, measure  # noqa: E402
from tpa_train.cli import run_main  # noqa: E402
from tpa_train.distillation.end_to_end import EndToEndModule  # noqa: E402
from tpa_train.distillation.modules import OptimizerSettings  # noqa: E402
from tpa_train.distributed import processes  # noqa: E402
from tpa_train.distributed.launching import joined, one_voice  # noqa: E402
from tpa_train.distributed.sharding import gather_models, whole, wrapped_forwards  # noqa: E402
from tpa_train.errors import UserError  # noqa: E402
from tpa_train.settings import TrainerSettings  # noqa: E402
from tpa_train.trainers import Machine, make_trainer  # noqa: E402

STEPS, STOP = 3, 2
# What learns, and whether only some tokens count; the first one ends with an average of its weights.
CASES = {"attention": ("attention", False), "all": ("all", False), "masked": ("attention", True)}


class Watch(L.Callback):
    """Writes a checkpoint after step STOP."""

    def __init__(self, path: Path) -> None:
        self.path, self.saved = path, False

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == STOP and not self.saved:  # all processes must agree: no look at the disk
            trainer.save_checkpoint(self.path)
            self.saved = True


class Watched(EndToEndModule):
    """Keeps the first step's gradients, before clipping."""

    def _normalise_by_tokens(self, parameters):
        super()._normalise_by_tokens(parameters)
        if self.global_step == 0:
            named = self.student.named_parameters()
            self.gradients = {n: whole(p.grad).clone() for n, p in named if p.grad is not None}


def rows(config, masked: bool) -> list[dict]:
    """Two rows a step, of which the ranks get one each."""
    ids = tokens(config, 2 * STEPS, 24)
    made = [{"token_ids": row, "document_ids": torch.zeros_like(row)} for row in ids]
    if masked:
        for i, row in enumerate(made):
            row["loss_mask"] = torch.arange(24) < 5 + 3 * i
    return made


def train(case: str, strategy: str, folder: Path, checkpoint: Path | None = None) -> dict[str, torch.Tensor]:
    """Trains ``case``; returns gradients of the first step ("gradient.…") and what was learned, by name."""
    scope, masked = CASES[case]
    teacher = random_model(small_config(num_layers=3, num_kv_heads=1, layer_kinds=("local", "global", "local")))
    student = student_of(teacher, {1: (5, 4)})  # one KV head: the first dimension of U is too short to cut
    averaged = 0.5 if case == "attention" else 0.0
    module = Watched(teacher, student, OptimizerSettings(lr_factors=1e-2), scope, STEPS, ema=averaged)
    world = processes.world_size()
    settings = TrainerSettings(devices=world, accumulate=2 // world)
    machine = Machine(torch.device("cpu"), torch.float64, settings)
    watch = Watch(folder / f"{'resumed-' * bool(checkpoint)}{case}-{strategy}.ckpt")
    sharded = strategy == "fsdp2"
    trainer = make_trainer(machine, folder, STEPS, callbacks=[watch], sharded=sharded)
    loader = StatefulDataLoader(processes.share(rows(teacher.config, masked)), batch_size=1)
    original = teacher.layers[1].mlp.up_proj.weight.clone()
    with wrapped_forwards([*teacher.layers, *student.layers], compiled=False, recomputed=sharded):
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    if sharded:
        local = dict(student.named_parameters())["layers.1.self_attn.keys.up"].to_local()
        assert local.shape == (1, 8 // world, 5)
        embedding = teacher.embed_tokens.weight
        assert student.embed_tokens is teacher.embed_tokens and embedding.to_local().shape[0] < len(embedding)
        assert (student.layers[1].mlp is teacher.layers[1].mlp) == (scope == "attention")
        assert (student.layers[0] is teacher.layers[0]) == (scope == "attention")
        gather_models(teacher, student)
    learned = {n: t.clone() for n, t in module.trained_tensors().items()}
    module.finish()
    assert averaged == 0 or not all(torch.equal(t, learned[n]) for n, t in module.trained_tensors().items())
    assert torch.equal(teacher.layers[1].mlp.up_proj.weight, original)
    parameters, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    shared = {n for n, p in parameters.items() if n in theirs and p is theirs[n]}
    assert "embed_tokens.weight" in shared and shared.isdisjoint(module.trained)
    assert all(n in shared for n in parameters if n in theirs and n not in module.trained)
    found = {} if checkpoint else {f"gradient.{n}": g for n, g in module.gradients.items()}
    return found | {n: t.clone() for n, t in module.trained_tensors().items()}


def check_talking() -> None:
    """What processes tell each other."""
    me = processes.rank()
    assert processes.from_first(processes.rank) == 0
    assert processes.gathered(me) == [0, 1]
    assert processes.merged({i: i * i for i in processes.share(range(5))}) == {i: i * i for i in range(5)}
    assert list(processes.merged({-me: 0})) == [-1, 0]
    assert processes.raised_anywhere(me == 1, False) == [True, False]
    rows_ = processes.gather_rows(torch.full((me + 1, 2), float(me)))
    assert [tuple(r.shape) for r in rows_] == [(1, 2), (2, 2)] and rows_[1].eq(1).all()
    sent = torch.full((3, 2), float(me)).T
    processes.send_from_first([sent])
    assert sent.eq(0).all()
    try:
        processes.from_first(lambda: (_ for _ in ()).throw(UserError("said to all")))
    except UserError as error:
        assert str(error) == "said to all"
    else:
        raise AssertionError("every process must hear it")


def main() -> None:
    folder = Path(sys.argv[1])
    with one_voice(), joined(use_gpu=False):
        check_talking()
        found = {f"{case} {strategy}": train(case, strategy, folder) for case in CASES for strategy in ("ddp", "fsdp2")}
        # Each goes on from the other's checkpoint.
        for strategy, other in (("ddp", "fsdp2"), ("fsdp2", "ddp")):
            checkpoint = folder / f"attention-{other}.ckpt"
            found[f"resumed {strategy}"] = train("attention", strategy, folder, checkpoint)
        row = measure(ScalingSettings(model="tiny", context=32, steps=2, warmup=1, device="cpu"), "fsdp2")
        (folder / f"{processes.rank()}.json").write_text(json.dumps(row))
        torch.save(found, folder / f"{processes.rank()}.pt")
        if processes.rank() == 1:
            raise UserError("the second process found a mistake.")
        torch.distributed.barrier()  # the second one never comes


if __name__ == "__main__":
    run_main(main)
