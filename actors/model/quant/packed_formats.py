"""Formats whose numbers are packed into int32 words: compressed-tensors' pack-quantized, GPTQ, AWQ."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.model.errors import CheckpointError
from actors.model.weights import Checkpoint

from .packing import add_to_each, pack_nibbles, unpack_awq_words, unpack_words
from .qtensor import SCALES, QTensor
from .scheme import QuantScheme

WORDS = (torch.int32,)
SIZES = (torch.int64, torch.int32)


def read_pack_quantized(checkpoint: Checkpoint, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> QTensor:
    """``weight_packed`` int32 [N, K * bits / 32], along K, each number + 2**(bits - 1); ``weight_scale`` [N, groups];
    ``weight_shape`` [2]; ``weight_zero_point``, if asymmetric, packed along N: int32 [N * bits / 32, groups], or by
    older versions int8 [N, groups]; ``weight_g_idx`` int [K], if ordered by activation, or -1."""
    rows, width = shape
    group, groups = _groups(scheme, base, width)
    stated = tuple(checkpoint.read_raw(f"{base}.weight_shape", (2,), SIZES).tolist())
    if stated != shape:
        raise CheckpointError(f"tensor '{base}.weight_shape' says {list(stated)}, expected {list(shape)}")
    words = checkpoint.read_raw(f"{base}.weight_packed", (rows, _words(width, scheme.bits)), WORDS)
    values = unpack_words(words, scheme.bits, width)
    scale = checkpoint.read_raw(f"{base}.weight_scale", (rows, groups), SCALES)
    zero = None if scheme.symmetric else _zero_of_pack(checkpoint, scheme, base, rows, groups)
    order = None
    if checkpoint.has(f"{base}.weight_g_idx"):
        order = checkpoint.read_raw(f"{base}.weight_g_idx", (width,), SIZES)
        order = None if (order == -1).all() else _column_order(order, f"{base}.weight_g_idx", group)
    return _qtensor(scheme, values, scale, group, zero, order)


def read_gptq(checkpoint: Checkpoint, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> QTensor:
    """``qweight`` int32 [K * bits / 32, N], along K; ``qzeros`` int32 [groups, N * bits / 32]; ``scales`` [groups, N];
    ``g_idx`` int32 [K], the group of each column."""
    rows, width = shape
    group, groups = _groups(scheme, base, width)
    words = checkpoint.read_raw(f"{base}.qweight", (_words(width, scheme.bits), rows), WORDS)
    zeros = checkpoint.read_raw(f"{base}.qzeros", (groups, _words(rows, scheme.bits)), WORDS)
    scale = checkpoint.read_raw(f"{base}.scales", (groups, rows), SCALES).T.contiguous()
    values = unpack_words(words.T, scheme.bits, width)
    zero = unpack_words(add_to_each(zeros, scheme.bits, scheme.zero_offset), scheme.bits, rows).T.contiguous()
    order = None
    if checkpoint.has(f"{base}.g_idx"):
        order = _column_order(checkpoint.read_raw(f"{base}.g_idx", (width,), SIZES), f"{base}.g_idx", group)
    return _qtensor(scheme, values, scale, group, zero, order)


def read_awq(checkpoint: Checkpoint, scheme: QuantScheme, base: str, shape: tuple[int, int]) -> QTensor:
    """``qweight`` int32 [K, N / 8], along N in AWQ's order; ``qzeros`` int32 [groups, N / 8] alike; ``scales``
    [groups, N]."""
    rows, width = shape
    group, groups = _groups(scheme, base, width)
    if rows % 8:
        raise CheckpointError(f"tensor '{base}.qweight' is to have {rows} rows, expected a multiple of 8 (AWQ packs 8)")
    words = checkpoint.read_raw(f"{base}.qweight", (width, rows // 8), WORDS)
    zeros = checkpoint.read_raw(f"{base}.qzeros", (groups, rows // 8), WORDS)
    scale = checkpoint.read_raw(f"{base}.scales", (groups, rows), SCALES).T.contiguous()
    return _qtensor(
        scheme, unpack_awq_words(words).T.contiguous(), scale, group, unpack_awq_words(zeros).T.contiguous(), None
    )


def _groups(scheme: QuantScheme, base: str, width: int) -> tuple[int, int]:
    """(columns in a group, groups) of a row."""
    if scheme.bits == 4 and width % 2:
        raise CheckpointError(f"matrix {base!r} is to have {width} columns, expected an even number (4 bits each)")
    group = scheme.group_size or width
    return group, -(-width // group)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _zero_of_pack(checkpoint: Checkpoint, scheme: QuantScheme, base: str, rows: int, groups: int) -> Tensor:
    """uint8 [N, groups], counted as the packed numbers are: 2**(bits - 1) more than the true zero point."""
    name = f"{base}.weight_zero_point"
    if checkpoint.has(name) and checkpoint.dtype(name) == torch.int8:
        signed = checkpoint.read_raw(name, (rows, groups), (torch.int8,)).int()
        half = 1 << (scheme.bits - 1)
        if signed.numel() and not -half <= int(signed.min()) <= int(signed.max()) < half:
            found = f"{int(signed.min())}..{int(signed.max())}"
            raise CheckpointError(f"tensor {name!r} holds zero points {found}, expected {-half}..{half - 1}")
        return (signed + half).to(torch.uint8)
    words = checkpoint.read_raw(name, (_words(rows, scheme.bits), groups), WORDS)
    return unpack_words(words.T, scheme.bits, rows).T.contiguous()


def _column_order(groups_of: Tensor, name: str, group: int) -> Tensor | None:
    """The columns, those of group 0 first; None if they lie so already. groups_of: int [K]."""
    groups = -(-len(groups_of) // group)
    low, high = int(groups_of.min()), int(groups_of.max())
    if low < 0 or high >= groups:
        raise CheckpointError(f"tensor {name!r} names groups {low}..{high}, expected 0..{groups - 1}")
    in_order = torch.arange(len(groups_of)) // group
    columns = groups_of.argsort(stable=True)
    if not torch.equal(groups_of[columns].long(), in_order):
        counts = torch.bincount(groups_of.long(), minlength=groups).tolist()
        raise CheckpointError(f"tensor {name!r} puts {counts} columns into its groups, expected {group} into each")
    return None if torch.equal(groups_of.long(), in_order) else columns


def _qtensor(
    scheme: QuantScheme, values: Tensor, scale: Tensor, group: int, zero: Tensor | None, columns: Tensor | None
) -> QTensor:
    """values: uint8 [N, K], zero: uint8 [N, groups] or None, both counted from 0 to 2**bits - 1."""
    middle = 1 << (scheme.bits - 1)
    if zero is not None and bool((zero == middle).all()):
        zero = None
    if columns is not None:
        values = values[:, columns]
    if scheme.bits == 4:
        return QTensor("int4", pack_nibbles(values), scale, group, zero, columns)
    signed = (values ^ middle).view(torch.int8)
    return QTensor("int8", signed, scale, group, None if zero is None else (zero ^ middle).view(torch.int8), columns)
