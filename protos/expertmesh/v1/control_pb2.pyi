from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_CONTROLLER: _ClassVar[Role]
    ROLE_GATEWAY: _ClassVar[Role]
    ROLE_ATTENTION: _ClassVar[Role]
    ROLE_ROUTER: _ClassVar[Role]
    ROLE_EXPERT: _ClassVar[Role]

class ActorState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ACTOR_STATE_UNSPECIFIED: _ClassVar[ActorState]
    ACTOR_STATE_READY: _ClassVar[ActorState]
    ACTOR_STATE_UNREACHABLE: _ClassVar[ActorState]
ROLE_UNSPECIFIED: Role
ROLE_CONTROLLER: Role
ROLE_GATEWAY: Role
ROLE_ATTENTION: Role
ROLE_ROUTER: Role
ROLE_EXPERT: Role
ACTOR_STATE_UNSPECIFIED: ActorState
ACTOR_STATE_READY: ActorState
ACTOR_STATE_UNREACHABLE: ActorState

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetClusterResponse(_message.Message):
    __slots__ = ("model", "expert_map_epoch", "nodes", "actors", "wires")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    WIRES_FIELD_NUMBER: _ClassVar[int]
    model: str
    expert_map_epoch: int
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    actors: _containers.RepeatedCompositeFieldContainer[Actor]
    wires: _containers.RepeatedCompositeFieldContainer[Wire]
    def __init__(self, model: _Optional[str] = ..., expert_map_epoch: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., actors: _Optional[_Iterable[_Union[Actor, _Mapping]]] = ..., wires: _Optional[_Iterable[_Union[Wire, _Mapping]]] = ...) -> None: ...

class Node(_message.Message):
    __slots__ = ("node_id", "address", "alive", "labels")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    address: str
    alive: bool
    labels: _containers.ScalarMap[str, str]
    def __init__(self, node_id: _Optional[str] = ..., address: _Optional[str] = ..., alive: _Optional[bool] = ..., labels: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Actor(_message.Message):
    __slots__ = ("name", "role", "state", "node_id", "pid", "placement_group", "bundle", "weight_bytes", "attention", "router", "expert", "gateway")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_GROUP_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_FIELD_NUMBER: _ClassVar[int]
    ROUTER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: Role
    state: ActorState
    node_id: str
    pid: int
    placement_group: str
    bundle: int
    weight_bytes: int
    attention: AttentionLoad
    router: RouterLoad
    expert: ExpertLoad
    gateway: GatewayLoad
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., state: _Optional[_Union[ActorState, str]] = ..., node_id: _Optional[str] = ..., pid: _Optional[int] = ..., placement_group: _Optional[str] = ..., bundle: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., attention: _Optional[_Union[AttentionLoad, _Mapping]] = ..., router: _Optional[_Union[RouterLoad, _Mapping]] = ..., expert: _Optional[_Union[ExpertLoad, _Mapping]] = ..., gateway: _Optional[_Union[GatewayLoad, _Mapping]] = ...) -> None: ...

class AttentionLoad(_message.Message):
    __slots__ = ("running", "waiting", "kv_blocks", "kv_blocks_free", "steps", "tokens")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_free: int
    steps: int
    tokens: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class RouterLoad(_message.Message):
    __slots__ = ("expert_map_epoch", "rows_per_shard")
    class RowsPerShardEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SHARD_FIELD_NUMBER: _ClassVar[int]
    expert_map_epoch: int
    rows_per_shard: _containers.ScalarMap[str, int]
    def __init__(self, expert_map_epoch: _Optional[int] = ..., rows_per_shard: _Optional[_Mapping[str, int]] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("expert_map_epoch", "experts", "rows", "pairs")
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    expert_map_epoch: int
    experts: int
    rows: int
    pairs: int
    def __init__(self, expert_map_epoch: _Optional[int] = ..., experts: _Optional[int] = ..., rows: _Optional[int] = ..., pairs: _Optional[int] = ...) -> None: ...

class GatewayLoad(_message.Message):
    __slots__ = ("address", "streams", "requests")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    address: str
    streams: int
    requests: int
    def __init__(self, address: _Optional[str] = ..., streams: _Optional[int] = ..., requests: _Optional[int] = ...) -> None: ...

class Wire(_message.Message):
    __slots__ = ("to", "medium", "bytes_sent", "bytes_received")
    FROM_FIELD_NUMBER: _ClassVar[int]
    TO_FIELD_NUMBER: _ClassVar[int]
    MEDIUM_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    to: str
    medium: str
    bytes_sent: int
    bytes_received: int
    def __init__(self, to: _Optional[str] = ..., medium: _Optional[str] = ..., bytes_sent: _Optional[int] = ..., bytes_received: _Optional[int] = ..., **kwargs) -> None: ...
