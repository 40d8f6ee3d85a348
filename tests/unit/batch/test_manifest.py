"""The manifest: whole or not there, and it tells what answers depend on."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from expertmesh.v1 import inference_pb2 as pb

from cluster.batch.errors import BatchError
from cluster.batch.manifest import (
    Manifest,
    describe_model,
    differences,
    manifest_path,
    model_differences,
    read_manifest,
    write_manifest,
)
from cluster.batch.rows import InputIdentity

MODEL = describe_model(
    pb.GetModelInfoResponse(
        model="tiny", context_length=128, default_sampling=pb.SamplingParameters(temperature=0, top_p=0.9)
    )
)
MANIFEST = Manifest("b", "2026-01-01T00:00:00+00:00", "0.1.0", 7, InputIdentity(2, 100, "ab"), MODEL)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = manifest_path(tmp_path / "out.jsonl")
    assert path == tmp_path / "out.jsonl.manifest.json"
    assert read_manifest(path) is None
    write_manifest(path, MANIFEST)
    assert read_manifest(path) == MANIFEST
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_it_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    path = tmp_path / "manifest.json"
    write_manifest(path, MANIFEST)
    with monkeypatch.context() as patch:
        patch.setattr(os if moment == "fsync" else Path, moment, crash)
        with pytest.raises(Crash):
            write_manifest(path, dataclasses.replace(MANIFEST, seed=8))
    assert read_manifest(path) == MANIFEST
    write_manifest(path, dataclasses.replace(MANIFEST, seed=9))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "input": {"x": 1}}', "null"])
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(BatchError, match=r"manifest\.json: not a manifest of a batch"):
        read_manifest(path)


def test_another_format(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text('{"format": 2}')
    with pytest.raises(BatchError, match="its format is not 1"):
        read_manifest(path)


def test_differences() -> None:
    assert differences(MANIFEST, dataclasses.replace(MANIFEST, batch="c", created="later", expertmesh="2")) == []
    other = dataclasses.replace(MANIFEST, seed=8, input=InputIdentity(2, 101, "ab"), model=MODEL | {"dtype": "x"})
    assert differences(MANIFEST, other) == ["input size: 100 → 101", "seed: 7 → 8", "model dtype:  → x"]


def test_a_newer_gateway_may_tell_more_of_its_model() -> None:
    assert model_differences(MODEL, MODEL | {"news": 1}) == []
    without = {key: value for key, value in MODEL.items() if key != "context_length"}
    assert model_differences(MODEL, without) == ["model context_length: 128 → None"]


def test_the_defaults_for_sampling_are_part_of_the_model() -> None:
    assert MODEL["default_sampling"]["temperature"] == 0
    other = MODEL | {"default_sampling": MODEL["default_sampling"] | {"temperature": 0.5}}
    assert len(model_differences(MODEL, other)) == 1
