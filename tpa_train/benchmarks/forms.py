"""Which form wins where: every form at the bytes of the contextual one, one-shot and after equal recovery.

For the global layers of a model with several KV heads. At each rank R of the contextual form, the others get the same
bytes a token (K and V apart, joint and mixed together) and the best rank that fits; everything is cached in bfloat16.
"""

from __future__ import annotations

import itertools
import json
import statistics
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tpa_train.checkpoints import load_pretrained
from tpa_train.errors import UserError, nearest
from tpa_train.evaluation.atomic import write_text
from tpa_train.evaluation.suites import Evaluator
from tpa_train.factorization.allocation import AUTO, Budget, allocate, plan_probes
from tpa_train.factorization.contextual_factorization import contextual_error, per_token_error
from tpa_train.factorization.sensitivity import measure_sensitivity, output_kl
from tpa_train.factorization.solutions import Bases, build_student
from tpa_train.factorization.stacked import ActivationSample
from tpa_train.gemma3.config import Gemma3Config
from tpa_train.gemma3.model import Gemma3ForCausalLM
from tpa_train.pipeline import (
    Measured,
    Session,
    calibrate,
    choices_of,
    choose_balance,
    convert,
    sensitivity_text,
    student_factors,
)
from tpa_train.recipes import compose
from tpa_train.recovery import measure_layer_errors, recover
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import LayerSpec, cache_bytes, dense_specs, specs_to_dicts

COMPARED = ("contextual", "constant_a", "latent", "joint", "tucker", "mixed")


@dataclass
class FormsSettings:
    """Options of ``benchmark.py forms``."""

    model: str = field(metadata={"help": "a checkpoint with several KV heads (scripts/pretrain.py makes one)"})
    data: str = field(metadata={"help": "text to calibrate and recover on, as data.path of train.py"})
    forms: list[str] = field(
        default_factory=lambda: list(COMPARED),
        metadata={"help": "of " + ", ".join(COMPARED) + "; repeat the option for several"},
    )
    ranks: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "R of the contextual form"})
    seeds: int = field(default=3, metadata={"help": "repetitions: calibration, data order and training"})
    context: int = field(default=2048, metadata={"help": "tokens of a row"})
    batch_size: int = field(default=8, metadata={"help": "rows a step"})
    calibration_tokens: int = field(default=131_072, metadata={"help": "tokens to calibrate on"})
    layerwise_tokens: int = field(default=262_144, metadata={"help": "tokens of the layer-wise stage"})
    distill_tokens: int = field(default=524_288, metadata={"help": "tokens of the end-to-end stage"})
    evaluation_tokens: int = field(default=65_536, metadata={"help": "held-out tokens"})
    solved: str | None = field(
        default=None, metadata={"help": "folder that keeps the solved factors, to recover them later or elsewhere"}
    )


@dataclass
class Cell:
    """One form at the bytes of one R: what it became, its factors, and what it costs before any recovery."""

    rank: int
    form: str
    specs: list[LayerSpec]
    factors: dict[str, Tensor]
    row: dict[str, Any]


def run(settings: FormsSettings) -> list[dict[str, Any]]:
    """Returns rows of each cell: every layer alone and one-shot, all layers before and after recovery, by seed; means.

    Raises:
        UserError: the model has one KV head, or an option is at fault.
    """
    for form in settings.forms:
        if form not in COMPARED:
            raise UserError(f"forms={form} is no form of this benchmark{nearest(form, COMPARED)}")
    with tempfile.TemporaryDirectory() as folder:
        session = _session(settings, 0, Path(folder), None)
        rows, cells, metrics = solve(session, settings)
        evaluator = _evaluator(session, settings)
        for cell in cells:
            rows += _one_shot(session, evaluator, cell)
        for seed in range(settings.seeds):
            if seed > 0:
                session = _session(settings, seed, Path(folder), session.teacher)
            evaluator = _evaluator(session, settings)
            for cell in cells:
                rows.append(_recovered(session, settings, evaluator, cell, metrics, seed))
                _say(rows[-1])
    return rows + summary(rows)


def _say(row: dict[str, Any]) -> None:
    shown = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items() if not isinstance(v, dict)}
    tqdm.write("  ".join(f"{k}={v}" for k, v in shown.items()))


