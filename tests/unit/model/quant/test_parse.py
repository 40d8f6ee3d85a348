from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.model.config_fields import Fields
from actors.model.errors import UnsupportedModelError
from actors.model.quant.parse import parse_scheme
from actors.model.quant.scheme import QuantScheme
from tests.quantised_checkpoints import FORMATS, TOKEN

V3 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
V1 = QuantScheme("gptq", 4, 128, zero_offset=1)
FP8_CHANNEL = QuantScheme("compressed-tensors", 8, floating=True)
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False}
KIMI = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None,
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None}
    },
}


def parse(config: Any) -> QuantScheme | None:
    return parse_scheme(Fields({"quantization_config": config}))


def packed(**changes: Any) -> dict[str, Any]:
    """KIMI with other weights."""
    return KIMI | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | changes}}}


def int8(weights: dict[str, Any], rows: dict[str, Any] | None = None, **group: Any) -> dict[str, Any]:
    """An int-quantized config."""
    inner = {"num_bits": 8, "type": "int", "strategy": "channel"} | weights
    groups = {"group_0": {"targets": ["Linear"], "weights": inner, "input_activations": rows, **group}}
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}


def fp8(weights: dict[str, Any], rows: dict[str, Any] | None = None) -> dict[str, Any]:
    """A float-quantized config."""
    return int8({"type": "float"} | weights, rows) | {"format": "float-quantized"}


def test_none() -> None:
    assert parse_scheme(Fields({})) is None
    assert parse(None) is None


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (V3, QuantScheme("fp8", 8, 128)),
        (V3 | {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}, QuantScheme("fp8", 8, 128)),
        (KIMI, QuantScheme("compressed-tensors", 4, 32)),
        (packed(num_bits=8, symmetric=False), QuantScheme("compressed-tensors", 8, 32, symmetric=False)),
        (packed(strategy="channel", group_size=None), QuantScheme("compressed-tensors", 4, 0)),
        (packed(actorder="weight", observer="minmax", observer_kwargs={}), QuantScheme("compressed-tensors", 4, 32)),
        (int8({}), QuantScheme("compressed-tensors", 8)),
        (int8({}, TOKEN), QuantScheme("compressed-tensors", 8, int8_activations=True)),
        (int8({}) | {"sparsity_config": {"format": "dense"}}, QuantScheme("compressed-tensors", 8)),
        (int8({}) | {"transform_config": {}}, QuantScheme("compressed-tensors", 8)),
        (fp8({}), FP8_CHANNEL),
        (fp8({}, TOKEN | {"type": "float"}), FP8_CHANNEL),
        (fp8({}, TOKEN | {"type": "float", "strategy": "tensor"}), FP8_CHANNEL),
        (fp8({"strategy": "tensor"}), replace(FP8_CHANNEL, one_scale=True)),
        (packed(actorder="group"), QuantScheme("compressed-tensors", 4, 32, ordered=True)),
        (packed(actorder="static"), QuantScheme("compressed-tensors", 4, 32)),
        (GPTQ, V1),
        (GPTQ | {"desc_act": True}, replace(V1, ordered=True)),
        (GPTQ | {"checkpoint_format": "gptq_v2", "sym": False}, replace(V1, symmetric=False, zero_offset=0)),
        (GPTQ | {"format": "gptq_v2"}, replace(V1, zero_offset=0)),
        (GPTQ | {"format": "gptq_v2", "checkpoint_format": "gptq_v2"}, replace(V1, zero_offset=0)),
        (GPTQ | {"bits": 8, "group_size": -1}, replace(V1, bits=8, group_size=0)),
        (GPTQ | {"dynamic": {"-:.*gate$": {}, "lm_head": {"bits": 8}}}, replace(V1, dynamic=("-:.*gate$", "lm_head"))),
        (AWQ, QuantScheme("awq", 4, 128, symmetric=False)),
        (AWQ | {"version": "GEMM", "modules_to_not_convert": ["gate"]}, QuantScheme("awq", 4, 128, symmetric=False)),
        (AWQ | {"version": None, "format": "gemm"}, QuantScheme("awq", 4, 128, symmetric=False)),
        (AWQ | {"zero_point": False, "checkpoint_format": "gemm"}, QuantScheme("awq", 4, 128, symmetric=False)),
    ],
)  # fmt: skip
def test_what_is_read(config: dict[str, Any], want: QuantScheme) -> None:
    assert parse(config) == want


@pytest.mark.parametrize("name", FORMATS)
def test_configs_that_the_libraries_write(name: str) -> None:
    assert parse(FORMATS[name].config) is not None


def test_groups_may_differ_in_their_targets_alone() -> None:
    group = KIMI["config_groups"]["group_0"]  # type: ignore[index]
    groups = {"experts": group | {"targets": ["re:.*experts.*"]}, "rest": group | {"targets": ["Linear"]}}
    assert parse(KIMI | {"config_groups": groups}) == parse(KIMI)


