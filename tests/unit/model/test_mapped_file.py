"""Tensors that stay where they lie in their file."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actors.model import mapped_file
from actors.model.errors import CheckpointError
from actors.model.experts import ExpertBank
from actors.model.families import load_spec
from actors.model.mapped_file import LEAST_BYTES, MappedFile
from actors.model.reader import TensorReader
from actors.model.weights import Checkpoint
from tests.checkpoints import write_deepseek_v3

ROWS, COLUMNS = 96, 1024
SHAPE = (ROWS, COLUMNS)
FILE = "model.safetensors"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def held(tmp_path: Path) -> dict[str, torch.Tensor]:
    """What lies in tmp_path: all but ``small`` are large enough."""
    tensors = {
        "a": random(*SHAPE).bfloat16(),
        "b": random(*SHAPE, seed=1).bfloat16(),
        "wide": random(*SHAPE, seed=2),
        "experts": random(4, *SHAPE, seed=3).bfloat16(),
        "small": random(LEAST_BYTES // 2 - 1, seed=4).bfloat16(),
        "int8": torch.arange(LEAST_BYTES).to(torch.int8),
    }
    save_file(tensors, tmp_path / FILE)
    return tensors


def mapped_kilobytes(folder: Path, field: str = "Rss") -> int | None:
    """Of the file's mapping in this process; None where there is none."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [at for at, line in enumerate(lines) if line.endswith(str(folder / FILE))]
    if not starts:
        return None
    return next(int(line.split()[1]) for line in lines[starts[0] :] if line.startswith(f"{field}:"))


