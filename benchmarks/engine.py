"""An open-loop load on a served cluster: throughput, latency, goodput, KV use and cache hits.

    python -m benchmarks.engine [--rates 0.5 1 2] [--seconds 40] [--target HOST:PORT] [--config FILE.yaml] [-o NAME]
    python -m benchmarks.engine --stall [--rounds 3] [--streams 8] [--prompt-tokens 4096]

Requests arrive by a seeded Poisson process of each rate (a second), with mixed lengths; half of them begin like
others, and a fifth are batch requests, which may wait: latencies and goodput leave them out. Nobody waits for an
answer before sending the next, so a cluster that is too slow shows it in its queue. Without --target a cluster is
started here. Writes NAME.json and NAME.svg.

--stall asks instead what a long prompt does to running streams: the longest gap between their tokens over their usual
one, and the time to the prompt's first token over what it is alone; medians of some rounds, as a machine shared with
others is restless by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks.arrivals import Mix, percentile, poisson
from benchmarks.open_loop import Gateway, Run
from benchmarks.plots import draw_sweep
from benchmarks.stall import StallError, measure_stall, summary
from cluster.cli.serve import StopSignals, expected_errors, ready_cluster, weight_bytes
from cluster.config import load_config

_PIPED_WIDTH = 140


@dataclass(frozen=True)
class Slo:
    """Seconds within which a request has to have its first token, and each further one on average."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Figures:
    """One rate: of all requests that arrive, ``offered`` of the interactive ones. Times in seconds; ``kv_use`` and
    ``hits`` are shares.

    Times and ``goodput``, the interactive requests a second that were served within the SLO, leave out batch requests,
    which may wait: there is no time within which they have to be answered. The rest is of all.
    """

    rate: float
    offered: float
    requests: int
    refused: int
    failed: int
    tokens_per_s: float
    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    goodput: float
    kv_use_mean: float
    kv_use_max: float
    hits: float


def figures(rate: float, run: Run, slo: Slo) -> Figures:
    """What a run comes to; NaN for what nothing was seen of."""
    done = [one for one in run.served if not one.error and one.token_at]
    prompt = [one for one in done if not one.arrival.batch]
    gaps = [gap for one in prompt for gap in one.gaps_s]
    kept = [one for one in prompt if one.ttft_s <= slo.ttft_s and one.tpot_s <= slo.tpot_s]
    use = [share for _, share in run.kv_use] or [math.nan]
    return Figures(
        rate=rate,
        offered=rate * sum(not one.arrival.batch for one in run.served) / max(1, len(run.served)),
        requests=len(run.served),
        refused=sum(one.error == "RESOURCE_EXHAUSTED" for one in run.served),
        failed=sum(bool(one.error) and one.error != "RESOURCE_EXHAUSTED" for one in run.served),
        tokens_per_s=sum(len(one.token_at) for one in done) / run.seconds,
        ttft_p50=percentile([one.ttft_s for one in prompt], 0.5),
        ttft_p99=percentile([one.ttft_s for one in prompt], 0.99),
        itl_p50=percentile(gaps, 0.5),
        itl_p99=percentile(gaps, 0.99),
        goodput=len(kept) / run.seconds,
        kv_use_mean=mean(use),
        kv_use_max=max(use),
        hits=sum(one.cached for one in done) / max(1, sum(len(one.arrival.prompt_ids) for one in done)),
    )


async def sweep(target: str, rates: Sequence[float], seconds: float, slo: Slo, seed: int) -> list[tuple[Figures, Run]]:
    """One run after the other, each on other prompts, which are new to the cluster."""
    gateway = Gateway(target)
    try:
        model, shift = await gateway.model(), secrets.randbelow(2**30)
        results = []
        for number, rate in enumerate(rates):
            arrivals = poisson(rate, seconds, Mix(), model.vocab_size, model.context_length, seed + number, shift)
            print(f"{rate:g} requests/s for {seconds:g} s: {len(arrivals)} requests", file=sys.stderr, flush=True)
            run = await gateway.run(arrivals)
            results.append((figures(rate, run, slo), run))
        return results
    finally:
        await gateway.close()


@contextmanager
def gateway_at(target: str | None, config_file: Path | None) -> Iterator[str]:
    """The gateway that was named, or that of a cluster which is started here and stopped afterwards."""
    if target is not None:
        yield target
        return
    config = load_config(config_file, {"gateway.port": 0, "gateway.http_port": 0})
    with ready_cluster(config, weight_bytes(config), StopSignals()) as doors:
        yield doors.grpc


def print_sweep(rows: Sequence[Figures], slo: Slo) -> None:
    """One line a rate."""
    slo_text = f"TTFT <= {slo.ttft_s:g} s and TPOT <= {slo.tpot_s * 1e3:g} ms"
    table = Table(title=f"Open loop. TTFT, ITL and goodput ({slo_text}) are of interactive requests, the rest of all")
    for name in ("req/s", "requests", "refused", "failed", "tok/s", "TTFT p50 / p99", "ITL p50 / p99", "goodput"):
        table.add_column(name, justify="right")
    for name in ("KV mean / max", "cache hits"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.rate:g}",
            *(str(count) for count in (row.requests, row.refused, row.failed)),
            f"{row.tokens_per_s:.1f}",
            f"{row.ttft_p50:.2f} / {row.ttft_p99:.2f} s",
            f"{row.itl_p50 * 1e3:.0f} / {row.itl_p99 * 1e3:.0f} ms",
            f"{row.goodput:.2f} of {row.offered:.2f} req/s",
            f"{row.kv_use_mean:.0%} / {row.kv_use_max:.0%}",
            f"{row.hits:.0%}",
        )
    Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH).print(table)


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="requests a second, one run each"
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="so long requests arrive in each run")
    parser.add_argument("--target", help="HOST:PORT of a gateway; none: start a cluster here")
    parser.add_argument("--config", type=Path, help="of the cluster that is started here")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--slo-ttft", type=float, default=5.0, help="seconds")
    parser.add_argument("--slo-tpot", type=float, default=0.5, help="seconds")
    parser.add_argument("-o", "--output", type=Path, default=Path("benchmarks/results/engine"), help="without suffix")
    parser.add_argument("--stall", action="store_true", help="what a long prompt does to running streams")
    parser.add_argument("--streams", type=int, default=8, help="with --stall: so many run")
    parser.add_argument("--prompt-tokens", type=int, default=4096, help="with --stall")
    parser.add_argument("--rounds", type=int, default=3, help="with --stall: so often, each with other prompts")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds: at least 1")
    try:
        with gateway_at(options.target, options.config) as target:
            if options.stall:
                stalls = []
                for _ in range(options.rounds):
                    stalls.append(asyncio.run(measure_stall(target, options.streams, options.prompt_tokens)))
                    print(stalls[-1], flush=True)
                print(summary(stalls))
                return 0
            slo = Slo(options.slo_ttft, options.slo_tpot)
            results = asyncio.run(sweep(target, options.rates, options.seconds, slo, options.seed))
    except (*expected_errors(), StallError, grpc.RpcError) as error:
        print(error, file=sys.stderr)
        return 1
    rows = [row for row, _ in results]
    print_sweep(rows, slo)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    written = options.output.with_suffix(".json")
    written.write_text(json.dumps({"slo": asdict(slo), "runs": [asdict(row) for row in rows]}, indent=1) + "\n")
    draw_sweep(options.output.with_suffix(".svg"), rows, results[-1][1])
    print(f"{written}, {options.output.with_suffix('.svg')}")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
