"""What is said where NCCL cannot be used, and how cupy is handled; cupy itself is stood in for."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from typing import Any

import pytest
import torch

from actors.transport import cupy_nccl
from actors.transport.cupy_nccl import CupyBackend, requirements_missing


class FakeNccl(types.ModuleType):
    """As much of ``cupy.cuda.nccl`` as is asked for."""

    class NcclError(RuntimeError):
        pass

    def __init__(self, available: bool, version: int = 22500) -> None:
        super().__init__("cupy.cuda.nccl")
        self.available = available
        self.version = version
        self.calls: list[str] = []

    def get_version(self) -> int:
        assert self.available, "cupy would raise"
        return self.version

    def groupStart(self) -> None:
        self.calls.append("start")

    def groupEnd(self) -> None:
        self.calls.append("end")


def install(monkeypatch: pytest.MonkeyPatch, nccl: FakeNccl) -> None:
    """``import cupy`` finds this."""
    for name in ("cupy", "cupy.cuda"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", nccl)


def with_devices(monkeypatch: pytest.MonkeyPatch, cuda: str | None, visible: bool) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)


def without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else real(name))


def test_all_that_is_missing_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, None, False)
    without_cupy(monkeypatch)
    torch_text, cupy_text = requirements_missing()
    assert torch_text.startswith(f"torch {torch.__version__} is a build without CUDA")
    assert cupy_text.startswith("cupy is not installed")


def test_a_cuda_build_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, "12.8", False)
    install(monkeypatch, FakeNccl(True))
    assert requirements_missing() == ["torch sees no CUDA device: check the driver and CUDA_VISIBLE_DEVICES"]


@pytest.mark.parametrize(
    ("nccl", "told"),
    [
        (FakeNccl(True), []),
        (FakeNccl(True, 22105), ["NCCL has version code 22105; at least 22200 (2.22) is needed"]),
        (FakeNccl(False), ["cupy finds no NCCL library: pip install nvidia-nccl-cu12"]),
    ],
)
def test_the_library_itself(monkeypatch: pytest.MonkeyPatch, nccl: FakeNccl, told: list[str]) -> None:
    with_devices(monkeypatch, "12.8", True)
    install(monkeypatch, nccl)
    assert requirements_missing() == told


def test_cupy_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, "12.8", True)
    install(monkeypatch, FakeNccl(True))
    monkeypatch.setitem(sys.modules, "cupy.cuda.nccl", None)
    (text,) = requirements_missing()
    assert text.startswith("cupy cannot be imported: ")


def test_a_backend_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with_devices(monkeypatch, None, False)
    without_cupy(monkeypatch)
    with pytest.raises(ValueError, match=r"nccl cannot be used here: torch .* without CUDA.*; cupy is not installed"):
        CupyBackend(torch.device("cuda", 0))


def test_a_group_is_closed_after_an_error_too() -> None:
    nccl: Any = FakeNccl(True)
    with pytest.raises(RuntimeError, match="inside"), cupy_nccl._grouped(nccl):
        raise RuntimeError("inside")
    assert nccl.calls == ["start", "end"]
