"""When tiles may be tried: see ``decode.assembler``."""

import stat
import sys

import pytest
import torch

from tpa_train.tpa.decode import assembler, tuning

HOPPER = torch.device("cuda", 0)
INSTALLED = assembler._installed


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    monkeypatch.setattr(assembler.torch.version, "hip", None)
    monkeypatch.setattr(assembler, "_installed", lambda: None)
    assembler.trusted.cache_clear()
    yield
    assembler.trusted.cache_clear()


def _asked(monkeypatch, version, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(assembler, "assembler_version", lambda: version)
    return assembler.trusted(HOPPER)


@pytest.mark.parametrize("version,trusted", [("12.8", False), ("13.2", False), ("13.3", True), ("13.10", True),
                                             ("14.0", True), (None, True)])  # fmt: skip
def test_a_mended_assembler_is_trusted(version, trusted, monkeypatch, caplog):
    assert _asked(monkeypatch, version) == trusted == assembler.trusted(HOPPER)
    assert len(caplog.messages) == (0 if trusted else 1), "it is said once"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_only_hopper_is_concerned(capability, monkeypatch, caplog):
    assert _asked(monkeypatch, "12.8", capability) and not caplog.messages


def test_what_would_help_is_said(monkeypatch, tmp_path, caplog):
    assert not _asked(monkeypatch, "12.9")
    assert "ptxas 12.9" in caplog.text and "pip install nvidia-cuda-nvcc" in caplog.text and "13.3" in caplog.text
    caplog.clear()
    assembler.trusted.cache_clear()
    monkeypatch.setattr(assembler, "_installed", lambda: tmp_path / "ptxas")
    assert not _asked(monkeypatch, "12.9")
    assert f"TRITON_PTXAS_PATH={tmp_path / 'ptxas'} " in caplog.text and "pip" not in caplog.text


def test_the_assembler_of_a_wheel_is_found(monkeypatch, tmp_path):
    (tmp_path / "nvidia" / assembler.WHEEL).parent.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    others = INSTALLED()  # of an environment that has the wheel
    (tmp_path / "nvidia" / assembler.WHEEL).touch()
    assert others != INSTALLED() == tmp_path / "nvidia" / assembler.WHEEL


def test_triton_is_asked_which_it_takes(monkeypatch, tmp_path):
    """The one that a variable names, where there is one: the second is that of newer Tritons."""
    version = assembler.assembler_version()
    assert version and all(part.isdigit() for part in version.split("."))
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 77.5, V77.5.1'\n")
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"):
        monkeypatch.setenv(name, str(other))
    assert assembler.assembler_version() == "77.5"


def test_tiles_are_not_tried_where_the_assembler_errs(monkeypatch):
    monkeypatch.setenv(tuning.VARIABLE, "1")
    monkeypatch.setattr(tuning, "tuned", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "default_tiles", lambda *_: "default")
    monkeypatch.setattr(tuning, "candidates", lambda *_: ["default", "other"])
    monkeypatch.setattr(tuning, "fastest", lambda options, run: options[-1])
    for version, expected in (("12.8", "default"), ("13.4", "other")):
        assembler.trusted.cache_clear()
        _asked(monkeypatch, version)
        assert tuning.chosen(None, lambda: "key", torch.bfloat16, HOPPER, None) == expected
