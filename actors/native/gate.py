"""A gate's choice on the CPU in one call: small products, scores, groups and top-k of a batch's rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .library import library
from .matrix import KINDS, Product, address

_Whole, _Real = ctypes.c_int64, ctypes.c_double


class GateFields(ctypes.Structure):
    """One layer's gate, as the kernels are told of it; what it points at must outlive it. Types as in KINDS."""

    _fields_ = [
        ("weight", Product),
        ("bias", ctypes.c_void_p),
        *[(name, _Whole) for name in ("logits_type", "weights_type", "top_k", "n_group", "topk_group")],
        *[(name, _Whole) for name in ("softmax", "best_two", "normalise")],
        *[(name, _Real) for name in ("masked", "epsilon", "scale")],
    ]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, weights: torch.dtype, *rule: float) -> GateFields:
        """weight: [E, D], bias: [E] or None, in the logits' dtype; ``rule``: the fields from ``top_k`` on."""
        return cls(Product.of(weight, None), address(bias), KINDS[weight.dtype], KINDS[weights], *rule)


def choose(gate: GateFields, x: Tensor, weights: torch.dtype) -> tuple[Tensor, Tensor]:
    """Experts int64 [T, K] and weights [T, K] of the rows x [T, D], best first.

    x: fp32 or bf16, on the CPU; fp32 logits, or in its dtype. ``weights``: as told to ``of``. Raises ValueError where x
    has not D columns.
    """
    kernels = library()
    assert kernels is not None
    if x.shape[1] != gate.weight.k:
        raise ValueError(f"x has {x.shape[1]} columns, the gate takes {gate.weight.k}")
    x = x.contiguous()
    experts = torch.empty(x.shape[0], gate.top_k, dtype=torch.int64)
    out = torch.empty(x.shape[0], gate.top_k, dtype=weights)
    kernels.gate(
        kernels.number,
        KINDS[x.dtype],
        ctypes.addressof(gate),
        x.data_ptr(),
        experts.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        torch.get_num_threads(),
    )
    return experts, out
