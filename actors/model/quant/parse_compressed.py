"""compressed-tensors' part of a config.json."""

from __future__ import annotations

from typing import Any, cast

from actors.model.config_fields import Fields

from .scheme import Bits, QuantScheme

FORMATS = ("int-quantized", "float-quantized", "pack-quantized")
FLOAT = "float-quantized"
INT = "int-quantized"
GROUPED = (True, "group", "dynamic")
"""Of ``actorder``: columns of a group need not lie side by side. Not any more written since 2026."""
WHERE = "quantization_config.config_groups."


def parse_compressed_tensors(f: Fields) -> QuantScheme:
    """``f``: the quantization_config. ``targets`` and ``ignore`` are not read: the tensors tell what is quantised. fp8
    activations are left out of the computation, see :func:`parse_scheme`."""
    stored = f.one_of("format", FORMATS)
    for key in ("sparsity_config", "moe_sparsity_config", "transform_config"):
        f.require(_is_empty(f.get(key)), key, "none")
    group, where = _only_group(f)
    weights = _part(group, where, "weights")
    if weights is None:
        raise group.error("weights", "an object")
    group.require(group.get("output_activations") is None, "output_activations", "none")
    group.one_of("format", (stored,), default=stored)
    bits, size = _weights(weights, stored)
    symmetric = weights.flag("symmetric", default=True)
    weights.require(symmetric or stored != FLOAT, "symmetric", f"true with format {stored}")
    int8_activations = _activations(group, where, stored)
    ordered = weights.get("actorder") in GROUPED
    weights.require(not (ordered and int8_activations), "actorder", "none or 'weight' with int8 activations")
    return QuantScheme(
        "compressed-tensors",
        bits,
        size,
        symmetric=symmetric,
        floating=stored == FLOAT,
        one_scale=weights.get("strategy") == "tensor",
        ordered=ordered,
        int8_activations=int8_activations,
    )


def _only_group(f: Fields) -> tuple[Fields, str]:
    """The first group, and what its keys begin with in messages. Groups may differ in what they target, no more."""
    groups = f.get("config_groups")
    f.require(isinstance(groups, dict) and bool(groups), "config_groups", "an object with at least one group")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise Fields(groups, WHERE).error(name, "an object (no name of a preset)")
    name, first = next(iter(groups.items()))
    same = all(_without_targets(group) == _without_targets(first) for group in groups.values())
    f.require(same, "config_groups", "groups with the same weights and activations (one setting for all matrices)")
    where = f"{WHERE}{name}."
    return Fields(first, where), where


def _without_targets(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "targets" and value is not None}


def _part(group: Fields, where: str, key: str) -> Fields | None:
    value = group.get(key)
    if value is None:
        return None
    group.require(isinstance(value, dict), key, "an object")
    return Fields(value, f"{where}{key}.")


def _weights(w: Fields, stored: str) -> tuple[Bits, int]:
    """(bits, columns in a group, 0 for a whole row)."""
    w.one_of("type", ("float",) if stored == FLOAT else ("int",), default="int")
    w.require(not w.get("dynamic"), "dynamic", "false")
    bits = w.integer("num_bits", default=8)
    allowed = (4, 8) if stored == "pack-quantized" else (8,)
    w.require(bits in allowed, "num_bits", f"{' or '.join(map(str, allowed))} with format {stored}")
    strategy = w.one_of("strategy", ("channel", "tensor") if stored == FLOAT else ("channel", "group"))
    return cast(Bits, bits), w.integer("group_size") if strategy == "group" else 0


def _activations(group: Fields, where: str, stored: str) -> bool:
    """Whether rows are quantised to int8 as they come; fp8 ones, with a scale for each row or for all, stay as they
    are."""
    a = _part(group, where, "input_activations")
    if a is None:
        return False
    group.require(stored in (INT, FLOAT), "input_activations", f"none with format {stored}")
    a.one_of("type", ("int",) if stored == INT else ("float",), default="int")
    a.require(a.get("num_bits") == 8, "num_bits", "8")
    a.require(a.get("dynamic") is True, "dynamic", "true (scales are computed, not read)")
    a.one_of("strategy", ("token",) if stored == INT else ("token", "tensor"))
    a.require(a.flag("symmetric", default=True), "symmetric", "true")
    return stored == INT


def _is_empty(value: Any) -> bool:
    """None, {} or a format that says: nothing."""
    return not value or (isinstance(value, dict) and value.get("format") == "dense")
