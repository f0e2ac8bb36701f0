"""What else could be had for the same bytes: the points that a frontier is drawn against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tpa_train.errors import UserError
from tpa_train.factorization.allocation import Budget, layers_to_convert, uniform_specs, validate_budget
from tpa_train.factorization.sensitivity import output_kl
from tpa_train.factorization.solutions import build_student
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.pipeline import Session, choose_student, measure, sensitivity_text
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, dense_specs

DENSE_BITS = (8, 4, 3)  # quantized caches that people use today
SINGLE_BITS = (16, 8, 4)

Peer = tuple[str, str, Gemma3ForMultimodalLMwithTPA | list[LayerSpec]]


def frontier_peers(session: Session, budgets: list[Budget]) -> Iterator[Peer]:
    """Yields (name, mix, model or all-dense specifications), one at a time; all are one-shot.

    Dense caches at 8, 4 and 3 bits (global layers only, and all layers). For each budget and width (16, 8, 4 bits),
    latents of one rank for K and V in every layer ("uniform": the better of global layers only and all), and latents
    whose ranks are allocated at that width ("ranks"; at 16 bits, rank alone), where that can meet the budget.

    Args:
        session: of the sweep's jobs; its calibration is reused.
        budgets: of the jobs.
    """
    config = session.config
    yield from dense_peers(config)
    rounded = replace(session.budget, bits=(16, 8), forms=("latent",))  # calibrates every layer
    measured = measure(session, {}, {}, rounded)
    for budget in sorted(set(budgets), key=lambda b: b.cache_ratio):
        for bits in SINGLE_BITS:
            name, ratio = "bf16" if bits == 16 else f"int{bits}", f"÷{budget.cache_ratio:g}"
            specs = better_uniform(session, budget, bits)
            if specs is not None:
                student = build_student(session.teacher, measured.bases, specs)
                yield f"uniform {name} {ratio}", f"uniform ranks, {name}", student
            single = replace(budget, bits=(bits,), forms=("latent",))
            if not can_be_met(config, single):
                continue
            student, _ = choose_student(session, measure(session, {}, {}, single), single)
            yield f"ranks {name} {ratio}", f"ranks, {name}", student


def can_be_met(config: Gemma3Config, budget: Budget) -> bool:
    """Returns whether ``budget`` can be met; one that several widths share need not be at one of them."""
    try:
        validate_budget(config, budget)
    except UserError:
        return False
    return True


def dense_peers(config: Gemma3Config) -> Iterator[Peer]:
    """Yields the original with its cache in fewer bits."""
    for bits in DENSE_BITS:
        whole = [replace(spec, bits_k=bits, bits_v=bits) for spec in dense_specs(config)]
        mixed = [s if config.is_global(i) else d for i, (s, d) in enumerate(zip(whole, dense_specs(config)))]  # noqa: B905
        yield f"dense int{bits}, global layers", f"dense int{bits}, global", mixed
        yield f"dense int{bits}, all layers", f"dense int{bits}, all", whole


def better_uniform(session: Session, budget: Budget, bits: int) -> list[LayerSpec] | None:
    """Returns the uniform specifications that cost the output less, of global layers only and of all layers."""
    config, bases = session.config, session.measured.bases
    globals_ = [i for i in range(config.num_layers) if config.is_global(i)]
    sets = [globals_, layers_to_convert(config, replace(budget, bits=(16, 8)))]
    found = [s for layers in sets if layers and (s := uniform_specs(config, budget, layers, bits)) is not None]
    if len(found) < 2:
        return found[0] if found else None
    text = sensitivity_text(session)
    with session.machine.autocast():
        kls = [output_kl(session.teacher, build_student(session.teacher, bases, specs), text) for specs in found]
    return found[kls.index(min(kls))]
