from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actors.model.config_fields import Fields
from actors.model.errors import CheckpointError
from actors.model.quant.layout import is_quantized
from actors.model.quant.parse import parse_scheme
from actors.model.quant.qtensor import ZERO_PARTS
from actors.model.quant.read import read_quantized
from actors.model.quant.scheme import QuantScheme
from tests.quantised_checkpoints import FORMATS

from .conftest import Store

WRITTEN_BY_OTHERS = Path(__file__).parents[3] / "fixtures" / "quantised"
NAME = "model.layers.1.mlp.experts.3.up_proj"


def scheme_of(config: dict[str, Any]) -> QuantScheme:
    scheme = parse_scheme(Fields({"quantization_config": config}))
    assert scheme is not None
    return scheme


def draw(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.1


def named(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{NAME}.{part}": tensor for part, tensor in parts.items()}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(32, 64), (176, 160), (8, 32), (136, 288)])
def test_every_format_reads_as_its_writer_meant_it(store: Store, name: str, shape: tuple[int, int]) -> None:
    """compressed-tensors' formats: bit-equal to what its own decompress gives."""
    parts, plain = FORMATS[name].pack(draw(*shape))
    scheme = scheme_of(FORMATS[name].config)
    checkpoint = store(named(parts))
    assert is_quantized(checkpoint, scheme, f"{NAME}.weight")
    q = read_quantized(checkpoint, scheme, f"{NAME}.weight", shape)
    assert q is not None
    assert q.shape == shape
    assert q.row_group == (q.shape[1] if name == "W8A8" else 0)
    assert (q.columns is not None) == (name == "gptq act order" and shape[1] > 32)
    assert torch.equal(q.dequantize(torch.float32), plain)


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].config["quant_method"][0] == "c"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_of_two_bytes(store: Store, name: str, dtype: torch.dtype) -> None:
    """compressed-tensors multiplies in the scale's dtype: the same bits as our fp32 product, cast."""
    parts, plain = FORMATS[name].pack(draw(48, 64).to(dtype))
    assert parts["weight_scale"].dtype == plain.dtype == dtype
    q = read_quantized(store(named(parts)), scheme_of(FORMATS[name].config), f"{NAME}.weight", (48, 64))
    assert q is not None
    assert q.scale.dtype == dtype
    assert torch.equal(q.dequantize(dtype), plain)


@pytest.mark.parametrize("case", json.loads((WRITTEN_BY_OTHERS / "configs.json").read_text()))
def test_matrices_that_gptqmodel_and_autoawq_packed(store: Store, case: str) -> None:
    """Bit-equal to those libraries' own dequantisation, which is in fp16; zero points of 0 are among them."""
    scheme = scheme_of(json.loads((WRITTEN_BY_OTHERS / "configs.json").read_text())[case])
    stored = load_file(WRITTEN_BY_OTHERS / "matrices.safetensors")
    parts = {name.removeprefix(f"{case}."): part for name, part in stored.items() if name.startswith(f"{case}.")}
    plain = parts.pop("dequantised")
    q = read_quantized(store(named(parts)), scheme, f"{NAME}.weight", (32, 96))
    assert q is not None
    assert torch.equal(q.dequantize(torch.float16), plain)
    assert (q.columns is not None) == ("ordered" in case)
    assert (q.zero is None) == (scheme.symmetric)


def test_a_scale_of_fp8_belongs_to_row_and_column_over_128(store: Store) -> None:
    """176 rows have two rows of scales, as kv_a_proj_with_mqa's 576 have five: no block is 88 or 115 rows high."""
    data = draw(176, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    checkpoint = store(named({"weight": data, "weight_scale_inv": scale}))
    q = read_quantized(checkpoint, scheme_of(FORMATS["fp8"].config), f"{NAME}.weight", (176, 200))
    assert q is not None
    got = q.dequantize(torch.float32)
    for row, column in ((0, 0), (127, 127), (127, 128), (128, 127), (128, 128), (175, 199)):
        assert got[row, column] == data[row, column].float() * scale[row // 128, column // 128]


@pytest.mark.parametrize("name", FORMATS)
def test_a_plain_matrix_is_left_to_others(store: Store, name: str) -> None:
    checkpoint = store({f"{NAME}.weight": draw(4, 8), f"{NAME}.bias": draw(1, 4)})
    scheme = scheme_of(FORMATS[name].config)
    assert not is_quantized(checkpoint, scheme, f"{NAME}.weight")
    assert read_quantized(checkpoint, scheme, f"{NAME}.weight", (4, 8)) is None


def test_versions_of_pack_quantized_that_keep_zero_points_unpacked(store: Store) -> None:
    parts, plain = FORMATS["pack int4 asymmetric"].pack(draw(48, 64))
    scheme = scheme_of(FORMATS["pack int4 asymmetric"].config)
    q = read_quantized(store(named(parts)), scheme, f"{NAME}.weight", (48, 64))
    assert q is not None
    assert q.zero is not None
    unpacked = parts | {"weight_zero_point": (q.zero.int() // ZERO_PARTS["int4"] - 8).to(torch.int8)}
    older = read_quantized(store(named(unpacked)), scheme, f"{NAME}.weight", (48, 64))
    assert older is not None
    assert torch.equal(older.dequantize(torch.float32), plain)


def test_versions_of_pack_quantized_that_order_by_activation(store: Store) -> None:
    parts, plain = FORMATS["pack int4 group"].pack(draw(16, 64))
    scheme = scheme_of(FORMATS["pack int4 group"].config)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    values = FORMATS["pack int4 group"].pack(draw(16, 64))[1]  # the same, to be scaled anew below
    numbers = (values / parts["weight_scale"].repeat_interleave(32, 1)).round()
    group_of = (torch.arange(64) // 32)[order]
    q = read_quantized(store(named(parts | {"weight_g_idx": group_of.int()})), scheme, f"{NAME}.weight", (16, 64))
    assert q is not None
    assert torch.equal(q.dequantize(torch.float32), numbers * parts["weight_scale"][:, group_of])
    unused = parts | {"weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    q = read_quantized(store(named(unused)), scheme, f"{NAME}.weight", (16, 64))
    assert q is not None
    assert torch.equal(q.dequantize(torch.float32), plain)


@pytest.mark.parametrize("rows_too", [False, True])
def test_int8_of_columns_out_of_order(store: Store, rows_too: bool) -> None:
    """As compressed-tensors wrote it until 2026: ``weight_scale[:, weight_g_idx]``."""
    weight, group_of = draw(16, 64), torch.arange(64).flip(0) % 2
    scale = torch.stack([weight[:, group_of == group].abs().amax(1) / 127 for group in (0, 1)], 1)
    data = (weight / scale[:, group_of]).round().to(torch.int8)
    parts = {"weight": data, "weight_scale": scale, "weight_g_idx": group_of.int()}
    config = json.loads(json.dumps(FORMATS["int8 group"].config))
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    scheme = scheme_of(config)
    if rows_too:
        scheme = replace(scheme, int8_activations=True)
        with pytest.raises(CheckpointError, match=r"safetensors: .*_g_idx' orders the columns, expected them in order"):
            read_quantized(store(named(parts)), scheme, f"{NAME}.weight", (16, 64))
        return
    q = read_quantized(store(named(parts)), scheme, f"{NAME}.weight", (16, 64))
    assert q is not None
    assert torch.equal(q.dequantize(torch.float32), data * scale[:, group_of])
    del parts["weight_g_idx"]
    with pytest.raises(CheckpointError, match=r"has no tensor '.*weight_g_idx'"):
        read_quantized(store(named(parts)), scheme, f"{NAME}.weight", (16, 64))


@pytest.mark.parametrize(("name", "part"), [("fp8", "weight_scale_inv"), ("fp8 channel", "weight_scale")])
def test_scales_that_are_exponents(store: Store, name: str, part: str) -> None:
    parts, _ = FORMATS[name].pack(draw(160, 200))
    powers = {part: parts[part].log2().ceil().exp2()}
    shape, scheme = (160, 200), scheme_of(FORMATS[name].config)
    wanted = read_quantized(store(named(parts | powers)), scheme, f"{NAME}.weight", shape)
    exponents = {part: powers[part].to(torch.float8_e8m0fnu)}
    got = read_quantized(store(named(parts | exponents)), scheme, f"{NAME}.weight", shape)
    assert wanted is not None
    assert got is not None
    assert got.scale.dtype == torch.float32
    assert torch.equal(got.dequantize(torch.float32), wanted.dequantize(torch.float32))


RULES = [
    ({"lm_head": {"bits": 8}}, None),
    ({"+:.*down.*": {"bits": 8}, r"-:model\.layers\.1\..*experts.*": {}}, None),
    ({r"-:.*experts.*": {}, r"+:.*up_proj": {"bits": 8}}, None),
    ({r"+:.*up_proj": {"bits": 8}, r"-:.*experts.*": {}}, r"\+:\.\*up_proj"),
    ({r"model\.layers\.1\..*": {"bits": 8}}, "model"),
]


@pytest.mark.parametrize("name", ["gptq", "awq"])
@pytest.mark.parametrize(("rules", "refused"), RULES)
def test_rules_for_single_matrices(store: Store, name: str, rules: dict[str, Any], refused: str | None) -> None:
    """What a rule does not touch, or what is plain, is read as all else."""
    scheme = scheme_of(FORMATS[name].config | {"dynamic": rules})
    checkpoint = store(named(FORMATS[name].pack(draw(16, 64))[0]))
    if refused is None:
        assert read_quantized(checkpoint, scheme, f"{NAME}.weight", (16, 64)) is not None
    else:
        message = rf"model\.safetensors: matrix '{re.escape(NAME)}' has a setting of its own by the rule '{refused}"
        with pytest.raises(CheckpointError, match=message):
            read_quantized(checkpoint, scheme, f"{NAME}.weight", (16, 64))
    plain = store(named({"weight": draw(16, 64)}))
    assert read_quantized(plain, scheme, f"{NAME}.weight", (16, 64)) is None


EIGHTS = torch.full((16, 2), 8, dtype=torch.int8)
WRONG: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("fp8", {"weight_scale_inv": None}, "weight' is torch.float8_e4m3fn, but there is no .*weight_scale_inv"),
    ("fp8", {"weight_scale_inv": torch.ones(1, 2)}, r"weight_scale_inv' has shape \[1, 2\], expected \[1, 1\]"),
    ("fp8", {"weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, "weight_scale_inv' is torch.int32, expected"),
    ("fp8", {"weight": torch.ones(16, 64)}, "weight' is torch.float32, expected one of torch.float8_e4m3fn"),
    ("int8 channel", {"weight_scale": None}, "weight' is torch.int8, but there is no .*weight_scale or .*packed"),
    ("int8 channel", {"weight_scale": torch.ones(16)}, r"weight_scale' has shape \[16\], expected \[16, 1\]"),
    ("int8 group", {"weight_scale": torch.ones(16, 3)}, r"weight_scale' has shape \[16, 3\], expected \[16, 2\]"),
    ("int8 asymmetric", {"weight_zero_point": None}, "has no tensor '.*weight_zero_point'"),
    ("pack int4 group", {"weight_scale": None}, "has no tensor '.*weight_scale'"),
    ("pack int4 group", {"weight_shape": torch.tensor([16, 32])}, r"shape' says \[16, 32\], expected \[16, 64\]"),
    ("pack int4 group", {"weight_packed": torch.zeros(16, 7, dtype=torch.int32)}, r"packed' has shape \[16, 7\]"),
    ("pack int4 asymmetric", {"weight_zero_point": EIGHTS}, r"points 8..8, expected -8..7"),
    ("pack int4 group", {"weight_g_idx": torch.arange(64) // 16}, r"weight_g_idx' names groups 0..3, expected 0..1"),
    ("gptq", {"g_idx": torch.arange(64).int() // 32 - 1}, r"g_idx' names groups -1..0, expected 0..1"),
    ("gptq", {"g_idx": torch.zeros(64, dtype=torch.int32)}, r"puts \[64, 0\] columns into its groups, expected 32"),
    ("gptq", {"scales": torch.ones(2, 8)}, r"scales' has shape \[2, 8\], expected \[2, 16\]"),
    ("gptq act order", {"g_idx": None}, "has no tensor '.*g_idx'"),
    ("fp8 channel", {"weight_scale": torch.ones(1)}, r"weight_scale' has shape \[1\], expected \[16, 1\]"),
    ("fp8 tensor", {"weight_scale": torch.ones(16, 1)}, r"weight_scale' has shape \[16, 1\], expected \[1\]"),
    ("fp8 channel", {"weight": EIGHTS.repeat(1, 32)}, "weight' is torch.int8, expected one of torch.float8_e4m3fn"),
    ("gptq", {"qzeros": None}, "has no tensor '.*qzeros'"),
    ("awq", {"qweight": torch.zeros(64, 3, dtype=torch.int32)}, r"qweight' has shape \[64, 3\], expected \[64, 2\]"),
    ("awq", {"qzeros": torch.zeros(1, 2, dtype=torch.int32)}, r"qzeros' has shape \[1, 2\], expected \[2, 2\]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), WRONG)
def test_errors_name_the_tensor_and_what_was_expected(
    store: Store, name: str, changes: dict[str, Tensor | None], message: str
) -> None:
    parts = FORMATS[name].pack(draw(16, 64))[0] | changes
    checkpoint = store(named({part: tensor for part, tensor in parts.items() if tensor is not None}))
    with pytest.raises(CheckpointError, match=message) as refused:
        read_quantized(checkpoint, scheme_of(FORMATS[name].config), f"{NAME}.weight", (16, 64))
    file = checkpoint.file(min(checkpoint.names()))
    assert str(refused.value).startswith(f"{file.parent if 'has no tensor' in message else file}: ")


@pytest.mark.parametrize("name", ["gptq", "awq", "pack int4 group"])
def test_an_odd_number_of_columns_is_refused(store: Store, name: str) -> None:
    checkpoint = store(named({mark: torch.zeros(1) for mark in ("qweight", "weight_packed")}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* is to have 7 columns, expected an even number"):
        read_quantized(checkpoint, scheme_of(FORMATS[name].config), f"{NAME}.weight", (16, 7))


def test_awq_packs_eight_rows(store: Store) -> None:
    checkpoint = store(named({"qweight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .* is to have 12 rows, expected a multiple of 8"):
        read_quantized(checkpoint, scheme_of(FORMATS["awq"].config), f"{NAME}.weight", (12, 64))
