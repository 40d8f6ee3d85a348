"""Rotary position embedding: frequencies, the cos/sin table, and the two ways of pairing elements.

Follows transformers' ``modeling_rope_utils``; YaRN is arXiv 2309.00071, ``mscale`` is DeepSeek's addition to
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from actors.native.attention_layer import Rope

from .spec import RopeSpec
from .yarn import magnitude

Rotation = Callable[[Tensor, Tensor, Tensor], Tensor]

PIECE = 8192
"""Positions whose angles are computed at once: 163,840 positions would take several copies of the table."""


class RopeTable:
    """cos and sin of every position, each [max_positions, dim/2]; as transformers computes them for the spec.

    Computed once, in fp32 and scaled there. ``precision`` "model" casts them to the activation dtype before they
    rotate; "float32" keeps them, rotates in fp32 and casts the result, as DeepSeek-V2 does with complex numbers (their
    angle functions differ from cos and sin in the last bit). A table (instead of cos and sin of each step's positions)
    makes a row's angles independent of its batch mates.
    """

    def __init__(
        self, spec: RopeSpec, max_positions: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        frequencies, scaling = inverse_frequencies(spec)
        self._wide = spec.precision == "float32"
        kept = torch.float32 if self._wide else dtype
        shape = (max_positions, len(frequencies))
        self._cos = torch.empty(shape, dtype=kept, device=device)
        self._sin = torch.empty(shape, dtype=kept, device=device)
        for start in range(0, max_positions, PIECE):
            positions = torch.arange(start, min(start + PIECE, max_positions), dtype=torch.float32)
            cos, sin = _polar(positions[:, None] * frequencies, scaling, self._wide)
            self._cos[start : start + PIECE], self._sin[start : start + PIECE] = cos, sin
        self._rotate = rotate_interleaved if spec.interleaved else rotate_half
        self._dim = spec.dim

    @property
    def place(self) -> Rope:
        """The table as the kernels are told of it; valid as long as this lives."""
        interleaved = self._rotate is rotate_interleaved
        tables = self._cos.data_ptr(), self._sin.data_ptr()
        return Rope(*tables, self._cos.shape[0], self._dim, self._wide, interleaved)

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate the first ``dim`` elements of every head. x: [T, H, d], positions: int64 [T]; returns [T, H,
        d].

        Raises IndexError for a position outside the table.
        """
        return self._turn(x, positions, self._rotate)

    def apply_half(self, x: Tensor, positions: Tensor) -> Tensor:
        """As :meth:`apply`, in halves whatever the spec says of pairs."""
        return self._turn(x, positions, rotate_half)

    def _turn(self, x: Tensor, positions: Tensor, rotate: Rotation) -> Tensor:
        cos = self._cos.index_select(0, positions).unsqueeze(1)
        sin = self._sin.index_select(0, positions).unsqueeze(1)
        if x.shape[-1] > self._dim:
            turned, rest = x[..., : self._dim], x[..., self._dim :]
            return torch.cat((self._turned(turned, cos, sin, rotate), rest), dim=-1)
        return self._turned(x, cos, sin, rotate)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor, rotate: Rotation) -> Tensor:
        return rotate(x.to(torch.float32), cos, sin).to(x.dtype) if self._wide else rotate(x, cos, sin)


def _polar(angles: Tensor, scaling: float, complex_numbers: bool) -> tuple[Tensor, Tensor]:
    """Scaled cos and sin of fp32 ``angles``."""
    if complex_numbers:
        units = torch.polar(torch.ones_like(angles), angles) * scaling
        return units.real, units.imag
    return angles.cos() * scaling, angles.sin() * scaling


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (j, j + d/2). x: [..., d], cos and sin: [..., d/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (2j, 2j+1); the result is laid out as all first elements, then all second ones.

    Queries and keys share that order, so scores are those of the interleaved layout (DeepSeek-V3 in
    transformers).
    """
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def inverse_frequencies(spec: RopeSpec) -> tuple[Tensor, float]:
    """fp32 [dim/2] frequencies in radians per position, and the factor on cos and sin."""
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.float32) / spec.dim
    powers = spec.theta**exponents
    if spec.type == "default":
        return 1.0 / powers, 1.0
    keep = 1 - _ramp(*_correction_range(spec), spec.dim // 2)
    frequencies = (1.0 / (spec.factor * powers)) * (1 - keep) + (1.0 / powers) * keep
    return frequencies, _attention_scaling(spec)


def _attention_scaling(spec: RopeSpec) -> float:
    if spec.attention_factor is not None:
        return spec.attention_factor
    if spec.mscale and spec.mscale_all_dim:
        return magnitude(spec.factor, spec.mscale) / magnitude(spec.factor, spec.mscale_all_dim)
    return magnitude(spec.factor)


def _correction_range(spec: RopeSpec) -> tuple[float, float]:
    """Between which frequency indices YaRN goes over from extrapolation to interpolation."""

    def index(rotations: float) -> float:
        turns = math.log(spec.original_max_positions / (rotations * 2 * math.pi))
        return spec.dim * turns / (2 * math.log(spec.theta))

    low, high = index(spec.beta_fast), index(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, spec.dim - 1)


def _ramp(low: float, high: float, count: int) -> Tensor:
    if low == high:
        high += 0.001
    return torch.clamp((torch.arange(count, dtype=torch.float32) - low) / (high - low), 0, 1)
