"""The random numbers of draws: a pure function of what is drawn, not a stream."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from actors.engine.request import Draw


def uniforms(draws: Sequence[Draw]) -> np.ndarray:
    """One float64 in [0, 1) per draw: 53 bits of Philox4x64-10 at key (seed, choice), counter (index).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), as in numpy.random.Philox.
    """
    # One generator whose state is set anew for each draw: making one costs ten times as much.
    generator = np.random.Philox(0)
    state = generator.state
    bits = np.empty(len(draws), dtype=np.uint64)
    for row, draw in enumerate(draws):
        state["state"]["key"][:] = (draw.sampling.seed, draw.sampling.choice)
        state["state"]["counter"][:] = (draw.index, 0, 0, 0)
        generator.state = state
        bits[row] = generator.random_raw()
    return (bits >> np.uint64(11)) * 2.0**-53
