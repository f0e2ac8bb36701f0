"""AdamW whose steps are relative to the size of what they change, element by element where a factor needs it.

The rows (or columns) of a factor belong to latents of very different importance, and latents are scaled to equal spread
for the cache's sake: their weights then differ by orders of magnitude. A step of one size would drown the large
directions in noise, so a step is scaled like the factor itself, by the outer product of its row and column sizes over
the overall size (the factored second moment of Adafactor, arXiv:1804.04235, §3, applied to weights).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def element_scale(factor: Tensor) -> tuple[Tensor, ...]:
    """Returns the step size of every element relative to a learning rate, as tensors to multiply, each broadcastable.

    Row and column sizes are root mean squares over the other dimension, all but the last dimension being rows. A factor
    that starts at zero has no size of its own: it gets that of a random matrix with its number of columns.
    """
    wide = factor.detach().float()
    overall = wide.square().mean().sqrt()
    if not overall > 0:
        return (torch.full((1,) * factor.dim(), factor.shape[-1] ** -0.5, device=factor.device),)
    if factor.dim() < 2:
        return (overall.reshape((1,) * factor.dim()),)
    rows = wide.square().mean(-1, keepdim=True).sqrt()
    columns = wide.square().mean(tuple(range(factor.dim() - 1)), keepdim=True).sqrt()
    return rows / overall, columns


class ScaledAdamW(torch.optim.AdamW):
    """AdamW with optional ``scales`` in a parameter group: each step is multiplied by them, element by element.

    ``scales`` has one item a parameter of the group, as ``element_scale`` returns it. The state is AdamW's own, so
    checkpoints do not change. Where a parameter is sharded (a DTensor), its scale is still that of the whole one.
    """

    @torch.no_grad()
    def step(self, closure=None):
        groups = [group for group in self.param_groups if group.get("scales") is not None]
        scaled = [pair for group in groups for pair in zip(group["params"], group["scales"], strict=True)]
        parameters = [parameter for parameter, _ in scaled]
        before = torch._foreach_mul(parameters, 1.0) if parameters else []  # copies, in few kernels
        loss = super().step(closure)
        if parameters:
            steps = torch._foreach_sub(parameters, before)
            for step, (_, scales) in zip(steps, scaled, strict=True):
                for scale in scales:
                    step *= _beside(scale.to(step.device, step.dtype), step)
            changed = torch._foreach_add(before, steps)
            torch._foreach_zero_(parameters)  # shards know no _foreach_copy_
            torch._foreach_add_(parameters, changed)
        return loss


def _beside(scale: Tensor, parameter: Tensor) -> Tensor:
    """Returns ``scale`` in a form that may be multiplied with ``parameter``, sharded or not."""
    if not isinstance(parameter, DTensor):
        return scale
    mesh = parameter.device_mesh
    return DTensor.from_local(scale, mesh, [Replicate()] * mesh.ndim, run_check=False)
