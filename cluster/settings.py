"""From the configuration to what each actor is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from actors.engine.admission import SchedulerLimits
from actors.model.dtypes import ITEM_BYTES
from actors.model.families import load_spec
from actors.model.spec import MoEDecoderSpec
from actors.settings import EngineSettings, ModelSettings
from cluster.access import AccessList, refuse_open_door
from cluster.config import ConfigError, ServerConfig
from cluster.fleet import Bundle
from cluster.gateway.settings import GatewaySettings
from cluster.model_source import model_name

ROW_BLOCK = 8
"""Rows of a product in the deterministic mode: decode stays bound by memory bandwidth up to about that many."""

_WORTH_A_THREAD = 2 << 20
"""Bytes of an expert's matrix from which on a second thread of its shard pays: below, it has hardly woken up when the
products are done. Attention always gains (default model, two cores: 54 ms a step of 8 rows instead of 64)."""

_ALONE = 2
"""Threads of a node's only shard where experts are that small: no other uses the second core (default model, two cores,
8 streams: 10 % faster than two shards with a thread each)."""


@dataclass(frozen=True)
class SettingsFactory:
    """Settings for the actors of one cluster; ``paths`` gives the checkpoint's folder on each node, ``nccl`` tells
    whether rows go over it between routers and expert shards."""

    config: ServerConfig
    paths: dict[str, Path]
    nccl: bool = False

    def expert(self, bundle: Bundle, all_bundles: Sequence[Bundle]) -> ModelSettings:
        """Expert shards of one node share its cores: they work at the same time."""
        sharing = Counter(b.node_id for b in all_bundles)[bundle.node_id]
        experts = self.config.experts
        small = self._has_small_experts(bundle.node_id)
        threads = experts.threads or ((_ALONE if sharing == 1 else 1) if small else 0)
        return self._model(bundle.node_id, threads, sharing, experts.quantization)

    def attention(self, bundle: Bundle, all_bundles: Sequence[Bundle]) -> ModelSettings:
        """Attention replicas of one node share its cores."""
        sharing = Counter(b.node_id for b in all_bundles)[bundle.node_id]
        return self._model(bundle.node_id, self.config.attention.threads, sharing, self.config.attention.quantization)

    def router(self, bundle: Bundle) -> ModelSettings:
        """Gates are small: one thread."""
        return self._model(bundle.node_id, threads=1, sharing=1)

    def engine(self, bundle: Bundle, all_bundles: Sequence[Bundle], nodes: Set[str]) -> EngineSettings:
        """Limits of an attention shard. Those of one node share its memory, unless each has a GPU's.

        ``nodes``: of all attention and expert shards. Where one node's cores compute for both fleets no micro-batch can
        be at the experts while another's attention is computed: steps are not split, not even to try it.
        """
        attention = self.config.attention
        cores_shared = self.config.device == "cpu" and nodes == {bundle.node_id}
        beside = sum(b.node_id == bundle.node_id for b in all_bundles)
        limits = SchedulerLimits(
            context_length=self.context_length(bundle.node_id),
            max_running=attention.max_running,
            token_budget=attention.token_budget,
            max_waiting=attention.max_waiting,
            prefix_cache=attention.prefix_cache,
            max_gap=attention.max_gap,
            batch_patience_s=attention.batch_patience_s,
        )
        return EngineSettings(
            limits,
            kv_bytes=attention.kv_memory,
            block_size=attention.block_size,
            kv_share=attention.kv_memory_share,
            sharing=beside if self.config.device == "cpu" else max(1, int(1 / attention.gpus)),
            micro_batches=attention.micro_batches or int(cores_shared),
        )

    def gateway(self, node_id: str) -> GatewaySettings:
        """The door's address, its locks, and what it must know of the model.

        Raises ConfigError for a door that would be open to others: no gateway comes up past this.
        """
        config = self.config
        refuse_open_door(config)
        path = self.paths[node_id]
        return GatewaySettings(
            model_path=path,
            model_name=model_name(config.model),
            dtype=dtype_name(config, path),
            context_length=self.context_length(node_id),
            host=config.gateway.host,
            port=config.gateway.port,
            http_port=config.gateway.http_port,
            health_port=config.gateway.health_port,
            metrics_port=config.gateway.metrics_port,
            reflection=config.gateway.reflection,
            max_message=config.gateway.max_message,
            recovery_timeout_s=config.recovery_timeout_s,
            tls=config.gateway.tls,
            access=AccessList(config.access.tokens),
            telemetry=config.telemetry,
        )

    def context_length(self, node_id: str) -> int:
        """Tokens of prompt and answer together: what was asked for, else what the model allows and the cache holds.

        With kv_memory auto a shard measures only later what its cache holds, and does not start if that is less.
        Raises ConfigError when more is asked for than either of them has.
        """
        config, path = self.config, self.paths[node_id]
        spec = load_spec(path)
        allowed = spec.max_positions
        if config.context_length > allowed:
            raise ConfigError(f"context_length: {config.context_length} is over the model's {allowed}")
        if config.attention.kv_memory is None:
            return config.context_length or allowed
        held = self._cache_tokens(node_id, config.attention.kv_memory)
        if config.context_length > held or held < 2:
            raise ConfigError(
                f"attention.kv_memory: {config.attention.kv_memory} bytes hold {held} tokens of this model (blocks of "
                f"{config.attention.block_size}); context_length is {config.context_length or 'at least 2'}"
            )
        return config.context_length or min(allowed, held)

    def _cache_tokens(self, node_id: str, kv_bytes: int) -> int:
        block_size, path = self.config.attention.block_size, self.paths[node_id]
        token_bytes = load_spec(path).kv_floats_per_token * ITEM_BYTES[dtype_name(self.config, path)]
        return kv_bytes // (token_bytes * block_size) * block_size

    def _has_small_experts(self, node_id: str) -> bool:
        path = self.paths[node_id]
        spec = load_spec(path)
        return spec.d_model * spec.moe.inter * ITEM_BYTES[dtype_name(self.config, path)] < _WORTH_A_THREAD

    def _model(self, node_id: str, threads: int, sharing: int, quantization: str = "none") -> ModelSettings:
        path = self.paths[node_id]
        spec = load_spec(path)
        check_quantization(self.config, spec)
        return ModelSettings(
            path=path,
            dtype=dtype_name(self.config, path),
            row_block=ROW_BLOCK if self.config.deterministic else 0,
            threads=threads,
            step_timeout_s=self.config.step_timeout_s,
            sharing=sharing,
            device=self.config.device,
            nccl=self.nccl,
            quantization=quantization,
            check_weights=self.config.check_weights,
            map_weights=self.config.map_weights,
        )


def dtype_name(config: ServerConfig, path: Path) -> str:
    """The dtype to compute in: the checkpoint's own for "auto"."""
    return load_spec(path).dtype_name if config.dtype == "auto" else config.dtype


def check_quantization(config: ServerConfig, spec: MoEDecoderSpec) -> None:
    """Raise ConfigError when weights are to be quantised of a checkpoint that is stored quantised."""
    stored = spec.quantization
    for fleet, section in (("experts", config.experts), ("attention", config.attention)):
        if section.quantization != "none" and stored is not None:
            raise ConfigError(
                f"{fleet}.quantization: {section.quantization}, but the checkpoint is quantised already "
                f"({stored.method}, {stored.bits} bits), which is kept as it is; write none"
            )
