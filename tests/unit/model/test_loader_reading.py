"""How tensors get from a file into memory."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from actors.model import tensor_file
from actors.model.errors import CheckpointError
from actors.model.finite import all_finite
from actors.model.heap import CHUNK_BYTES, EVERY_BYTES, LEAST_BYTES, MAPPED_BYTES, HeapTrimmer, blank, lasting, trim
from actors.model.parallel import READERS, load_each
from actors.model.weights import Checkpoint

NAN8 = torch.tensor([0x00, 0x7E, 0xFF], dtype=torch.uint8).view(torch.float8_e4m3fn)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def held(tmp_path: Path) -> dict[str, torch.Tensor]:
    """What lies in tmp_path."""
    tensors = {
        "plain": random(37, 11),
        "half": random(37, 11).half(),
        "experts": random(5, 7, 3).bfloat16(),
        "int8": torch.arange(-8, 8, dtype=torch.int8).view(4, 4),
        "packed": torch.arange(6, dtype=torch.int32).view(2, 3),
        "bytes": torch.arange(256, dtype=torch.int16).to(torch.uint8),
        "fp8": torch.arange(0x7F).to(torch.uint8).view(torch.float8_e4m3fn),
        "nan8": NAN8,
        "inf": torch.tensor([1.0, float("inf")]),
        "scalar": torch.tensor(3.0),
        "empty": torch.ones(0, 3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def of_pread(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, int, list[memoryview], int], int]) -> None:
    """Put ``change``, which gets the real call and its arguments, in place of the system's reading."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: change(real, fd, buffers, offset))


@pytest.mark.parametrize("piece", [64, 1024, 1 << 20])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_come_whole_in_any_dtype(
    tmp_path: Path, held: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, piece: int
) -> None:
    monkeypatch.setattr(tensor_file, "PIECE", piece)
    monkeypatch.setattr(tensor_file, "_of_thread", threading.local())
    with Checkpoint(tmp_path) as checkpoint:
        for name in ("plain", "half", "experts", "scalar", "empty"):
            tensor = checkpoint.read(name, tuple(held[name].shape), dtype)
            assert tensor.dtype == (dtype or held[name].dtype)
            assert torch.equal(tensor, held[name].to(tensor.dtype))


def test_reading_goes_on_where_the_system_gave_less(
    tmp_path: Path, held: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_pread(monkeypatch, lambda real, fd, buffers, offset: real(fd, [buffers[0][:5]], offset))
    with Checkpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read("plain", (37, 11)), held["plain"])
        assert torch.equal(checkpoint.read("half", (37, 11), torch.float32), held["half"].float())


