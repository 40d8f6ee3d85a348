"""What a config.json says about quantised weights: which formats are read, and which are refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import cast

from actors.model.config_fields import Fields

from .parse_compressed import parse_compressed_tensors
from .scheme import Bits, QuantScheme

KEY = "quantization_config"


def parse_scheme(f: Fields) -> QuantScheme | None:
    """The scheme at ``quantization_config``, None if there is none.

    Weights in fp8 (DeepSeek's 128 x 128 blocks), compressed-tensors (int8, fp8, and packed int4 or int8), GPTQ and
    AWQ are read. Of activations int8 with a scale per row (compressed-tensors) is computed as such; dynamic fp8
    activations, which DeepSeek's and compressed-tensors' fp8 formats ask for, are not: those models are computed
    with their weights dequantised, which is closer to the model before quantisation. Raises UnsupportedModelError,
    naming key, value and what is allowed, for everything else.
    """
    f.require(f.get("compression_config") is None, "compression_config", f"none ({KEY} is read)")
    value = f.get(KEY)
    if value is None:
        return None
    f.require(isinstance(value, dict), KEY, "an object")
    fields = Fields(value, f"{KEY}.")
    method = fields.one_of("quant_method", tuple(METHODS))
    fields.require(not fields.get("kv_cache_scheme"), "kv_cache_scheme", "none (the cache is not quantised)")
    return METHODS[method](fields)


def _fp8(f: Fields) -> QuantScheme:
    f.one_of("fmt", ("e4m3",), default="e4m3")
    f.one_of("activation_scheme", ("dynamic",), default="dynamic")
    f.one_of("scale_fmt", ("ue8m0", "float"), default="float")
    f.require(f.get("weight_block_size") == [128, 128], "weight_block_size", "[128, 128]")
    return QuantScheme("fp8", 8, group_size=128)


def _gptq(f: Fields) -> QuantScheme:
    bits = _bits(f, (4, 8))
    stored = f.one_of(f.synonym("format", "checkpoint_format"), ("gptq", "gptq_v2"), default="gptq")
    f.one_of("pack_dtype", ("int32",), default="int32")
    f.require(not f.get("is_marlin_format"), "is_marlin_format", "false")
    return QuantScheme(
        "gptq",
        bits,
        _group_size(f),
        symmetric=f.flag("sym", default=True),
        ordered=f.flag("desc_act", default=False),
        zero_offset=1 if stored == "gptq" else 0,
        dynamic=_dynamic(f),
    )


def _awq(f: Fields) -> QuantScheme:
    """``zero_point`` is not looked at: qzeros are read whatever it says. GPTQModel writes false by default, and qzeros
    all the same."""
    for key in ("version", "format", "checkpoint_format"):
        f.one_of(key, ("gemm", "GEMM"), default="gemm")
    f.one_of("backend", ("autoawq", "auto"), default="autoawq")
    return QuantScheme("awq", _bits(f, (4,)), _group_size(f), symmetric=False, dynamic=_dynamic(f))


def _dynamic(f: Fields) -> tuple[str, ...]:
    """GPTQModel's rules for single matrices, which are regular expressions. Whether one touches a matrix that is there,
    the readers see."""
    rules = f.get("dynamic") or {}
    f.require(isinstance(rules, dict), "dynamic", "an object of regular expressions")
    for rule in rules:
        try:
            re.compile(rule.removeprefix("+:").removeprefix("-:"))
        except re.error:
            raise f.error("dynamic", f"an object of regular expressions, which {rule!r} is not") from None
    return tuple(rules)


def _bits(f: Fields, allowed: tuple[int, ...]) -> Bits:
    bits = f.integer("bits")
    f.require(bits in allowed, "bits", " or ".join(map(str, allowed)))
    return cast(Bits, bits)


def _group_size(f: Fields) -> int:
    """0 for a whole row."""
    if f.get("group_size") == -1:
        return 0
    return f.integer("group_size")


METHODS: dict[str, Callable[[Fields], QuantScheme]] = {
    "fp8": _fp8,
    "compressed-tensors": parse_compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
}
