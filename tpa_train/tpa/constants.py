"""Constants of attention outputs that a bias of the values gives as well, which is all that a stock engine may hold.

Attention weights sum to one, so a constant value v of every KV head is a constant of the output: Σ_g O_g v_g, with O_g
the sum of W_O over the query heads of g. Factorization leaves biases b of that kind. Training moves b and W_O apart, by
less than a thousandth of b in a run of minutes; where values fill their heads nothing else can hold the difference, and
a GGUF file then computes logits that are 0.02 to 0.05 off (270M).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from tpa_train.tpa.attention import FactorizedAttention
from tpa_train.tpa.forms.latent import JointValues, LatentValues
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA

CLOSE = 1e-3  # of a bias: so far it moves at no cost. Training may have had a reason to move it further


@torch.no_grad()
def settle_constants(student: Gemma3ForMultimodalLMwithTPA, names: Collection[str]) -> list[int]:
    """Moves biases to the nearest that a bias of the values would give, where one is next to them.

    Args:
        student: the converted model, changed in place.
        names: the parameters that may change.

    Returns:
        The layers that were changed, if only by rounding.
    """
    changed = []
    for layer in student.converted_layers:
        attention = student.layers[layer].self_attn
        if f"layers.{layer}.self_attn.values.bias" in names and _settle(attention):
            changed.append(layer)
    return changed


def constant_of_values(out: Tensor, constant: Tensor, groups: int, width: int) -> tuple[Tensor, Tensor]:
    """Returns the constant value [G·e] that is nearest to a constant of the output, and what maps such to outputs.

    Args:
        out: the output projection, float64 [D, H·e].
        constant: of the output, float64 [D].
        groups: KV heads G.
        width: numbers of a value e.

    Returns:
        v and Σ over each KV head's query heads of ``out``, [D, G·e]: their product is nearest to ``constant``.
    """
    summed = out.unflatten(1, (groups, -1, width)).sum(2).flatten(1)
    return torch.linalg.lstsq(summed, constant[:, None], rcond=1e-6, driver="gelsy").solution[:, 0], summed


def _settle(attention: FactorizedAttention) -> bool:
    values, config = attention.values, attention.config
    if not isinstance(values, (LatentValues, JointValues)) or attention.output_form is not None:
        return False
    width = values.out.weight.shape[1] // config.num_heads
    if width < config.head_dim:  # a number of the values to spare, for a constant of any direction
        return False
    if not (values.bias.isfinite().all() and values.out.weight.isfinite().all()):  # for whoever looks at the results
        return False
    bias = values.bias.cpu().double()
    value, summed = constant_of_values(values.out.weight.cpu().double(), bias, config.num_kv_heads, width)
    nearest = summed @ value
    if not 0 < float((nearest - bias).norm()) <= CLOSE * float(bias.norm()):
        return False
    values.bias.copy_(nearest)
    return True
