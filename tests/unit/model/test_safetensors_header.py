from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from actors.model.errors import CheckpointError
from actors.model.safetensors_header import MAX_DIMENSION, MAX_DIMENSIONS, Stamp, TensorEntry, read_header

FLOAT = {"dtype": "F32", "shape": [1]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "none": torch.ones(0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    return tmp_path / "x.safetensors"


def write(folder: Path, header: bytes, data: bytes = b"") -> Path:
    path = folder / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_it_says_where_tensors_lie(file: Path) -> None:
    entries = read_header(file).entries
    assert set(entries) == {"a", "b", "none"}
    assert (entries["a"].dtype, entries["a"].shape) == ("F32", (2, 3))
    assert (entries["b"].dtype, entries["b"].shape) == ("BF16", (4,))
    held = file.read_bytes()[entries["a"].begin : entries["a"].end]
    assert torch.equal(torch.frombuffer(bytearray(held), dtype=torch.float32), torch.arange(6.0))


def test_a_header_may_be_empty_or_padded(tmp_path: Path) -> None:
    assert read_header(write(tmp_path, b"{}    ")).entries == {}
    text = json.dumps({"a": {**FLOAT, "data_offsets": [0, 4]}}).encode() + b"  "
    found = read_header(write(tmp_path, text, b"1234")).entries
    assert found == {"a": TensorEntry("F32", (1,), 8 + len(text), 12 + len(text))}


def test_the_stamp_tells_one_file_from_the_next(file: Path) -> None:
    first = read_header(file).stamp
    assert first == Stamp.of(file) == read_header(file).stamp
    os.utime(file, ns=(0, 1))
    touched = read_header(file).stamp
    (file.parent / "new").write_bytes(file.read_bytes())
    os.utime(file.parent / "new", ns=(0, 1))
    (file.parent / "new").rename(file)
    assert len({first, touched, read_header(file).stamp}) == 3
    assert Stamp.of(file.parent / "nothing") is None


@pytest.mark.parametrize(
    "shape", [[4294967295] * 200_000, [1] * (MAX_DIMENSIONS + 1), [10**18] * 20, [0, MAX_DIMENSION + 1]]
)
def test_shapes_that_no_tensor_has_are_refused_at_once(tmp_path: Path, shape: list[int]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    path, began = write(tmp_path, header, b"1234"), time.process_time()
    message = r"x\.safetensors: tensor 'a' has shape \[.*\], expected at most 16 dimensions of at most 92\d{17}$"
    with pytest.raises(CheckpointError, match=message) as refused:
        read_header(path)
    assert len(str(refused.value)) < len(str(path)) + 300
    assert time.process_time() - began < 5  # the product of the first would take a minute


def test_the_largest_shapes_are_still_compared(tmp_path: Path) -> None:
    shape = [MAX_DIMENSION] * MAX_DIMENSIONS
    header = json.dumps({"a": {"dtype": "F64", "shape": shape, "data_offsets": [0, 4]}}).encode()
    with pytest.raises(CheckpointError, match=r"tensor 'a' spans 0\.\.4, expected \S+e\+\d+ bytes"):
        read_header(write(tmp_path, header, b"1234"))


@pytest.mark.parametrize("kept", [0, 4, 8, 20, -1])
def test_truncation(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: is truncated"):
        read_header(file)


def test_trailing_bytes(file: Path) -> None:
    with file.open("ab") as out:
        out.write(b"x")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: is longer than its header says"):
        read_header(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "header is not valid JSON"),
        (b"\xff\xfe", "header is not valid JSON"),
        (b"[" * 100_000, "header is not valid JSON"),
        (b"[]", "header is list, expected a JSON object"),
        (b'{"a": 1}', "entry of tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1]}}', "entry of tensor 'a' is malformed"),
        (b'{"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}', "entry of tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', r"'a' spans 0\.\.4, expected 8 bytes"),
        (b'{"a": {"dtype": "F4", "shape": [6], "data_offsets": [0, 4]}}', r"'a' spans 0\.\.4, expected 3 bytes"),
        (b'{"a": {"dtype": "F4", "shape": [5], "data_offsets": [0, 4]}}', r"'a' spans 0\.\.4, expected 2\.5 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1073741827], "data_offsets": [0, 4]}}', "expected 4294967308 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', r"'a' spans 4\.\.0, expected 4 bytes"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}', "tensor 'a' is malformed"),
        (b'{"a": {"dtype": "F32", "dtype": "I32"}}', "header is not valid JSON: key 'dtype' is there twice"),
    ],
)
def test_bad_headers(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{message}"):
        read_header(write(tmp_path, header, b"1234"))


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    entries = [json.dumps({**FLOAT, "data_offsets": [begin, begin + 4]}) for begin in (0, 4)]
    header = f'{{"a": {entries[0]}, "a": {entries[1]}}}'.encode()
    with pytest.raises(CheckpointError, match=r"x\.safetensors: .*key 'a' is there twice"):
        read_header(write(tmp_path, header, bytes(8)))


@pytest.mark.parametrize(
    ("begins", "message"),
    [
        ((0, 0), "'b' overlaps another: begins at byte 0 of the data, expected 4"),
        ((0, 2), "'b' overlaps another: begins at byte 2 of the data, expected 4"),
        ((0, 8), "'b' leaves a hole before it: begins at byte 8 of the data, expected 4"),
        ((8, 4), "'b' leaves a hole before it: begins at byte 4 of the data, expected 0"),
    ],
)
def test_tensors_lie_side_by_side(tmp_path: Path, begins: tuple[int, int], message: str) -> None:
    header: dict[str, Any] = {
        name: {**FLOAT, "data_offsets": [begin, begin + 4]} for name, begin in zip("ab", begins, strict=True)
    }
    path = write(tmp_path, json.dumps(header).encode(), bytes(max(begins) + 4))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: tensor {message}"):
        read_header(path)


def test_a_pointer_of_git_lfs_is_told_from_garbage(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: is a Git LFS pointer"):
        read_header(path)
    for text in ("some other text of some length", "<!DOCTYPE html><html></html>"):
        path.write_text(text)
        message = rf"x\.safetensors: is no safetensors file: begins with b'{text[:8]}', expected the length of a header"
        with pytest.raises(CheckpointError, match=message):
            read_header(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no such file"):
        read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no such file"):
        read_header(tmp_path / "x.safetensors")


def test_files_that_cannot_be_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be read: .*Permission denied"):
        read_header(file)
