import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClusterEventKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CLUSTER_EVENT_KIND_UNSPECIFIED: _ClassVar[ClusterEventKind]
    CLUSTER_EVENT_KIND_ACTOR_STARTED: _ClassVar[ClusterEventKind]
    CLUSTER_EVENT_KIND_ACTOR_STOPPED: _ClassVar[ClusterEventKind]
    CLUSTER_EVENT_KIND_ACTOR_LOST: _ClassVar[ClusterEventKind]
    CLUSTER_EVENT_KIND_MAP_COMMITTED: _ClassVar[ClusterEventKind]
    CLUSTER_EVENT_KIND_SCALING_DECIDED: _ClassVar[ClusterEventKind]
    CLUSTER_EVENT_KIND_FAILED: _ClassVar[ClusterEventKind]
    CLUSTER_EVENT_KIND_WIRES_CHOSEN: _ClassVar[ClusterEventKind]

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
CLUSTER_EVENT_KIND_UNSPECIFIED: ClusterEventKind
CLUSTER_EVENT_KIND_ACTOR_STARTED: ClusterEventKind
CLUSTER_EVENT_KIND_ACTOR_STOPPED: ClusterEventKind
CLUSTER_EVENT_KIND_ACTOR_LOST: ClusterEventKind
CLUSTER_EVENT_KIND_MAP_COMMITTED: ClusterEventKind
CLUSTER_EVENT_KIND_SCALING_DECIDED: ClusterEventKind
CLUSTER_EVENT_KIND_FAILED: ClusterEventKind
CLUSTER_EVENT_KIND_WIRES_CHOSEN: ClusterEventKind
ROLE_UNSPECIFIED: Role
ROLE_CONTROLLER: Role
ROLE_GATEWAY: Role
ROLE_ATTENTION: Role
ROLE_ROUTER: Role
ROLE_EXPERT: Role
ACTOR_STATE_UNSPECIFIED: ActorState
ACTOR_STATE_READY: ActorState
ACTOR_STATE_UNREACHABLE: ActorState

class TraceRequest(_message.Message):
    __slots__ = ("steps", "timeout_s")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    steps: int
    timeout_s: float
    def __init__(self, steps: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class TraceResponse(_message.Message):
    __slots__ = ("actors", "steps")
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    actors: _containers.RepeatedCompositeFieldContainer[TracedActor]
    steps: int
    def __init__(self, actors: _Optional[_Iterable[_Union[TracedActor, _Mapping]]] = ..., steps: _Optional[int] = ...) -> None: ...

class TracedActor(_message.Message):
    __slots__ = ("name", "role", "node_id", "pid", "spans", "dropped", "clock_error_ns")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    CLOCK_ERROR_NS_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: Role
    node_id: str
    pid: int
    spans: _containers.RepeatedCompositeFieldContainer[TracedSpan]
    dropped: int
    clock_error_ns: int
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., node_id: _Optional[str] = ..., pid: _Optional[int] = ..., spans: _Optional[_Iterable[_Union[TracedSpan, _Mapping]]] = ..., dropped: _Optional[int] = ..., clock_error_ns: _Optional[int] = ...) -> None: ...

class TracedSpan(_message.Message):
    __slots__ = ("name", "start_ns", "duration_ns", "lane", "numbers")
    class NumbersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_NS_FIELD_NUMBER: _ClassVar[int]
    DURATION_NS_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_ns: int
    duration_ns: int
    lane: str
    numbers: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., start_ns: _Optional[int] = ..., duration_ns: _Optional[int] = ..., lane: _Optional[str] = ..., numbers: _Optional[_Mapping[str, int]] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ("include_experts",)
    INCLUDE_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    include_experts: bool
    def __init__(self, include_experts: _Optional[bool] = ...) -> None: ...

class WatchClusterRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class WatchClusterResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: ClusterEvent
    def __init__(self, event: _Optional[_Union[ClusterEvent, _Mapping]] = ...) -> None: ...

