"""What a converted model looks like, as data: forms, ranks and cache widths of every layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

from tpa_train.errors import UserError, nearest
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.tpa.entries import Bits, Entry, check_widths, describe_bits

# constant_a and constant_b are the contextual form with a constant A or B; a joint latent serves
# keys and values at once.
KEY_VALUE_FORMS = ("dense", "latent", "joint", "contextual", "constant_a", "constant_b", "tucker")
QUERY_FORMS = ("dense", "contextual", "tucker")
OUTPUT_FORMS = ("dense", "tucker")
FORMAT_VERSION = 4  # of exported folders; raised when an older reader could not load a newer folder
VISION_VERSION = 3  # of folders with a vision side in which no joint latent caches norms, which older readers load
TEXT_VERSION = 2  # of those without a vision side
NORM_SHARE = 32  # a joint latent caches norms where they add at most this part of its bytes


@dataclass(frozen=True)
class LayerSpec:
    """Forms, ranks and cache widths of one layer. In the dense form the rank is head_dim.

    ``rank``: r of a latent, R of the contextual forms, r₂ (feature mode) of Tucker.
    ``heads``: r_h, the rank of Tucker's head mode; 0 leaves the mode whole (r_h = G).
    ``hidden``: r₁, the rank of Tucker's hidden mode, shared by all Tucker parts of the layer; 0 leaves it whole (D).
    ``shared_features``: whether all Tucker parts of the layer share one U_feat (their ranks are then equal).
    ``rank_o``: r₂ of a Tucker output projection of dense values; of Tucker values it is ``rank_v``.
    ``bits``: widths of the cached numbers (``tpa.entries.Bits``); ``bits_v`` are ``bits_k`` where left out.
    ``cached_norm``: whether a joint latent has 1/rms of every KV head's key cached beside it, G numbers of 16 bits.
    Otherwise its keys have to be rebuilt for their norms.
    """

    form_k: str = "dense"
    rank_k: int = 0
    form_v: str = "dense"
    rank_v: int = 0
    bits_k: Bits = 16
    bits_v: Bits | None = None
    form_q: str = "dense"
    rank_q: int = 0
    form_o: str = "dense"
    heads_k: int = 0
    heads_v: int = 0
    hidden: int = 0
    shared_features: bool = False
    rank_o: int = 0
    cached_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("bits_k", "bits_v"):
            bits = getattr(self, name)
            if isinstance(bits, list):
                object.__setattr__(self, name, tuple(bits))
        if self.bits_v is None:
            object.__setattr__(self, "bits_v", self.bits_k)
        check_widths(self.bits_k)
        check_widths(self.bits_v)
        for form, forms in (
            (self.form_k, KEY_VALUE_FORMS), (self.form_v, KEY_VALUE_FORMS), (self.form_q, QUERY_FORMS),
            (self.form_o, OUTPUT_FORMS),
        ):  # fmt: skip
            if form not in forms:
                raise UserError(f"unknown TPA form '{form}'{nearest(form, forms)}")
        joint = "joint" in (self.form_k, self.form_v)
        if joint and (self.form_k, self.rank_k) != (self.form_v, self.rank_v):
            raise UserError("a joint latent serves keys and values at once: both need the form 'joint' and one rank.")
        if self.cached_norm and not joint:
            raise UserError("cached_norm is of joint latents; all other forms' norms have their place already.")

    @property
    def converted(self) -> bool:
        forms = {self.form_k, self.form_v, self.form_q, self.form_o}
        return forms != {"dense"} or (self.bits_k, self.bits_v) != (16, 16)

    def describe(self) -> str:
        """Returns one line for a person, e.g. ``K latent 96 @ 8+4×2   V latent 128 @ 4``."""
        parts = [("K", self.form_k, self.rank_k, self.bits_k), ("V", self.form_v, self.rank_v, self.bits_v)]
        if self.form_q != "dense":
            parts.insert(0, ("Q", self.form_q, self.rank_q, 16))
        text = "   ".join(f"{name} {form} {rank} @ {describe_bits(bits)}" for name, form, rank, bits in parts)
        return text + "   cached norms" * self.cached_norm

    def key_entries(self, config: Gemma3Config) -> list[Entry]:
        """Returns what keys cache a token. Per-token coefficients and norms (few, and sensitive) stay at 16 bits."""
        found = _entries(config, self.form_k, self.rank_k, self.heads_k, self.bits_k, keys=True)
        return [*found, Entry(1, config.num_kv_heads)] if self.cached_norm else found

    def value_entries(self, config: Gemma3Config) -> list[Entry]:
        """Returns what values cache a token; nothing for a joint latent, which the keys cache."""
        return _entries(config, self.form_v, self.rank_v, self.heads_v, self.bits_v, keys=False)

    def bytes_per_token(self, config: Gemma3Config) -> int:
        """Returns the bytes that one token caches in this layer, in a 16-bit cache."""
        return sum(entry.nbytes for entry in self.key_entries(config) + self.value_entries(config))

    def with_norms(self, config: Gemma3Config, layer: int) -> LayerSpec:
        """Returns what to make of this specification in ``layer``: with norms cached where that pays.

        It does for a joint latent in a global layer, where U then goes into the queries instead of the keys
        (``decode.turning``), if norms add at most 1/``NORM_SHARE`` of its bytes.
        """
        plain = replace(self, cached_norm=False)
        if self.form_k != "joint" or not config.is_global(layer):
            return plain
        norms = Entry(1, config.num_kv_heads).nbytes
        return replace(self, cached_norm=NORM_SHARE * norms <= plain.bytes_per_token(config))


def _entries(config: Gemma3Config, form: str, rank: int, heads: int, bits: Bits, keys: bool) -> list[Entry]:
    groups, width = config.num_kv_heads, config.head_dim
    heads = heads or groups
    norms = [Entry(1, groups)] if keys else []
    match form:
        case "dense":
            entries = [Entry(groups, width, bits)]
        case "latent":
            entries = [Entry(groups, rank, bits)]
        case "joint":
            entries = [Entry(1, rank, bits)] if keys else []
        case "contextual":  # a' [R, G] and b' [R, d]: R(G + d) numbers
            entries = [Entry(rank, groups), Entry(rank, width, bits)]
        case "constant_a":  # b' [R, d] and, for keys, 1/rms of every head
            entries = [Entry(rank, width, bits), *norms]
        case "constant_b":  # a' [G, R]: the latent form with one U for all heads
            entries = [Entry(groups, rank, bits)]
        case "tucker":  # core activations [r_h, r₂]; norms only where heads are mixed, else they are divided out
            entries = [Entry(heads, rank, bits), *(norms if heads < groups else [])]
    for entry in entries:
        check_widths(entry.bits, entry.count)
    return entries


def dense_specs(config: Gemma3Config) -> list[LayerSpec]:
    """Returns the specification of the original model."""
    return [LayerSpec(rank_k=config.head_dim, rank_v=config.head_dim) for _ in range(config.num_layers)]


def cache_bytes(config: Gemma3Config, specs: list[LayerSpec], context: int) -> int:
    """Returns the cache bytes of one sequence at ``context`` tokens: Σ n_l(L)·c_l, windows included."""
    return sum(config.cached_tokens(index, context) * spec.bytes_per_token(config) for index, spec in enumerate(specs))


def specs_to_dicts(specs: list[LayerSpec]) -> list[dict]:
    """Returns specifications as JSON has them; what older versions do not know is left out where it says nothing."""
    found = [dataclasses.asdict(spec) for spec in specs]
    for values in found:
        if not values["cached_norm"]:
            del values["cached_norm"]
    return found
