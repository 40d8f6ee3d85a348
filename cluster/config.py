"""The server's configuration: YAML or flags in, one validated object out. Importable without torch and Ray."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from actors.engine.fairness import LEAST_SHARE
from actors.quant_kind import QuantKind
from placement.autoscale import AutoscalePolicy


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the key, the value and what is allowed."""


_UNITS = {
    "": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}


def _byte_size(value: Any) -> Any:
    """ "1.5GiB" → bytes; integers pass."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError("write a size as a number of bytes or like 512MiB, 2GiB, 1.5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _none_for_auto(value: Any) -> Any:
    """ "auto" → None; else a size."""
    if value == "auto":
        return None
    try:
        size = _byte_size(value)
    except ValueError as error:
        raise ValueError(f"{error}, or auto") from None
    if size is None:
        raise ValueError("write a size like 2GiB, or auto")
    return size


def _switch(value: Any) -> Any:
    """YAML takes a bare on or off for a truth value."""
    return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


def _no_ratio_to_one(value: float) -> float:
    if 0 < value <= 1:
        raise ValueError("a step cannot be shorter than usual; write more than 1, or 0 for no bound")
    return value


def _not_one(value: int) -> int:
    if value == 1:
        raise ValueError("a context of 1 has no room for an answer; write at least 2, or 0 for the model's own")
    return value


def _hex_digest(value: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", value):
        raise ValueError("write the SHA-256 of the token, 64 hex digits; `expertmesh token` makes both")
    return value.lower()


ByteSize = Annotated[int, BeforeValidator(_byte_size)]
Labels = dict[str, str]
PemFile = Annotated[Path, AfterValidator(lambda path: path.expanduser().absolute())]
Sha256 = Annotated[str, AfterValidator(_hex_digest)]
Role = Literal["user", "admin"]
"""user: may ask the model. admin: may also look at the cluster and change it."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionConfig(_Section):
    """The attention fleet: data-parallel replicas, each with its router in the same bundle."""

    replicas: int = Field(1, ge=1, le=1024)
    cpus: float = Field(0.25, gt=0, description="logical CPUs of a bundle, for Ray's bookkeeping")
    gpus: float = Field(1.0, gt=0, le=1, description="with device: cuda, the part of a GPU that a bundle gets")
    threads: int = Field(0, ge=0, description="threads; 0: the node's cores, shared by its replicas")
    node_labels: Labels = Field(default_factory=dict, description="nodes that may hold this fleet")
    quantization: Literal["none", QuantKind] = Field(
        "none",
        description="quantise attention's projections, shared experts, dense layers and the head while they are loaded",
    )
    kv_memory: Annotated[ByteSize | None, BeforeValidator(_none_for_auto)] = Field(
        2**30,
        ge=1,
        description="KV cache of each replica; auto: by the memory that is free once all weights are loaded",
    )
    kv_memory_share: float = Field(0.5, gt=0, le=1, description="with auto: the part of it that all replicas get")
    block_size: int = Field(16, ge=1, le=1024, description="tokens of a KV block")
    max_running: int = Field(64, ge=1, description="sequences of a step")
    max_waiting: int = Field(256, ge=1, description="requests that may wait for their first step")
    token_budget: int = Field(512, ge=1, description="rows of a step, decode and prefill together")
    prefix_cache: bool = Field(True, description="keep the KV blocks of prompts for those that begin alike")
    max_gap: Annotated[float, AfterValidator(_no_ratio_to_one)] = Field(
        2.2,
        ge=0,
        allow_inf_nan=False,
        description="a step of streams is to take at most so many times its usual time for prompts; 0: no bound",
    )
    batch_patience_s: float = Field(
        60.0, ge=0, le=86400, description="the oldest batch request counts as interactive after so long"
    )
    micro_batches: int = Field(
        0,
        ge=0,
        le=8,
        description="of a step; 0: by the measured times of both fleets, 1 where they share one node's cores",
    )

    @model_validator(mode="after")
    def _every_running_sequence_moves(self) -> AttentionConfig:
        if self.token_budget < self.max_running:
            raise ValueError(f"token_budget is {self.token_budget}, must be at least max_running ({self.max_running})")
        return self