def _session(settings: FormsSettings, seed: int, folder: Path, teacher: Gemma3ForCausalLM | None) -> Session:
    device = "gpu" if torch.cuda.is_available() else "cpu"
    composed = compose(
        [
            f"trainer={device}", f"model.path={settings.model}", "data=text", f"data.path={settings.data}",
            "data.join_documents=true", f"data.seed={seed}", f"seed={seed}", "trainer.compile=false",
            f"trainer.context={settings.context}", f"trainer.batch_size={settings.batch_size}",
            f"recipe.calibration.tokens={settings.calibration_tokens}",
            f"recipe.layerwise.tokens={settings.layerwise_tokens}", f"recipe.distill.tokens={settings.distill_tokens}",
            "recipe.distill.scope=all", "recipe.distill.kl_every=1",
        ]
    )  # fmt: skip
    if teacher is None:
        probe = Session(composed, folder)
        teacher = load_pretrained(settings.model, dtype=probe.machine.dtype)
    return Session(composed, folder, teacher)


def _evaluator(session: Session, settings: FormsSettings) -> Evaluator:
    rows = session.data.heldout_rows(settings.evaluation_tokens)
    return Evaluator(session.teacher, rows, {}, autocast=session.machine.autocast, progress=False)


def solve(session: Session, settings: FormsSettings) -> tuple[list[dict[str, Any]], list[Cell], dict[int, Tensor]]:
    """Returns the one-shot rows, the cells to recover, and the layers' output metrics.

    With ``settings.solved`` all of it is kept in that folder, and read from there the next time: solving wants a CPU
    for minutes, recovering wants an accelerator.
    """
    kept = Path(settings.solved) / "cells.json" if settings.solved else None
    if kept is not None and kept.exists():
        return _read_solved(kept, settings.forms)
    config = session.config
    layers = [i for i in range(config.num_layers) if config.is_global(i)]
    calibration, cost = calibrate(session, layers)
    measured = Measured(Bases.of(session.teacher, calibration), {}, cost)
    if {"joint", "mixed"} & set(settings.forms):
        _measure_all(session, measured, layers)
    rows, cells, metrics = [], [], {}
    for rank in settings.ranks:
        for form in settings.forms:
            base = {"R": rank, "form": form, "bytes_per_token": contextual_bytes(config, rank)}
            found = best_specs(session, measured, layers, form, rank)
            if isinstance(found, str):
                rows.append(base | {"layers": layers, "na": found})
                continue
            if form == "contextual":
                for layer in layers:
                    rows.append(base | {"layers": [layer]} | _token_errors(session, measured, layer, rank))
            student = convert(session, measured, found)
            metrics |= student.output_metrics
            cells.append(Cell(rank, form, found, student_factors(student), base))
            tqdm.write(f"solved  R={rank}  {form}  {', '.join(found[i].describe() for i in layers)}")
    if kept is not None:
        _write_solved(kept, rows, cells, metrics)
    return rows, cells, metrics


