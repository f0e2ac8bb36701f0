"""Moments of the keys or values of *all* KV heads together: what factors that heads share are solved from.

The separate latent form needs one head at a time; a constant-A, Tucker or joint factor mixes heads, so their
correlations count. One weight a token serves all heads, and one scale (the root mean square over all heads) divides a
token's keys, so that keys stay linear in the layer's input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tpa_train.factorization.calibration import LayerMoments
from tpa_train.factorization.latent import output_heads
from tpa_train.gemma3.attention import Attention


@dataclass
class HeadMoments:
    """Keys or values of one layer. G KV heads, d head_dim; float64. An error δ [G, d] costs δ · metric · δ."""

    second: Tensor  # [G, d, G, d], weighted second moment; of values it is centred (a covariance)
    metric: Tensor  # [G, d, G, d], symmetric, positive semi-definite
    mean: Tensor  # [G, d], weighted; zero where nothing is centred

    @classmethod
    def of_weights(cls, weight: Tensor) -> HeadMoments:
        """Returns the moments without data: white inputs and a plain squared error.

        Args:
            weight: W_K or W_V [G, d, D].
        """
        weight = weight.detach().double().cpu()
        groups, width, _ = weight.shape
        second = torch.einsum("gdi,hei->gdhe", weight, weight)
        metric = torch.eye(groups * width, dtype=torch.float64).view(groups, width, groups, width)
        return cls(second, metric, torch.zeros(groups, width, dtype=torch.float64))


@dataclass
class ActivationSample:
    """A sample of one layer's tokens, for fits that have no closed form."""

    x: Tensor  # [T, D] float32, the attention's input (after the input norm)
    key_weight: Tensor  # [T], how much an error of the token's keys counts
    value_weight: Tensor  # [T]

    @classmethod
    def of(cls, moments: LayerMoments) -> ActivationSample:
        """Returns the calibrated sample of a layer."""
        return cls(moments.sample_x, moments.sample_key_weight, moments.sample_value_weight)


def key_metric(moments: LayerMoments, tokens: int) -> Tensor:
    """Returns the Fisher metric [G, d, G, d] of errors of k / s, in nats a token.

    Calibration gathers it for k̃ = k / rms_g; the mean ratio of the two scales carries it over, head by head.
    """
    ratio = (moments.norm_ratio / moments.shared_key_weight).sqrt()
    return moments.cross_fisher / tokens * ratio[:, None, None, None] * ratio[None, None, :, None]


def key_moments(moments: LayerMoments, tokens: int) -> HeadMoments:
    """Returns the moments of a layer's keys of all heads, k / s, in the Fisher metric of the model's output."""
    groups, width = moments.key_first.shape
    second = moments.shared_key_second / moments.shared_key_weight
    size = groups * width
    block = second[:size, :size].reshape(groups, width, groups, width)
    return HeadMoments(block, key_metric(moments, tokens), torch.zeros(groups, width, dtype=torch.float64))


def value_metric(attention: Attention) -> Tensor:
    """Returns Σ_h W_O^hᵀ W_O^h over each group's heads, block diagonal [G, d, G, d]."""
    heads = output_heads(attention)
    own = torch.einsum("ghod,ghoe->gde", heads, heads)
    groups, width, _ = own.shape
    metric = torch.zeros(groups, width, groups, width, dtype=torch.float64)
    for head in range(groups):
        metric[head, :, head] = own[head]
    return metric


def value_moments(attention: Attention, moments: LayerMoments) -> HeadMoments:
    """Returns the covariance of a layer's values of all heads, in the metric of the layer's output."""
    groups, width = moments.value_first.shape
    mean, covariance = centred_values(moments)
    size = groups * width
    block = covariance[size:, size:].reshape(groups, width, groups, width)
    return HeadMoments(block, value_metric(attention), mean[size:].reshape(groups, width))


def centred_values(moments: LayerMoments) -> tuple[Tensor, Tensor]:
    """Returns mean [2Gd] and covariance [2Gd, 2Gd] of y = [k; v] under the values' weights."""
    mean = moments.shared_value_first / moments.shared_value_weight
    return mean, moments.shared_value_second / moments.shared_value_weight - mean[:, None] * mean[None]
