from collections.abc import Sequence

from actors.transport.ring import Ring

Events = list[tuple[int, int]]
Call = tuple[int, int, int]

class Router:
    number: int
    def __init__(
        self,
        call: Call,
        gate: int,
        combine: int,
        columns: int,
        row_bytes: int,
        last_layer: int,
        timeout_s: float,
        spin_s: float,
        /,
    ) -> None: ...
    def watch(self, fd: int, into: Ring, out: Ring, /) -> None: ...
    def forget(self, fd: int, /) -> None: ...
    def wait(self, epoll: int, deadline: float, /) -> Events: ...
    def install(
        self,
        epoch: int,
        shards: Sequence[tuple[Ring | None, Ring | None, str]],
        layers: Sequence[tuple[int, ...]],
        /,
    ) -> None: ...
    def hand_over(self) -> tuple[list[Batch], list[tuple[int, bool, float]]]: ...
    def completed(self) -> tuple[int, float, float, float]: ...
    def rows_sent(self) -> dict[str, int]: ...

class ExpertShard:
    def __init__(
        self, call: Call, experts: int, columns: int, row_bytes: int, spin_s: float, /
    ) -> None: ...
    def watch(self, fd: int, into: Ring, out: Ring, /) -> None: ...
    def forget(self, fd: int, /) -> None: ...
    def wait(self, epoll: int, deadline: float, /) -> Events: ...
    def install(self, layers: Sequence[tuple[int, int, int, int, int, int, float]], keep: object, /) -> None: ...
    def done(self) -> tuple[int, int, float, int]: ...

Tag = tuple[int, int, int, int, int]
Share = tuple[int, int, bytes, bytes, bytes, bytes, bytearray | None]
Batch = tuple[int, int, Tag, bytearray, bytearray, bytearray, float, float, float, list[Share]]
