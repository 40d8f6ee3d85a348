"""The routed experts of a model in one process: the reference for every distributed one."""

from __future__ import annotations

import torch
from torch import Tensor

from .combine import combine_rows
from .experts import ExpertBank
from .gate import Gate


class LocalMoE:
    """gate -> experts -> combine, all here and at once. Implements the decoder's ``MoE``."""

    def __init__(self, gate: Gate, bank: ExpertBank) -> None:
        self._gate = gate
        self._bank = bank

    @torch.inference_mode()
    def start(self, layer: int, rows: Tensor, micro_batch: int = 0) -> Tensor:
        """rows: [T, D], normed; the handle is the finished result, of whatever ``micro_batch``."""
        experts, weights = self._gate.route(layer, rows)
        tokens, top_k = experts.shape
        pair_row = torch.arange(tokens, device=rows.device).repeat_interleave(top_k)
        out = self._bank.forward(layer, rows, pair_row, experts.flatten())
        return combine_rows(out.view(tokens, top_k, -1), weights, rows.dtype)

    def finish(self, handle: object) -> Tensor:
        """The weighted sum [T, D] of the experts' outputs for a handle of :meth:`start`."""
        if not isinstance(handle, Tensor):
            raise TypeError(f"handle is {type(handle).__name__}, expected what start returned")
        return handle
