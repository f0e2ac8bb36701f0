"""The recovery benchmark on a tiny model: variants from one student, resumed, and rendered."""

from __future__ import annotations

import json

import pytest
import torch
from quality_runs import prepare, without_times

from tpa_train.benchmarks import recovery
from tpa_train.benchmarks.journal import Journal
from tpa_train.benchmarks.recovery import CELL, FREE, RecoverySettings, parse_variant, plan, render, run
from tpa_train.benchmarks.students import Start, compose_settings, open_session, solve
from tpa_train.benchmarks.variants import GROUPS, built_in
from tpa_train.errors import UserError
from tpa_train.recipes import compose

OWN = dict(groups=["lr_original"], variants=["only factors: recipe.distill.scope=factors",
           "too long: trainer.context=1024", "all at once: recipe.layerwise.tokens=0 recipe.distill.tokens=768"],
           cache_ratio=5.0, layerwise_tokens=256, distill_tokens=512, copy=[20])  # fmt: skip
NAMES = ["before recovery", "base", "lr_original ×0", "lr_original ×0.33", "lr_original ×3", "only factors", "too long",
         "all at once"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The finished benchmark's rows; its file is not to be changed."""
    tiny = prepare(tmp_path_factory.mktemp("recovery"))
    tiny.solved, tiny.out = tiny.folder / "start.safetensors", tiny.folder / "recovery.json"
    tiny.own = dict(tiny.shared, **OWN, solved=str(tiny.solved))
    # Rates at which two steps of a tiny model can be told apart.
    tiny.own["options"] = [*tiny.own["options"], "recipe.distill.lr_original=1e-3", "recipe.distill.lr_factors=1e-2"]
    tiny.rows = start(tiny, tiny.out)
    return tiny


def start(made, out, **changed):
    settings = RecoverySettings(**(made.own | changed))
    record = lambda rows: {"settings": vars(settings), "rows": rows}  # noqa: E731
    return run(settings, Journal(out, record, CELL, FREE))


def test_every_variant_has_a_row(made):
    assert [row["variant"] for row in made.rows] == NAMES
    rows = {row["variant"]: row for row in made.rows}
    assert rows.pop("too long")["error"].startswith("UserError: trainer.context needs 1024 tokens")
    assert rows["lr_original ×3"]["options"] == ["recipe.distill.lr_original=0.003"]
    assert len({row["kl"] for row in rows.values()}) == len(rows) - 1, "a zero rate is the same as factors alone"
    assert rows["lr_original ×0"]["kl"] == rows["only factors"]["kl"]
    for name, row in rows.items():
        if name == "before recovery":
            assert "seconds" not in row
            continue
        whole = "all at once" == name
        assert (row["layerwise_tokens"], row["distill_tokens"]) == ((0, 768) if whole else (256, 512))
        assert row["seconds"] == row["layerwise_seconds"] + row["distill_seconds"] > 0
        assert set(row["copy_accuracy"]) == {"20"} and row["kl_wikitext2"] > 0
    shared = {row["layerwise_seconds"] for name, row in rows.items() if row.get("layerwise_tokens")}
    assert len(shared) == 1, "one layer-wise stage serves all that agree on it"


def test_a_stopped_benchmark_goes_on_from_the_same_student(made, tmp_path, monkeypatch):
    out, kept = tmp_path / "half.json", made.rows[:4]
    record = json.loads(made.out.read_text())
    out.write_text(json.dumps(record | {"rows": kept}))
    monkeypatch.setattr(recovery, "solve", lambda *_: pytest.fail("solved again"))
    changed = {"variants": OWN["variants"][:1]}
    assert len(start(made, out, minutes=1e-9, **changed)) == 5
    rows = start(made, out, **changed)
    assert without_times(rows) == without_times(made.rows[:6])


def test_nothing_that_is_trained_changes_the_start(made, tmp_path):
    settings = RecoverySettings(**made.own)
    session = open_session(compose_settings(settings, "budget.cache_ratio=5", "recipe.layerwise.tokens=256"), tmp_path)
    begin = solve(session)
    before = {name: tensor.clone() for name, tensor in begin.factors.items()}
    later, student, cost = begin.recover(session, "layerwise")
    assert cost.tokens == 256 and begin.trained == {} and set(later.trained) <= set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in begin.factors.items())
    parameters = dict(student.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in later.trained.items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in later.trained.items())
    # On disk and back it is the same student.
    begin.save(tmp_path / "start.safetensors", "these settings")
    found = Start.load(tmp_path / "start.safetensors", "these settings", torch.device("cpu"))
    assert found.specs == begin.specs and found.metrics.keys() == begin.metrics.keys()
    for ours, theirs in ((found.factors, before), (found.metrics, begin.metrics)):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="solved with other settings"):
        Start.load(tmp_path / "start.safetensors", "others", torch.device("cpu"))
    (tmp_path / "start.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is damaged"):
        Start.load(tmp_path / "start.safetensors", "these settings", torch.device("cpu"))


