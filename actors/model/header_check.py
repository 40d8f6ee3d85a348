"""What is wrong with a checkpoint's tensors as far as their files' headers tell: what reading them would refuse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from .dtypes import COMPUTED, STORED, shown
from .errors import CheckpointError
from .quant.layout import Part, quantized_parts
from .quant.scheme import QuantScheme
from .safetensors_header import TensorEntry
from .spec import MoEDecoderSpec
from .surplus import surplus_faults
from .tensor_list import ExpectedTensor, stored_tensors


class KnownHeaders:
    """Tensors by name, with their headers' entries; None where only the name was seen, in an index."""

    def __init__(self, entries: Mapping[str, TensorEntry | None]) -> None:
        self._entries = entries

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._entries.keys()

    def has(self, name: str) -> bool:
        """Whether there is a tensor called ``name``."""
        return name in self._entries

    def file(self, name: str) -> None:
        """Where ``name`` lies: not known here."""

    def stored(self, name: str) -> str | None:
        """The dtype of ``name``, if that is known. CheckpointError for a type that torch has not."""
        entry = self._entries[name]
        if entry is None:
            return None
        if entry.dtype not in STORED:
            raise CheckpointError(f"tensor {name!r} is {entry.dtype}, expected one of {', '.join(STORED)}")
        return STORED[entry.dtype]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of ``name``, if it is known."""
        entry = self._entries[name]
        return None if entry is None else entry.shape


@dataclass(frozen=True, slots=True)
class Fault:
    """``text``: what is wrong with the tensor ``name``; None: it is missing."""

    name: str
    text: str | None = None


def find_faults(spec: MoEDecoderSpec, headers: KnownHeaders) -> Iterator[Fault]:
    """What the model's loading would stumble over: tensors that are missing or have another shape or dtype, scales and
    all else that belongs to quantised ones too; and then tensors that contradict config.json, see
    :func:`surplus_faults`."""
    known: set[str] = set()
    for tensor in stored_tensors(spec, headers.has):
        known.update((tensor.name, *tensor.aliases))
        try:
            for part in _wanted(headers, spec.quantization, tensor):
                yield from _faults(headers, part)
        except CheckpointError as error:
            yield Fault(tensor.name, str(error))
    yield from (Fault(name, text) for name, text in surplus_faults(spec, headers, headers.names(), known))


def _wanted(headers: KnownHeaders, scheme: QuantScheme | None, tensor: ExpectedTensor) -> list[Part]:
    name = next(filter(headers.has, (tensor.name, *tensor.aliases)), tensor.name)
    if scheme is not None and len(tensor.shape) == 2:
        parts = quantized_parts(headers, scheme, name, (tensor.shape[0], tensor.shape[1]))
        if parts is not None:
            return list(parts.values())
    return [Part(name, tensor.shape, COMPUTED)]


def _faults(headers: KnownHeaders, part: Part) -> Iterator[Fault]:
    if not headers.has(part.name):
        yield Fault(part.name)
        return
    shape, dtype = headers.shape(part.name), headers.stored(part.name)
    if shape is not None and shape != part.shape:
        yield Fault(part.name, f"tensor {part.name!r} has shape {list(shape)}, expected {list(part.shape)}")
    if dtype is not None and dtype not in part.dtypes:
        told = f"tensor {part.name!r} is {shown((dtype,))}, expected one of {shown(part.dtypes)}"
        yield Fault(part.name, told)
