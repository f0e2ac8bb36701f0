"""The benchmark command: names, options, the record, and a tiny run of the streaming benchmark."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from random_models import small_config

from tpa_train.benchmarks import command, streaming
from tpa_train.benchmarks.record import card, make_record, versions, write_record
from tpa_train.benchmarks.streaming import RandomWeights, StreamingSettings, measure
from tpa_train.errors import UserError
from tpa_train.gemma3.config import SIZES

TINY = dict(tokens=48, context=24, device="cpu")


def test_help_lists_benchmarks_and_options(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for name in command.BENCHMARKS:
        module, schema = command.find(name)
        assert f"{name}: {module.__doc__.splitlines()[0]}" in text
        for option in (*(f.name for f in dataclasses.fields(schema)), "out"):
            assert f"\n  {option} " in text
    with pytest.raises(SystemExit):
        command.main(["streaming", "--help"])
    assert "\n  out " in capsys.readouterr().out


@pytest.mark.parametrize("argv,message", [
    ([], "name a benchmark first, out of: .*streaming"), (["size=27b"], "name a benchmark first"),
    (["streming"], "did you mean 'streaming'"), (["streaming", "sise=27b"], "did you mean 'size'"),
    (["streaming", "size=27c"], "did you mean '27b'"), (["streaming", "tokens=many"], "a whole number"),
    (["streaming", "tokens=100"], "a multiple of context=2048"), (["streaming", "tokens=0"], "at least 1"),
    (["streaming", "layers=63"], "between 1 and the 62"), (["streaming", "rank=129"], "head_dim, 128"),
    (["streaming", "seed=-1"], "seed=-1"), (["streaming", "size=1b", "context=65536", "tokens=65536"], "32768"),
    (["streaming", "device=gpu7"], "device=gpu7 cannot be used here"),
])  # fmt: skip
def test_mistakes_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        command.main(argv)


def test_a_place_that_cannot_be_written_is_found_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "run", lambda settings: pytest.fail("it ran"))
    (tmp_path / "file").write_text("")
    for out, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "x.json", "cannot be written")):
        with pytest.raises(UserError, match=message):
            command.main(["streaming", f"out={out}"])


def test_other_benchmarks_need_neither_render_nor_device(tmp_path, monkeypatch, capsys):
    """A settings class with a required field, and rows with different keys."""

    @dataclasses.dataclass
    class Settings:
        model: str

    rows = [{"name": "a", "value": 1.23456789}, {"name": "b", "error": float("nan"), "path": Path("x")}]
    module = SimpleNamespace(Settings=Settings, run=lambda s: rows, __doc__="Other.")
    monkeypatch.setitem(sys.modules, "other_benchmark", module)
    monkeypatch.setitem(command.BENCHMARKS, "other", "other_benchmark:Settings")
    with pytest.raises(UserError, match="model= is missing"):
        command.main(["other"])
    command.main(["other", "model=m x", f"out={tmp_path / 'made' / 'o.json'}"])
    assert "1.235" in capsys.readouterr().out
    found = json.loads((tmp_path / "made" / "o.json").read_text())
    assert found["command"] == f"python scripts/benchmark.py other 'model=m x' out={tmp_path / 'made' / 'o.json'}"
    assert found["settings"] == {"model": "m x"}
    assert found["rows"] == [rows[0], {"name": "b", "error": None, "path": "x"}]


def test_the_record(tmp_path):
    settings = StreamingSettings(size="4b")
    record = make_record("the command", settings, [{"a": 1}], torch.device("cpu"))
    assert list(record) == ["card", "versions", "command", "settings", "rows"]
    assert record["settings"] == dataclasses.asdict(settings) and record["command"] == "the command"
    assert record["card"] == card(torch.device("cpu")) and "threads" in record["card"]
    write_record(tmp_path / "r.json", record)
    assert json.loads((tmp_path / "r.json").read_text()) == record
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    found = versions()
    assert found["torch"] == torch.__version__ and {"python", "tpa_train", "lightning"} <= set(found)


def test_tiny_streaming_run(tmp_path, monkeypatch, capsys):
    """From the command line to JSON, on shapes of a few kilobytes in place of a size's."""
    config = small_config(num_kv_heads=2)
    monkeypatch.setitem(SIZES, "270m", config)
    out = tmp_path / "s.json"
    command.main(["streaming", "size=270m", *(f"{k}={v}" for k, v in TINY.items()), f"out={out}"])
    printed = capsys.readouterr().out
    assert "| 5 global |" in printed and "6 layers of together" in printed and f"written to {out}" in printed
    record = json.loads(out.read_text())
    *layers, head, summary = record["rows"]
    assert [row["layer"] for row in layers] == list(range(6)) and {r["row"] for r in layers} == {"layer"}
    assert [row["kind"] for row in layers] == list(config.layer_kinds)
    # q, o: 24·32 each; k, v: 24·16 each; MLP: 3·24·32; norms: 4·24 + 2·8; bfloat16.
    assert {row["weight_bytes"] for row in layers} == {2 * (2 * 24 * 32 + 2 * 24 * 16 + 3 * 24 * 32 + 4 * 24 + 2 * 8)}
    # rank 2: up 2·8·2, W_down 2·2·24 twice, centers 2·2 twice, W_out 24·4·2, bias 24.
    assert {row["factor_bytes"] for row in layers} == {2 * (32 + 2 * 96 + 2 * 4 + 192 + 24)}
    for row in layers:
        parts = [row[f"{name}_seconds"] for name in ("load", "forward", "moments", "solve")]
        assert min(parts) > 0 and row["seconds"] == pytest.approx(sum(parts)) and row["peak_gib"] > 0
    assert head["row"] == "head" and head["weight_bytes"] == 2 * 97 * 24
    assert summary["row"] == "summary" and (summary["layers"], summary["tokens"], summary["rank"]) == (6, 48, 2)
    assert summary["weights_gib"] * 2**30 == pytest.approx(6 * layers[0]["weight_bytes"])
    assert summary["kept_gib"] * 2**30 == pytest.approx(6 * 48 * 24 * 4)
    assert summary["seconds_per_layer"] == pytest.approx(sum(r["seconds"] for r in layers) / 6)
    assert summary["peak_gib"] >= max(row["peak_gib"] for row in layers)