class AutoscaleConfig(_Section):
    """When the number of expert shards follows the load. All times in seconds."""

    mode: Annotated[Literal["off", "dry-run", "on"], BeforeValidator(_switch)] = "off"
    minimum: int = Field(1, ge=1, le=4096)
    maximum: int = Field(8, ge=1, le=4096)
    target_busy: float = Field(0.6, ge=0, le=1, description="share of its time that a shard should compute; 0: unused")
    target_pairs_per_s: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="(row, expert) pairs a second that a shard should get; 0: unused"
    )
    tolerance: float = Field(0.1, ge=0, lt=1, description="no change within this share of the target")
    interval_s: float = Field(5.0, gt=0, le=3600, description="how often the load is looked at")
    up_after_s: float = Field(0.0, ge=0, le=86400, description="more only when so many were wanted for so long")
    cool_down_s: float = Field(30.0, ge=0, le=86400, description="after a change, no other for so long")
    down_after_s: float = Field(300.0, ge=0, le=86400, description="fewer only when so few were enough for so long")

    @model_validator(mode="after")
    def _consistent(self) -> AutoscaleConfig:
        assert self.policy  # made to check what does not fit together
        return self

    @property
    def policy(self) -> AutoscalePolicy:
        """The same for the planner. Raises ValueError for what does not fit together."""
        return AutoscalePolicy(**{f.name: getattr(self, f.name) for f in fields(AutoscalePolicy)})


class ExpertsConfig(_Section):
    """The expert fleet."""

    shards: int = Field(
        0,
        ge=0,
        le=4096,
        description="0: one for each node that may hold them (device: cuda: for each GPU that attention leaves)",
    )
    min_replicas: int = Field(1, ge=1, le=16, description="shards that hold each expert, at least")
    slots: int = Field(0, ge=0, description="(layer, expert) weights a shard may hold; 0: what its share needs")
    spares: int = Field(0, ge=0, le=64, description="warm processes without experts, for quick recovery")
    quantization: Literal["none", QuantKind] = Field(
        "none", description="quantise the experts' weights while they are loaded; none: keep them as they are stored"
    )
    autoscale: AutoscaleConfig = Field(default_factory=AutoscaleConfig)
    cpus: float = Field(0.25, gt=0, description="logical CPUs of a bundle, for Ray's bookkeeping")
    gpus: float = Field(1.0, gt=0, le=1, description="with device: cuda, the part of a GPU that a bundle gets")
    threads: int = Field(
        0, ge=0, description="threads; 0: the cores shared, of small matrices one (two, alone on its node)"
    )
    node_labels: Labels = Field(default_factory=dict, description="nodes that may hold this fleet")

    @model_validator(mode="after")
    def _replicas_have_shards(self) -> ExpertsConfig:
        if 0 < self.shards < self.min_replicas:
            raise ValueError(f"min_replicas is {self.min_replicas}, but there are {self.shards} shards to hold them")
        return self


class TlsConfig(_Section):
    """PEM files on the gateway's node, read when it starts."""

    certificate: PemFile = Field(description="the server's certificate, and the chain under it")
    key: PemFile = Field(description="its private key, not encrypted")
    client_ca: PemFile | None = Field(None, description="clients must show a certificate that this authority signed")


class GatewayConfig(_Section):
    """The doors: gRPC and HTTP, with the same TLS, tokens and validator; and two that tell nothing of any request."""

    # min_length: to gRPC an empty host is every address, to the resolver it is loopback
    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(50051, ge=0, le=65535, description="gRPC; 0: any free port")
    http_port: int | None = Field(8000, ge=0, le=65535, description="OpenAI's API; 0: any free port; null: none")
    health_port: int | None = Field(
        None, ge=0, le=65535, description="gRPC health in plaintext, for probes that speak no TLS; null: none"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="/metrics and /health in plaintext and without tokens; null: none"
    )
    reflection: bool = True
    max_message: ByteSize = Field(64 * 2**20, ge=2**10)
    tls: TlsConfig | None = None
    insecure: bool = Field(False, description="off loopback, serve even without TLS or tokens")