def test_the_table_is_sorted_and_names_differences(made):
    text = render(made.rows)
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    best = min((row for row in made.rows if "error" not in row), key=lambda row: row["kl"])
    base = next(row for row in made.rows if row["variant"] == "base")
    assert lines[0].startswith(f"| {best['variant']} ")
    for line in lines:
        name, _, kl, apart = [cell.strip() for cell in line.split("|")[1:5]]
        row = next(r for r in made.rows if r["variant"] == name)
        assert kl == f"{row['kl']:.4f}"
        assert apart == ("" if row is base else f"{100 * (row['kl'] / base['kl'] - 1):+.1f} %")
    assert "too long (trainer.context=1024): UserError:" in text.split("\n\n")[-1]
    assert "–" in render([row for row in made.rows if row["variant"] != "base"]), "without a base nothing is compared"


def test_built_in_variants_compose_and_differ():
    base = compose(["recipe=distill", "trainer=gpu"] if torch.cuda.is_available() else ["recipe=distill"])
    base.trainer.context, base.trainer.batch_size = 4096, 4
    variants = built_in(base, list(GROUPS))
    assert {variant.group for variant in variants} >= set(GROUPS) - {"divergence"}
    assert len({variant.name for variant in variants}) == len(variants)
    plain = compose(["recipe=distill"])
    for variant in {variant.group: variant for variant in variants}.values():
        assert compose(["recipe=distill", *variant.options]) != plain, variant
    rows = [v.options for v in variants if v.group == "context"]
    assert rows == [("trainer.context=2048", "trainer.batch_size=8"), ("trainer.context=8192", "trainer.batch_size=2"),
                    ("trainer.context=16384", "trainer.batch_size=1")]  # fmt: skip
    for variant in variants:
        if variant.group == "stages":
            tokens = [int(option.partition("=")[2]) for option in variant.options]
            assert sum(tokens) == base.recipe.layerwise.tokens + base.recipe.distill.tokens


def test_options_that_the_schema_lacks_are_left_out(monkeypatch):
    base = compose(["recipe=distill"])
    everything = built_in(base, ["scope", "hidden"])
    known = {"recipe.distill.scope": None}
    monkeypatch.setattr("tpa_train.benchmarks.variants.option_keys", lambda: known)
    assert built_in(base, ["scope", "hidden"]) == [v for v in everything if v.group == "scope"]


def test_a_variant_is_a_name_and_options():
    variant = parse_variant("two things:  recipe.distill.betas=[0.9,0.99] 'data.path=a b.txt'")
    assert variant.name == "two things" and variant.options == ("recipe.distill.betas=[0.9,0.99]", "data.path=a b.txt")


@pytest.mark.parametrize("changed,message", [
    ({"groups": ["scopes"]}, "did you mean 'scope'"), ({"variants": ["recipe.distill.clip=1"]}, "expected a name"),
    ({"variants": ["a: clip"]}, "expected a name"), ({"variants": ["a: b='"]}, "expected a name"),
    ({"variants": ["base: recipe.distill.clip=1"]}, "the name 'base' is taken"),
    ({"variants": ["a: recipe.distill.clop=1"]}, "did you mean 'recipe.distill.clip'"),
    ({"distill_tokens": 0}, "distill_tokens=0"), ({"minutes": 0.0}, "minutes=0"),
])  # fmt: skip
def test_mistakes_are_found_before_anything_is_measured(made, tmp_path, changed, message):
    with pytest.raises(UserError, match=message):
        start(made, tmp_path / "new.json", **changed)
    assert not (tmp_path / "new.json").exists()


def test_no_built_in_variants(made):
    names = [variant.name for variant in plan(RecoverySettings(**(made.own | {"groups": ["none"]})))]
    assert names == ["base", "only factors", "too long", "all at once"]
