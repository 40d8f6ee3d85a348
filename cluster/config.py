"""The server's configuration: YAML or flags in, one validated object out. Importable without torch and Ray."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator


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


def _not_one(value: int) -> int:
    if value == 1:
        raise ValueError("a context of 1 has no room for an answer; write at least 2, or 0 for the model's own")
    return value


ByteSize = Annotated[int, BeforeValidator(_byte_size)]
Labels = dict[str, str]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AttentionConfig(_Section):
    """The attention fleet: data-parallel replicas, each with its router in the same bundle."""

    replicas: int = Field(1, ge=1, le=1024)
    cpus: float = Field(0.25, gt=0, description="logical CPUs of a bundle, for Ray's bookkeeping")
    threads: int = Field(0, ge=0, description="torch threads; 0: one for small matrices, else one a core")
    node_labels: Labels = Field(default_factory=dict, description="nodes that may hold this fleet")
    kv_memory: ByteSize = Field(2**30, ge=1, description="KV cache of each replica")
    block_size: int = Field(16, ge=1, le=1024, description="tokens of a KV block")
    max_running: int = Field(64, ge=1, description="sequences of a step")
    max_waiting: int = Field(256, ge=1, description="requests that may wait for their first step")
    token_budget: int = Field(512, ge=1, description="rows of a step, decode and prefill together")

    @model_validator(mode="after")
    def _every_running_sequence_moves(self) -> AttentionConfig:
        if self.token_budget < self.max_running:
            raise ValueError(f"token_budget is {self.token_budget}, must be at least max_running ({self.max_running})")
        return self


class ExpertsConfig(_Section):
    """The expert fleet."""

    shards: int = Field(2, ge=1, le=4096)
    cpus: float = Field(0.25, gt=0, description="logical CPUs of a bundle, for Ray's bookkeeping")
    threads: int = Field(0, ge=0, description="torch threads; 0: one for small matrices, else the cores shared")
    node_labels: Labels = Field(default_factory=dict, description="nodes that may hold this fleet")


class GatewayConfig(_Section):
    """The gRPC door."""

    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535, description="0: any free port")
    reflection: bool = True
    max_message: ByteSize = Field(64 * 2**20, ge=2**10)


class RayConfig(_Section):
    """Which Ray cluster to use."""

    address: str = Field(
        "auto",
        description="auto: the running one of this machine, else a new local one; local: a new one; or HOST:PORT",
    )


class ServerConfig(_Section):
    """Everything ``expertmesh serve`` can be told."""

    model: str = Field("default", description="default, or the folder of a checkpoint")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    context_length: Annotated[int, AfterValidator(_not_one)] = Field(
        0, ge=0, description="tokens, prompt and answer; 0: what the model allows"
    )
    deterministic: bool = Field(True, description="a row's result does not depend on its batch mates")
    transport: Literal["auto", "shm", "tcp", "local"] = "auto"
    step_timeout_s: float = Field(30.0, gt=0, le=3600)
    start_timeout_s: float = Field(300.0, gt=0, le=86400)
    attention: AttentionConfig = Field(default_factory=AttentionConfig)
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    ray: RayConfig = Field(default_factory=RayConfig)


def load_config(path: Path | None, overrides: dict[str, Any] | None = None) -> ServerConfig:
    """Read ``path`` (or the defaults), then apply ``overrides`` given as dotted keys. Raises ConfigError."""
    tree = _read_yaml(path) if path is not None else {}
    for key, value in (overrides or {}).items():
        _set(tree, key.split("."), value)
    try:
        return ServerConfig.model_validate(tree)
    except ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise ConfigError(where + "; ".join(_explain(dict(e)) for e in error.errors())) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys with values, found {type(tree).__name__}")
    return tree


def _set(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            return  # the file has a plain value there: validation will say so
        tree = below
    tree[keys[-1]] = value


def _explain(error: dict[str, Any]) -> str:
    """One pydantic error as "key: what is wrong (given ...)"; a typo is answered with the keys that exist."""
    location = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        section: Any = ServerConfig
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        return f"{'.'.join(location)}: unknown key; allowed here: {', '.join(sorted(section.model_fields))}"
    return f"{'.'.join(location)}: {error['msg']} (given {error['input']!r})"
