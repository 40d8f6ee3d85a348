"""Small integers in larger ones: how 4-bit numbers lie in bytes and in the formats' int32 words."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word, from the lowest on, is number AWQ_ORDER[i] of the eight."""


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> uint8 [..., 2n]; a byte's low nibble comes first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 [..., 2n] of 0..15 -> uint8 [..., n]: the inverse of :func:`unpack_nibbles`."""
    pairs = values.unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 [R, w] -> uint8 [R, count]: each row's first ``count`` numbers of ``bits`` (4 or 8), low bits first."""
    as_bytes = words.contiguous().view(torch.uint8)  # little-endian, as safetensors is
    values = unpack_nibbles(as_bytes) if bits == 4 else as_bytes
    return values[:, :count]


def unpack_awq_words(words: Tensor) -> Tensor:
    """int32 [R, w] -> uint8 [R, 8w], AWQ's order within a word undone."""
    nibbles = unpack_words(words, 4, words.shape[1] * 8).unflatten(1, (-1, 8))
    places = torch.tensor(AWQ_ORDER).argsort()
    return nibbles[:, :, places].flatten(1)


def add_to_each(words: Tensor, bits: int, amount: int) -> Tensor:
    """int32 words whose numbers of ``bits`` bits are each ``amount`` more, as one addition modulo 2**32.

    So does GPTQModel, going and coming (convert_gptq_v1_to_v2_format_module): a zero point of 0, stored as -1, borrows
    from its neighbour, and the carry gives it back.
    """
    ones = sum(1 << shift for shift in range(0, 32, bits))
    return (words.long() + amount * ones).to(torch.int32)
