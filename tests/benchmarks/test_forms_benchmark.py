"""The table of forms on a tiny model: every cell measured, means over seeds, and solved factors used again."""

import pytest
from tiny_runs import write_model, write_text_file

from tpa_train.benchmarks.forms import COMPARED, FormsSettings, candidates, contextual_bytes, run
from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES


@pytest.fixture(scope="module")
def settings(tmp_path_factory, monkeypatch_module):
    folder = tmp_path_factory.mktemp("forms")
    monkeypatch_module.setenv("TPA_TRAIN_CACHE", str(folder / "cache"))
    return FormsSettings(
        model=str(write_model(folder / "model")), data=str(write_text_file(folder / "text.txt")), ranks=[1, 2], seeds=2,
        context=64, batch_size=2, calibration_tokens=512, layerwise_tokens=256, distill_tokens=256,
        evaluation_tokens=256, solved=str(folder / "solved"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def rows(settings):
    return run(settings)


def test_every_cell_is_measured_before_and_after_recovery(rows):
    cells = [r for r in rows if "seed" in r]
    assert {(r["R"], r["form"], r["seed"]) for r in cells} == {(1, form, s) for form in COMPARED for s in (0, 1)}
    for row in cells:
        assert row["one_shot_kl"] > 0 and row["recovered_kl"] > 0 and row["recovered_kl"] != row["one_shot_kl"]
        assert set(row["recovered_errors"]) == {5}
    by_seed = {r["seed"]: r["recovered_kl"] for r in cells if r["form"] == "latent"}
    assert by_seed[0] != by_seed[1], "seeds train on other data"


def test_cells_that_cannot_be_are_named(rows):
    """The model has two KV heads: at R = 2 the contextual form is no smaller than the original."""
    missing = {r["form"]: r["na"] for r in rows if r["R"] == 2 and "na" in r}
    assert set(missing) == set(COMPARED) and "the original 256" in missing["contextual"]


def test_layers_alone_keep_to_the_bytes(rows):
    alone = [r for r in rows if "used_bytes" in r]
    assert alone and all(0 < r["used_bytes"] <= r["bytes_per_token"] for r in alone)
    contextual = next(r for r in rows if "oracle_error_k" in r)
    for kind in "kv":
        assert contextual[f"contextual_error_{kind}"] <= contextual[f"constant_a_error_{kind}"] * (1 + 1e-9)
        least = min(contextual[f"contextual_error_{kind}"], contextual[f"constant_a_error_{kind}"])
        assert 0 < contextual[f"oracle_error_{kind}"] <= least


def test_means_over_seeds(rows):
    line = next(r for r in rows if r.get("summary") and r["form"] == "joint" and r["R"] == 1)
    values = [r["recovered_kl"] for r in rows if r["form"] == "joint" and r["R"] == 1 and "seed" in r]
    assert line["seeds"] == 2 and line["recovered_kl"] == pytest.approx(sum(values) / 2)


def test_solved_factors_are_used_again(settings, rows, monkeypatch):
    import tpa_train.benchmarks.forms as forms

    monkeypatch.setattr(forms, "calibrate", lambda *_: pytest.fail("solved again"))
    again = run(FormsSettings(**{**vars(settings), "seeds": 1}))
    first = {(r["form"]): r["recovered_kl"] for r in rows if r.get("seed") == 0}
    assert {(r["form"]): r["recovered_kl"] for r in again if r.get("seed") == 0} == first


def test_the_compared_forms_can_be_chosen(settings, rows, monkeypatch):
    """Of the solved ones, and without what only others need."""
    import tpa_train.benchmarks.forms as forms

    monkeypatch.setattr(forms, "_measure_all", lambda *_: pytest.fail("measured for joint and mixed"))
    chosen = {**vars(settings), "seeds": 0, "forms": ["constant_a"]}
    kept = run(FormsSettings(**chosen))
    again = run(FormsSettings(**{**chosen, "solved": settings.solved + "-constant"}))
    assert {r["form"] for r in kept} == {r["form"] for r in again} == {"constant_a"}
    kl = [next(r["one_shot_kl"] for r in found if "spec" in r) for found in (kept, again)]
    assert kl[0] == pytest.approx(kl[1])
    with pytest.raises(UserError, match="forms=joint was not solved in solved=.*-constant; name another folder"):
        run(FormsSettings(**{**chosen, "forms": ["joint"], "solved": settings.solved + "-constant"}))
    with pytest.raises(UserError, match="forms=constant is no form of this benchmark; did you mean 'constant_a'"):
        run(FormsSettings(**{**chosen, "forms": ["constant"]}))


@pytest.mark.parametrize("size", ["4b", "12b", "27b"])
def test_candidates_fit_the_bytes_at_every_size(size):
    config = SIZES[size]
    for rank in (1, 2, 3):
        for form in COMPARED[:-1]:
            found = candidates(config, form, rank)
            assert not isinstance(found, str)
            for spec in found:
                assert spec.bytes_per_token(config) <= contextual_bytes(config, rank)
