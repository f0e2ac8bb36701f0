"""Latent factors in closed form: the best rank-r keys and values under data-aware metrics.

Minimising E‖M^½(k − UAx)‖² over rank-r maps has the solution of a principal component analysis in the metric: with E
the top-r eigenvectors of M^½ C M^½, U = M^-½ E and A = Eᵀ M^½ W. The metric of keys measures the model's output, that
of values the layer's output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_train.factorization.calibration import LayerMoments
from tpa_train.gemma3.attention import Attention

SMALLEST_METRIC = 1e-12  # nats; a direction that never mattered on the calibration text still has a length
SMALLEST_SPREAD = 1e-6  # of the first coordinate's root energy
EIGENVALUE_FLOOR = 1e-10  # of the largest; a metric that ignores a direction must still be invertible


def symmetric_power(matrix: Tensor, power: float) -> Tensor:
    """Returns ``matrix`` [..., n, n] (symmetric, positive semi-definite) to ``power``, eigenvalues floored."""
    values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
    floor = values.amax(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny) * EIGENVALUE_FLOOR
    return (vectors * values.clamp_min(floor).pow(power)[..., None, :]) @ vectors.mT


@dataclass
class Basis:
    """Directions of one layer's keys or values, most important first. G KV heads, d head_dim; float64."""

    energies: Tensor  # [G, d], squared error that each direction carries: a rank-r tail sum is the error of rank r
    up: Tensor  # [G, d, d]; the first r columns are U
    down: Tensor  # [G, d, d]; the first r rows are Eᵀ M^½, so A = down[:r] W
    mean: Tensor  # [G, d], what the vectors are on average

    spread: Tensor  # [G, d], standard deviation of each coordinate

    @classmethod
    def from_metric(cls, second: Tensor, metric: Tensor, mean: Tensor, centred: bool = False) -> Basis:
        """Solves for all ranks at once, from C [G, d, d], M [G, d, d] and the mean [G, d].

        ``centred``: C is a covariance, without the mean.
        """
        root, inverse = symmetric_power(metric, 0.5), symmetric_power(metric, -0.5)
        values, vectors = torch.linalg.eigh(root @ (0.5 * (second + second.mT)) @ root)
        values, vectors = values.flip(-1).clamp_min(0), vectors.flip(-1)
        # An eigenvector's sign is arbitrary; fix it so that two machines agree.
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        vectors = vectors * largest.sign()
        down = vectors.mT @ root
        center = torch.einsum("grd,gd->gr", down, mean)
        variance = values if centred else values - center.square()
        # A coordinate that never moved may have any scale; the floor keeps it from dividing by zero.
        floor = values.amax(-1, keepdim=True) * SMALLEST_SPREAD**2 + torch.finfo(values.dtype).tiny
        return cls(values, inverse @ vectors, down, mean, variance.clamp_min(floor).sqrt())

    def scaled(self, rank: int) -> tuple[Tensor, Tensor]:
        """Returns U [G, d, r] and Eᵀ M^½ [G, r, d] with latents of unit spread."""
        spread = self.spread[:, :rank]
        return self.up[:, :, :rank] * spread[:, None, :], self.down[:, :rank] / spread[:, :, None]

    def tail(self, rank: int) -> float:
        """Returns the error that rank ``rank`` leaves, summed over KV heads."""
        return float(self.energies[:, rank:].sum())


def key_basis(moments: LayerMoments, tokens: int) -> Basis:
    """Returns the directions of a layer's keys, in the metric of the model's output (its Fisher information).

    Energies are nats a token: half the tail sum is the KL that a truncation costs, to second order and if the errors of
    different tokens were independent.

    Args:
        moments: of the layer.
        tokens: that they were gathered on.
    """
    weight = moments.key_weight
    metric = moments.key_fisher / tokens
    metric = metric + SMALLEST_METRIC * torch.eye(metric.shape[-1], dtype=metric.dtype)
    return Basis.from_metric(
        moments.key_second / weight[:, None, None], metric, moments.key_first / weight[:, None]
    )


def output_heads(attention: Attention) -> Tensor:
    """Returns W_O per query head, [G, H/G, D, d] in float64."""
    config = attention.config
    weight = attention.o_proj.weight.detach().double().cpu().unflatten(1, (config.num_kv_heads, -1, config.head_dim))
    return weight.permute(1, 2, 0, 3)


def value_basis(attention: Attention, moments: LayerMoments) -> Basis:
    """Returns the directions of a layer's values around their mean; M = Σ_h W_O^hᵀ W_O^h over a group's heads."""
    heads = output_heads(attention)
    mean, covariance = moments.value_covariance()
    return Basis.from_metric(covariance, torch.einsum("ghod,ghoe->gde", heads, heads), mean, centred=True)


def latent_key_factors(attention: Attention, basis: Basis, rank: int) -> dict[str, Tensor]:
    """Returns ``LatentKeys``' parameters at ``rank`` by their names."""
    config = attention.config
    weight = attention.k_proj.weight.detach().double().cpu().unflatten(0, (config.num_kv_heads, config.head_dim))
    up, project = basis.scaled(rank)
    return {
        "keys.up": up,
        "keys.down.weight": (project @ weight).flatten(0, 1),
        "keys.center": torch.einsum("grd,gd->gr", project, basis.mean),
    }


def latent_value_factors(attention: Attention, basis: Basis, rank: int) -> dict[str, Tensor]:
    """Returns ``LatentValues``' parameters at ``rank`` by their names; W_O U per query head, and the mean as a bias."""
    config = attention.config
    weight = attention.v_proj.weight.detach().double().cpu().unflatten(0, (config.num_kv_heads, config.head_dim))
    up, project = basis.scaled(rank)
    heads = output_heads(attention)
    out = torch.einsum("ghod,gdr->oghr", heads, up)
    return {
        "values.down.weight": (project @ weight).flatten(0, 1),
        "values.out.weight": out.flatten(1),
        "values.center": torch.einsum("grd,gd->gr", project, basis.mean),
        # Latents are read without their center, so the layer's output owes the whole mean.
        "values.bias": torch.einsum("ghod,gd->o", heads, basis.mean),
    }


def output_metric(moments: LayerMoments, tokens: int) -> Tensor:
    """Returns F^½ [D, D] (float32) of a layer's attention output: ‖F^½ δ‖²/2 is the KL of an error δ, in nats a token.

    Args:
        moments: of the layer.
        tokens: that they were gathered on.
    """
    fisher = moments.output_fisher / tokens
    return symmetric_power(fisher + SMALLEST_METRIC * torch.eye(fisher.shape[-1], dtype=fisher.dtype), 0.5).float()
