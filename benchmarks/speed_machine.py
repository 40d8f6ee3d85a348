"""What this machine can do at all: bytes a second from memory, operations a second. Measured beside the engines."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from actors.native import products
from benchmarks.speed_roofline import Machine

_BUFFER = 512 << 20
_WIDTH = 2048
_SQUARE = 1536
_TRIES = 8


def measure_machine() -> Machine:
    """The best of all ways and tries, with a thread a core: a limit is what was reached at least once."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        return Machine(max(_bandwidths()), max(_float_rates()), _int_rate())
    finally:
        torch.set_num_threads(before)


def best(machines: Sequence[Machine]) -> Machine:
    """The most of several rounds, at least one."""
    return Machine(
        max(one.bandwidth for one in machines),
        max(one.float_ops for one in machines),
        max(one.int_ops for one in machines),
    )


def _bandwidths() -> list[float]:
    """Bytes a second of what only reads: a scan by a thread a core, and one row through a matrix larger than any cache.

    Copies are left out: memory may read and write at the same time, and decoding only reads.
    """
    matrix = torch.ones(_BUFFER // 2 // _WIDTH, _WIDTH, dtype=torch.bfloat16)
    row = torch.ones(1, _WIDTH, dtype=torch.bfloat16)
    parts = np.array_split(matrix.view(torch.int64).numpy().reshape(-1), torch.get_num_threads())
    with ThreadPoolExecutor(len(parts)) as threads:
        found = [_BUFFER / _seconds(lambda: list(threads.map(np.bitwise_or.reduce, parts)))]
    found.append(_BUFFER / _seconds(lambda: torch.mm(row, matrix.t())))
    if products.usable(row, matrix):
        found.append(_BUFFER / _seconds(lambda: products.linear(row, matrix)))
    return found


def _float_rates() -> list[float]:
    """Operations a second of square products."""
    ops, found = 2 * _SQUARE**3, []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(_SQUARE, _SQUARE, dtype=dtype)
        found.append(ops / _seconds(partial(torch.mm, a, a)))
        if products.usable(a, a):
            found.append(ops / _seconds(partial(products.linear, a, a)))
    return found


def _int_rate() -> float:
    a = torch.ones(_SQUARE, _SQUARE, dtype=torch.int8)
    return 2 * _SQUARE**3 / _seconds(lambda: torch._int_mm(a, a))


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some tries, after one that does not count."""
    work()
    times = []
    for _ in range(_TRIES):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
