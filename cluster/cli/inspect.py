"""``expertmesh inspect``: how large a model is, how it divides over shards, and what is wrong with its files."""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from actors.model.errors import CheckpointError
from cluster.cli.terminal import complain
from cluster.config import ByteSize, ConfigError
from cluster.inspection import Inspection, Sizes, inspect_model

_PIPED_WIDTH = 140
_LEAST_BARE = 2**20
"""Bytes: a number without a unit that is below was meant in another one."""

_RAW_KEYS = (
    "model_type",
    "architectures",
    "num_hidden_layers",
    "hidden_size",
    "vocab_size",
    "num_attention_heads",
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
    "quantization_config",
)


def run_inspect(model: str, memory: str | None, as_json: bool) -> int:
    """Print it; the exit status is 1 when the model cannot be served."""
    try:
        size = None if memory is None else _byte_size(memory)
        found = inspect_model(model)
    except (ConfigError, CheckpointError) as error:
        return complain(str(error))
    if as_json:
        print(json.dumps(as_dict(found, size), indent=2))
    else:
        print_inspection(found, size)
        for problem in found.problems:
            complain(problem)
    return int(bool(found.problems))


def _byte_size(text: str) -> int:
    try:
        size = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"--memory: {message} (given {text!r})") from None
    if size < _LEAST_BARE and not any(map(str.isalpha, text)):
        raise ConfigError(f"--memory: {text.strip()} bytes; write a unit, as in 80GiB")
    return size


def as_dict(found: Inspection, memory: int | None) -> dict[str, Any]:
    """All of it, for ``--json``: counts of parameters, sizes in bytes."""
    told: dict[str, Any] = {"model": found.model, "supported": found.spec is not None}
    told["facts"] = dict(facts(found)) if found.sizes else raw_facts(found)
    if (sizes := found.sizes) is not None:
        inventory = sizes.inventory
        told["parameters"] = {
            "total": inventory.total,
            "active": inventory.active,
            "attention_shard": inventory.attention_shard,
            "gates": inventory.gates,
            "expert": inventory.expert,
            "experts": inventory.experts,
        }
        told["bytes"] = {
            "expert": sizes.expert,
            "expert_on_disk": sizes.expert_on_disk,
            "attention_shard": sizes.attention_shard,
            "kv_per_token": sizes.kv_per_token,
            "files": sizes.disk,
        }
        told["shards"] = [{"shards": n, "experts": inventory.experts_per_shard(n)} for n in shard_counts(found)]
        if memory is not None:
            told["memory"] = {"bytes": memory, "shards": shards_for(sizes, memory)}
    told["problems"] = list(found.problems)
    return told


def print_inspection(found: Inspection, memory: int | None) -> None:
    """As tables on stdout."""
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)
    table = _table(found.model, "", "")
    for key, value in facts(found) if found.sizes else raw_facts(found).items():
        table.add_row(key, str(value))
    console.print(table)
    if found.sizes is None:
        return
    console.print(_experts(found.sizes))
    if found.sizes.inventory.experts:
        console.print(_shards(found, found.sizes))
    if memory is not None:
        console.print(_memory(found.sizes, memory))


def raw_facts(found: Inspection) -> dict[str, Any]:
    """Of a model that is not supported: what its config.json says in plain words."""
    return {key: found.config[key] for key in _RAW_KEYS if found.config.get(key) is not None}


def facts(found: Inspection) -> list[tuple[str, str]]:
    """What the model is, in the order in which it is told."""
    spec, sizes = found.spec, found.sizes
    assert spec is not None
    assert sizes is not None
    inventory, moe = sizes.inventory, spec.moe
    n_moe = len(spec.moe_layers)
    shared = f", a shared expert of width {moe.shared_inter}" if moe.shared_inter else ""
    disk = "" if sizes.disk is None else f"; {_bytes(sizes.disk)} on disk"
    context = sizes.kv_per_token * spec.max_positions
    plain = sizes.attention_shard["none"]
    quantised = ", ".join(f"{kind} {_bytes(size)}" for kind, size in sizes.attention_shard.items() if kind != "none")
    return [
        ("family", f"{spec.model_type} ({spec.attn.kind.upper()}{_features(found)})"),
        ("layers", f"{spec.n_layers}: {spec.n_layers - n_moe} dense, {n_moe} MoE{_mtp(found)}"),
        ("experts", f"{moe.n_experts} a layer of width {moe.inter}, top-{moe.top_k}{shared}"),
        ("parameters", f"{_count(inventory.total)}, {_count(inventory.active)} active per token{disk}"),
        ("stored as", _stored_as(found)),
        ("context", f"{spec.max_positions:,} tokens; {_rope(found)}"),
        ("KV cache", f"{sizes.kv_per_token / 1024:,.1f} KiB a token, {_bytes(context)} for one context of full length"),
        ("attention shard", f"{_bytes(plain)}, and its KV cache: all but gates and routed experts"),
        *([("attention.quantization", quantised)] if quantised else []),
    ]


