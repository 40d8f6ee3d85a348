from __future__ import annotations

import torch

from actors.engine.masks import mask
from actors.engine.request import Draw, SamplingParams

OUT = -torch.inf


def test_each_row_keeps_what_its_draw_lets_come() -> None:
    logits = torch.arange(20.0).view(5, 4)
    draws = [
        Draw(SamplingParams(allowed_ids=(2, 0)), 0),
        Draw(SamplingParams(), 0),
        Draw(SamplingParams(banned_ids=(3,)), 0, held_back=frozenset({0, 3})),
        Draw(SamplingParams(allowed_ids=(1, 2), banned_ids=(2,)), 0),
        Draw(SamplingParams(allowed_ids=(1,)), 0, held_back=frozenset({1})),
    ]
    mask(logits, draws)
    assert logits.tolist() == [
        [0, OUT, 2, OUT],
        [4, 5, 6, 7],
        [OUT, 9, 10, OUT],
        [OUT, 13, OUT, OUT],
        [OUT, OUT, OUT, OUT],
    ]
