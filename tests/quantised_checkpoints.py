"""Tiny checkpoints in every quantised format that is read, each with its weights dequantised by other means than ours.

compressed-tensors' formats are written, and read back, by that library's own compressors. fp8 (DeepSeek-V3's blocks),
GPTQ and AWQ are packed number by number, straight from the words of their layouts; tests/fixtures/quantised holds
matrices that GPTQModel and AutoAWQ packed themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
FP8_TOO = ("kv_a_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Packed = tuple[dict[str, Tensor], Tensor]
"""A matrix's parts by the end of their name (``weight_scale``), and what they stand for, in fp32."""


@dataclass(frozen=True)
class Format:
    """``config``: the checkpoint's quantization_config. ``pack``: weight [N, K] fp32 -> its parts."""

    config: dict[str, Any]
    pack: Callable[[Tensor], Packed]


def write_quantised(source: Path, target: Path, format_name: str) -> dict[str, Tensor]:
    """Write the plain checkpoint ``source`` in a format of FORMATS to ``target``: the matrices of attention and MLPs,
    except the gates; in fp8, as released, those whose names do not end in proj as well. Returns all tensors as a plain
    checkpoint would have them, the quantised ones dequantised."""
    written, plain = {}, {}
    matrices = ("proj.weight", *FP8_TOO) if format_name == "fp8" else ("proj.weight",)
    for name, tensor in load_file(source / "model.safetensors").items():
        if ".layers." in name and name.endswith(matrices) and tensor.dim() == 2:
            parts, plain[name] = FORMATS[format_name].pack(tensor.float())
            written.update({f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()})
        else:
            written[name] = plain[name] = tensor
    target.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in written.items()}, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = FORMATS[format_name].config
    (target / "config.json").write_text(json.dumps(config))
    return plain


def write_plain(source: Path, target: Path, tensors: Mapping[str, Tensor]) -> None:
    """A checkpoint with the config of ``source`` and these tensors."""
    target.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())


