"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.engine import Figures
    from benchmarks.open_loop import Run


def draw_sweep(path: Path, rows: Sequence[Figures], last: Run) -> None:
    """Latencies and goodput of interactive requests over the rate of all, and the KV cache over the last run's time, as
    SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    rates = [row.rate for row in rows]
    figure, (latency, gaps, served, cache) = pyplot.subplots(1, 4, figsize=(18, 4), layout="constrained")
    latency.plot(rates, [row.ttft_p50 for row in rows], "o-", label="p50")
    latency.plot(rates, [row.ttft_p99 for row in rows], "s--", label="p99")
    latency.set(title="Time to first token, interactive", xlabel="requests/s", ylabel="s", ylim=(0, None))
    gaps.plot(rates, [row.itl_p50 * 1e3 for row in rows], "o-", label="p50")
    gaps.plot(rates, [row.itl_p99 * 1e3 for row in rows], "s--", label="p99")
    gaps.set(title="Time between tokens, interactive", xlabel="requests/s", ylabel="ms", ylim=(0, None))
    served.plot(rates, [row.offered for row in rows], ":", color="grey", label="offered")
    served.plot(rates, [row.goodput for row in rows], "o-", label="goodput")
    served.set(title="Interactive requests within the SLO", xlabel="requests/s", ylabel="requests/s", ylim=(0, None))
    cache.step([at for at, _ in last.kv_use], [100 * share for _, share in last.kv_use], where="post", label="in use")
    cache.set(title=f"KV blocks at {rates[-1]:g} requests/s", xlabel="s", ylabel="%", ylim=(0, 100))
    for axes in (latency, gaps, served, cache):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
