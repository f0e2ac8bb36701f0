"""Who starts the processes, what is refused before they start, and how they end together."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from tpa_train.distributed import launching
from tpa_train.distributed.launching import find_cluster, launch, local_rank, must_launch, resolve_devices
from tpa_train.distributed.processes import from_first, gather_rows, gathered, merged, raised_anywhere, share
from tpa_train.errors import UserError
from tpa_train.launch import main
from tpa_train.pipeline import Session
from tpa_train.recipes import compose
from tpa_train.settings import TrainerSettings

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "2345",
}  # fmt: skip
SLURM = {
    "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_NODELIST": "node[7-8]", "SLURM_JOB_ID": "1234567", "SLURM_JOB_NAME": "train",
}  # fmt: skip


def fake(monkeypatch, variables):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "restored")
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables,kind", [(TORCHRUN, TorchElasticEnvironment), (SLURM, SLURMEnvironment)])
def test_processes_that_somebody_started_are_found(monkeypatch, variables, kind):
    assert find_cluster() is None and local_rank() == 0
    fake(monkeypatch, variables)
    cluster = find_cluster()
    assert isinstance(cluster, kind) and cluster.creates_processes_externally
    assert (cluster.global_rank(), cluster.world_size(), local_rank()) == (5, 8, 1)
    assert cluster.main_address == {TorchElasticEnvironment: "node0", SLURMEnvironment: "node7"}[kind]
    trainer = compose(["trainer=cpu"]).trainer
    assert (trainer.devices, trainer.num_nodes, trainer.rows_per_step) == (4, 2, 8) and not must_launch(trainer)
    resolve_devices(TrainerSettings(devices=4, num_nodes=2))
    starter = "SLURM" if kind is SLURMEnvironment else "torchrun"
    with pytest.raises(UserError, match=f"trainer.devices=3, but {starter} started 4 processes on each of 2 nodes"):
        resolve_devices(TrainerSettings(devices=3))


@pytest.mark.parametrize("change", [{"SLURM_NTASKS": "1"}, {"SLURM_JOB_NAME": "bash"}])
def test_a_slurm_job_of_one_task_or_a_shell_in_one_starts_its_own(monkeypatch, change):
    fake(monkeypatch, SLURM | change)
    assert find_cluster() is None
    assert must_launch(compose(["trainer=cpu", "trainer.devices=2"]).trainer)


def test_slurm_tasks_must_be_counted_by_node(monkeypatch):
    fake(monkeypatch, {k: v for k, v in SLURM.items() if k != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(UserError, match="--ntasks-per-node"):
        find_cluster()


@pytest.mark.parametrize("option,message", [
    ("trainer.devices=0", "trainer.devices=0 must be a number of at least 1, or auto"),
    ("trainer.devices=all", "trainer.devices=all must be"), ("trainer.num_nodes=2", "needs a launcher on every node"),
    ("trainer.num_nodes=0", "trainer.num_nodes=0 must be"),
])  # fmt: skip
def test_mistakes(option, message):
    with pytest.raises(UserError, match=message):
        compose(["trainer=cpu", option])


def test_devices_are_counted():
    assert compose(["trainer=cpu", "trainer.devices=auto"]).trainer.devices == 1
    trainer = compose(["trainer=cpu", "trainer.devices=3", "trainer.accumulate=2", "trainer.batch_size=5"]).trainer
    assert must_launch(trainer) and trainer.rows_per_step == 30


@pytest.mark.parametrize("name,strategy,recomputed", [("ddp", "ddp", False), ("fsdp2", "fsdp2", True)])
def test_the_recipes_of_several_devices_are_those_of_one(name, strategy, recomputed):
    ours, gpu = compose([f"trainer={name}"]), compose(["trainer=gpu"])
    assert (ours.trainer.strategy, ours.trainer.activation_checkpointing) == (strategy, recomputed)
    assert (ours.trainer.context, ours.trainer.accelerator) == (gpu.trainer.context, "gpu")
    assert ours.recipe == gpu.recipe and ours.evaluation == gpu.evaluation


def test_what_starts_no_processes_refuses_several_devices(tmp_path):
    with pytest.raises(UserError, match="trainer.devices=2: only a single run of scripts/train.py"):
        Session(compose(["trainer=cpu", "trainer.devices=2"]), tmp_path)
    with pytest.raises(UserError, match="trainer.devices=2: only a single run"):
        main(["--multirun", "trainer=cpu", "trainer.devices=2", "budget.cache_ratio=2,4", f"run_dir={tmp_path / 'x'}"])
    assert not list(tmp_path.iterdir())


def test_one_process_needs_nobody():
    assert from_first(lambda: 3) == 3 and gathered(3) == [3] and share([1, 2]) == [1, 2]
    assert list(merged({2: "b", 1: "a"})) == [2, 1]  # as it was
    assert raised_anywhere(True, False) == [True, False]
    rows = compose  # anything: it comes back as it is
    assert gather_rows(rows) == [rows]
    with pytest.raises(UserError, match="no"):
        from_first(lambda: (_ for _ in ()).throw(UserError("no")))


# ------------------------------------------------------------------------------------- processes that need no torch

SAY = "import os, sys, time, signal; me = int(os.environ['LOCAL_RANK']); "


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", SAY + code]


def test_processes_know_each_other(tmp_path):
    code = (
        f"keys = ['RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT']; "
        f"open('{tmp_path}/' + str(me), 'w').write(' '.join(os.environ[k] for k in keys))"
    )
    assert launch(python(code), 3) == 0
    said = [(tmp_path / str(i)).read_text().split() for i in range(3)]
    assert [s[:5] for s in said] == [[str(i), str(i), "3", "3", "127.0.0.1"] for i in range(3)]
    assert len({s[5] for s in said}) == 1


@pytest.mark.parametrize("code,status", [
    ("sys.exit(2) if me == 1 else time.sleep(60)", 2),
    ("sys.exit(1) if me == 1 else (time.sleep(0.1), sys.exit(2))", 2),  # the user's mistake, not what came of it
    ("os.kill(os.getpid(), 9) if me == 0 else time.sleep(60)", 137),
    ("signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.exit(1) if me == 0 else time.sleep(60)", 1),
])  # fmt: skip
def test_one_failure_ends_all(monkeypatch, code, status):
    monkeypatch.setattr(launching, "GRACE_SECONDS", 0.3)
    start = time.monotonic()
    assert launch(python(code), 2) == status
    assert time.monotonic() - start < 10


def test_signals_are_passed_on_once(tmp_path):
    code = (
        f"signal.signal(signal.SIGTERM, lambda *_: (open('{tmp_path}/got' + str(me), 'a').write('x'))); "
        f"open('{tmp_path}/ready' + str(me), 'w'); "
        f"[time.sleep(0.02) for _ in range(500) if not os.path.exists('{tmp_path}/got' + str(me))]; "
        f"time.sleep(0.2); sys.exit(143)"
    )

    def send():
        while not all((tmp_path / f"ready{i}").exists() for i in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send).start()
    assert launch(python(code), 2) == 143
    assert [(tmp_path / f"got{i}").read_text() for i in range(2)] == ["x", "x"]
    assert signal.getsignal(signal.SIGTERM) is before
