"""What else could be had for the same bytes, and the measuring that it rests on, on a tiny model of two heads."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tpa_train import peers, pipeline
from tpa_train.errors import UserError
from tpa_train.factorization.allocation import AUTO, Budget, can_be_met, layers_to_convert, plan_probes, uniform_specs
from tpa_train.factorization.sensitivity import Probe, measure_sensitivity, output_kl
from tpa_train.factorization.solutions import Bases, build_student
from tpa_train.peers import better_uniform, dense_peers, frontier_peers
from tpa_train.pipeline import (
    Measured,
    Session,
    choose_balance,
    choose_student,
    factorize_model,
    measure,
    sensitivity_text,
)
from tpa_train.recipes import compose
from tpa_train.tpa.gemma3_tpa_model_modular import Gemma3ForMultimodalLMwithTPA
from tpa_train.tpa.spec import cache_bytes, dense_specs


def _session(tiny, folder, *options, measured=None, loaded=None):
    own = [o for o in tiny.options if not o.startswith(("budget.bits", "budget.forms", "budget.cache_ratio"))]
    return Session(compose(["recipe=distill", *own, *options, f"run_dir={folder}"]), folder, loaded, measured)


def choose_specs(*arguments):
    student, kls = choose_student(*arguments)
    return student.specs, kls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def calibrated(tiny, folder):
    """A teacher and its calibration, with nothing measured yet; not to be changed."""
    session = _session(tiny, folder, "budget.cache_ratio=4", "budget.forms=latent")
    calibration, cost = pipeline.calibrate(session, list(range(session.config.num_layers)))
    return SimpleNamespace(teacher=session.teacher, calibration=calibration, cost=cost)


@pytest.fixture
def make(tiny, folder, calibrated):
    """Makes sessions that share the calibration and nothing else."""

    def session(*options, calibrate=True):
        measured = Measured(Bases.of(calibrated.teacher, calibrated.calibration), {}, calibrated.cost)
        return _session(
            tiny, folder, *options, measured=measured if calibrate else None, loaded=calibrated.teacher
        )  # fmt: skip

    return session


@pytest.fixture
def probed(monkeypatch):
    """Every probe that is measured, in order, with the balance of its layer."""
    seen = []

    def watched(model, bases, probes, *args, **kwargs):
        probes = list(probes)
        seen.extend((p, bases.balances.get(p.layer)) for p in probes)
        return measure_sensitivity(model, bases, probes, *args, **kwargs)

    monkeypatch.setattr(pipeline, "measure_sensitivity", watched)
    return seen


def _probes(seen):
    return [p for p, _ in seen]


# -------------------------------------------------------------------------------------------------------------- measure


def test_what_is_known_is_not_measured_again(make, probed):
    session = make("budget.cache_ratio=4", "budget.forms=latent")
    plan = plan_probes(session.config, session.budget, layers_to_convert(session.config, session.budget))
    known = {p: 0.125 for p in plan[::2]}
    measured = measure(session, known, {})
    assert sorted(_probes(probed)) == sorted(set(plan) - set(known)), "each of the others, once"
    assert set(measured.sensitivities) == set(plan) and session.measured is measured
    assert all(measured.sensitivities[p] == 0.125 for p in known)
    for probe, kl in list(measured.sensitivities.items())[:4]:
        if probe not in known:
            specs = dense_specs(session.config)
            specs[probe.layer] = probe.spec(session.config)
            student = build_student(session.teacher, measured.bases, specs)
            expected = output_kl(session.teacher, student, sensitivity_text(session))
            assert kl == pytest.approx(expected, rel=1e-3, abs=1e-6)
    probed.clear()
    assert measure(session, {}, {}) is measured and not probed
    # A richer budget measures only what it adds.
    rich = replace(session.budget, forms=("latent", "constant_a"))
    measure(session, {}, {}, rich)
    assert {p.form for p in _probes(probed)} == {"constant_a"}


def test_measuring_calibrates_the_layers_it_needs(make):
    session = make("budget.cache_ratio=1.5", "budget.bits=16", "budget.forms=latent", calibrate=False)
    measured = measure(session, {}, {})
    layers = layers_to_convert(session.config, session.budget)
    assert set(measured.bases.keys) == set(layers) == {5} and measured.cost.tokens == 512
    assert {p.layer for p in measured.sensitivities} == {5}
    wide = measure(session, {}, {}, replace(session.budget, bits=(16, 8)))
    assert set(wide.bases.keys) == set(range(7)) and wide is session.measured
    assert {p.layer for p in wide.sensitivities} == set(range(7)), "directions changed: everything is measured anew"


def test_the_balance_is_the_best_of_three(make, probed):
    session = make("budget.cache_ratio=4", "budget.forms=joint")
    measured = measure(session, {}, {})
    config, bases = session.config, measured.bases
    quarter = config.head_dim // 4
    assert set(bases.balances) == set(range(7))
    joint = Probe(5, "kv", "joint", 2 * 2 * 32 // 8)
    tried = [balance for p, balance in probed if p == joint]
    for layer, balance in bases.balances.items():
        slope = {
            k: measured.sensitivities[Probe(layer, k, "latent", quarter)] / bases.part(layer, k).tail(quarter)
            for k in "kv"
        }
        ratio = slope["v"] / slope["k"]
        if not config.is_global(layer):
            assert balance == pytest.approx(ratio)
            continue
        assert tried[:3] == pytest.approx([ratio / 4, ratio, 4 * ratio]) and tried[3:] == [balance]
        kls = []
        for trial in tried[:3]:
            bases.balances[layer] = trial
            kls.extend(measure_sensitivity(session.teacher, bases, [joint], sensitivity_text(session)).values())
        assert balance == tried[kls.index(min(kls))] and measured.sensitivities[joint] == min(kls)


def test_balances_of_an_interrupted_run_are_kept(make, probed):
    session = make("budget.cache_ratio=4", "budget.forms=joint")
    first = measure(session, {}, {})
    known, balances = dict(first.sensitivities), dict(first.bases.balances)
    again = make("budget.cache_ratio=4", "budget.forms=joint")
    probed.clear()
    second = measure(again, known, balances)
    assert not probed and second.sensitivities == known and second.bases.balances == balances
    assert choose_specs(again, second) == choose_specs(session, first)


def test_a_layer_whose_parts_cost_nothing_has_a_balance(make):
    session = make("budget.cache_ratio=4", "budget.forms=joint")
    bases, text = session.measured.bases, sensitivity_text(session)
    found = {Probe(layer, k, "latent", 8): -1e-12 for layer in (0, 5) for k in "kv"}
    for layer in (0, 5):
        assert 0 < choose_balance(session, bases, found, layer, 8, text) < float("inf")


# ------------------------------------------------------------------------------------------------------- choose_student


def test_the_mix_that_costs_least_wins(make, monkeypatch):
    """All forms together and each alone are allocated, and what the output says decides."""
    session = make("budget.cache_ratio=4", "budget.forms=[latent,joint]")
    measured = measure(session, {}, {})
    specs, kls = choose_specs(session, measured)
    text, found = sensitivity_text(session), {}
    for forms in (("latent", "joint"), ("latent",), ("joint",)):
        alone, own = choose_specs(session, measured, replace(session.budget, forms=forms))
        if len(forms) == 1:
            assert {s.form_k for s in alone} | {s.form_v for s in alone} <= {*forms, "dense"}
        student = build_student(session.teacher, measured.bases, alone)
        found[forms] = output_kl(session.teacher, student, text)
        assert own["measured"] == pytest.approx(found[forms], rel=1e-3) and own["expected"] > 0
        assert cache_bytes(session.config, alone, 512) <= session.budget.bytes(session.config)
    assert kls["measured"] == pytest.approx(min(found.values()), rel=1e-3)
    # Whatever is said to cost least is what is returned.
    for wanted in range(3):
        answers = iter([0.1 if i == wanted else 0.5 for i in range(3)] + [0.9])  # and of what measured layers correct
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "output_kl", lambda *_: next(answers))  # noqa: B023
            specs, kls = choose_specs(session, measured)
        alone = [("latent", "joint"), ("latent",), ("joint",)][wanted]
        assert kls["measured"] == 0.1
        assert {s.form_k for s in specs} | {s.form_v for s in specs} <= {*alone, "dense"}


def test_what_measured_layers_correct_is_spent_anew(make, monkeypatch):
    """The better of both is returned, judged by the output."""
    session, seen = make("budget.cache_ratio=4", "budget.forms=latent"), []
    measured, config = measure(session, {}, {}), session.config

    def layer_kls(teacher, student, text):
        seen.append(student.specs)
        return {i: 1.0 if i == 5 else 1e-12 for i in student.converted_layers}

    monkeypatch.setattr(pipeline, "layer_kls", layer_kls)
    for answers, kept in (((0.5, 0.1), False), ((0.1, 0.5), True)):
        answers = iter(answers)
        monkeypatch.setattr(pipeline, "output_kl", lambda *_: next(answers))  # noqa: B023
        specs, kls = choose_specs(session, measured)
        assert kls["measured"] == 0.1 and (specs == seen[-1]) == kept
        assert (kls["first"] == 0.1) == kept
        assert cache_bytes(config, specs, 512) <= session.budget.bytes(config)
        if not kept:
            assert specs[5].bytes_per_token(config) > seen[-1][5].bytes_per_token(config)
    lent = make("budget.cache_ratio=4", "budget.forms=latent", "recipe=factorize", "trainer.offload=true")
    answers = iter([0.3])
    choose_specs(lent, measured)
    assert len(seen) == 2


def test_the_chosen_student_is_built_once(make, monkeypatch):
    session, built = make("budget.cache_ratio=4", "budget.forms=latent"), []
    monkeypatch.setattr(pipeline, "build_student", lambda *given: built.append(build_student(*given)) or built[-1])
    student, _, _, _ = factorize_model(session)
    assert len(built) <= 2 and student in built  # what measured layers correct is the second
    assert len(built) == 1 or built[0].specs != built[1].specs
    assert set(student.output_metrics) == set(student.converted_layers)


def test_a_student_that_is_chosen_again_is_not_built_again(make, monkeypatch):
    session, built = make("budget.cache_ratio=4", "budget.forms=latent"), []
    monkeypatch.setattr(pipeline, "build_student", lambda *given: built.append(build_student(*given)) or built[-1])
    monkeypatch.setattr(pipeline, "corrected", lambda choices, *_: choices)
    student, _, _, _ = factorize_model(session)
    assert built == [student]


def test_other_forms_that_were_measured_stay_out(make, monkeypatch):
    """Contextual forms that a richer budget measured, made to look free, are not chosen by one that forbids them."""
    session = make("budget.cache_ratio=4", "budget.forms=auto")
    assert session.budget.forms == AUTO
    measured = measure(session, {}, {}, replace(session.budget, forms=("latent", "constant_a")))
    measured.sensitivities.update({p: 1e-12 for p in measured.sensitivities if p.form == "constant_a"})
    single = replace(session.budget, bits=(8,), forms=("latent",))
    specs, _ = choose_specs(session, measured, single)
    assert {(s.form_k, s.form_v, s.bits_k, s.bits_v) for s in specs} == {("latent", "latent", 8, 8)}
    answers = iter([0.1, 0.5, 0.9])  # of the mix, of latents alone, and of what measured layers correct
    monkeypatch.setattr(pipeline, "output_kl", lambda *_: next(answers))
    both, _ = choose_specs(session, measured, replace(session.budget, forms=("latent", "constant_a")))
    assert any("constant_a" in (s.form_k, s.form_v) for s in both)


# ---------------------------------------------------------------------------------------------------------------- peers


def test_dense_peers(make):
    config = make("budget.cache_ratio=4").config
    found = list(dense_peers(config))
    assert [f[:2] for f in found] == [
        (f"dense int{bits}, {which}", f"dense int{bits}, {mix}")
        for bits in (8, 4, 3)
        for which, mix in (("global layers", "global"), ("all layers", "all"))
    ]
    for (_, mix, specs), bits in zip(found, (8, 8, 4, 4, 3, 3), strict=True):
        rounded = [i for i, s in enumerate(specs) if (s.bits_k, s.bits_v) == (bits, bits)]
        assert rounded == ([5] if mix.endswith("global") else list(range(7)))
        assert all(i in rounded or not s.converted for i, s in enumerate(specs))
        assert {(s.form_k, s.rank_k, s.form_v, s.rank_v) for s in specs} == {("dense", 32, "dense", 32)}


@pytest.fixture(scope="module")
def frontier(tiny, folder, calibrated):
    """Peers of three budgets (one twice): one that all widths meet, two that only 4 bits do."""
    measured = Measured(Bases.of(calibrated.teacher, calibrated.calibration), {}, calibrated.cost)
    options = ("budget.cache_ratio=3", "budget.forms=auto")
    session = _session(tiny, folder, *options, measured=measured, loaded=calibrated.teacher)
    budgets = [replace(session.budget, cache_ratio=ratio) for ratio in (6.0, 3.0, 3.0, 8.0)]
    found = []
    for name, mix, model in frontier_peers(session, budgets):
        dense = not isinstance(model, Gemma3ForMultimodalLMwithTPA)
        found.append((name, mix, model if dense else model.specs, None if dense else model.cache_bytes(512)))
    return session, budgets, found


def test_names_and_mixes(frontier):
    session, _, found = frontier
    assert [f[:2] for f in found[:6]] == [f[:2] for f in dense_peers(session.config)]
    expected = [("bf16", 3), ("int8", 3), ("int4", 3), ("int4", 6), ("int4", 8)]  # 16 and 8 bits cannot give more
    assert [f[0] for f in found[6:]] == [f"{kind} {w} ÷{r}" for w, r in expected for kind in ("uniform", "ranks")]
    assert [f[1] for f in found[6:]] == [f"{kind}, {w}" for w, _ in expected for kind in ("uniform ranks", "ranks")]


def test_every_peer_costs_at_most_its_budget(frontier):
    session, budgets, found = frontier
    dense = cache_bytes(session.config, dense_specs(session.config), 512)
    assert {b.context for b in budgets} == {512} and len(found) > 10
    for name, _, specs, nbytes in found[6:]:
        ratio, bits = float(name.partition("÷")[2]), {"bf16": 16, "int8": 8, "int4": 4}[name.split(" ")[1]]
        assert nbytes == cache_bytes(session.config, specs, 512) <= dense / ratio
        assert {s.form_k for s in specs} | {s.form_v for s in specs} <= {"latent", "dense"}
        converted = [s for s in specs if s.converted]
        assert {(s.bits_k, s.bits_v) for s in converted} == {(bits, bits)}
        if name.startswith("uniform"):
            assert len({(s.rank_k, s.rank_v) for s in converted}) == 1 and len(converted) in (1, 7)
            assert converted[0].rank_k == converted[0].rank_v


def test_only_the_sessions_calibration_is_used(make, monkeypatch):
    """Its directions serve every peer; another calibration would not be comparable, and takes time."""
    session = make("budget.cache_ratio=4", "budget.forms=latent")
    monkeypatch.setattr(pipeline, "calibrate", lambda *_: pytest.fail("calibrated again"))
    before = session.measured
    assert len(list(frontier_peers(session, [session.budget]))) > 6 and session.measured is before


@pytest.mark.parametrize("bits,ratio", [(8, 3.0), (4, 4.0)])
def test_the_better_of_two_uniform_sets_is_taken(make, bits, ratio, monkeypatch):
    """Latents of one rank in the global layer only, or in all: whichever costs the output less."""
    session = make("budget.cache_ratio=4", "budget.forms=latent")
    config, budget = session.config, replace(session.budget, cache_ratio=ratio)
    sets = [uniform_specs(config, budget, layers, bits) for layers in ([5], list(range(7)))]
    assert None not in sets and sets[0] != sets[1]
    text, bases = sensitivity_text(session), session.measured.bases
    kls = [output_kl(session.teacher, build_student(session.teacher, bases, s), text) for s in sets]
    assert better_uniform(session, budget, bits) == sets[kls.index(min(kls))]
    for wanted in (0, 1):  # whichever it is
        answers = iter([0.5 - 0.1 * (i == wanted) for i in range(2)])
        with monkeypatch.context() as patch:
            patch.setattr(peers, "output_kl", lambda *_: next(answers))  # noqa: B023
            assert better_uniform(session, budget, bits) == sets[wanted]


def test_uniform_sets_that_do_not_fit(make, monkeypatch):
    """The only one that fits needs no measuring; none is none."""
    session = make("budget.cache_ratio=4", "budget.forms=latent")
    monkeypatch.setattr(peers, "output_kl", lambda *_: pytest.fail("there is nothing to compare"))
    budget = replace(session.budget, cache_ratio=8.0)
    assert uniform_specs(session.config, budget, [5], 4) is None
    assert better_uniform(session, budget, 4) == uniform_specs(session.config, budget, list(range(7)), 4)
    assert better_uniform(session, replace(budget, cache_ratio=30.0), 4) is None


def test_budgets_of_one_width_that_cannot_be_met(make):
    """They leave a gap in the frontier; asked for by themselves they are refused."""
    session = make("budget.cache_ratio=4", "budget.forms=latent")
    for bits, ratio, possible in ((16, 3.9, True), (16, 4.1, False), (4, 8.0, True), (4, 8.1, False)):
        budget = Budget(ratio, 512, (bits,), 8)
        assert peers.can_be_met(session.config, budget) == possible
    measured = measure(session, {}, {})
    with pytest.raises(UserError, match="cannot be met"):
        choose_specs(session, measured, Budget(5.0, 512, (16,), 8))


def test_models_run(frontier):
    """What is yielded is a student that shares the teacher's weights."""
    session, _, found = frontier
    name, _, specs, _ = found[-1]
    student = next(m for n, _, m in frontier_peers(session, [Budget(8.0, 512, (4,), 8)]) if n == name)
    assert student.specs == specs
    assert student.embed_tokens.weight is session.teacher.embed_tokens.weight
    with torch.no_grad():
        assert student(torch.arange(4, 20)[None]).isfinite().all()


def test_forms_that_cannot_meet_the_budget_alone_still_compete(make):
    session = make("budget.cache_ratio=6", "budget.forms=[latent,dense]", "budget.bits=[8,4]")
    assert not can_be_met(session.config, replace(session.budget, forms=("dense",)))
    specs, _ = choose_specs(session, measure(session, {}, {}))
    assert cache_bytes(session.config, specs, session.budget.context) <= session.budget.bytes(session.config)
