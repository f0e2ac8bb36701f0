"""When tiles may be tried: see ``decode.assembler``."""

import stat
from importlib import metadata

import pytest
import torch
import triton

from tpa_train.tpa.decode import assembler, tuning

HOPPER = torch.device("cuda", 3)
INSTALLED = assembler.installed


@pytest.fixture(autouse=True)
def _asked_anew(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(assembler, "installed", lambda: None)
    _forget()
    yield
    _forget()


def _forget():
    assembler.trusted.cache_clear()
    assembler._tell.cache_clear()


def _asked(monkeypatch, version, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "get_device_capability", {HOPPER: capability}.__getitem__)
    monkeypatch.setattr(assembler, "assembler", lambda: (version, "THE_VARIABLE"))
    return assembler.trusted(HOPPER)


@pytest.mark.parametrize("version,trusted", [("12.8", False), ("13.2", False), ("13.3", True), ("13.10", True),
                                             ("14.0", True), (None, True)])  # fmt: skip
def test_a_mended_assembler_is_trusted(version, trusted, monkeypatch, caplog):
    assert _asked(monkeypatch, version) == trusted == assembler.trusted(HOPPER)
    assert len(caplog.messages) == (0 if trusted else 1), "it is said once"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_only_hopper_is_concerned(capability, monkeypatch, caplog):
    assert _asked(monkeypatch, "12.8", capability) and not caplog.messages


def test_what_would_help_is_said(monkeypatch, caplog):
    assert not _asked(monkeypatch, "12.9")
    assert "ptxas 12.9" in caplog.text and "pip install 'nvidia-cuda-nvcc>=13.3'" in caplog.text
    caplog.clear()
    _forget()
    monkeypatch.setattr(assembler, "installed", lambda: "/here/ptxas")
    assert not _asked(monkeypatch, "12.9")
    assert "set THE_VARIABLE=/here/ptxas," in caplog.text and "pip" not in caplog.text


@pytest.mark.parametrize("version,found", [("13.0.88", False), ("13.5rc1", True), ("14.0.1", True), ("new", False)])
def test_the_assembler_of_a_wheel_is_found(version, found, monkeypatch, tmp_path):
    folder = tmp_path / f"nvidia_cuda_nvcc-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: {version}\n")
    (folder / "RECORD").write_text("nvidia/cu13/bin/nvcc,,\nnvidia/cu13/bin/ptxas,,\n")
    ptxas = tmp_path / "nvidia" / "cu13" / "bin" / "ptxas"
    ptxas.parent.mkdir(parents=True)
    ptxas.touch()
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(folder))
    assert INSTALLED() == (str(ptxas) if found else None)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    assert INSTALLED() is None


def test_triton_is_asked_which_it_takes_for_hopper(monkeypatch, tmp_path):
    """Each variable names another one: that which is said to matter does."""
    named = {}
    for n, name in enumerate(("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")):
        path = tmp_path / f"ptxas{n}"
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 77.{n}, V77.{n}.1'\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv(name, str(path))
        named[name] = f"77.{n}"
    version, variable = assembler.assembler()
    assert version == named[variable]
    monkeypatch.delenv(variable)
    assert assembler.assembler()[0] not in (None, version)


def test_hopper_is_what_triton_is_asked_for(monkeypatch):
    from triton.backends.nvidia import compiler

    seen = []

    class Found:
        version, path = "12.8", "other"

    monkeypatch.setattr(compiler, "get_ptxas", lambda arch: seen.append(arch) or Found)
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert assembler.assembler() == ("12.8", "TRITON_PTXAS_BLACKWELL_PATH") and seen == [90]
    monkeypatch.setattr(triton, "__version__", "3.8.0+git1")
    monkeypatch.setattr(compiler, "get_ptxas", lambda: Found)  # as in Triton 3.5
    assert assembler.assembler() == ("12.8", "TRITON_PTXAS_PATH")


@pytest.mark.parametrize("error", [PermissionError, RuntimeError, TypeError, None])
def test_nothing_that_goes_wrong_in_asking_ends_a_step(error, monkeypatch, tmp_path):
    from triton.backends.nvidia import compiler

    def failing(arch):
        raise error("no")

    monkeypatch.delattr(compiler, "get_ptxas")
    if error is not None:
        monkeypatch.setattr(compiler, "get_ptxas", failing, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert assembler.assembler()[0] is None and assembler.trusted(HOPPER)
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.PathDistribution(tmp_path))
    assert INSTALLED() is None, "no metadata"


@pytest.mark.parametrize("measured", [False, True])
def test_tiles_are_not_tried_where_the_assembler_errs(measured, monkeypatch, caplog):
    """Whoever has such an assembler is told, also where nothing is measured."""
    monkeypatch.setenv(tuning.VARIABLE, "1" if measured else "")
    monkeypatch.setattr(tuning, "tuned", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "default_tiles", lambda *_: "default")
    monkeypatch.setattr(tuning, "candidates", lambda *_: ["default", "other"])
    monkeypatch.setattr(tuning, "fastest", lambda options, run: options[-1])
    for version, expected in (("12.8", "default"), ("13.4", "other" if measured else "default")):
        _asked(monkeypatch, version)
        caplog.clear()
        _forget()
        assert tuning.chosen(None, lambda: "key", torch.bfloat16, HOPPER, None) == expected
        assert bool(caplog.messages) == (version == "12.8")