def test_large_tensors_are_views_of_the_file(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        assert checkpoint.has_view("a", SHAPE, torch.bfloat16)
        a = checkpoint.read("a", SHAPE)
        entry = checkpoint.read_entry("experts", 4, 2, SHAPE)
        raw = checkpoint.read_raw("int8", (LEAST_BYTES,), (torch.int8,))
        assert checkpoint.bytes_read == a.nbytes + entry.nbytes + raw.nbytes
    assert torch.equal(a, held["a"])
    assert torch.equal(entry, held["experts"][2])
    assert torch.equal(raw, held["int8"])
    assert mapped_kilobytes(tmp_path, "Anonymous") == 0
    del a, entry, raw
    assert mapped_kilobytes(tmp_path) is None


def test_a_view_may_be_written_to_and_the_file_stays(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    before = (tmp_path / FILE).read_bytes()
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        a = checkpoint.read("a", SHAPE).fill_(2)
        assert torch.equal(checkpoint.read("b", SHAPE), held["b"])
    assert a.eq(2).all()
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.usefixtures("held")
def test_what_is_read_instead(tmp_path: Path) -> None:
    """Small ones, casts, and everything where nobody asked for maps."""
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        assert not checkpoint.has_view("small", (LEAST_BYTES // 2 - 1,), torch.bfloat16)
        assert not checkpoint.has_view("wide", SHAPE, torch.bfloat16)
        assert checkpoint.read("wide", SHAPE, torch.bfloat16).dtype == torch.bfloat16
    with Checkpoint(tmp_path) as checkpoint:
        assert not checkpoint.has_view("a", SHAPE, torch.bfloat16)
        checkpoint.read("a", SHAPE)
        assert mapped_kilobytes(tmp_path) is None


def test_numbers_that_begin_between_others_are_read(tmp_path: Path) -> None:
    """A view has to begin at a multiple of its elements' size."""
    odd, wide = torch.ones(3, dtype=torch.uint8), random(LEAST_BYTES)
    header = (
        f'{{"odd": {{"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}, "wide": {{"dtype": "F32", '
        f'"shape": [{len(wide)}], "data_offsets": [3, {3 + wide.nbytes}]}}}}'
    ).encode()
    header += b" " * (-len(header) % 8)
    data = odd.numpy().tobytes() + wide.numpy().tobytes()
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + data)
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        assert not checkpoint.has_view("wide", wide.shape, torch.float32)
        assert torch.equal(checkpoint.read("wide", wide.shape), wide)


def test_other_file_systems_are_read(
    tmp_path: Path, held: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_file, "_LOCAL", {0x6969: "nfs"})
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        assert torch.equal(checkpoint.read("a", SHAPE), held["a"])
        assert mapped_kilobytes(tmp_path) is None


def advice_fails(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    class Libc:
        fstatfs = mapped_file._libc.fstatfs

        @staticmethod
        def madvise(start: int, length: int, advice: int) -> int:
            ctypes.set_errno(number)
            return -1

    monkeypatch.setattr(mapped_file, "_libc", Libc)


def test_kernels_that_cannot_bring_pages_in_are_told_to_read(
    tmp_path: Path, held: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    advice_fails(monkeypatch, errno.EINVAL)
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        assert torch.equal(checkpoint.read("a", SHAPE), held["a"])
        assert mapped_kilobytes(tmp_path) is None


@pytest.mark.usefixtures("held")
def test_an_error_of_the_disk_names_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        checkpoint.read("b", SHAPE)
        advice_fails(monkeypatch, errno.EIO)
        with pytest.raises(CheckpointError, match=rf"{FILE}: tensor 'a' cannot be read: .*Input/output error"):
            checkpoint.read("a", SHAPE)


def test_a_file_that_is_cut_off_is_an_error_and_no_signal(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        kept = checkpoint.read("b", SHAPE)
        os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size // 2)
        with pytest.raises(CheckpointError, match=rf"{FILE}: tensor 'int8' cannot be read: .*Bad address"):
            checkpoint.read_raw("int8", (LEAST_BYTES,), (torch.int8,))
        assert torch.equal(kept, held["b"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, ROWS * COLUMNS - 1])
def test_views_are_searched_for_what_is_not_finite(tmp_path: Path, bad: float, at: int) -> None:
    values = random(*SHAPE).bfloat16()
    values.view(-1)[at] = bad
    save_file({"a": values}, tmp_path / FILE)
    with (
        Checkpoint(tmp_path, map_files=True) as checkpoint,
        pytest.raises(CheckpointError, match=r"'a' holds NaN or infinity, expected finite torch\.bfloat16"),
    ):
        checkpoint.read("a", SHAPE)
    with Checkpoint(tmp_path, check_finite=False, map_files=True) as checkpoint:
        assert torch.equal(checkpoint.read("a", SHAPE).view(torch.int16), values.view(torch.int16))


def test_pages_of_a_dropped_tensor_are_given_back_and_its_neighbours_stay(tmp_path: Path) -> None:
    path = tmp_path / FILE
    page = os.sysconf("SC_PAGESIZE")
    data = os.urandom(64 * page)
    path.write_bytes(data)
    with path.open("rb") as file:
        mapped = MappedFile.of(file.fileno(), len(data))
    assert mapped is not None
    first, second = mapped.bytes(100, 40 * page + 10), mapped.bytes(40 * page + 10, len(data))
    mapped.bring_in(first)
    mapped.bring_in(second)
    assert mapped_kilobytes(tmp_path) == 64 * page // 1024
    del first
    assert mapped_kilobytes(tmp_path) == (64 - 39) * page // 1024
    assert bytes(second.numpy()) == data[40 * page + 10 :]
    assert bytes(mapped.bytes(100, 5000).numpy()) == data[100:5000]


@pytest.mark.usefixtures("held")
def test_matrices_under_one_another_stay_apart_where_they_lie(tmp_path: Path) -> None:
    parts = [("a", SHAPE), ("b", SHAPE)]
    with Checkpoint(tmp_path, map_files=True) as checkpoint:
        read = TensorReader(checkpoint, torch.bfloat16)
        for apart in (read.projections(parts), read.stacked_matrix(parts)):
            assert isinstance(apart, tuple)
            assert [part.shape for part in apart] == [SHAPE, SHAPE]
        assert isinstance(TensorReader(checkpoint, torch.float32).projections(parts), torch.Tensor)
        assert read.stacked(parts).shape == (2 * ROWS, COLUMNS)
    with Checkpoint(tmp_path) as checkpoint:
        assert isinstance(TensorReader(checkpoint, torch.bfloat16).projections(parts), torch.Tensor)


def test_mapped_experts_compute_what_read_ones_do(tmp_path: Path) -> None:
    write_deepseek_v3(tmp_path, hidden_size=256, moe_intermediate_size=128)
    spec = load_spec(tmp_path)
    layer = spec.moe_layers[0]
    wanted = [(layer, expert) for expert in range(spec.moe.n_experts)]
    rows = random(5, spec.d_model).to(spec.dtype)
    pair_row, pair_expert = torch.arange(5), torch.arange(5) % spec.moe.n_experts
    outputs = []
    for map_files in (True, False):
        with Checkpoint(tmp_path, map_files=map_files) as checkpoint:
            bank = ExpertBank.load(spec, checkpoint, wanted, spec.dtype, row_block=8)
            assert bank._held[layer, 0].gate_up.__class__ is (tuple if map_files else torch.Tensor)
        outputs.append(bank.forward(layer, rows, pair_row, pair_expert))
    assert torch.equal(*outputs)
