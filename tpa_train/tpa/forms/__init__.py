"""How queries, keys and values are written into the cache and read back, one small module per form.

A form is built for one layer and one of Q, K, V; they are chosen separately. The interface:

* keys: ``write(x, rotary)`` returns the tensors that the tokens ``x`` [B, L, D] cache, each [B, L, rows, count] as
  ``LayerSpec.key_entries`` says; ``read(entries, rotary)`` returns keys [B, S, G, d], normalised and rotated. QK-norm
  and RoPE are part of one of the two, so both stay exact. ``norm`` is the original's QK-norm. The cached norms of a
  joint latent depend on how that is rounded: ``write`` does not return them, and ``inverse_norms`` adds them later.
* values: ``write(x)``, ``read(entries, key_entries)`` to [B, S, G, e] with e as the form likes, and ``output(heads)``
  from attention's [B, L, H, e] to [B, L, D]: the projection belongs to the form, because latent values are never
  expanded. Where ``out`` is the original's own W_O, ``keeps_output`` is true.
* queries: ``forward(x)`` returns raw queries [B, L, H, d]; norm and RoPE are the attention's.
* an output projection of its own form (Tucker's): ``forward(heads)`` in place of the values' ``output``.

Tucker parts of a layer share factors: ``shared``, from ``build_shared``, is built first and handed to each.
"""

from __future__ import annotations

from torch import nn

from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.forms.contextual import (
    ConstantAKeys,
    ConstantAValues,
    ConstantBKeys,
    ConstantBValues,
    ContextualKeys,
    ContextualQueries,
    ContextualValues,
)
from tpa_train.tpa.forms.latent import DenseKeys, DenseValues, JointKeys, JointValues, LatentKeys, LatentValues
from tpa_train.tpa.forms.tucker import (
    TuckerKeys,
    TuckerOutput,
    TuckerQueries,
    TuckerShared,
    TuckerValues,
    UnprojectedValues,
    build_shared,
)
from tpa_train.tpa.spec import LayerSpec

__all__ = ["build_keys", "build_output", "build_queries", "build_shared", "build_values"]


def build_keys(config: Gemma3Config, spec: LayerSpec, shared: TuckerShared | None = None) -> nn.Module:
    """Returns the layer's keys in the form and rank that ``spec`` names."""
    match spec.form_k:
        case "dense":
            return DenseKeys(config)
        case "latent":
            return LatentKeys(config, spec.rank_k)
        case "joint":
            return JointKeys(config, spec.rank_k)
        case "contextual":
            return ContextualKeys(config, spec.rank_k)
        case "constant_a":
            return ConstantAKeys(config, spec.rank_k)
        case "constant_b":
            return ConstantBKeys(config, spec.rank_k)
        case "tucker":
            return TuckerKeys(config, spec, shared)
    raise NotImplementedError(spec.form_k)


def build_values(config: Gemma3Config, spec: LayerSpec, shared: TuckerShared | None = None) -> nn.Module:
    """Returns the layer's values in the form and rank that ``spec`` names."""
    match spec.form_v:
        case "dense":
            return DenseValues(config) if spec.form_o == "dense" else UnprojectedValues(config)
        case "latent":
            return LatentValues(config, spec.rank_v)
        case "joint":
            return JointValues(config, spec.rank_v)
        case "contextual":
            return ContextualValues(config, spec.rank_v)
        case "constant_a":
            return ConstantAValues(config, spec.rank_v)
        case "constant_b":
            return ConstantBValues(config, spec.rank_v)
        case "tucker":
            return TuckerValues(config, spec, shared)
    raise NotImplementedError(spec.form_v)


def build_queries(config: Gemma3Config, spec: LayerSpec, shared: TuckerShared | None = None) -> nn.Module | None:
    """Returns the layer's queries in the form and rank that ``spec`` names; None where they stay dense."""
    match spec.form_q:
        case "dense":
            return None
        case "contextual":
            return ContextualQueries(config, spec.rank_q)
        case "tucker":
            return TuckerQueries(config, spec, shared)
    raise NotImplementedError(spec.form_q)


def build_output(config: Gemma3Config, spec: LayerSpec, shared: TuckerShared | None = None) -> nn.Module | None:
    """Returns the layer's output projection where it has a form of its own; None where it belongs to the values."""
    return TuckerOutput(config, spec, shared) if spec.form_o == "tucker" else None
