"""Seconds and blocks of what is computed."""

from __future__ import annotations

import pytest
import torch

from actors.stopwatch import Stopwatch


def test_who_reads_it_sees_whole_blocks() -> None:
    watch = Stopwatch(torch.device("cpu"))
    seen = [watch.measured]
    for _ in range(3):
        with watch.running():
            assert watch.measured is seen[-1]
        seen.append(watch.measured)
    assert [measured.blocks for measured in seen] == [0, 1, 2, 3]
    seconds = [measured.seconds for measured in seen]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0 < seconds[-1]
    assert watch.last_s == pytest.approx(seconds[-1] - seconds[-2])


def test_a_block_that_raises_does_not_count() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(ValueError, match="broken"), watch.running():
        raise ValueError("broken")
    assert watch.measured == (0.0, 0)
