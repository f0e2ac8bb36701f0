"""Two processes measure what one does."""

import pytest
import torch
import torch.multiprocessing as mp
from evaluation_models import dense_model, rows, tpa_model

from tpa_train.evaluation.suites import Evaluator


def _evaluate():
    torch.set_num_threads(1)
    teacher = dense_model(dtype=torch.float64)
    text = torch.arange(10, 30)
    copies = {20: torch.cat([torch.tensor([2]), text, text])[None].repeat(3, 1)}
    return Evaluator(teacher, rows(3), copies, progress=False).evaluate(tpa_model(teacher), "factorized")


def _process(rank: int, store: str, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    result = _evaluate()
    torch.save(result.to_dict(), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_equal_one(tmp_path):
    mp.spawn(_process, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    expected = _evaluate()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["kl"] == pytest.approx(expected.kl, rel=1e-12)
        assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-12)
        assert result["copy_accuracy"] == expected.copy_accuracy
        assert result["evaluated_tokens"] == expected.evaluated_tokens
