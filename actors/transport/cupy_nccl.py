"""NCCL itself, through ``cupy.cuda.nccl``. cupy is imported where it is used; torch may be a CPU build.

Not run on real devices yet. What shaped it:

* Each communicator has a stream of its own. An exchange waits for what the calling thread has enqueued on torch's
  current stream, so what it sends is computed and what it receives into is no longer read.
* NCCL is not safe where two threads post to communicators of one device at once, and a new epoch forms beside the one
  in use: posts take one lock a process.
* ``groupStart``/``groupEnd`` around the aborts of a group's communicators, because an abort may wait for the device
  and so for the others' hanging transfers (NCCL issue 1013; NCCL 2.22 or newer).
* Never ``destroy``: it waits for the peers.

Source: NCCL user guide, "Thread safety", "Using multiple NCCL communicators concurrently"; CuPy's ``nccl.pyx``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actors.transport.communicator import Communicator, CommunicatorError, Transfer

LEAST_NCCL = 22200
"""NCCL 2.22: aborts of several communicators as one group."""

_POSTING = threading.Lock()

log = logging.getLogger(__name__)


def requirements_missing() -> list[str]:
    """What keeps this process from using NCCL, each with what to do about it; empty when nothing does."""
    missing = cuda_missing()
    if importlib.util.find_spec("cupy") is None:
        return [*missing, "cupy is not installed: pip install 'expertmesh[gpu]'"]
    try:
        nccl = _nccl()
    except ImportError as error:
        return [*missing, f"cupy cannot be imported: {error}"]
    if not nccl.available:
        return [*missing, "cupy finds no NCCL library: pip install nvidia-nccl-cu12"]
    version = nccl.get_version()
    if version < LEAST_NCCL:
        missing.append(f"NCCL has version code {version}; at least {LEAST_NCCL} (2.22) is needed")
    return missing


def cuda_missing() -> list[str]:
    """What keeps this process from computing on a GPU, with what to do about it; empty when nothing does."""
    if torch.version.cuda is None:
        return [f"torch {torch.__version__} is a build without CUDA: install a CUDA build of it"]
    if not torch.cuda.is_available():
        return ["torch sees no CUDA device: check the driver and CUDA_VISIBLE_DEVICES"]
    return []


def _nccl() -> Any:
    return importlib.import_module("cupy.cuda.nccl")


@contextmanager
def _grouped(nccl: Any) -> Iterator[None]:
    nccl.groupStart()
    try:
        yield
    finally:
        # Also after an error: a group left open would swallow everything this thread posts later.
        nccl.groupEnd()


class CupyBackend:
    """A :class:`~.communicator.Backend` for one GPU. No two members of a group may use the same GPU."""

    def __init__(self, device: torch.device) -> None:
        """Errors: ValueError listing all that is missing, or when ``device`` is not a CUDA device."""
        missing = requirements_missing()
        if missing:
            raise ValueError("nccl cannot be used here: " + "; ".join(missing))
        if device.type != "cuda":
            raise ValueError(f"device is {device}; nccl needs a cuda device")
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._nccl = _nccl()

    @property
    def device(self) -> torch.device:
        """See :class:`~.communicator.Backend`."""
        return self._device

    def unique_id(self) -> bytes:
        """See :class:`~.communicator.Backend`."""
        return bytes(self._nccl.get_unique_id())

    def connect(self, unique_id: bytes, rank: int, size: int) -> CupyCommunicator:
        """See :class:`~.communicator.Backend`."""
        torch.cuda.set_device(self._device)
        try:
            made = self._nccl.NcclCommunicator(size, unique_id, rank)
        except self._nccl.NcclError as error:
            raise CommunicatorError(f"rank {rank} of {size} cannot join over NCCL: {error}") from error
        return CupyCommunicator(self._nccl, made, rank, size, self._device)

    def abort(self, communicators: Sequence[Communicator]) -> None:
        """See :class:`~.communicator.Backend`."""
        torch.cuda.set_device(self._device)
        try:
            with _grouped(self._nccl):
                for communicator in communicators:
                    assert isinstance(communicator, CupyCommunicator)
                    communicator.handle.abort()
        except self._nccl.NcclError as error:
            log.error("NCCL could not abort in order; device memory of the old epoch may be lost: %s", error)


class CupyCommunicator:
    """A :class:`~.communicator.Communicator` over NCCL."""

    def __init__(self, nccl: Any, handle: Any, rank: int, size: int, device: torch.device) -> None:
        self.handle = handle
        self.rank, self.size = rank, size
        self._nccl = nccl
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def exchange(self, sends: Sequence[Transfer], receives: Sequence[Transfer]) -> CupyPending:
        """See :class:`~.communicator.Communicator`."""
        nccl, stream = self._nccl, self._stream.cuda_stream
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.device(self._device), _POSTING, _grouped(nccl):
                for tensor, peer in sends:
                    self.handle.send(tensor.data_ptr(), tensor.numel(), nccl.NCCL_UINT8, peer, stream)
                for tensor, peer in receives:
                    self.handle.recv(tensor.data_ptr(), tensor.numel(), nccl.NCCL_UINT8, peer, stream)
        except nccl.NcclError as error:
            raise CommunicatorError(f"rank {self.rank} cannot post its transfers: {error}") from error
        event = torch.cuda.Event()
        event.record(self._stream)
        return CupyPending(event, [transfer.tensor for transfer in (*sends, *receives)])

    def failure(self) -> str | None:
        """See :class:`~.communicator.Communicator`."""
        try:
            self.handle.check_async_error()
        except self._nccl.NcclError as error:
            return f"NCCL reports {error}"
        return None


class CupyPending:
    """A :class:`~.communicator.Pending`: an event behind the exchange on its stream."""

    def __init__(self, event: torch.cuda.Event, tensors: list[Tensor]) -> None:
        self._event = event
        self._tensors = tensors

    def done(self) -> bool:
        """See :class:`~.communicator.Pending`."""
        return bool(self._event.query())