def test_into_part_of_a_larger_tensor(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    both = torch.zeros(80, 11)
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.read_into(both[1:38], "plain")
        checkpoint.read_into(both[38:75], "half")
        with pytest.raises(CheckpointError, match=r"'plain' has shape \[37, 11\], expected \[36, 11\]"):
            checkpoint.read_into(both[:36], "plain")
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            checkpoint.read_into(torch.zeros(11, 37).T, "plain")
    assert torch.equal(both[1:75], torch.cat([held["plain"], held["half"].float()]))
    assert not both[0].any()
    assert not both[75:].any()


def test_an_entry_costs_its_own_bytes(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    with Checkpoint(tmp_path) as checkpoint:
        for index in range(5):
            assert torch.equal(checkpoint.read_entry("experts", 5, index, (7, 3)), held["experts"][index])
        assert checkpoint.bytes_read == 5 * 42
        wide = checkpoint.read_entry("experts", 5, 4, (7, 3), torch.float32)
        assert torch.equal(wide, held["experts"][4].float())
        assert checkpoint.bytes_read == 6 * 42
        for index in (-1, 5):
            with pytest.raises(IndexError, match=rf"entry {index} of tensor 'experts', expected 0\.\.4"):
                checkpoint.read_entry("experts", 5, index, (7, 3))
        with pytest.raises(CheckpointError, match=r"'experts' has shape \[5, 7, 3\], expected \[4, 7, 3\]"):
            checkpoint.read_entry("experts", 4, 0, (7, 3))


def test_raw_tensors_keep_their_type(tmp_path: Path, held: dict[str, torch.Tensor]) -> None:
    with Checkpoint(tmp_path) as checkpoint:
        for name in ("int8", "packed", "bytes", "fp8", "half"):
            kept = checkpoint.read_raw(name, tuple(held[name].shape), (torch.float32, held[name].dtype))
            assert kept.dtype == held[name].dtype
            assert torch.equal(kept.view(torch.uint8), held[name].view(torch.uint8))
        with pytest.raises(CheckpointError, match=r"'int8' is torch\.int8, expected one of torch\.uint8, torch\.int32"):
            checkpoint.read_raw("int8", (4, 4), (torch.uint8, torch.int32))
        with pytest.raises(CheckpointError, match=r"'nan8' holds NaN .* expected finite torch\.float8_e4m3fn"):
            checkpoint.read_raw("nan8", (3,), (torch.float8_e4m3fn,))
    with Checkpoint(tmp_path, check_finite=False) as checkpoint:
        kept = checkpoint.read_raw("nan8", (3,), (torch.float8_e4m3fn,))
    assert torch.equal(kept.view(torch.uint8), NAN8.view(torch.uint8))


def test_a_type_that_torch_has_not(tmp_path: Path) -> None:
    header = b'{"four": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}'
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(CheckpointError, match=r"model\.safetensors: .*'four' is F4"),
    ):
        checkpoint.read("four", (8,))


def test_scales_that_are_powers_of_two(tmp_path: Path) -> None:
    """Microscaling formats' e8m0: 2**(byte - 127), 255 is NaN."""
    every = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(torch.float8_e8m0fnu)
    save_file({"scales": every[:255].clone(), "nan": every[255:].clone()}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        kept = checkpoint.read_raw("scales", (255,), (torch.float8_e8m0fnu,))
        assert torch.equal(kept.view(torch.uint8), every[:255].view(torch.uint8))
        with pytest.raises(CheckpointError, match="'nan' holds NaN or infinity"):
            checkpoint.read_raw("nan", (1,), (torch.float8_e8m0fnu,))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu]
)
def test_every_number_of_a_small_format_is_judged_rightly(dtype: torch.dtype) -> None:
    width = dtype.itemsize * 8
    bits = torch.arange(1 << width, dtype=torch.int32).to(torch.uint8 if width == 8 else torch.uint16)
    every = bits.view(dtype)
    finite = every.float().isfinite()
    assert all_finite(every[finite])
    assert [all_finite(every[i : i + 1]) for i in range(0, len(every), 7)] == finite[::7].tolist()
    assert not any(all_finite(value[None]) for value in every[~finite])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    numbers = torch.tensor([limits.max, limits.min, limits.tiny, 0.0, -0.0], dtype=dtype)
    assert all_finite(numbers)
    for bad in ("inf", "-inf", "nan"):
        assert not all_finite(torch.cat([numbers, torch.tensor([float(bad)], dtype=dtype)]))
    assert all_finite(numbers[:0])
    assert all_finite(torch.tensor([-1], dtype=torch.int32))


def test_one_bad_number_is_found_wherever_it_is(tmp_path: Path) -> None:
    count = tensor_file.PIECE // 4 * 2 + 3
    for place in (0, tensor_file.PIECE // 4, count - 1):
        values = torch.zeros(count)
        values[place] = float("-inf")
        save_file({"a": values}, tmp_path / "model.safetensors")
        for dtype in (None, torch.bfloat16):
            with Checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="'a' holds NaN or infinity"):
                checkpoint.read("a", (count,), dtype)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": random(100)}, path)
    message = r"model\.safetensors: was cut off .* ends at byte \d+, inside tensor 'a', expected 8 more"
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.read("a", (100,))
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read("a", (100,))


