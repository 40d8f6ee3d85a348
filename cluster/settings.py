"""From the configuration to what each actor is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from actors.model.families import load_spec
from actors.model.kv_cache import KVCache
from actors.settings import EngineSettings, ModelSettings
from cluster.config import ConfigError, ServerConfig
from cluster.fleet import Bundle
from cluster.gateway.settings import GatewaySettings
from cluster.model_source import model_name

ROW_BLOCK = 8
"""Rows of a product in the deterministic mode: decode stays bound by memory bandwidth up to about that many."""


@dataclass(frozen=True)
class SettingsFactory:
    """Settings for the actors of one cluster; ``paths`` gives the checkpoint's folder on each node."""

    config: ServerConfig
    paths: dict[str, Path]

    def expert(self, bundle: Bundle, all_bundles: Sequence[Bundle]) -> ModelSettings:
        """Expert shards of one node share its cores: they work at the same time."""
        sharing = Counter(b.node_id for b in all_bundles)[bundle.node_id]
        return self._model(bundle.node_id, self.config.experts.threads, sharing)

    def attention(self, bundle: Bundle, all_bundles: Sequence[Bundle]) -> ModelSettings:
        """Attention replicas of one node share its cores."""
        sharing = Counter(b.node_id for b in all_bundles)[bundle.node_id]
        return self._model(bundle.node_id, self.config.attention.threads, sharing)

    def router(self, bundle: Bundle) -> ModelSettings:
        """Gates are small: one thread."""
        return self._model(bundle.node_id, threads=1, sharing=1)

    def engine(self, bundle: Bundle) -> EngineSettings:
        """Limits of an attention shard."""
        attention = self.config.attention
        path = self.paths[bundle.node_id]
        block_bytes = attention.block_size * KVCache.bytes_per_token(load_spec(path), torch_dtype(self.config, path))
        if attention.kv_memory < block_bytes:
            raise ConfigError(
                f"attention.kv_memory: {attention.kv_memory} bytes hold no KV block of {attention.block_size} tokens "
                f"({block_bytes} bytes)"
            )
        return EngineSettings(
            context_length=context_length(self.config, path),
            kv_bytes=attention.kv_memory,
            block_size=attention.block_size,
            max_running=attention.max_running,
            max_waiting=attention.max_waiting,
            token_budget=attention.token_budget,
        )

    def gateway(self, node_id: str) -> GatewaySettings:
        """The door's address and what it must know of the model."""
        config = self.config
        path = self.paths[node_id]
        return GatewaySettings(
            model_path=path,
            model_name=model_name(config.model),
            dtype=dtype_name(config, path),
            context_length=context_length(config, path),
            host=config.gateway.host,
            port=config.gateway.port,
            reflection=config.gateway.reflection,
            max_message=config.gateway.max_message,
        )

    def _model(self, node_id: str, threads: int, sharing: int) -> ModelSettings:
        path = self.paths[node_id]
        return ModelSettings(
            path=path,
            dtype=dtype_name(self.config, path),
            row_block=ROW_BLOCK if self.config.deterministic else 0,
            threads=threads,
            step_timeout_s=self.config.step_timeout_s,
            sharing=sharing,
        )


def dtype_name(config: ServerConfig, path: Path) -> str:
    """The dtype to compute in: the checkpoint's own for "auto"."""
    return str(torch_dtype(config, path)).removeprefix("torch.")


def torch_dtype(config: ServerConfig, path: Path) -> torch.dtype:
    """As ``dtype_name``, for torch."""
    if config.dtype == "auto":
        return load_spec(path).dtype
    dtype = getattr(torch, config.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def context_length(config: ServerConfig, path: Path) -> int:
    """Tokens of prompt and answer together; ConfigError when more is asked than the model was made for."""
    allowed = load_spec(path).max_positions
    if config.context_length > allowed:
        raise ConfigError(f"context_length: {config.context_length} is over the model's {allowed}")
    return config.context_length or allowed
