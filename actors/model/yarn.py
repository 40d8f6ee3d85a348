"""YaRN (arXiv 2309.00071) as far as it is no tensor."""

from __future__ import annotations

import math


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's growth of the logits with the context's growth: 0.1 mscale ln(factor) + 1, never below 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