class ClusterEvent(_message.Message):
    __slots__ = ("sequence", "time", "kind", "actor", "expert_map_epoch", "message")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    time: _timestamp_pb2.Timestamp
    kind: ClusterEventKind
    actor: str
    expert_map_epoch: int
    message: str
    def __init__(self, sequence: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., kind: _Optional[_Union[ClusterEventKind, str]] = ..., actor: _Optional[str] = ..., expert_map_epoch: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class ScaleExpertsRequest(_message.Message):
    __slots__ = ("shards",)
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    shards: int
    def __init__(self, shards: _Optional[int] = ...) -> None: ...

class ScaleExpertsResponse(_message.Message):
    __slots__ = ("expert_map_epoch", "shards", "experts_read")
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_READ_FIELD_NUMBER: _ClassVar[int]
    expert_map_epoch: int
    shards: _containers.RepeatedScalarFieldContainer[str]
    experts_read: int
    def __init__(self, expert_map_epoch: _Optional[int] = ..., shards: _Optional[_Iterable[str]] = ..., experts_read: _Optional[int] = ...) -> None: ...

class ScaleAttentionRequest(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: int
    def __init__(self, replicas: _Optional[int] = ...) -> None: ...

class ScaleAttentionResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, replicas: _Optional[_Iterable[str]] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RebalanceResponse(_message.Message):
    __slots__ = ("expert_map_epoch", "experts_read", "imbalance_before", "imbalance_after")
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_READ_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_BEFORE_FIELD_NUMBER: _ClassVar[int]
    IMBALANCE_AFTER_FIELD_NUMBER: _ClassVar[int]
    expert_map_epoch: int
    experts_read: int
    imbalance_before: float
    imbalance_after: float
    def __init__(self, expert_map_epoch: _Optional[int] = ..., experts_read: _Optional[int] = ..., imbalance_before: _Optional[float] = ..., imbalance_after: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("actor", "node", "undo")
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    actor: str
    node: str
    undo: bool
    def __init__(self, actor: _Optional[str] = ..., node: _Optional[str] = ..., undo: _Optional[bool] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("stopped", "started")
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    stopped: _containers.RepeatedScalarFieldContainer[str]
    started: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, stopped: _Optional[_Iterable[str]] = ..., started: _Optional[_Iterable[str]] = ...) -> None: ...

class GetClusterResponse(_message.Message):
    __slots__ = ("model", "expert_map_epoch", "nodes", "actors", "wires", "expert_shards_wanted", "attention_replicas_wanted", "expert_autoscaling", "events", "layers", "transport")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    ACTORS_FIELD_NUMBER: _ClassVar[int]
    WIRES_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARDS_WANTED_FIELD_NUMBER: _ClassVar[int]
    ATTENTION_REPLICAS_WANTED_FIELD_NUMBER: _ClassVar[int]
    EXPERT_AUTOSCALING_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    model: str
    expert_map_epoch: int
    nodes: _containers.RepeatedCompositeFieldContainer[Node]
    actors: _containers.RepeatedCompositeFieldContainer[Actor]
    wires: _containers.RepeatedCompositeFieldContainer[Wire]
    expert_shards_wanted: int
    attention_replicas_wanted: int
    expert_autoscaling: str
    events: _containers.RepeatedCompositeFieldContainer[ClusterEvent]
    layers: _containers.RepeatedCompositeFieldContainer[MoELayer]
    transport: str
    def __init__(self, model: _Optional[str] = ..., expert_map_epoch: _Optional[int] = ..., nodes: _Optional[_Iterable[_Union[Node, _Mapping]]] = ..., actors: _Optional[_Iterable[_Union[Actor, _Mapping]]] = ..., wires: _Optional[_Iterable[_Union[Wire, _Mapping]]] = ..., expert_shards_wanted: _Optional[int] = ..., attention_replicas_wanted: _Optional[int] = ..., expert_autoscaling: _Optional[str] = ..., events: _Optional[_Iterable[_Union[ClusterEvent, _Mapping]]] = ..., layers: _Optional[_Iterable[_Union[MoELayer, _Mapping]]] = ..., transport: _Optional[str] = ...) -> None: ...

class MoELayer(_message.Message):
    __slots__ = ("layer", "experts")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    layer: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertPlacement]
    def __init__(self, layer: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertPlacement, _Mapping]]] = ...) -> None: ...

