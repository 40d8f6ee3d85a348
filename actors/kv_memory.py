"""How large the KV cache of an attention shard is, and the cache itself."""

from __future__ import annotations

import torch

from actors.engine.kv_blocks import BlockPool
from actors.free_memory import free_bytes
from actors.model.kv_cache import KVCache
from actors.model.spec import MoEDecoderSpec
from actors.refusals import NoMemory
from actors.settings import EngineSettings, ModelSettings


def allocate_cache(spec: MoEDecoderSpec, model: ModelSettings, engine: EngineSettings) -> tuple[KVCache, BlockPool]:
    """As much as is configured, or its part of what is free now. Raises NoMemory, also if one request could not fill
    its context."""
    dtype, device = model.torch_dtype, model.torch_device
    block_bytes = engine.block_size * KVCache.bytes_per_token(spec, dtype)
    kv_bytes = _measured(device, engine) if engine.kv_bytes is None else engine.kv_bytes
    held = kv_bytes // block_bytes * engine.block_size
    if held < engine.limits.context_length:
        whence = (
            "" if engine.kv_bytes is not None else f", {engine.kv_share:g} of what is free, shared by {engine.sharing},"
        )
        raise NoMemory(
            f"attention.kv_memory: {kv_bytes} bytes{whence} hold {held} tokens; context_length is "
            f"{engine.limits.context_length}: write less, or give the cache more"
        )
    try:
        # Whoever measures next must find it taken.
        resident = engine.kv_bytes is None
        cache = KVCache(spec, kv_bytes // block_bytes, engine.block_size, dtype, device, resident)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise NoMemory(f"attention.kv_memory: {kv_bytes} bytes cannot be allocated: {error}") from error
    return cache, BlockPool(kv_bytes // block_bytes, engine.block_size)


def _measured(device: torch.device, engine: EngineSettings) -> int:
    return int(free_bytes(device) * engine.kv_share / engine.sharing)
