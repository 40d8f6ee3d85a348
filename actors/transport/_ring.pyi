from collections.abc import Callable, Sequence

from actors.transport.blocks import Block
from actors.transport.ring import Taken

class Ring:
    memory: memoryview
    data_bell: int
    space_bell: int
    known: int
    position: int
    unannounced: int
    frames: int
    bytes: int
    partial: bool
    def __init__(self, memory: memoryview, data_bell: int, space_bell: int, known: int) -> None: ...
    def put(self, kind: int, tag: tuple[int, ...], parts: Sequence[object]) -> int: ...
    def take(self, allocate: Callable[[int], Block]) -> Taken | None: ...
    def close(self) -> None: ...
