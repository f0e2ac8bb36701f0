"""FSDP2 (Zhao et al., arXiv:2304.11277; ``fully_shard``): student and teacher in shards, one unit a decoder layer.

Teacher and student share what does not learn. A parameter may belong to one unit only, so a shared one is owned by one
*module*: the student's module, whose parameters are all the teacher's, is replaced by the teacher's own, and that
module is a unit which both call. A wholly shared layer is one unit, a converted layer has the shared MLP or projection
as a unit of its own beside what learns. The order in which teacher and student run does not matter.

Units hold weights that learn in float32 and frozen ones in the dtype they were loaded in, and are gathered in the
dtype that the run computes in. Embedding (the head) and final norms are the root's: they are whole while the loss is
computed, which is why the loss runs as the root's ``forward``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recompute

from tpa_train.distributed.processes import is_first


def whole(tensor: Tensor) -> Tensor:
    """Returns a sharded tensor gathered, on every process; a plain one as it is. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Returns what this process holds of a sharded tensor, the same memory; a plain one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Returns this process's part of a whole ``tensor``, sharded as ``parameter`` is."""
    tensor = tensor.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


# ----------------------------------------------------------------------------------------------------------- sharding


def share_modules(teacher: nn.Module, student: nn.Module) -> list[nn.Module]:
    """Replaces every module of the student that holds nothing but the teacher's parameters by the teacher's own module.

    Returns:
        The modules that both have now, the largest ones: whole layers, else MLPs, projections and norms.
    """
    by_name = dict(teacher.named_modules())
    owners = {id(p): module for module in teacher.modules() for p in module.parameters(recurse=False)}
    shared: list[nn.Module] = []

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            own = list(child.parameters())
            if not own:
                continue
            # By name, or, for a projection that has another name in a converted layer, by its weight.
            for twin in (by_name.get(prefix + name), owners.get(id(own[0]))):
                if twin is not None and type(twin) is type(child) and _same(own, list(twin.parameters())):
                    parent._modules[name] = twin
                    shared.append(twin)
                    break
            else:
                visit(child, f"{prefix}{name}.")

    visit(student, "")
    return shared


def _same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def stays_whole(name: str, parameter: nn.Parameter) -> bool:
    """Whether every process keeps the whole parameter: frozen vectors are small, and a quantizer's centers must not be
    rounded.
    """
    return not parameter.requires_grad and (parameter.ndim == 1 or name.endswith(".center"))


def shard(
    root: nn.Module, teacher: nn.Module, student: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None
) -> None:
    """Shards both models over ``mesh``, in place; parameters become DTensors.

    Args:
        root: whose ``forward`` computes the loss; has both models as submodules.
        teacher, student: models of decoder ``layers``.
        mesh: one-dimensional.
        dtype: that gathered weights are cast to (gradients are reduced in float32); None leaves theirs.
    """
    shared = share_modules(teacher, student)
    policy = MixedPrecisionPolicy(dtype, torch.float32 if dtype else None, cast_forward_inputs=False)
    frozen = {p for n, p in root.named_parameters() if stays_whole(n, p)}
    layers = {id(layer): layer for model in (teacher, student) for layer in model.layers}
    inside = {id(module) for layer in layers.values() for module in layer.modules()}
    units = [m for m in shared if id(m) in inside and not set(m.parameters()) <= frozen]
    for unit in {id(unit): unit for unit in (*units, *layers.values())}.values():
        fully_shard(
            unit, mesh=mesh, reshard_after_forward=True, shard_placement_fn=_placement(mesh.size()), mp_policy=policy,
            ignored_params=frozen,
        )  # fmt: skip
    fully_shard(
        root, mesh=mesh, shard_placement_fn=_placement(mesh.size()), mp_policy=policy, ignored_params=frozen
    )


def _placement(processes: int) -> Callable[[nn.Parameter], Shard | None]:
    """Returns the rule for the dimension that is cut: the first, or where it is too short, a later one that divides."""

    def place(parameter: nn.Parameter) -> Shard | None:
        if parameter.shape[0] < processes:
            for dim in range(1, parameter.ndim):
                if parameter.shape[dim] % processes == 0:
                    return Shard(dim)
        return None

    return place


def gather_models(teacher: nn.Module, student: nn.Module) -> None:
    """Makes sharded models whole again on every process, in place; shared parameters stay shared.

    FSDP2 cannot be taken off a module, so the models get new submodules.

    Args:
        teacher, student: models whose submodules were sharded, made anew from their ``config`` (and ``specs``).
    """
    gathered: dict[int, nn.Parameter] = {}
    for model in (teacher, student):
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    for model in (teacher, student):
        forms = [model.specs] if hasattr(model, "specs") else []
        with torch.device("meta"):
            fresh = type(model)(model.config, *forms)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in gathered:
                tensor = whole(parameter.detach())
                gathered[id(parameter)] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            path, _, leaf = name.rpartition(".")
            fresh.get_submodule(path)._parameters[leaf] = gathered[id(parameter)]
        mode = model.training
        for name, child in fresh.named_children():
            setattr(model, name, child)
        model.train(mode)


@contextmanager
def wrapped_forwards(layers: Iterable[nn.Module], compiled: bool, recomputed: bool) -> Iterator[None]:
    """Compiles the ``forward`` of ``layers``, or recomputes their activations in the backward pass, in the context.

    It is ``forward`` that is replaced, not the module's call: FSDP's hooks, which gather and free weights, stay around
    it, and the recomputation finds the weights gathered.
    """
    layers = list({id(layer): layer for layer in layers}.values())
    for layer in layers:
        forward = torch.compile(layer.forward, dynamic=False) if compiled else layer.forward
        layer.forward = _recomputing(forward) if recomputed else forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _recomputing(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*args, **options)
        # Nothing is random.
        return recompute(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return call


# ----------------------------------------------------------------------------------------------------------- strategy


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy with checkpoints of whole tensors, as every other strategy writes and reads them.

    They are gathered one at a time and kept by the first process only, so that a run may go on with another number of
    processes or another strategy.
    """

    def __init__(self, processes: int) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return on_first(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state = optimizer.state_dict()
        whole_state = {index: on_first(values) for index, values in state["state"].items()}
        return {"state": whole_state, "param_groups": state["param_groups"]}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        current = self.lightning_module.state_dict()
        with torch.no_grad():
            for name, tensor in checkpoint["state_dict"].items():
                current[name].copy_(sharded_like(tensor, current[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: {
                    key: sharded_like(value, parameters[index]) if value.shape == parameters[index].shape else value
                    for key, value in values.items()
                }
                for index, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def on_first(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors whole and on the CPU; nothing on other processes than the first."""
    kept = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor)
        if is_first():
            kept[name] = gathered.detach().cpu()
    return kept