@pytest.mark.parametrize("change", ["replaced", "written"])
def test_a_file_that_is_not_the_one_any_more_whose_header_was_read(tmp_path: Path, change: str) -> None:
    """At the old offsets lies something else; the number of bytes is the same."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.zeros(4)}, path)
    old = path.stat()
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.unchanged()
        other = save({"a": torch.zeros(4), "c": torch.ones(4)})
        if change == "replaced":
            (tmp_path / "new").write_bytes(other)
            os.utime(tmp_path / "new", ns=(old.st_atime_ns, old.st_mtime_ns))
            (tmp_path / "new").rename(path)
        else:
            path.write_bytes(other)
            os.utime(path, ns=(0, old.st_mtime_ns + 1))
        assert path.stat().st_size == old.st_size
        assert not checkpoint.unchanged()
        with pytest.raises(CheckpointError, match=r"model\.safetensors: was replaced or written to .* tensor 'a'"):
            checkpoint.read("a", (4,))


def test_a_folder_whose_files_are_others_has_changed(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file({name: torch.ones(4)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    both = Checkpoint(tmp_path)
    assert both.unchanged()
    index.write_text('{"weight_map": {"x": "x.safetensors"}}')
    assert not both.unchanged()
    one = Checkpoint(tmp_path)
    assert one.unchanged()
    index.write_text('{"weight_map": {"y": "y.safetensors"}}')
    os.utime(index, ns=(0, 1))
    assert not one.unchanged()
    other = Checkpoint(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    assert not other.unchanged()


def test_errors_of_the_system_name_file_and_tensor(
    tmp_path: Path, held: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(real: Any, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    of_pread(monkeypatch, fail)
    with Checkpoint(tmp_path) as checkpoint:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'plain' cannot be read: .*Input/output"):
            checkpoint.read("plain", (37, 11))
        assert checkpoint.bytes_read == 0
    with Checkpoint(tmp_path) as checkpoint:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"tensor 'plain' cannot be read: .*No such file"):
            checkpoint.read("plain", (37, 11))


def test_tensors_are_read_at_the_same_time(
    tmp_path: Path, held: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read waits until as many are under way as there are readers: one after the other, none would end."""
    together = threading.Barrier(READERS)

    def wait(real: Any, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        together.wait(timeout=30)
        return int(real(fd, buffers, offset))

    of_pread(monkeypatch, wait)
    with Checkpoint(tmp_path) as checkpoint:
        tensors = load_each(lambda _: checkpoint.read("plain", (37, 11)), range(3 * READERS))
        assert checkpoint.bytes_read == 3 * READERS * held["plain"].nbytes
    assert all(torch.equal(tensor, held["plain"]) for tensor in tensors)


def test_casts_of_several_threads_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None goes on before all have read."""
    tensors = {f"t{i}": random(300, 100, seed=i).half() for i in range(4 * READERS)}
    save_file(tensors, tmp_path / "model.safetensors")
    together = threading.Barrier(READERS)

    def wait(real: Any, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        got = int(real(fd, buffers, offset))
        together.wait(timeout=30)
        return got

    of_pread(monkeypatch, wait)
    with Checkpoint(tmp_path) as checkpoint:
        wide = load_each(lambda name: checkpoint.read(name, (300, 100), torch.float32), tensors)
        assert checkpoint.bytes_read == 4 * READERS * 300 * 100 * 2
    assert all(torch.equal(a, b.float()) for a, b in zip(wide, tensors.values(), strict=True))


def test_surplus_tensors_are_nobodys_business(tmp_path: Path) -> None:
    surplus = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.tensor([float("nan")]),
        "model.layers.61.eh_proj.weight": torch.ones(2, 4),
        "position_ids": torch.arange(4),
    }
    save_file({"a": torch.ones(1), **surplus}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("a", (1,)).item() == 1
        assert checkpoint.bytes_read == 4


@pytest.mark.parametrize("nbytes", [0, 64, MAPPED_BYTES - 2, MAPPED_BYTES, MAPPED_BYTES + 2])
def test_blank_tensors(nbytes: int) -> None:
    tensor = blank((nbytes // 2, 1), torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((nbytes // 2, 1), torch.bfloat16, True)
    assert tensor.data_ptr() % 64 == 0
    assert tensor.fill_(2).eq(2).all()


@pytest.mark.parametrize("nbytes", [0, 64, LEAST_BYTES - 2, LEAST_BYTES, LEAST_BYTES + 2, CHUNK_BYTES + 2])
def test_lasting_tensors(nbytes: int) -> None:
    before, tensor, after = (lasting((n // 2, 1), torch.bfloat16).fill_(3) for n in (LEAST_BYTES, nbytes, LEAST_BYTES))
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((nbytes // 2, 1), torch.bfloat16, True)
    assert tensor.data_ptr() % 64 == 0
    assert tensor.fill_(2).eq(2).all()
    del tensor
    assert before.eq(3).all()
    assert after.eq(3).all()


def test_lasting_memory_goes_back_when_it_is_dropped() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    nbytes = CHUNK_BYTES // 4
    tensors = [lasting((nbytes,), torch.uint8).fill_(1) for _ in range(4)]
    much = resident()
    del tensors[1:3]
    assert resident() <= much - 1.9 * nbytes


def test_the_heap_is_trimmed_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr("actors.model.heap._malloc_trim", trims.append)
    heap = HeapTrimmer()
    for _ in range(11):
        heap.loaded(EVERY_BYTES // 4)
    assert trims == [0, 0]
    load_each(str, range(3))
    assert trims == [0, 0, 0]
    load_each(str, range(3), leaves_holes=False)
    assert trims == [0, 0, 0]
    monkeypatch.setattr("actors.model.heap._malloc_trim", None)
    trim()