def _features(found: Inspection) -> str:
    assert found.spec is not None
    attn = found.spec.attn
    words = [f"{attn.heads} heads"]
    if attn.kind == "gqa":
        words.append(f"{attn.kv_heads} for keys")
    if any(window is not None for window in attn.windows):
        words.append(f"windows of {min(window for window in attn.windows if window is not None)} tokens")
    if attn.indexer is not None:
        words.append(f"the {attn.indexer.top_k} most relevant tokens")
    return ": " + ", ".join(words)


def _mtp(found: Inspection) -> str:
    assert found.spec is not None
    if not found.spec.n_mtp and not found.mtp_tensors:
        return ""
    seen = f" (tensors on disk: {found.mtp_tensors})" if found.mtp_tensors else ""
    return f"; {max(1, found.spec.n_mtp)} for multi-token prediction{seen}: skipped, not counted"


def _stored_as(found: Inspection) -> str:
    assert found.spec is not None
    dtype, scheme = found.spec.dtype_name, found.spec.quantization
    return dtype if scheme is None else f"{scheme.method}, {scheme.bits} bits; computed in {dtype}"


def _rope(found: Inspection) -> str:
    assert found.spec is not None
    rope = found.spec.rope
    if rope.type != "yarn":
        return f"rotary base {rope.theta:g}"
    return f"rotary base {rope.theta:g}, YaRN {rope.factor:g} x {rope.original_max_positions:,}"


def _experts(sizes: Sizes) -> Table:
    table = _table("Routed experts", "experts.quantization", "one", f"all {sizes.inventory.experts:,}")
    if sizes.expert_on_disk is not None:
        on_disk = sizes.expert_on_disk
        table.add_row("(on disk)", _bytes(on_disk), _bytes(on_disk * sizes.inventory.experts))
    for kind, size in sizes.expert.items():
        name = kind if len(sizes.expert) > 1 else "none: as stored"
        name += " (about)" if len(sizes.expert) == 1 and sizes.expert_on_disk is None else ""
        table.add_row(name, _bytes(size), _bytes(size * sizes.inventory.experts))
    return table


def shard_counts(found: Inspection) -> list[int]:
    """1, 2, 4, ... up to as many shards as there are experts in a layer."""
    assert found.spec is not None
    most = found.spec.moe.n_experts
    powers = [1 << power for power in range(most.bit_length())]
    return powers if most in powers else [*powers, most]


def _shards(found: Inspection, sizes: Sizes) -> Table:
    table = _table("Expert shards: weights of each", "shards", "experts of each", *sizes.expert)
    for shards in shard_counts(found):
        held = sizes.inventory.experts_per_shard(shards)
        table.add_row(str(shards), f"{held:,}", *(_bytes(held * size) for size in sizes.expert.values()))
    return table


def shards_for(sizes: Sizes, memory: int) -> dict[str, int | None]:
    """Fewest expert shards of so much memory, by quantisation."""
    return {kind: sizes.inventory.shards_for(memory, size) for kind, size in sizes.expert.items()}


def _memory(sizes: Sizes, memory: int) -> Table:
    table = _table(f"Shards of {_bytes(memory)}", "", "")
    for kind, shards in shards_for(sizes, memory).items():
        table.add_row(f"expert shards, {kind}", "not even one expert fits" if shards is None else str(shards))
    for kind, size in sizes.attention_shard.items():
        left = memory - size
        tokens = f"{left // sizes.kv_per_token:,} tokens of KV cache"
        table.add_row(f"attention shard, {kind}", f"{_bytes(left)} left for {tokens}" if left > 0 else "does not fit")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.show_header = any(columns)
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="right" if number and any(columns) else "left")
    return table


def _bytes(size: int) -> str:
    """In the largest unit of which it is one at least."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 2**10:,.2f} KiB"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:,.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:,.1f} M"
