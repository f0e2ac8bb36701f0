"""Starting the processes of a run, or finding that torchrun or SLURM started them, and ending them together.

Processes that nobody started are started here as torchrun does it: the same command once more for each device, with
RANK, LOCAL_RANK, WORLD_SIZE and the address to meet at in the environment. The process that the user started only
passes signals on and ends the others when one has failed, since those may wait for it in a collective forever.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from lightning_utilities.core.rank_zero import rank_zero_only as utilities_rank_zero_only

from tpa_train.distributed.processes import rank, world_size
from tpa_train.errors import UserError
from tpa_train.interrupts import Interrupted
from tpa_train.settings import TrainerSettings

# The first process may solve factors on its CPU for long while the others wait; dead processes are noticed elsewhere.
COLLECTIVE_TIMEOUT = timedelta(hours=4)
GRACE_SECONDS = 5.0  # for the others to fail by themselves, once one has
INTERRUPTED_GRACE_SECONDS = 60.0  # for the first process to finish what it writes
_FAILURES = "tpa_train/failures"  # counted in the process group's store: the first to fail says why
_LAUNCHER = "TPA_TRAIN_LAUNCHER"  # process id; whoever loses it ends itself


def find_cluster() -> ClusterEnvironment | None:
    """Returns Lightning's description of who started this process beside others; None if it is on its own.

    torchrun (and ``launch``) tell by TORCHELASTIC_RUN_ID, srun by SLURM_NTASKS; a batch script without srun runs alone.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ and SLURMEnvironment.detect():
        with suppress(RuntimeError):  # --ntasks without --ntasks-per-node: Lightning refuses, _layout has a sentence
            # Requeueing has a checkpoint of its own in mind; runs go on by resume=true.
            return SLURMEnvironment(auto_requeue=False)
        raise UserError("SLURM: start the run with --ntasks-per-node=DEVICES rather than --ntasks.")
    return None


def local_rank() -> int:
    """Returns this process's number on its node, which is also that of its accelerator."""
    cluster = find_cluster()
    return 0 if cluster is None else cluster.local_rank()


def resolve_devices(trainer: TrainerSettings) -> None:
    """Fills in ``devices`` and ``num_nodes``: counts them for "auto", and takes what torchrun or SLURM started.

    Raises:
        UserError: a number is not one, or torchrun or SLURM started another number of processes than was asked for.
    """
    cluster = find_cluster()
    devices = trainer.devices
    if devices != "auto" and (isinstance(devices, bool) or not isinstance(devices, int) or devices < 1):
        raise UserError(f"trainer.devices={devices} must be a number of at least 1, or auto.")
    if trainer.num_nodes < 1:
        raise UserError(f"trainer.num_nodes={trainer.num_nodes} must be at least 1.")
    if cluster is None:
        if trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={trainer.num_nodes} needs a launcher on every node: torchrun --nnodes="
                f"{trainer.num_nodes} … scripts/train.py, or srun python scripts/train.py under SLURM."
            )
        if devices == "auto":
            trainer.devices = max(1, torch.cuda.device_count()) if trainer.accelerator != "cpu" else 1
        return
    starter = "SLURM" if isinstance(cluster, SLURMEnvironment) else "torchrun"
    found = dict(zip(("devices", "num_nodes"), _layout(cluster), strict=True))
    for option, count in found.items():
        if getattr(trainer, option) not in ("auto", 1, count):
            raise UserError(
                f"trainer.{option}={getattr(trainer, option)}, but {starter} started {found['devices']} processes on "
                f"each of {found['num_nodes']} nodes; leave trainer.{option} out or start as many."
            )
        setattr(trainer, option, count)