def load_reference(path: Path) -> Any:
    """transformers' model of a plain checkpoint, in fp32, in eval mode."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", experts_implementation="grouped_mm"
    ).eval()


def pack_fp8(weight: Tensor) -> Packed:
    """DeepSeek-V3: W[n, k] = fp8[n, k] * weight_scale_inv[n // 128, k // 128]."""
    rows, width = weight.shape
    scale = torch.zeros(-(-rows // 128), -(-width // 128))
    data, plain = torch.empty(rows, width, dtype=torch.float8_e4m3fn), torch.empty(rows, width)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale[i, j] = weight[block].abs().max() / 448
            data[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
            plain[block] = data[block].float() * scale[i, j]
    return {"weight": data, "weight_scale_inv": scale}, plain


def compressed(stored: str, **weights: Any) -> Callable[[Tensor], Packed]:
    """What compressed-tensors' compressor of the format ``stored`` makes of a weight, and reads back."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(stored)

    def pack(weight: Tensor) -> Packed:
        grouped = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
        low, high = grouped.amin(-1), grouped.amax(-1)
        if args.strategy == "tensor":
            low, high = low.amin()[None], high.amax()[None]
        scale, zero = calculate_qparams(low, high, args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(args.pytorch_dtype())}
        parts = compressor.compress(state, scheme)
        return parts, compressor.decompress(parts, scheme)["weight"]

    return pack


def gptq(bits: int, symmetric: bool = False, ordered: bool = False, version: int = 1) -> Callable[[Tensor], Packed]:
    """GPTQ: ``32 / bits`` numbers in an int32, the first in its lowest bits: rows (of the transposed weight) in
    qweight, columns in qzeros, whose numbers are one less than the zero points in version 1."""

    def pack(weight: Tensor) -> Packed:
        width = weight.shape[1]
        group_of = torch.arange(width) // GROUP
        if ordered:
            group_of = group_of[torch.randperm(width, generator=torch.Generator().manual_seed(width))]
        numbers, scale, zero = _affine(weight, group_of, bits, symmetric)
        stored = zero - (1 if version == 1 else 0)
        parts = {
            "qweight": _words(numbers, bits).T,
            "qzeros": _words(stored.T, bits),
            "scales": scale.T.half(),
            "g_idx": group_of.int(),
        }
        return parts, (numbers - zero[:, group_of]) * scale[:, group_of]

    return pack


def pack_awq(weight: Tensor) -> Packed:
    """AWQ (GEMM): eight numbers in an int32, from the lowest bits on of the weight's rows 0, 2, 4, 6, 1, 3, 5, 7."""
    group_of = torch.arange(weight.shape[1]) // GROUP
    numbers, scale, zero = _affine(weight, group_of, 4, symmetric=False)
    order = [block + place for block in range(0, weight.shape[0], 8) for place in AWQ_ORDER]
    parts = {
        "qweight": _words(numbers.T[:, order], 4),
        "qzeros": _words(zero.T[:, order], 4),
        "scales": scale.T.half(),
    }
    return parts, (numbers - zero[:, group_of]) * scale[:, group_of]


def _affine(weight: Tensor, group_of: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(numbers [N, K], scales, zero points [N, groups]), all fp32. No zero point is 0: version 1 of GPTQ has none."""
    top, groups = 2**bits - 1, int(group_of.max()) + 1
    scale, zero = torch.empty(weight.shape[0], groups), torch.empty(weight.shape[0], groups)
    for group in range(groups):
        part = weight[:, group_of == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            low, high = -part.abs().amax(1), part.abs().amax(1)
        scale[:, group] = ((high - low) / top).half().float()
        zero[:, group] = (-low / scale[:, group]).round().clamp(1, top) if not symmetric else float(top // 2 + 1)
    numbers = (weight / scale[:, group_of] + zero[:, group_of]).round().clamp(0, top)
    return numbers, scale, zero


def _words(numbers: Tensor, bits: int) -> Tensor:
    """[R, C] -> int32 [R, C * bits / 32]."""
    values, each = numbers.numpy().astype(np.uint32), 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // each), np.uint32)
    for column in range(values.shape[1]):
        words[:, column // each] |= values[:, column] << np.uint32(bits * (column % each))
    return torch.from_numpy(words.view(np.int32).copy())


def _fp8_config() -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }


def _compressed_config(stored: str, rows: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": json.loads(QuantizationArgs(**weights).model_dump_json()),
                "input_activations": rows,
                "output_activations": None,
            }
        },
    }


def _compressed_format(stored: str, rows: dict[str, Any] | None = None, **weights: Any) -> Format:
    return Format(_compressed_config(stored, rows, **weights), compressed(stored, **weights))


def _gptq_format(bits: int, symmetric: bool = False, ordered: bool = False, version: int = 1) -> Format:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": ordered,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Format(config, gptq(bits, symmetric, ordered, version))


TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_TOKEN = TOKEN | {"type": "float"}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}

FORMATS: Mapping[str, Format] = {
    "fp8": Format(_fp8_config(), pack_fp8),
    "int8 channel": _compressed_format("int-quantized", num_bits=8, strategy="channel"),
    "int8 group": _compressed_format("int-quantized", num_bits=8, strategy="group", group_size=GROUP),
    "int8 asymmetric": _compressed_format("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "W8A8": _compressed_format("int-quantized", TOKEN, num_bits=8, strategy="channel"),
    "fp8 channel": _compressed_format("float-quantized", FP8_TOKEN, num_bits=8, type="float", strategy="channel"),
    "fp8 tensor": _compressed_format("float-quantized", FP8_TOKEN, num_bits=8, type="float", strategy="tensor"),
    "pack int4 group": _compressed_format("pack-quantized", num_bits=4, strategy="group", group_size=GROUP),
    "pack int4 channel": _compressed_format("pack-quantized", num_bits=4, strategy="channel"),
    "pack int4 asymmetric": _compressed_format(
        "pack-quantized", num_bits=4, strategy="group", group_size=GROUP, symmetric=False
    ),
    "pack int8": _compressed_format("pack-quantized", num_bits=8, strategy="group", group_size=GROUP),
    "gptq": _gptq_format(4, symmetric=True),
    "gptq act order": _gptq_format(4, ordered=True),
    "gptq v2": _gptq_format(4, version=2),
    "gptq int8": _gptq_format(8),
    "awq": Format(_AWQ, pack_awq),
}
