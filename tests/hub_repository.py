"""A small repository of the hub, in pieces: what it holds, and what of it a checkpoint needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.hub import Hub
from cluster.hub_id import HubId

INDEX = "model.safetensors.index.json"

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

REPO = HubId("org/tiny")


def index(**tensors: str) -> bytes:
    """An index: file by tensor."""
    return json.dumps({"weight_map": tensors}).encode()


def files(**more: bytes) -> dict[str, bytes]:
    """A repository of two weight files, with all that tends to lie beside them."""
    return {
        "config.json": b"{}",
        "generation_config.json": b"g",
        "tokenizer.json": b"t",
        "tokenizer_config.json": b"tc",
        "chat_template.jinja": b"x",
        "tokenizer.model": b"m",
        INDEX: index(a=A, b=B),
        A: b"a" * 5000,
        B: b"b" * 3000,
        "consolidated.safetensors": b"c" * 8000,
        "original/model.safetensors": b"o" * 8000,
        "original/tokenizer.model": b"om",
        "pytorch_model.bin": b"p" * 8000,
        "modeling_deepseek.py": b"raise SystemExit",
        "configuration_deepseek.py": b"raise SystemExit",
        "README.md": b"r",
        **{name.replace("__", "."): data for name, data in more.items()},
    }


WANTED = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "tokenizer.model",
    INDEX,
    A,
    B,
}


def names(folder: Path) -> set[str]:
    """Of the files in ``folder``."""
    return {path.name for path in folder.iterdir()}


def repository(hub: Hub) -> Path:
    """Where the cache keeps REPO."""
    return hub._cache.root / "models--org--tiny"


def in_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> None:
    """Run ``code`` first in each process that downloads."""
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
