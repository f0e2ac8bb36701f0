from __future__ import annotations

import lightning
import pytest
import torch
from stub_tokenizer import StubTokenizer
from test_packing import documents, settings_for

from tpa_train.data.datamodule import STAGES, PackedDataModule, StageSampler
from tpa_train.data.packed import PackedStream
from tpa_train.data.settings import DataSettings
from tpa_train.errors import UserError

CONTEXT, BATCH, ROWS = 16, 2, 26  # one pass over the rows: 13 batches


@pytest.fixture
def settings(tmp_path):
    texts = documents(400)
    budget = CONTEXT * ROWS + 5
    return settings_for(tmp_path, texts, max_tokens=budget, heldout_fraction=0.0)


class Recorder(lightning.LightningModule):
    """Trains one weight on anything and writes down what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        assert batch["token_ids"].shape == batch["document_ids"].shape == (BATCH, CONTEXT)
        self.seen.append(tuple((batch["token_ids"] * torch.arange(1, CONTEXT + 1)).sum(1).tolist()))
        return (self.weight - batch["token_ids"].float().mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Interrupted(Exception):
    pass


class SaveAndStop(lightning.Callback):
    def __init__(self, after, path):
        self.after, self.path, self.batches = after, path, 0

    def on_train_batch_end(self, trainer, *_):
        self.batches += 1
        if self.batches == self.after:
            trainer.save_checkpoint(self.path)
            raise Interrupted


def fit(settings, steps, ckpt_path=None, stop=None, accumulate=1, stage="distill", **options):
    """Trains and returns (what was seen, the weight)."""
    torch.manual_seed(torch.seed() % 2**31)  # nothing may depend on the global seed
    module = Recorder()
    data = PackedDataModule(settings, StubTokenizer(), CONTEXT, BATCH, stage=stage, progress=False, **options)
    trainer = lightning.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        accumulate_grad_batches=accumulate, callbacks=[stop] if stop else [],
    )  # fmt: skip
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except Interrupted:
        pass
    return module.seen, module.weight.item()


def rows_in(batches):
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize("after", [1, 5, 12, 13, 14, 25, 26, 27, 32])
def test_resume_sees_the_same_batches(settings, tmp_path, after):
    steps = 32  # two passes over the rows and a half: 13 + 13 + 6
    whole, weight = fit(settings, steps)
    assert len(whole) == steps and len(set(rows_in(whole))) == ROWS
    assert sorted(rows_in(whole[:13])) == sorted(rows_in(whole[13:26]))  # every row once a pass ...
    assert rows_in(whole[:13]) != rows_in(whole[13:26])  # ... in another order
    first, _ = fit(settings, steps, stop=SaveAndStop(after, tmp_path / "a.ckpt"))
    assert first == whole[:after]
    rest, resumed_weight = fit(settings, steps, tmp_path / "a.ckpt")
    assert rest == whole[after:]
    assert resumed_weight == weight


def test_resume_after_the_last_step_goes_on(settings, tmp_path):
    whole, weight = fit(settings, 32)
    for end in (13, 20):
        first, _ = fit(settings, end, stop=SaveAndStop(end, tmp_path / "a.ckpt"))
        rest, resumed_weight = fit(settings, 32, tmp_path / "a.ckpt")
        assert first + rest == whole and resumed_weight == weight


@pytest.mark.parametrize("after", [2, 12, 14, 28])
def test_resume_with_gradient_accumulation(settings, tmp_path, after):
    whole, weight = fit(settings, 16, accumulate=2)  # 13 batches a pass: steps straddle passes
    assert len(whole) == 32
    first, _ = fit(settings, 16, stop=SaveAndStop(after, tmp_path / "a.ckpt"), accumulate=2)
    rest, resumed_weight = fit(settings, 16, tmp_path / "a.ckpt", accumulate=2)
    assert first + rest == whole and resumed_weight == weight


@pytest.mark.parametrize("cuts", [(3, 4), (5, 8), (13, 13), (10, 10), (12, 2), (13, 1)])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_twice_in_a_row(settings, tmp_path, cuts, workers):
    settings.num_workers = workers
    steps, seen, ckpt = 32, [], None
    whole, weight = fit(settings, steps)
    for i, after in enumerate(cuts):
        path = tmp_path / f"{i}.ckpt"
        seen += fit(settings, steps, ckpt, stop=SaveAndStop(after, path))[0]
        ckpt = path
    rest, resumed_weight = fit(settings, steps, ckpt)
    assert seen + rest == whole and resumed_weight == weight


def test_resume_refuses_other_data(settings, tmp_path, caplog):
    fit(settings, 8, stop=SaveAndStop(3, tmp_path / "a.ckpt"))
    changes = {
        "data.seed is 5 but the checkpoint was saved with 0": {"seed": 5},
        "the text .data.*. is": {"max_tokens": CONTEXT * ROWS},
    }
    for message, change in changes.items():
        with pytest.raises(UserError, match=message):
            fit(DataSettings(**(vars(settings) | change)), 8, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="the stage is layerwise but the checkpoint was saved with distill"):
        fit(settings, 8, tmp_path / "a.ckpt", stage="layerwise")
    with pytest.raises(UserError, match="stage_rows"):
        fit(settings, 8, tmp_path / "a.ckpt", stage_rows={"calibration": 3})


def module(settings, context=CONTEXT, batch_size=BATCH, **options):
    return PackedDataModule(settings, StubTokenizer(), context, batch_size, progress=False, **options)


def test_order_depends_on_seed_stage_and_pass_only(settings):
    def order(data, stage):
        torch.rand(1)
        return [tuple(b["token_ids"][:, 1].tolist()) for b in data.stage_dataloader(stage)]

    first = order(module(settings), "distill")
    data = module(settings)
    assert order(data, "layerwise") != first  # read first: must not matter
    assert order(data, "distill") == first and order(data, "distill") == first
    settings.seed = 1
    assert order(module(settings), "distill") != first


def test_stages_have_rows_of_their_own(settings):
    data = module(settings, stage_rows={"calibration": 5, "layerwise": 8})
    shares = {stage: set(data.rows_of(stage).tolist()) for stage in STAGES}
    assert [len(shares[s]) for s in STAGES] == [5, 8, 13]
    assert set.union(*shares.values()) == set(range(ROWS))
    assert shares["calibration"] != set(range(5))  # spread over the text
    whole = module(settings, stage_rows={"calibration": 5, "layerwise": 8, "distill": 13})
    assert set(whole.rows_of("distill").tolist()) == shares["distill"]


def test_stages_share_when_rows_are_few(settings, caplog):
    data = module(settings, stage_rows={"calibration": 5, "layerwise": 400})
    assert [len(data.rows_of(s)) for s in STAGES] == [5, ROWS, ROWS]
    assert "they share them" in caplog.text
    assert [len(module(settings).rows_of(s)) for s in STAGES] == [ROWS] * 3


def test_calibration_is_one_ordered_pass(settings):
    data = module(settings, stage_rows={"calibration": 5})
    batches = list(data.calibration_dataloader())
    assert [len(b["token_ids"]) for b in batches] == [2, 2, 1]
    got = torch.cat([b["token_ids"] for b in batches])
    assert torch.equal(got, torch.stack([data.train_dataset[i]["token_ids"] for i in data.rows_of("calibration")]))


@pytest.mark.parametrize("rows", [7, 8, 100])
def test_processes_share_the_rows(rows):
    length = 40
    alone = list(StageSampler(range(rows), 1, 0, seed=3, length=4 * length))
    together = [list(StageSampler(range(rows), 4, rank, seed=3, length=length)) for rank in range(4)]
    assert [row for step in zip(*together, strict=True) for row in step] == alone
    assert sorted(alone[:rows]) == list(range(rows))


@pytest.mark.parametrize("replicas", [2, 3])
def test_processes_see_the_batches_that_one_accumulates(replicas):
    size, steps = 4, 5

    def batches(order):
        return [order[i : i + size] for i in range(0, len(order), size)]

    alone = batches(list(StageSampler(range(9), 1, 0, seed=3, length=replicas * steps * size, batch_size=size)))
    for start in (0, 2):  # of steps, as an interrupted run has left off
        options = dict(seed=3, length=steps * size, batch_size=size, start=start * size)
        together = [batches(list(StageSampler(range(9), replicas, r, **options))) for r in range(replicas)]
        assert [batch for step in zip(*together, strict=True) for batch in step] == alone[start * replicas :]


def test_heldout_rows(tmp_path):
    settings = settings_for(tmp_path, documents(400), heldout_min_tokens=2_000)
    data = module(settings)
    rows = data.heldout_rows(320, context=32)
    assert len(rows) == 10 and rows[0]["token_ids"].shape == (32,)
    assert len(data.heldout_rows(10**9)) == len(PackedStream(data.folder, "heldout")) // CONTEXT
    assert len(data.heldout_rows(1)) == 1
    assert any(r["document_ids"].any() for r in rows)
    assert not any(r["document_ids"].any() for r in data.heldout_rows(320, 32, join_documents=True))
    with pytest.raises(UserError, match="data.heldout_min_tokens"):
        data.heldout_rows(1, context=10**6)


def test_copy_texts(tmp_path):
    settings = settings_for(tmp_path, documents(400), heldout_min_tokens=2_000)
    data = module(settings)
    texts = data.copy_texts(distance=100, count=4)
    assert texts.shape == (4, 201) and texts.dtype == torch.int64
    assert (texts[:, 0] == 2).all() and (texts[:, 1:] > 2).all()
    assert torch.equal(texts[:, 1:101], texts[:, 101:])
    assert len({tuple(t.tolist()) for t in texts}) == 4
    assert torch.equal(texts, module(settings).copy_texts(distance=100, count=4))
    assert data.copy_texts(distance=100, count=1).shape == (1, 201)
    with pytest.raises(UserError, match="data.heldout_min_tokens"):
        data.copy_texts(distance=10**6, count=1)


def test_mistakes(settings):
    with pytest.raises(UserError, match="no stage; did you mean 'layerwise'"):
        module(settings, stage_rows={"layer_wise": 3})
    with pytest.raises(UserError, match="no stage; did you mean 'distill'"):
        module(settings).stage_dataloader("distil")
    with pytest.raises(UserError, match="at least 1 row"):
        module(settings, stage_rows={"distill": 0})
    with pytest.raises(UserError, match="batch size"):
        module(settings, batch_size=0)
    with pytest.raises(UserError, match="max_steps"):
        fit(settings, -1)