def _layout(cluster: ClusterEnvironment) -> tuple[int, int]:
    """Returns (processes of a node, nodes)."""
    if isinstance(cluster, SLURMEnvironment):
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ.get("SLURM_NTASKS_PER_NODE", cluster.world_size() // nodes)), nodes
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", cluster.world_size()))
    return per_node, cluster.world_size() // per_node


def must_launch(trainer: TrainerSettings) -> bool:
    """Whether the run wants several processes (``resolve_devices``) and nobody has started them."""
    return trainer.devices > 1 and find_cluster() is None


# ------------------------------------------------------------------------------------------------------ the launcher


def launch(command: Sequence[str], processes: int) -> int:
    """Runs ``command`` as ``processes`` processes of this node and returns the exit status of the first that failed.

    SIGINT and SIGTERM are passed on, once each: the processes have a session of their own, so that a terminal's Ctrl-C
    does not reach them twice. When one fails, the others are given a moment and are then ended.
    """
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": f"tpa-train-{os.getpid()}",
        _LAUNCHER: str(os.getpid()),
    }  # fmt: skip
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    children = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(i), "LOCAL_RANK": str(i), "GROUP_RANK": "0"}, start_new_session=True
        )
        for i in range(processes)
    ]

    def pass_on(signum: int, _frame: object) -> None:
        for child in children:
            child.send_signal(signum)  # does nothing to one that has ended

    previous = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(children)
    finally:
        for child in children:
            child.kill()
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _wait(children: list[subprocess.Popen]) -> int:
    """Returns the first failure's status (128 + signal for a killed process), all processes having ended; or 0."""
    status, deadline, terminated = 0, 0.0, False
    while True:
        ended = [child.poll() for child in children]
        failures = [code if code > 0 else 128 - code for code in ended if code]
        if failures and not status:
            status = failures[0]
            deadline = time.monotonic() + (INTERRUPTED_GRACE_SECONDS if status in (130, 143) else GRACE_SECONDS)
        if None not in ended:
            return 2 if 2 in failures else status  # what the user did wrong, rather than what came of it
        if status and time.monotonic() > deadline:
            for child in children:
                child.kill() if terminated else child.terminate()
            terminated, deadline = True, time.monotonic() + GRACE_SECONDS
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------------------------- the processes


@contextmanager
def joined(use_gpu: bool) -> Iterator[None]:
    """Meets the other processes of the run, if there are any, and stays in their process group inside the context.

    Sets this process's CUDA device. Collectives of CPU tensors go through gloo, those of CUDA tensors through NCCL.

    Raises:
        UserError: this node has fewer CUDA devices than processes.
    """
    cluster = find_cluster()
    if cluster is None or world_size() > 1:
        yield
        return
    _end_with(os.environ.get(_LAUNCHER))
    if use_gpu:
        if cluster.local_rank() >= torch.cuda.device_count():
            raise UserError(
                f"process {cluster.local_rank()} of this node has no CUDA device of its own: PyTorch sees "
                f"{torch.cuda.device_count()}; a node runs as many processes as it has devices, all visible."
            )
        torch.cuda.set_device(cluster.local_rank())
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = cluster.main_address, str(cluster.main_port)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if use_gpu else "gloo", rank=cluster.global_rank(), world_size=cluster.world_size(),
        timeout=COLLECTIVE_TIMEOUT,
    )  # fmt: skip
    rank_zero_only.rank = utilities_rank_zero_only.rank = cluster.global_rank()
    if cluster.global_rank() > 0:  # the first process says it for all
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore")
    yield
    # Not after an error: the others may never come here.
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[None]:
    """Lets one process alone say what went wrong; the others end with status 2 and without a word.

    Whoever fails first speaks. The others fail because of it, or in the same way.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if find_cluster() is None or _fails_first():
            raise
        # No clean-up: libraries' threads may wait for processes that have gone.
        sys.stdout.flush()
        os._exit(2 if isinstance(error, UserError) else 1)


def _fails_first() -> bool:
    """Whether no other process of the run has failed before this one."""
    if not dist.is_initialized():  # options are read before the processes meet, by all of them alike
        return find_cluster().global_rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add(_FAILURES, 1) == 1
    except Exception:  # the store went away with the first process, which has said why
        return rank() == 0


def _end_with(launcher: str | None) -> None:
    """Ends this process when the one that launched it is gone, were it by SIGKILL."""
    if launcher is None:
        return

    def watch() -> None:
        while os.getppid() == int(launcher):
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