class WireTlsConfig(_Section):
    """PEM files on every node, at the same place; each actor reads them when it starts. Both ends of a wire show the
    certificate and check the other's, for client and server use alike; names in it do not count."""

    certificate: PemFile = Field(description="the node's certificate, and the chain under it")
    key: PemFile = Field(description="its private key, not encrypted")
    ca: PemFile = Field(description="the authority that signs the actors' certificates, and nobody else's")


class DataPlaneConfig(_Section):
    """The wires between actors."""

    tls: WireTlsConfig | None = Field(None, description="encrypts the wires between nodes; null: only authenticated")


class TokenConfig(_Section):
    """One token: its hash, and who comes with it."""

    sha256: Sha256
    tenant: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    role: Role = "user"
    share: float = Field(1.0, ge=LEAST_SHARE, allow_inf_nan=False, description="the tenant's weight beside others'")


class AccessConfig(_Section):
    """Who may call. Without tokens everybody who reaches the gateway is an admin."""

    tokens: tuple[TokenConfig, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> AccessConfig:
        hashes: dict[str, int] = {}
        tenants: dict[str, int] = {}
        for index, token in enumerate(self.tokens):
            if (same := hashes.setdefault(token.sha256, index)) != index:
                raise ValueError(f"tokens.{index}.sha256: the same token as tokens.{same}")
            first = tenants.setdefault(token.tenant, index)
            if (share := self.tokens[first].share) != token.share:
                raise ValueError(
                    f"tokens.{index}.share: {token.share:g} for tenant {token.tenant!r}, but tokens.{first} gives it "
                    f"{share:g}; a tenant has one share"
                )
        return self


class TelemetryConfig(_Section):
    """Where traces and metrics go, and what logs look like. Prompts and answers are in none of them."""

    otlp_endpoint: str = Field(
        "", pattern=r"^(https?://[^\s/?#]+(/[^\s?#]*)?)?$", description="OTLP over HTTP: http://HOST:4318; empty: none"
    )
    otlp_headers: dict[str, str] = Field(default_factory=dict, description="sent with each export, as for its tokens")
    trace_ratio: float = Field(
        1.0, ge=0, le=1, description="share of requests that are traced; those with a traceparent as that says"
    )
    metrics_interval_s: float = Field(60.0, gt=0, le=86400, description="between two exports of metrics over OTLP")
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


class RayConfig(_Section):
    """Which Ray cluster to use."""

    address: str = Field(
        "auto",
        description="auto: the running one of this machine, else a new local one; local: a new one; or HOST:PORT",
    )


class ServerConfig(_Section):
    """Everything ``expertmesh serve`` can be told."""

    model: str = Field(
        "default", min_length=1, description="default, the folder of a checkpoint, or ORG/NAME[@REVISION] of the hub"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    context_length: Annotated[int, AfterValidator(_not_one)] = Field(
        0, ge=0, description="tokens, prompt and answer; 0: what the model allows"
    )
    check_weights: bool = Field(True, description="look for NaN and infinity while weights are loaded")
    map_weights: bool = Field(True, description="use weights where they lie in local files; false: copy them")
    deterministic: bool = Field(True, description="a row's result does not depend on its batch mates")
    transport: Literal["auto", "nccl", "shm", "tcp", "local"] = Field(
        "auto", description="auto: by pair; another: that medium or none; local: all in one process, without Ray"
    )
    data_plane: DataPlaneConfig = Field(default_factory=DataPlaneConfig)
    device: Literal["cpu", "cuda"] = Field("cpu", description="where gates, experts and attention compute")
    step_timeout_s: float = Field(30.0, gt=0, le=3600)
    recovery_timeout_s: float = Field(
        60.0,
        gt=0,
        le=3600,
        description="an admitted stream that lost its attention shard goes on so long without a token",
    )
    start_timeout_s: float = Field(300.0, gt=0, le=86400, description="for the start, and for each later change")
    drain_timeout_s: float = Field(30.0, ge=0, le=86400, description="then the streams of what is drained are moved")
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    access: AccessConfig = Field(default_factory=AccessConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    ray: RayConfig = Field(default_factory=RayConfig)

    @model_validator(mode="after")
    def _a_port_each(self) -> ServerConfig:
        doors = self.gateway
        ports = {"port": doors.port, "http_port": doors.http_port}
        ports |= {"health_port": doors.health_port, "metrics_port": doors.metrics_port}
        seen: dict[int, str] = {}
        for key, port in ports.items():
            if port and (first := seen.setdefault(port, key)) != key:
                raise ValueError(f"gateway.{key}: {port}, but gateway.{first} has it; each needs a port of its own")
        return self

    @model_validator(mode="after")
    def _gpus_for_who_needs_them(self) -> ServerConfig:
        if self.transport == "nccl" and self.device != "cuda":
            raise ValueError("transport: nccl needs device: cuda")
        for key, fleet in (("attention", self.attention), ("experts", self.experts)):
            if self.device == "cpu" and "gpus" in fleet.model_fields_set:
                raise ValueError(f"{key}.gpus: {fleet.gpus:g}, but device is cpu; write device: cuda, or leave it out")
            if self.transport == "nccl" and fleet.gpus != 1:
                raise ValueError(f"{key}.gpus: {fleet.gpus:g}; transport: nccl needs 1, as its members share no GPU")
        return self


def load_config(path: Path | None, overrides: dict[str, Any] | None = None) -> ServerConfig:
    """Read ``path`` (or the defaults), then apply ``overrides``, the flags, given as dotted keys.

    Raises ConfigError, which names the file, but not for what a flag says.
    """
    tree = _read_yaml(path) if path is not None else {}
    flags = [keys for key, value in (overrides or {}).items() if _set(tree, keys := tuple(key.split(".")), value)]
    try:
        return ServerConfig.model_validate(tree)
    except ValidationError as error:
        texts: dict[str, list[str]] = {}
        for one in error.errors():
            texts.setdefault(_origin(path, flags, one["loc"]), []).append(_explain(dict(one)))
        raise ConfigError("; ".join(where + "; ".join(told) for where, told in texts.items())) from None


def _origin(path: Path | None, flags: Sequence[tuple[str, ...]], location: tuple[str | int, ...]) -> str:
    """Who gave what is at ``location``, as a prefix: the file, nobody for a flag's value, or both."""
    if path is None or any(location[: len(flag)] == flag for flag in flags):
        return ""
    # of several keys together, such as two doors with one port, each may have come from either
    below = any(flag[: len(location)] == location for flag in flags)
    return f"{path} and flags: " if below else f"{path}: "


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice: PyYAML takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See yaml."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                what = f"the key {key.value!r} comes twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.load(text, _UniqueKeys)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys with values, found {type(tree).__name__}")
    return tree


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> bool:
    """Whether there is room for it: the file may have a plain value on the way, as validation will say."""
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            return False
        tree = below
    tree[keys[-1]] = value
    return True


_SHOWN_OF_ACCESS = {"tenant", "role", "share"}


def _explain(error: dict[str, Any]) -> str:
    """One pydantic error as "key: what is wrong (given ...)"; a typo is answered with the keys that exist."""
    location = error["loc"]
    key = ".".join(map(str, location))
    text = error["msg"].removeprefix("Value error, ")
    if not key:  # of several keys: the message names them
        return str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; allowed here: {', '.join(sorted(_section(location[:-1]).model_fields))}"
    # whoever takes the hash for the token itself must not find it in a log
    if location[:1] == ("access",) and location[-1] not in _SHOWN_OF_ACCESS:
        return f"{key}: {text}"
    return f"{key}: {text} (given {error['input']!r})"


def _section(location: Sequence[str | int]) -> type[_Section]:
    """The section at ``location``: through lists of sections, and through those that may be left out."""
    section: type[_Section] = ServerConfig
    for key in location:
        if isinstance(key, str):
            annotation: Any = section.model_fields[key].annotation
            kinds = get_args(annotation) or (annotation,)
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, _Section))
    return section