TWO = {"a": {"weights": WEIGHTS}, "b": {"weights": WEIGHTS | {"num_bits": 8}}}
REFUSED = [
    ("gptq", "quantization_config is 'gptq': allowed is an object"),
    ({"bits": 4}, "quant_method is missing: allowed is one of 'fp8', 'compressed-tensors', 'gptq', 'awq'"),
    ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes': allowed is one of"),
    ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'"),
    (V3 | {"kv_cache_scheme": {"num_bits": 8}}, r"kv_cache_scheme is {'num_bits': 8}: allowed is none"),
    (V3 | {"fmt": "e5m2"}, "fmt is 'e5m2': allowed is one of 'e4m3'"),
    (V3 | {"activation_scheme": "static"}, "activation_scheme is 'static': allowed is one of 'dynamic'"),
    (V3 | {"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]: allowed is \[128, 128\]"),
    (V3 | {"weight_block_size": None}, r"weight_block_size is null: allowed is \[128, 128\]"),
    (V3 | {"scale_fmt": "e8"}, "scale_fmt is 'e8'"),
    (KIMI | {"format": "marlin-24"}, "format is 'marlin-24': allowed is one of 'int-quantized', 'float-quantized', "),
    (fp8({"type": "int"}), "weights.type is 'int': allowed is one of 'float'"),
    (fp8({"strategy": "block"}), "weights.strategy is 'block': allowed is one of 'channel', 'tensor'"),
    (fp8({"num_bits": 4}), "weights.num_bits is 4: allowed is 8 with format float-quantized"),
    (fp8({"symmetric": False}), "weights.symmetric is false: allowed is true with format float-quantized"),
    (fp8({}, TOKEN), "input_activations.type is 'int': allowed is one of 'float'"),
    (fp8({}, TOKEN | {"type": "float", "dynamic": False}), "input_activations.dynamic is false: allowed is true"),
    (int8({"actorder": "group"}, TOKEN), "weights.actorder is 'group': allowed is none or 'weight' with int8 activ"),
    (KIMI | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is .*: allowed is none"),
    (KIMI | {"transform_config": {"config_groups": {}}}, "transform_config is .*: allowed is none"),
    (KIMI | {"config_groups": {}}, "config_groups is {}: allowed is an object with at least one group"),
    (KIMI | {"config_groups": {"W4A16": ["Linear"]}}, r"config_groups.W4A16 is \['Linear'\]: allowed is an object"),
    (KIMI | {"config_groups": TWO}, "config_groups is .*: allowed is groups with the same"),
    (KIMI | {"config_groups": {"a": {"weights": None}}}, "config_groups.a.weights is null: allowed is an object"),
    (packed(num_bits=3), "group_0.weights.num_bits is 3: allowed is 4 or 8 with format pack-quantized"),
    (packed(type="float"), "weights.type is 'float': allowed is one of 'int'"),
    (packed(strategy="tensor"), "weights.strategy is 'tensor': allowed is one of 'channel', 'group'"),
    (packed(group_size=None), "weights.group_size is null: allowed is an integer >= 1"),
    (packed(dynamic=True), "weights.dynamic is true: allowed is false"),
    (int8({"num_bits": 4}), "weights.num_bits is 4: allowed is 8 with format int-quantized"),
    (int8({}, TOKEN | {"dynamic": False, "strategy": "tensor"}), "input_activations.dynamic is false: allowed is true"),
    (int8({}, TOKEN | {"strategy": "tensor"}), "input_activations.strategy is 'tensor': allowed is one of 'token'"),
    (int8({}, TOKEN | {"symmetric": False}), "input_activations.symmetric is false: allowed is true"),
    (int8({}, TOKEN | {"type": "float"}), "input_activations.type is 'float'"),
    (int8({}, TOKEN | {"num_bits": 4}), "input_activations.num_bits is 4: allowed is 8"),
    (int8({}, output_activations=TOKEN), "output_activations is .*: allowed is none"),
    (int8({}, format="pack-quantized"), "group_0.format is 'pack-quantized': allowed is one of 'int-quantized'"),
    (int8({}, TOKEN) | {"format": "pack-quantized"}, "input_activations is .*: allowed is none with format pack"),
    (GPTQ | {"bits": 3}, "bits is 3: allowed is 4 or 8"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin': allowed is one of 'gptq', 'gptq_v2'"),
    (GPTQ | {"is_marlin_format": True}, "is_marlin_format is true"),
    (GPTQ | {"group_size": 0}, "group_size is 0: allowed is an integer >= 1"),
    (GPTQ | {"pack_dtype": "int64"}, "pack_dtype is 'int64'"),
    (GPTQ | {"format": "marlin"}, "format is 'marlin': allowed is one of 'gptq', 'gptq_v2'"),
    (GPTQ | {"format": "gptq_v2", "checkpoint_format": "gptq"}, "checkpoint_format is 'gptq': allowed is 'gptq_v2', a"),
    (GPTQ | {"dynamic": ["lm_head"]}, "dynamic is .*: allowed is an object of regular expressions"),
    (GPTQ | {"dynamic": {"+:*": {}}}, r"dynamic is .*: allowed is .*, which '\+:\*' is not"),
    (AWQ | {"bits": 8}, "bits is 8: allowed is 4"),
    (AWQ | {"version": "gemv"}, "version is 'gemv': allowed is one of 'gemm'"),
    (AWQ | {"format": "gemv"}, "format is 'gemv': allowed is one of 'gemm'"),
    (AWQ | {"checkpoint_format": "gemv_fast"}, "checkpoint_format is 'gemv_fast': allowed is one of 'gemm'"),
    (AWQ | {"backend": "llm-awq"}, "backend is 'llm-awq'"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_refused_is_named(config: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse(config)


def test_an_older_key_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"compression_config is .*: allowed is none"):
        parse_scheme(Fields({"compression_config": KIMI}))