def _write_solved(path: Path, rows: list[dict[str, Any]], cells: list[Cell], metrics: dict[int, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{n}:{name}": t.cpu().contiguous() for n, c in enumerate(cells) for name, t in c.factors.items()}
    tensors |= {f"metric:{layer}": root.cpu().contiguous() for layer, root in metrics.items()}
    save_file(tensors, path.with_suffix(".safetensors"))
    content = {
        "rows": rows,
        "cells": [{"R": c.rank, "form": c.form, "specs": specs_to_dicts(c.specs), "row": c.row} for c in cells],
    }
    write_text(path, json.dumps(content))


def _read_solved(path: Path, forms: list[str]) -> tuple[list[dict[str, Any]], list[Cell], dict[int, Tensor]]:
    content, tensors = json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    cells = []
    for number, cell in enumerate(content["cells"]):
        factors = {k.partition(":")[2]: t for k, t in tensors.items() if k.startswith(f"{number}:")}
        cells.append(Cell(cell["R"], cell["form"], [LayerSpec(**s) for s in cell["specs"]], factors, cell["row"]))
    solved = {row["form"] for row in content["rows"]} | {cell.form for cell in cells}
    for form in forms:
        if form not in solved:
            raise UserError(f"forms={form} was not solved in solved={path.parent}; name another folder to solve it.")
    metrics = {int(k.partition(":")[2]): t for k, t in tensors.items() if k.startswith("metric:")}
    rows = [row for row in content["rows"] if row["form"] in forms]
    return rows, [cell for cell in cells if cell.form in forms], metrics


def _one_shot(session: Session, evaluator: Evaluator, cell: Cell) -> list[dict[str, Any]]:
    """Returns one row a layer: only that layer converted, nothing trained."""
    config, rows = session.config, []
    for layer in [i for i, spec in enumerate(cell.specs) if spec.converted]:
        specs = dense_specs(config)
        specs[layer] = cell.specs[layer]
        own, device = f"layers.{layer}.", session.machine.device
        factors = {name: t.to(device) for name, t in cell.factors.items() if name.startswith(own)}
        student = Gemma3ForMultimodalLMwithTPA.from_dense(session.teacher, specs, factors)
        rows.append(
            cell.row | {
                "layers": [layer], "spec": specs[layer].describe(),
                "used_bytes": specs[layer].bytes_per_token(config),
                "one_shot_kl": evaluator.evaluate(student, cell.form).kl,
            }
        )  # fmt: skip
        _say(rows[-1])
    return rows


def _recovered(
    session: Session, settings: FormsSettings, evaluator: Evaluator, cell: Cell, metrics: dict[int, Tensor], seed: int
) -> dict[str, Any]:
    device = session.machine.device
    factors = {name: t.to(device) for name, t in cell.factors.items()}
    student = Gemma3ForMultimodalLMwithTPA.from_dense(session.teacher, cell.specs, factors)
    student.output_metrics = {i: root.to(device) for i, root in metrics.items()}
    before, error_before = evaluator.evaluate(student, cell.form), measure_layer_errors(session, student)
    for stage in ("layerwise", "distill"):
        recover(session, student, stage)
    after, error_after = evaluator.evaluate(student, cell.form), measure_layer_errors(session, student)
    return cell.row | {
        "seed": seed, "layers": student.converted_layers, "one_shot_kl": before.kl, "recovered_kl": after.kl,
        "one_shot_ppl_ratio": before.perplexity / before.teacher_perplexity,
        "recovered_ppl_ratio": after.perplexity / after.teacher_perplexity,
        "one_shot_errors": error_before, "recovered_errors": error_after,
        "tokens": settings.layerwise_tokens + settings.distill_tokens,
    }  # fmt: skip


def contextual_bytes(config: Gemma3Config, rank: int) -> int:
    """Returns the bytes a token of contextual keys and values at ``rank``."""
    return LayerSpec("contextual", rank, "contextual", rank).bytes_per_token(config)


def candidates(config: Gemma3Config, form: str, rank: int) -> list[LayerSpec] | str:
    """Returns the specifications of ``form`` within the bytes of the contextual form at R; or why there are none."""
    groups, width = config.num_kv_heads, config.head_dim
    numbers = rank * (groups + width)  # of K, and of V
    if form in ("contextual", "constant_a"):
        return [LayerSpec(form, rank, form, rank)]
    if form == "latent":
        r = min(width, numbers // groups)
        return [LayerSpec(form, r, form, r)] if r > 0 else f"{numbers} numbers are fewer than {groups} heads"
    if form == "joint":
        r = min(2 * numbers, 2 * groups * width)
        return [LayerSpec(form, r, form, r)]
    found = []
    for heads in [h for h in range(1, groups + 1) if groups % h == 0]:
        r_k = min(width, (numbers - (groups if heads < groups else 0)) // heads)
        r_v = min(width, numbers // heads)
        if r_k > 0:
            kept = 0 if heads == groups else heads
            found.append(LayerSpec(form, r_k, form, r_v, heads_k=kept, heads_v=kept))
    return found or f"{numbers} numbers hold no core"


def best_specs(session: Session, measured: Measured, layers: list[int], form: str, rank: int) -> list[LayerSpec] | str:
    """Returns the specifications of all layers with ``layers`` in ``form``, the best candidate by measured KL."""
    config = session.config
    original = dense_specs(config)[layers[0]].bytes_per_token(config)
    if contextual_bytes(config, rank) >= original:
        return f"R = {rank} takes {contextual_bytes(config, rank)} bytes a token, the original {original}"
    if form == "mixed":
        return _mixed(session, measured, layers, contextual_bytes(config, rank))
    options = candidates(config, form, rank)
    if isinstance(options, str):
        return options
    specs, text = dense_specs(config), sensitivity_text(session)
    for layer in layers:
        kls = []
        for option in options if len(options) > 1 else []:
            trial = dense_specs(config)
            trial[layer] = option
            with session.machine.autocast():
                kls.append(output_kl(session.teacher, build_student(session.teacher, measured.bases, trial), text))
        specs[layer] = options[kls.index(min(kls))] if kls else options[0]
    return specs


def _budget(session: Session, layers: list[int], size: int) -> Budget:
    """Returns the budget that gives each of ``layers`` ``size`` bytes a token."""
    config, context = session.config, session.settings.budget.context
    dense = cache_bytes(config, dense_specs(config), context)
    saved = sum(
        config.cached_tokens(i, context) * (dense_specs(config)[i].bytes_per_token(config) - size) for i in layers
    )
    return Budget(dense / (dense - saved + 0.5), context, (16,), 1, AUTO)


def _measure_all(session: Session, measured: Measured, layers: list[int]) -> None:
    """Measures what the allocator asks for about ``layers``, all forms competing."""
    config, bases, found, text = session.config, measured.bases, measured.sensitivities, sensitivity_text(session)
    plan = plan_probes(config, _budget(session, layers, contextual_bytes(config, 1)), layers)
    with session.machine.autocast():
        found |= measure_sensitivity(session.teacher, bases, [p for p in plan if p.form == "latent"], text)
    for layer in layers:
        bases.balances[layer] = choose_balance(session, bases, found, layer, max(1, config.head_dim // 4), text)
    with session.machine.autocast():
        found |= measure_sensitivity(session.teacher, bases, [p for p in plan if p.form != "latent"], text)


def _mixed(session: Session, measured: Measured, layers: list[int], size: int) -> list[LayerSpec]:
    budget = _budget(session, layers, size)
    text, tried = sensitivity_text(session), []
    mixes = [
        c for n in range(1, len(AUTO) + 1) for c in itertools.combinations(AUTO, n) if {"latent", "joint"} & set(c)
    ]
    for forms in mixes:
        own = replace(budget, forms=forms)
        specs, _ = allocate(session.config, own, choices_of(session, measured, own, layers))
        with session.machine.autocast():
            kl = output_kl(session.teacher, build_student(session.teacher, measured.bases, specs), text)
        tried.append((kl, specs))
    return min(tried, key=lambda t: t[0])[1]


def _token_errors(session: Session, measured: Measured, layer: int, rank: int) -> dict[str, float]:
    """Relative errors of the contextual factors, of the constant-A start, and of the per-token oracle."""
    attention, bases = session.teacher.layers[layer].self_attn, measured.bases
    sample, errors = ActivationSample.of(bases.calibration.layers[layer]), {}
    for kind, proj in (("k", attention.k_proj), ("v", attention.v_proj)):
        weight = proj.weight.detach().double().cpu().unflatten(0, (attention.config.num_kv_heads, -1))
        moments = bases.head_moments(attention, layer, kind)
        factors = {form: bases.contextual(attention, layer, kind, form, rank) for form in ("contextual", "constant_a")}
        for form, own in factors.items():
            errors[f"{form}_error_{kind}"] = contextual_error(weight, own, sample, moments, kind)
        errors[f"oracle_error_{kind}"] = per_token_error(weight, sample, moments, rank, kind, list(factors.values()))
    return errors


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns mean and standard deviation over the seeds of every cell."""
    cells: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["R"], row["form"], tuple(row["layers"])), []).append(row)
    found = []
    for (rank, form, layers), members in cells.items():
        seeds = len({m["seed"] for m in members if "seed" in m})
        line = {"summary": True, "R": rank, "form": form, "layers": list(layers), "seeds": seeds}
        for key in ("one_shot_kl", "recovered_kl", "recovered_ppl_ratio"):
            values = [m[key] for m in members if key in m]
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                line[key], line[f"{key}_std"] = statistics.mean(values), spread
        if "na" in members[0]:
            line["na"] = members[0]["na"]
        found.append(line)
    return found
