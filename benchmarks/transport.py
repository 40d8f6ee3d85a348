"""Round trips over the wires, beside what the machine can do at all.

    python -m benchmarks.transport [--seconds 0.5] [--spin-us 50]

Two processes (threads for ``local``) send one frame to and fro. "unix socket" and "pipe + memory" are the
plainest programs that do the same: the first copies through the kernel, the second through one shared buffer
per direction with a pipe as its bell. "memcpy x4" is four copies of the payload in one thread: what a ring
costs at least, which is copied into and out of on the way there and back. Figures are p50 / p99 in
microseconds.
"""

from __future__ import annotations

import argparse
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from actors.transport.base import FrameTag, Medium, PeerGone, Wire
from actors.transport.endpoint import Endpoint
from actors.transport.local import local_pair

SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20)
_SECRET = b"a benchmark's secret"
_PATIENCE_S = 60.0
_ROOT = Path(__file__).resolve().parents[1]

RoundTrip = Callable[[], object]


def measure(round_trip: RoundTrip, seconds: float) -> tuple[float, float]:
    """(p50, p99) in microseconds of calls during ``seconds``, at least 20, after a tenth of that as warm-up."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 22 or time.perf_counter() < begin + 1.1 * seconds:
        start = time.perf_counter()
        round_trip()
        times.append(time.perf_counter() - start)
    times = sorted(times[len(times) // 11 :])
    return times[len(times) // 2] * 1e6, times[int(len(times) * 0.99)] * 1e6


def echo(wire: Wire) -> None:
    """Send every frame back until the peer goes."""
    while True:
        try:
            frame = wire.recv(time.monotonic() + _PATIENCE_S)
        except PeerGone:
            wire.close()
            return
        wire.send(frame.kind, frame.tag, frame.parts, time.monotonic() + _PATIENCE_S)


def over_wire(wire: Wire, seconds: float) -> list[tuple[float, float]]:
    """One figure per size."""
    figures = []
    for size in SIZES:
        payload, tag = os.urandom(size), FrameTag()

        def round_trip(payload: bytes = payload, tag: FrameTag = tag) -> None:
            deadline = time.monotonic() + _PATIENCE_S
            wire.send(1, tag, (payload,), deadline)
            wire.recv(deadline)

        figures.append(measure(round_trip, seconds))
    wire.close()
    return figures


def local_figures(seconds: float, spin_us: float) -> list[tuple[float, float]]:
    """Two threads of this process."""
    ours, theirs = local_pair("here", "there", spin_us)
    thread = threading.Thread(target=echo, args=(theirs,))
    thread.start()
    figures = over_wire(ours, seconds)
    thread.join()
    return figures


def wire_figures(medium: Medium, seconds: float, spin_us: float) -> list[tuple[float, float]]:
    """This process and one more."""
    wires: list[Wire] = []
    came = threading.Event()

    def on_wire(wire: Wire) -> None:
        wires.append(wire)
        came.set()

    endpoint = Endpoint("here", "node", _SECRET, on_wire=on_wire, spin_us=spin_us)
    child, connection = _spawn("wire")
    connection.send((endpoint.address, medium, spin_us))
    if not came.wait(_PATIENCE_S):
        raise RuntimeError(f"the peer process did not connect within {_PATIENCE_S} s")
    figures = over_wire(wires[0], seconds)
    child.wait()
    endpoint.close()
    connection.close()
    return figures


def unix_socket_figures(seconds: float) -> list[tuple[float, float]]:
    """sendall and recv_into on a socket pair."""
    ours, theirs = socket.socketpair()
    child, connection = _spawn("unix", theirs.fileno())
    theirs.close()
    figures = []
    for size in SIZES:
        payload, into = os.urandom(size), memoryview(bytearray(size))
        connection.send(size)
        connection.recv()

        def round_trip(payload: bytes = payload, into: memoryview = into) -> None:
            ours.sendall(payload)
            _fill(ours, into)

        figures.append(measure(round_trip, seconds))
        ours.sendall(bytes(size))  # all zeros: the next size
    _finish(child, connection)
    ours.close()
    return figures


def pipe_figures(seconds: float) -> list[tuple[float, float]]:
    """One shared buffer per direction, a byte through a pipe as the bell: no framing, no deadline, no ring."""
    memory = os.memfd_create("benchmark")
    os.ftruncate(memory, 2 * SIZES[-1])
    (their_bell, ring_them), (our_bell, ring_us) = os.pipe(), os.pipe()
    child, connection = _spawn("pipe", memory, their_bell, ring_us)
    shared = mmap.mmap(memory, 2 * SIZES[-1])
    figures = []
    for size in SIZES:
        payload, into = os.urandom(size), memoryview(bytearray(size))
        connection.send(size)
        connection.recv()

        def round_trip(payload: bytes = payload, into: memoryview = into, size: int = size) -> None:
            with memoryview(shared) as view:
                view[:size] = payload
                os.write(ring_them, b"x")
                os.read(our_bell, 1)
                into[:] = view[SIZES[-1] : SIZES[-1] + size]

        figures.append(measure(round_trip, seconds))
        os.write(ring_them, b".")
    _finish(child, connection)
    shared.close()
    for fd in (memory, their_bell, ring_them, our_bell, ring_us):
        os.close(fd)
    return figures


def memcpy_figures(seconds: float) -> list[tuple[float, float]]:
    """Four copies, in one thread."""
    figures = []
    for size in SIZES:
        source, target = memoryview(bytearray(os.urandom(size))), memoryview(bytearray(size))

        def copies(source: memoryview = source, target: memoryview = target) -> None:
            for _ in range(2):
                target[:] = source
                source[:] = target

        figures.append(measure(copies, seconds / 2))
    return figures


def _fill(sock: socket.socket, into: memoryview) -> None:
    while into:
        into = into[sock.recv_into(into) :]


def _spawn(role: str, *fds: int) -> tuple[subprocess.Popen[bytes], Connection]:
    ours, theirs = Pipe()
    with theirs:
        numbers = [theirs.fileno(), *fds]
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.transport", "--peer", role, *map(str, numbers)],
            pass_fds=numbers,
            cwd=_ROOT,
        )
    return child, ours


def _finish(child: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.send(0)
    child.wait()
    connection.close()


def _peer(role: str, control: int, *fds: int) -> None:
    with Connection(control) as connection:
        if role == "wire":
            address, medium, spin_us = connection.recv()
            endpoint = Endpoint("there", "node", _SECRET, spin_us=spin_us)
            echo(endpoint.connect(address, time.monotonic() + _PATIENCE_S, medium))
            endpoint.close()
        elif role == "unix":
            _unix_peer(connection, socket.socket(fileno=fds[0]))
        else:
            _pipe_peer(connection, *fds)


def _unix_peer(connection: Connection, sock: socket.socket) -> None:
    while size := connection.recv():
        into, zeros = memoryview(bytearray(size)), bytes(size)
        connection.send("ready")
        while True:
            _fill(sock, into)
            if into == zeros:
                break
            sock.sendall(into)
    sock.close()


def _pipe_peer(connection: Connection, memory: int, bell: int, ring: int) -> None:
    shared = memoryview(mmap.mmap(memory, 2 * SIZES[-1]))
    while size := connection.recv():
        own = memoryview(bytearray(size))
        connection.send("ready")
        while os.read(bell, 1) == b"x":
            own[:] = shared[:size]
            shared[SIZES[-1] : SIZES[-1] + size] = own
            os.write(ring, b"x")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.5, help="per figure")
    parser.add_argument("--spin-us", type=float, default=50.0, help="bound of one phase of yielding polls")
    parser.add_argument("--peer", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        _peer(options.peer[0], *map(int, options.peer[1:]))
        return
    rows = {
        "local (threads)": lambda: local_figures(options.seconds, options.spin_us),
        "shm": lambda: wire_figures(Medium.SHM, options.seconds, options.spin_us),
        "tcp (loopback)": lambda: wire_figures(Medium.TCP, options.seconds, options.spin_us),
        "unix socket, raw": lambda: unix_socket_figures(options.seconds),
        "pipe + memory, raw": lambda: pipe_figures(options.seconds),
        "memcpy x4": lambda: memcpy_figures(options.seconds),
    }
    print(f"round trip, p50 / p99 in us, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':20}" + "".join(f"{size >> 10:>13} KiB" for size in SIZES))
    for name, figures in rows.items():
        print(f"{name:20}" + "".join(f"{p50:>9.0f} /{p99:>6.0f}" for p50, p99 in figures()), flush=True)


if __name__ == "__main__":
    main()
