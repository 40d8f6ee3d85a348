"""What /proc says of an engine's processes."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.speed_watch import (
    Others,
    Processes,
    available_bytes,
    busy_and_stolen_ticks,
    family,
    parent_and_ticks,
    pss_bytes,
)

SLEEPER = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'], env={})"
"""Its child does not carry the mark, like a process that writes over its environment."""


def test_a_name_may_have_brackets_and_spaces() -> None:
    stat = "42 (ray::A (b) c) S 7 42 42 0 -1 4194560 1 2 3 4 100 20 3 4 20 0 1 0 5"
    assert parent_and_ticks(stat) == (7, 127)


def test_idle_and_waiting_are_not_busy_and_guests_count_once() -> None:
    stat = "cpu  1 20 300 4000 50000 600000 7000000 80000000 1 2\ncpu0 9 9 9 9 9 9 9 9 9 9\n"
    assert busy_and_stolen_ticks(stat) == (7600321, 80000000)


def test_memory_is_the_proportional_one() -> None:
    rollup = "5-7 ---p 0 00:00 0 [rollup]\nRss: 900 kB\nPss:  12 kB\nPss_Anon: 8 kB\n"
    assert pss_bytes(rollup) == 12 * 1024
    assert pss_bytes("") == 0


def test_a_family_is_all_that_descend() -> None:
    parents = {1: 0, 2: 1, 3: 2, 4: 3, 5: 1, 6: 5}
    assert family(parents, [2]) == {2, 3, 4}
    assert family(parents, [3, 5, 99]) == {3, 4, 5, 6}


def test_processes_are_found_with_their_children_counted_and_ended() -> None:
    mine, others = Processes(), Processes()
    assert mine.ids() == set()
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER], env=mine.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.pid in mine.ids()
        assert len(mine.ids()) == 2
        assert others.ids() == set()
        assert mine.pss() > 1 << 20
        assert mine.cpu_seconds() > 0
        mine.wait_gone(0.0)
        assert mine.ids() == set()


def test_own_work_is_not_that_of_others() -> None:
    with Others(Processes()) as others:
        sum(range(200_000))
    assert others.cores >= 0.0


def test_there_is_memory() -> None:
    assert available_bytes() > 1 << 20
