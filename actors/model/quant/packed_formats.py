"""Formats whose numbers are packed into int32 words: compressed-tensors' pack-quantized, GPTQ, AWQ."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from actors.model.dtypes import torch_dtype
from actors.model.errors import CheckpointError
from actors.model.heap import blank
from actors.model.weights import Checkpoint

from .layout import Part, Parts, groups_of
from .packing import add_to_each, pack_nibbles, unpack_awq_words, unpack_words
from .qtensor import ZERO_PARTS, QTensor
from .scheme import QuantScheme

TILE_BYTES = 1024 * 1024
"""Of numbers, a byte each, that are unpacked at a time: whole matrices, unpacked, transposed and in another order,
would lie about several times."""

Unpack = Callable[[slice], Tensor]
"""Some rows of a matrix, from a multiple of 8 on, to their numbers: uint8 [n, K], counted from 0 to 2**bits - 1."""


def read_pack_quantized(checkpoint: Checkpoint, scheme: QuantScheme, parts: Parts, shape: tuple[int, int]) -> QTensor:
    """compressed-tensors' pack-quantized: each number + 2**(bits - 1), zero points too."""
    width = shape[1]
    group, _ = groups_of(scheme, width)
    stated = tuple(read_part(checkpoint, parts["weight_shape"]).tolist())
    if stated != shape:
        name = parts["weight_shape"].name
        raise CheckpointError(f"{checkpoint.file(name)}: tensor {name!r} says {list(stated)}, expected {list(shape)}")
    words = read_part(checkpoint, parts["weight_packed"])
    scale = read_part(checkpoint, parts["weight_scale"])
    zero = None if scheme.symmetric else _zero_of_pack(checkpoint, scheme, parts, shape[0])
    order = read_order(checkpoint, parts, "weight_g_idx", group)

    def unpack(part: slice) -> Tensor:
        return unpack_words(words[part], scheme.bits, width)

    return _qtensor(scheme, _repacked(scheme.bits, shape, unpack, order), scale, group, zero, order)


def read_gptq(checkpoint: Checkpoint, scheme: QuantScheme, parts: Parts, shape: tuple[int, int]) -> QTensor:
    """GPTQ: all but the order of columns lies transposed."""
    rows, width = shape
    group, _ = groups_of(scheme, width)
    words = read_part(checkpoint, parts["qweight"])
    zeros = read_part(checkpoint, parts["qzeros"])
    scale = read_part(checkpoint, parts["scales"]).T.contiguous()
    zero = unpack_words(add_to_each(zeros, scheme.bits, scheme.zero_offset), scheme.bits, rows).T.contiguous()
    order = read_order(checkpoint, parts, "g_idx", group)

    def unpack(part: slice) -> Tensor:
        return unpack_words(words[:, part].T, scheme.bits, width)

    return _qtensor(scheme, _repacked(scheme.bits, shape, unpack, order), scale, group, zero, order)


def read_awq(checkpoint: Checkpoint, scheme: QuantScheme, parts: Parts, shape: tuple[int, int]) -> QTensor:
    """AWQ (GEMM): transposed, eight rows of the matrix in a word, in an order of their own."""
    group, _ = groups_of(scheme, shape[1])
    words = read_part(checkpoint, parts["qweight"])
    zeros = read_part(checkpoint, parts["qzeros"])
    scale = read_part(checkpoint, parts["scales"]).T.contiguous()
    zero = unpack_awq_words(zeros).T.contiguous()

    def unpack(part: slice) -> Tensor:
        return unpack_awq_words(words[:, part.start // 8 : -(-part.stop // 8)]).T.contiguous()

    return _qtensor(scheme, _repacked(4, shape, unpack, None), scale, group, zero, None)


def read_order(checkpoint: Checkpoint, parts: Parts, end: str, group: int) -> Tensor | None:
    """The columns, those of group 0 first; None if they lie so already. compressed-tensors writes -1 where it ordered
    none."""
    if end not in parts:
        return None
    order = read_part(checkpoint, parts[end])
    unused = end == "weight_g_idx" and bool((order == -1).all())
    name = parts[end].name
    return None if unused else _column_order(order, group, f"{checkpoint.file(name)}: tensor {name!r}")


def read_part(checkpoint: Checkpoint, part: Part) -> Tensor:
    """A part of a matrix as it is stored. CheckpointError unless it is what it has to be."""
    return checkpoint.read_raw(part.name, part.shape, tuple(map(torch_dtype, part.dtypes)))


def _zero_of_pack(checkpoint: Checkpoint, scheme: QuantScheme, parts: Parts, rows: int) -> Tensor:
    """uint8 [N, groups], counted as the packed numbers are: 2**(bits - 1) more than the true zero point."""
    part = parts["weight_zero_point"]
    stored = read_part(checkpoint, part)
    if stored.dtype == torch.int8:
        signed, half = stored.int(), 1 << (scheme.bits - 1)
        if signed.numel() and not -half <= int(signed.min()) <= int(signed.max()) < half:
            found = f"{int(signed.min())}..{int(signed.max())}"
            raise CheckpointError(
                f"{checkpoint.file(part.name)}: tensor {part.name!r} holds zero points {found}, "
                f"expected {-half}..{half - 1}"
            )
        return (signed + half).to(torch.uint8)
    return unpack_words(stored.T, scheme.bits, rows).T.contiguous()


def _column_order(groups_of: Tensor, group: int, what: str) -> Tensor | None:
    """The columns, those of group 0 first; None if they lie so already. groups_of: int [K], which an error calls
    ``what``."""
    groups = -(-len(groups_of) // group)
    low, high = int(groups_of.min()), int(groups_of.max())
    if low < 0 or high >= groups:
        raise CheckpointError(f"{what} names groups {low}..{high}, expected 0..{groups - 1}")
    in_order = torch.arange(len(groups_of)) // group
    columns = groups_of.argsort(stable=True)
    if not torch.equal(groups_of[columns].long(), in_order):
        counts = torch.bincount(groups_of.long(), minlength=groups).tolist()
        raise CheckpointError(f"{what} puts {counts} columns into its groups, expected {group} into each")
    return None if torch.equal(groups_of.long(), in_order) else columns


def _repacked(bits: int, shape: tuple[int, int], unpack: Unpack, columns: Tensor | None) -> Tensor:
    """A QTensor's data: for 4 bits uint8 [N, K / 2], else int8 [N, K], its columns in the order ``columns``."""
    rows, width = shape
    data = blank((rows, width // 2), torch.uint8) if bits == 4 else blank(shape, torch.int8)
    height = max(8, TILE_BYTES // max(1, width) // 8 * 8)
    for start in range(0, rows, height):
        part = slice(start, min(rows, start + height))
        values = unpack(part)
        if columns is not None:
            values = values[:, columns]
        data[part] = pack_nibbles(values) if bits == 4 else _signed(values)
    return data


def _signed(values: Tensor) -> Tensor:
    """uint8 -> int8, 128 less."""
    return (values ^ 128).view(torch.int8)


def _qtensor(
    scheme: QuantScheme, data: Tensor, scale: Tensor, group: int, zero: Tensor | None, columns: Tensor | None
) -> QTensor:
    """zero: uint8 [N, groups] or None, counted from 0 to 2**bits - 1."""
    if zero is not None and bool((zero == 1 << (scheme.bits - 1)).all()):
        zero = None
    if scheme.bits == 4:
        return QTensor("int4", data, scale, group, None if zero is None else zero * ZERO_PARTS["int4"], columns)
    return QTensor("int8", data, scale, group, None if zero is None else _signed(zero), columns)
