"""The built-in variants of ``benchmark.py recovery``: each group varies one thing of the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from tpa_train.distillation.modules import SCOPES
from tpa_train.recipes import option_keys
from tpa_train.settings import RunSettings

LONGEST_ROW = 16_384  # tokens


@dataclass(frozen=True)
class Variant:
    """A name and the options of train.py by which it differs from the base."""

    name: str
    group: str
    options: tuple[str, ...] = ()


BASE = Variant("base", "base")


def _stages(base: RunSettings) -> list[Variant]:
    """Lengths of the layer-wise stage, the end-to-end stage taking the rest of the tokens."""
    recipe, found = base.recipe, []
    total = recipe.layerwise.tokens + recipe.distill.tokens
    for tokens in (0, recipe.layerwise.tokens // 2):
        if tokens != recipe.layerwise.tokens:
            own = (f"recipe.layerwise.tokens={tokens}", f"recipe.distill.tokens={total - tokens}")
            found.append(Variant(f"layer-wise {tokens:,} tokens", "stages", own))
    return found


def _times(option: str, value: float, factors: tuple[float, ...], group: str) -> list[Variant]:
    leaf = option.rpartition(".")[2]
    return [Variant(f"{leaf} ×{factor:.2g}", group, (f"{option}={value * factor:.6g}",)) for factor in factors]


def _lr_factors(base: RunSettings) -> list[Variant]:
    return _times("recipe.distill.lr_factors", base.recipe.distill.lr_factors, (1 / 3, 3), "lr_factors")


def _lr_layerwise(base: RunSettings) -> list[Variant]:
    found = _times("recipe.layerwise.lr_factors", base.recipe.layerwise.lr_factors, (1 / 3, 3), "lr_layerwise")
    return [Variant(f"layer-wise {v.name}", v.group, v.options) for v in found]


def _lr_original(base: RunSettings) -> list[Variant]:
    return _times("recipe.distill.lr_original", base.recipe.distill.lr_original, (0, 1 / 3, 3), "lr_original")


def _scope(base: RunSettings) -> list[Variant]:
    others = [scope for scope in SCOPES if scope != base.recipe.distill.scope]
    return [Variant(f"scope {scope}", "scope", (f"recipe.distill.scope={scope}",)) for scope in others]


def _context(base: RunSettings) -> list[Variant]:
    """Tokens of a row, at equal tokens a step."""
    step, found = base.trainer.context * base.trainer.batch_size, []
    for rows in (8, 4, 2, 1):
        context = step // rows
        if step % rows == 0 and rows != base.trainer.batch_size and context <= LONGEST_ROW:
            own = (f"trainer.context={context}", f"trainer.batch_size={rows}")
            found.append(Variant(f"rows of {context:,}", "context", own))
    return found


def _hidden(base: RunSettings) -> list[Variant]:
    others = [weight for weight in (0.0, 0.1, 1.0) if weight != base.recipe.distill.hidden_weight]
    return [Variant(f"hidden_weight {w:g}", "hidden", (f"recipe.distill.hidden_weight={w:g}",)) for w in others]


def _schedule(base: RunSettings) -> list[Variant]:
    others = [share for share in (0.0, 0.05, 0.3) if share != base.recipe.distill.final_lr]
    return [Variant(f"final_lr {s:g}", "schedule", (f"recipe.distill.final_lr={s:g}",)) for s in others]


def _betas(base: RunSettings) -> list[Variant]:
    others = [b for b in ((0.9, 0.95), (0.9, 0.99), (0.9, 0.999), (0.8, 0.95)) if b != tuple(base.recipe.distill.betas)]
    return [Variant(f"betas {a:g}, {b:g}", "betas", (f"recipe.distill.betas=[{a:g},{b:g}]",)) for a, b in others]


def _average(base: RunSettings) -> list[Variant]:
    others = [decay for decay in (0.9, 0.97, 0.99) if decay != base.recipe.distill.ema]
    return [Variant(f"ema {decay:g}", "average", (f"recipe.distill.ema={decay:g}",)) for decay in others]


def _copies(base: RunSettings) -> list[Variant]:
    """Shares of the rows in which a part of the text comes again, beyond the window."""
    others = [share for share in (0.1, 0.3, 1.0) if share != base.data.copy_share]
    return [Variant(f"copy_share {share:g}", "copies", (f"data.copy_share={share:g}",)) for share in others]


def _divergence(base: RunSettings) -> list[Variant]:
    options = ("divergence=reverse_kl", "divergence=jsd", "temperature=2", "ce_weight=0.1")
    return [Variant(option.replace("=", " "), "divergence", (f"recipe.distill.{option}",)) for option in options]


def _seeds(base: RunSettings) -> list[Variant]:
    """Other orders of the data: how far apart two runs of the same recipe are."""
    return [
        Variant(f"seed {seed}", "seeds", (f"seed={seed}", f"data.seed={seed}"))
        for seed in (base.seed + 1, base.seed + 2)
    ]


GROUPS = {
    "seeds": _seeds, "stages": _stages, "lr_factors": _lr_factors, "lr_layerwise": _lr_layerwise,
    "lr_original": _lr_original, "scope": _scope, "context": _context, "hidden": _hidden, "schedule": _schedule,
    "betas": _betas, "average": _average, "copies": _copies, "divergence": _divergence,
}  # fmt: skip


def built_in(base: RunSettings, groups: list[str]) -> list[Variant]:
    """Returns the variants of ``groups`` around ``base``; those of options that the schema does not have are left out.

    Args:
        base: what the variants differ from.
        groups: names out of ``GROUPS``.
    """
    known = option_keys()
    variants = [variant for group in groups for variant in GROUPS[group](base)]
    return [v for v in variants if all(option.partition("=")[0] in known for option in v.options)]
