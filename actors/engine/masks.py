"""Which tokens may come at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.engine.cells import cells
from actors.engine.request import Draw


def mask(logits: Tensor, draws: Sequence[Draw]) -> None:
    """Sets to -inf, in each row of ``logits [R, V]``, what is not among the draw's ``allowed_ids`` (where it has any),
    its ``banned_ids`` and what is ``held_back``."""
    flat, n_vocab = logits.view(-1), logits.shape[-1]
    limited = [row for row, draw in enumerate(draws) if draw.sampling.allowed_ids]
    if limited:
        allowed = _on(logits, cells("allowed_ids", [draw.sampling.allowed_ids for draw in draws], n_vocab))
        kept = flat[allowed]
        logits[limited] = -torch.inf
        flat[allowed] = kept
    flat[_on(logits, cells("banned_ids", [draw.sampling.banned_ids for draw in draws], n_vocab))] = -torch.inf
    flat[_on(logits, cells("held_back", [draw.held_back for draw in draws], n_vocab))] = -torch.inf


def _on(logits: Tensor, where: np.ndarray) -> Tensor:
    return torch.from_numpy(where).to(logits.device)
