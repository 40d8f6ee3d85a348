"""Free memory, read from a machine made of files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.free_memory import free_bytes

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """120 MiB are available, of which mapped files take 20; the process is in the group /pod/box of cgroups v2, where
    nothing is limited."""
    files = {
        "proc/meminfo": "MemTotal: 204800 kB\nMemAvailable: 122880 kB\nMapped: 20480 kB\n",
        "proc/self/cgroup": "0::/pod/box\n",
        "cgroup/pod/box/memory.max": "max",
        "cgroup/pod/box/memory.current": "0",
        "cgroup/pod/box/memory.stat": "inactive_file 0\n",
    }
    for name, text in files.items():
        write(tmp_path / name, text)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def free(machine: Path) -> float:
    return free_bytes(CPU, machine / "proc", machine / "cgroup") / MIB


def test_without_a_limit_it_is_the_machines(machine: Path) -> None:
    assert free(machine) == 100


@pytest.mark.parametrize("group", ["pod", "pod/box"])
def test_a_containers_limit_counts_and_its_cache_does_not(machine: Path, group: str) -> None:
    write(machine / "cgroup" / group / "memory.max", str(64 * MIB))
    write(machine / "cgroup" / group / "memory.current", str(50 * MIB))
    write(machine / "cgroup" / group / "memory.stat", f"anon {40 * MIB}\ninactive_file {10 * MIB}\n")
    assert free(machine) == 24


def test_mapped_files_are_no_cache_to_give_back(machine: Path) -> None:
    box = machine / "cgroup/pod/box"
    write(box / "memory.max", str(64 * MIB))
    write(box / "memory.current", str(50 * MIB))
    write(box / "memory.stat", f"inactive_file {30 * MIB}\nfile_mapped {25 * MIB}\n")
    assert free(machine) == 19
    write(box / "memory.stat", f"inactive_file {20 * MIB}\nfile_mapped {25 * MIB}\n")
    assert free(machine) == 14


def test_over_its_limit_nothing_is_free(machine: Path) -> None:
    write(machine / "cgroup/pod/box/memory.max", str(MIB))
    write(machine / "cgroup/pod/box/memory.current", str(2 * MIB))
    assert free(machine) == 0


def test_the_older_cgroups(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "8:pids:/\n9:cpu,memory:/box\n")
    box = machine / "cgroup/memory/box"
    write(box / "memory.limit_in_bytes", str(30 * MIB))
    write(box / "memory.usage_in_bytes", str(20 * MIB))
    write(box / "memory.stat", f"total_inactive_file {9 * MIB}\ntotal_mapped_file {4 * MIB}\n")
    assert free(machine) == 15


def test_this_machine() -> None:
    assert 0 < free_bytes(CPU) < 2**50
