"""How much memory a process could still take, measured."""

from __future__ import annotations

from pathlib import Path

import torch

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes that can be allocated on ``device`` now: those of the GPU, or those of the machine, but no more than the
    control group of this process (a container's) has left. What the system would give back under pressure counts as
    free, but for files that processes have mapped: weights are such files, and would be read again at once."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return max(0, min([_available(proc), *_left_in_groups(proc, cgroups)]))


def _available(proc: Path) -> int:
    told = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    try:
        available, mapped = (int(told[key].split()[0]) * 1024 for key in ("MemAvailable", "Mapped"))
    except KeyError as error:
        raise OSError(f"{proc / 'meminfo'} has no {error.args[0]}") from None
    return available - mapped


def _left_in_groups(proc: Path, cgroups: Path) -> list[int]:
    """Of every group above this process that has a limit. Version 2 is one tree; version 1 has one for memory."""
    left = []
    for line in (proc / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = cgroups, "memory.max", "memory.current"
            cache, mapped = "inactive_file", "file_mapped"
        elif "memory" in controllers.split(","):
            root, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache, mapped = "total_inactive_file", "total_mapped_file"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (room := _left(folder, limit, used, cache, mapped)) is not None:
                left.append(room)
            if folder == root:
                break
    return left


def _left(folder: Path, limit: str, used: str, cache: str, mapped: str) -> int | None:
    """None for a group without a limit, or one that cannot be seen from inside a container."""
    try:
        most = (folder / limit).read_text().strip()
        if most == "max":
            return None
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        reclaimable = max(0, int(stat.get(cache, 0)) - int(stat.get(mapped, 0)))
        return int(most) - int((folder / used).read_text()) + reclaimable
    except FileNotFoundError:
        return None