def test_only_the_first_layers():
    rows = measure(small_config(), StreamingSettings(layers=2, kept="bfloat16", dtype="float32", rank=3, **TINY))
    assert [row["row"] for row in rows] == ["layer", "layer", "head", "summary"] and rows[-1]["rank"] == 3
    assert rows[-1]["kept_gib"] * 2**30 == pytest.approx(2 * 48 * 24 * 2)


def test_random_weights_repeat():
    """A layer that is loaded twice is the same one; layers differ, and so do seeds."""
    weights, other = (RandomWeights(small_config(), torch.float32, torch.device("cpu"), seed) for seed in (0, 1))
    first, again, next_layer = weights.layer(0), weights.layer(0), weights.layer(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.mlp.up_proj.weight, next_layer.mlp.up_proj.weight)
    assert not torch.equal(first.mlp.up_proj.weight, other.layer(0).mlp.up_proj.weight)
    assert torch.equal(weights.embedding(), weights.head()[1])
    x = torch.cat([batch.flatten(0, 1) for batch in weights.hidden(960, 24, 4)])
    assert x.shape == (960, 24) and float(x.square().mean()) == pytest.approx(1, abs=0.1)


def test_the_script_reports_mistakes_in_one_line():
    script = Path(__file__).parents[2] / "scripts" / "benchmark.py"
    done = subprocess.run([sys.executable, script, "streming"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: there is no benchmark 'streming'; did you mean 'streaming'?\n"
