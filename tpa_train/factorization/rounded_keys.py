"""What it costs to round keys that are cached rotated, group by group.

Such keys keep all their numbers; a budget decides in how many bits each group of 32 of them is stored. On the 270M's
global layers 4 bits for all cost a KL of 0.017, and as many bytes 0.004 where slow pairs get more bits than fast ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tpa_train.factorization.calibration import LayerMoments
from tpa_train.gemma3.attention import Attention
from tpa_train.gemma3.layers import rotary_table
from tpa_train.tpa.quantization import BITS, GROUP, fake_quantize


@dataclass(frozen=True)
class RoundingCosts:
    """``of_group``: by width, what each group of 32 numbers of a key costs, relative to one another."""

    of_group: dict[int, list[float]]

    @classmethod
    @torch.no_grad()
    def of(cls, attention: Attention, moments: LayerMoments) -> RoundingCosts:
        """Measures rounding errors on the calibration's sample, in the metric of the model's output.

        The metric (the Fisher information of keys before RoPE) is turned like the keys: over many positions, both
        numbers of a pair share what they have of it.

        Args:
            attention: the dense layer.
            moments: of the layer.
        """
        config, weight = attention.config, attention.k_proj.weight
        x = moments.sample_x.to(weight.device, weight.dtype)
        positions = torch.arange(len(x), device=weight.device)
        keys, _ = attention.write(x[None], rotary_table(config, attention.kind, positions))
        keys = keys[0].float().cpu()  # [T, G, d]
        gain = 1.0 + attention.k_norm.weight.detach().double().cpu()
        fisher = moments.key_fisher.diagonal(dim1=-2, dim2=-1).cpu() / gain.square().clamp_min(1e-12)
        fisher = fisher.unflatten(-1, (2, -1)).mean(-2).repeat(1, 2)  # [G, d]
        tokens = moments.sample_key_weight.double().cpu()
        found = {}
        for bits in BITS:
            error = (fake_quantize(keys, bits) - keys).double().square()
            cost = torch.einsum("t,tgd,gd->d", tokens, error, fisher)
            found[bits] = [float(part.sum()) for part in cost.split(GROUP)]
        return cls(found)

    def total(self, bits: Sequence[int]) -> float:
        """Returns what a key costs with ``bits`` for its groups."""
        return sum(self.of_group[b][i] for i, b in enumerate(bits))