class ExpertPlacement(_message.Message):
    __slots__ = ("shards", "rows")
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    shards: _containers.RepeatedScalarFieldContainer[str]
    rows: int
    def __init__(self, shards: _Optional[_Iterable[str]] = ..., rows: _Optional[int] = ...) -> None: ...

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
    __slots__ = ("name", "role", "state", "node_id", "pid", "placement_group", "bundle", "weight_bytes", "attention", "router", "expert", "gateway", "bytes_sent")
    class BytesSentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
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
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
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
    bytes_sent: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., state: _Optional[_Union[ActorState, str]] = ..., node_id: _Optional[str] = ..., pid: _Optional[int] = ..., placement_group: _Optional[str] = ..., bundle: _Optional[int] = ..., weight_bytes: _Optional[int] = ..., attention: _Optional[_Union[AttentionLoad, _Mapping]] = ..., router: _Optional[_Union[RouterLoad, _Mapping]] = ..., expert: _Optional[_Union[ExpertLoad, _Mapping]] = ..., gateway: _Optional[_Union[GatewayLoad, _Mapping]] = ..., bytes_sent: _Optional[_Mapping[str, int]] = ...) -> None: ...

class AttentionLoad(_message.Message):
    __slots__ = ("running", "waiting", "kv_blocks", "kv_blocks_free", "steps", "tokens", "busy_s", "experts_wait_s", "moe_batches", "kv_blocks_cached", "kv_blocks_shared", "kv_bytes", "prefix_queried_tokens", "prefix_hit_tokens", "preemptions", "micro_batches", "kv_block_size")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    MOE_BATCHES_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_SHARED_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_free: int
    steps: int
    tokens: int
    busy_s: float
    experts_wait_s: float
    moe_batches: int
    kv_blocks_cached: int
    kv_blocks_shared: int
    kv_bytes: int
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    micro_batches: int
    kv_block_size: int
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_blocks: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., steps: _Optional[int] = ..., tokens: _Optional[int] = ..., busy_s: _Optional[float] = ..., experts_wait_s: _Optional[float] = ..., moe_batches: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., kv_blocks_shared: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., prefix_queried_tokens: _Optional[int] = ..., prefix_hit_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., micro_batches: _Optional[int] = ..., kv_block_size: _Optional[int] = ...) -> None: ...

class RouterLoad(_message.Message):
    __slots__ = ("expert_map_epoch", "rows_per_shard", "reroutes", "longest_wait_s", "batches", "dispatch_s", "combine_s")
    class RowsPerShardEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_SHARD_FIELD_NUMBER: _ClassVar[int]
    REROUTES_FIELD_NUMBER: _ClassVar[int]
    LONGEST_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    DISPATCH_S_FIELD_NUMBER: _ClassVar[int]
    COMBINE_S_FIELD_NUMBER: _ClassVar[int]
    expert_map_epoch: int
    rows_per_shard: _containers.ScalarMap[str, int]
    reroutes: int
    longest_wait_s: float
    batches: int
    dispatch_s: float
    combine_s: float
    def __init__(self, expert_map_epoch: _Optional[int] = ..., rows_per_shard: _Optional[_Mapping[str, int]] = ..., reroutes: _Optional[int] = ..., longest_wait_s: _Optional[float] = ..., batches: _Optional[int] = ..., dispatch_s: _Optional[float] = ..., combine_s: _Optional[float] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("expert_map_epoch", "experts", "rows", "pairs", "busy_s", "batches")
    EXPERT_MAP_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    expert_map_epoch: int
    experts: int
    rows: int
    pairs: int
    busy_s: float
    batches: int
    def __init__(self, expert_map_epoch: _Optional[int] = ..., experts: _Optional[int] = ..., rows: _Optional[int] = ..., pairs: _Optional[int] = ..., busy_s: _Optional[float] = ..., batches: _Optional[int] = ...) -> None: ...

class GatewayLoad(_message.Message):
    __slots__ = ("address", "streams", "requests", "replays", "http_address")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    REPLAYS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    streams: int
    requests: int
    replays: int
    http_address: str
    def __init__(self, address: _Optional[str] = ..., streams: _Optional[int] = ..., requests: _Optional[int] = ..., replays: _Optional[int] = ..., http_address: _Optional[str] = ...) -> None: ...

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
