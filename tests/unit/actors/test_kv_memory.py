"""How large the KV cache is: as configured, or by the memory that is free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import actors.kv_memory
from actors.engine.admission import SchedulerLimits
from actors.kv_memory import allocate_cache
from actors.model.families import load_spec
from actors.refusals import NoMemory
from actors.settings import EngineSettings, ModelSettings
from tests.checkpoints import write_deepseek_v3

TOKEN_BYTES = 3 * (32 + 8) * 4
LIMITS = SchedulerLimits(context_length=64, max_running=4, token_budget=8, max_waiting=4)
ENGINE = EngineSettings(LIMITS, kv_bytes=None, block_size=16, kv_share=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_deepseek_v3(path)
    return path


def blocks(checkpoint: Path, engine: EngineSettings) -> tuple[int, int]:
    """Of the cache and of the pool."""
    model = ModelSettings(checkpoint, "float32", 0, 1, 1.0)
    cache, pool = allocate_cache(load_spec(checkpoint), model, engine)
    assert cache.nbytes == cache.n_blocks * 16 * TOKEN_BYTES
    return cache.n_blocks, pool.n_blocks


def test_as_configured_and_not_more(checkpoint: Path) -> None:
    assert blocks(checkpoint, replace(ENGINE, kv_bytes=TOKEN_BYTES * 16 * 9 - 1)) == (8, 8)


def test_measured_and_shared_by_the_replicas_of_a_node(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.kv_memory, "free_bytes", lambda device: TOKEN_BYTES * 16 * 40)
    assert blocks(checkpoint, ENGINE) == (20, 20)
    assert blocks(checkpoint, replace(ENGINE, sharing=2, kv_share=1.0)) == (20, 20)


def test_a_cache_that_holds_no_whole_context_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors.kv_memory, "free_bytes", lambda device: TOKEN_BYTES * 16 * 7)
    wanted = r"attention\.kv_memory: 26880 bytes, 1 of .* shared by 2, hold 48 tokens; context_length is 64"
    with pytest.raises(NoMemory, match=wanted):
        blocks(checkpoint, replace(ENGINE, kv_share=1.0, sharing=2))
