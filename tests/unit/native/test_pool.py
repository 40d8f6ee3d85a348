"""What the kernels do where the system has no more threads or memory: in processes of their own, which lack them."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIMITED = """
import os, resource
import torch
from actors.native import products
from actors.native.expert_places import ExpertPlaces

def leave(mebibytes):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20), resource.RLIM_INFINITY))

def at_ease():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def threads():
    return len(os.listdir("/proc/self/task"))

def refused(call):
    try:
        call()
    except MemoryError as error:
        return str(error)

x, weight = torch.arange(2048.0).view(4, 512), torch.arange(512 * 4000.0).view(4000, 512) / 1e6
torch.set_num_threads(1)
want = products.linear(x, weight)
"""


def run(code: str) -> None:
    ran = subprocess.run([sys.executable, "-c", LIMITED + code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


def test_threads_that_cannot_be_started_are_done_without() -> None:
    """Until they can be."""
    run("""
torch.set_num_threads(4)
before = threads()
leave(1)
short = products.linear(x, weight)
assert threads() == before, "the limit does not keep threads from starting"
at_ease()
assert torch.equal(short, want)
assert torch.equal(products.linear(x, weight), want)
assert threads() == before + 3
""")


@pytest.mark.parametrize("count", [1, 2])
def test_no_memory_is_a_memory_error(count: int) -> None:
    """In the calling thread; the pool is free again, and the next call is right."""
    run(f"""
torch.set_num_threads({count})
products.linear(x, weight)
wide = torch.ones(1, 4096).expand(200000, 4096)
leave(256)
assert "linear" in refused(lambda: products.linear(wide, wide[:1])), "it was not refused"
assert torch.equal(products.linear(x, weight), want)
""")


@pytest.mark.parametrize("count", [1, 2])
def test_no_memory_for_a_task_is_a_memory_error(count: int) -> None:
    """Whichever thread does the task: rows and hidden rows of 400000 pairs fit, but not their gates."""
    run(f"""
torch.set_num_threads({count})
products.linear(x, weight)
gate_up, down = torch.ones(8, 8), torch.ones(8, 4)
one = ExpertPlaces.of(gate_up, down)
both = ExpertPlaces.together({{0: one, 1: one}})
row, expert = torch.zeros(400000, dtype=torch.int64), torch.arange(400000) % 2
products.experts(torch.ones(1, 8), row[:100], expert[:100], both)
leave(160)
assert "experts" in refused(lambda: products.experts(torch.ones(1, 8), row, expert, both)), "it was not refused"
assert torch.equal(products.linear(x, weight), want)
at_ease()
out = products.experts(torch.ones(1, 8), row, expert, both)
assert torch.equal(out, out[:1].expand_as(out))
""")


def test_memory_of_a_large_call_is_given_back() -> None:
    """128 MiB of rows, then 128 MiB of hidden rows. The C library keeps some tens of them for what asks next."""
    run("""
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() >> 20

wide = torch.ones(1, 4096).expand(8192, 4096)
before = resident()
products.linear(wide, torch.ones(3, 4096))
places = ExpertPlaces.of(gate_up := torch.ones(8192, 8), down := torch.ones(8, 4096))
products.swiglu(torch.ones(8192, 8), places)
assert resident() - before < 100, f"{resident() - before} MiB more"
""")


def test_a_child_computes_alone() -> None:
    """It has the pool of its parent, but none of the threads."""
    run("""
torch.set_num_threads(2)
products.linear(x, weight)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(products.linear(x, weight), want) and threads() == 1 else 3)
assert os.waitpid(child, 0)[1] == 0
""")
