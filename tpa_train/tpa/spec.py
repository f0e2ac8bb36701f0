"""What a converted model looks like, as data: the form and rank of keys and values in every layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.quantization import check_bits, entry_bytes

FORMS = ("dense", "latent")
FORMAT_VERSION = 1  # of exported folders; raised when an older reader could not load a newer folder


@dataclass(frozen=True)
class LayerSpec:
    """Form and rank of one layer's keys and values. In the dense form the rank is head_dim."""

    form_k: str = "dense"
    rank_k: int = 0
    form_v: str = "dense"
    rank_v: int = 0
    bits: int = 16  # of every cached number; 16 means the cache's own floating-point type

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for form in (self.form_k, self.form_v):
            if form not in FORMS:
                raise UserError(f"unknown TPA form '{form}'{nearest(form, FORMS)}")

    @property
    def converted(self) -> bool:
        return self.form_k != "dense" or self.form_v != "dense" or self.bits != 16

    def bytes_per_token(self, config: Gemma3Config) -> int:
        """Bytes that one token caches in this layer: G·d numbers each for dense K and V, G·r for latent ones."""
        k = config.head_dim if self.form_k == "dense" else self.rank_k
        v = config.head_dim if self.form_v == "dense" else self.rank_v
        return config.num_kv_heads * (entry_bytes(k, self.bits) + entry_bytes(v, self.bits))


def dense_specs(config: Gemma3Config) -> list[LayerSpec]:
    """Returns the specification of the original model."""
    return [LayerSpec(rank_k=config.head_dim, rank_v=config.head_dim) for _ in range(config.num_layers)]


def cache_bytes(config: Gemma3Config, specs: list[LayerSpec], context: int) -> int:
    """Returns the cache bytes of one sequence at ``context`` tokens: Σ n_l(L)·c_l (DESIGN §2), windows included."""
    return sum(
        config.cached_tokens(index, context) * spec.bytes_per_token(config) for index, spec in enumerate(specs)
    )


def specs_to_dicts(specs: list[LayerSpec]) -> list[dict]:
    return [dataclasses.asdict(spec) for spec in specs]
