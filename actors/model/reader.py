"""A process's tensors, in the dtype and on the device where it computes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from actors.native.library import library
from actors.native.matrix import takes
from actors.quant_kind import QuantKind

from .errors import CheckpointError
from .heap import lasting
from .linear import Matrix
from .quant.layout import is_quantized, mark_of
from .quant.qtensor import QTensor, can_stack, stack
from .quant.quantize import quantize
from .quant.read import read_quantized
from .quant.scheme import QuantScheme
from .weights import Checkpoint

Part = tuple[str, tuple[int, int]]
"""A matrix's name and shape."""


class TensorReader:
    """Reads a process's tensors in the dtype and on the device where it computes, and reports progress. Called, it
    gives dense tensors, dequantised if they are stored quantised; the ``matrix`` methods keep them as they are.

    ``scheme`` says how quantised matrices lie on disk, None: there are none. ``quantize``: as what plain ones are kept
    where they need not be dense; ValueError together with a scheme. ``progress`` gets the bytes read from disk, once
    per tensor, from one thread at a time. Reading is safe from several threads.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: Callable[[int], None] | None = None,
        scheme: QuantScheme | None = None,
        quantize: QuantKind | None = None,
    ) -> None:
        if scheme is not None and quantize is not None:
            raise ValueError(f"quantize is {quantize!r}: allowed is None, as the checkpoint is {scheme.method} already")
        self._checkpoint = checkpoint
        self.dtype = dtype
        self._device = torch.device(device)
        self._progress = progress
        self._scheme = scheme
        self._quantize = quantize
        self._reporting = threading.Lock()
        self._reported = checkpoint.bytes_read

    @property
    def quantizes(self) -> bool:
        """Whether plain matrices are quantised as they are read."""
        return self._quantize is not None

    @property
    def leaves_holes(self) -> bool:
        """Whether reading makes what is dropped again: quantised and plain forms, or copies on the way to a GPU."""
        return self._scheme is not None or self._quantize is not None or self._device.type != "cpu"

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor ``name``, which must have ``shape``."""
        return self.stacked([(name, shape)])

    def stacked(self, parts: Iterable[tuple[str, tuple[int, ...]]]) -> Tensor:
        """The tensors (name, shape) under one another, along axis 0: one product instead of several."""
        wanted = list(parts)
        if len(wanted) == 1 and self._has_view(*wanted[0]):
            view = self._checkpoint.read(*wanted[0], self.dtype)
            self._report()
            return view
        rows = sum(shape[0] for _, shape in wanted)
        whole = (rows, *wanted[0][1][1:])
        on_cpu = self._device.type == "cpu"
        out = lasting(whole, self.dtype) if on_cpu else torch.empty(whole, dtype=self.dtype, device=self._device)
        start = 0
        for name, shape in wanted:
            self._fill(out[start : start + shape[0]], name)
            start += shape[0]
            self._report()
        return out

    def projection(self, parts: Iterable[Part]) -> Matrix:
        """As :meth:`stacked`; quantised if ``quantize`` is set, but dense if it is the checkpoint that is quantised."""
        wanted = list(parts)
        if self._quantize is None:
            return self.stacked(wanted)
        return self._stacked([self._made(name, shape) for name, shape in wanted])

    def projections(self, parts: Iterable[Part]) -> Matrix | tuple[Matrix, ...]:
        """As :meth:`projection`, but apart, in their order, where they need no copy and stay where they lie."""
        wanted = list(parts)
        if self._quantize is None and all(self._has_view(*part) for part in wanted):
            return tuple(self.stacked([part]) for part in wanted)
        return self.projection(wanted)

    def matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        """The matrix ``name``, quantised if it is stored so or ``quantize`` is set."""
        return self._laid(self._matrix(name, shape))

    def stacked_matrix(self, parts: Sequence[Part]) -> Matrix | tuple[Matrix, ...]:
        """As :meth:`projections`, of what :meth:`matrix` gives. Apart too where they cannot lie under one another: one
        plain and one quantised, or two orders of columns."""
        if self._quantize is None and not any(self._is_quantized(name) for name, _ in parts):
            return self.projections(parts)
        matrices = [self._matrix(name, shape) for name, shape in parts]
        quantized = [matrix for matrix in matrices if isinstance(matrix, QTensor)]
        if len(quantized) == len(matrices) and can_stack(quantized):
            return self._stacked(quantized)
        return tuple(map(self._laid, matrices))

    def matrix_entry(self, name: str, count: int, index: int, shape: tuple[int, int]) -> Matrix:
        """Entry ``index`` of the fused tensor ``name`` [count, *shape], which is stored plain; see :meth:`matrix`."""
        if self._quantize is None:
            kept: Matrix = self._checkpoint.read_entry(name, count, index, shape, self.dtype).to(self._device)
        else:
            kept = self._laid(self._quantized(self._checkpoint.read_entry(name, count, index, shape), name))
        self._report()
        return kept

    def _matrix(self, name: str, shape: tuple[int, int]) -> Matrix:
        stored = self._stored_quantized(name, shape)
        if stored is None and self._quantize is None:
            return self(name, shape)
        if stored is None:
            return self._made(name, shape)
        self._report()
        return stored

    def _fill(self, out: Tensor, name: str) -> None:
        shape = tuple(out.shape)
        stored = self._stored_quantized(name, shape) if len(shape) == 2 else None
        if stored is not None:
            stored.dequantize_into(out)
        elif self._device.type == "cpu":
            self._checkpoint.read_into(out, name)
        else:
            out.copy_(self._checkpoint.read(name, shape, self.dtype))

    def _has_view(self, name: str, shape: tuple[int, ...]) -> bool:
        plain = self._device.type == "cpu" and not self._is_quantized(name)
        return plain and self._checkpoint.has(name) and self._checkpoint.has_view(name, shape, self.dtype)

    def _is_quantized(self, name: str) -> bool:
        return self._scheme is not None and is_quantized(self._checkpoint, self._scheme, name)

    def _stored_quantized(self, name: str, shape: tuple[int, ...]) -> QTensor | None:
        if self._scheme is None:
            return None
        stored = read_quantized(self._checkpoint, self._scheme, name, (shape[0], shape[1]))
        if stored is None:
            return None
        mark = mark_of(self._checkpoint, self._scheme, name)
        return self._fitting(stored, name, mark or name).to(self._device)

    def _made(self, name: str, shape: tuple[int, int]) -> QTensor:
        """The plain matrix ``name``, quantised."""
        made = self._quantized(self._checkpoint.read(name, shape), name)
        self._report()
        return made

    def _quantized(self, plain: Tensor, name: str) -> QTensor:
        """From the precision on disk: a cast before it would add an error."""
        assert self._quantize is not None
        return self._fitting(quantize(plain, self._quantize), name, name).to(self._device)

    def _stacked(self, parts: Sequence[QTensor]) -> QTensor:
        return stack(parts, in_lanes=all(map(self._goes_in_lanes, parts)))

    def _laid(self, matrix: Matrix) -> Matrix:
        """As the kernels like it best, where it will be theirs."""
        return matrix.in_lanes() if isinstance(matrix, QTensor) and self._goes_in_lanes(matrix) else matrix

    def _goes_in_lanes(self, matrix: QTensor) -> bool:
        return matrix.fits_lanes and takes(matrix, self.dtype) and library() is not None

    def _fitting(self, matrix: QTensor, name: str, part: str) -> QTensor:
        """``matrix``, whose parts are finite; multiplied, they may be more than fp16 holds. ``part``: a tensor that it
        was made of."""
        if self._checkpoint.check_finite and not matrix.fits(self.dtype):
            raise CheckpointError(
                f"{self._checkpoint.file(part)}: tensor {name!r}, dequantised, overflows {self.dtype}: expected finite "
                "numbers"
            )
        return matrix

    def _report(self) -> None:
        if self._progress is None:
            return
        with self._reporting:
            total = self._checkpoint.bytes_read
            if total > self._reported:
                self._progress(total - self._reported)
                self._reported = total
