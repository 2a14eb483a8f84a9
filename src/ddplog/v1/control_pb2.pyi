from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("interval_s",)
    INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    interval_s: float
    def __init__(self, interval_s: _Optional[float] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("run_id", "project", "name", "status", "status_detail", "attempt", "world_size", "ranks", "sinks", "num_points", "num_values", "watermark", "time_unix_ns", "last_values", "is_drained", "started_unix_ns", "hang")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    STATUS_DETAIL_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    NUM_POINTS_FIELD_NUMBER: _ClassVar[int]
    NUM_VALUES_FIELD_NUMBER: _ClassVar[int]
    WATERMARK_FIELD_NUMBER: _ClassVar[int]
    TIME_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    LAST_VALUES_FIELD_NUMBER: _ClassVar[int]
    IS_DRAINED_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    HANG_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    project: str
    name: str
    status: str
    status_detail: str
    attempt: int
    world_size: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    sinks: _containers.RepeatedCompositeFieldContainer[SinkStatus]
    num_points: int
    num_values: int
    watermark: int
    time_unix_ns: int
    last_values: _containers.RepeatedCompositeFieldContainer[LastValue]
    is_drained: bool
    started_unix_ns: int
    hang: str
    def __init__(self, run_id: _Optional[str] = ..., project: _Optional[str] = ..., name: _Optional[str] = ..., status: _Optional[str] = ..., status_detail: _Optional[str] = ..., attempt: _Optional[int] = ..., world_size: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., sinks: _Optional[_Iterable[_Union[SinkStatus, _Mapping]]] = ..., num_points: _Optional[int] = ..., num_values: _Optional[int] = ..., watermark: _Optional[int] = ..., time_unix_ns: _Optional[int] = ..., last_values: _Optional[_Iterable[_Union[LastValue, _Mapping]]] = ..., is_drained: bool = ..., started_unix_ns: _Optional[int] = ..., hang: _Optional[str] = ...) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "host", "pid", "state", "step", "next_seq", "idle_s", "num_drops", "backlog_bytes", "steps_per_s", "drops", "num_values")
    RANK_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    IDLE_S_FIELD_NUMBER: _ClassVar[int]
    NUM_DROPS_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEPS_PER_S_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    NUM_VALUES_FIELD_NUMBER: _ClassVar[int]
    rank: int
    host: str
    pid: int
    state: str
    step: int
    next_seq: int
    idle_s: float
    num_drops: int
    backlog_bytes: int
    steps_per_s: float
    drops: _containers.RepeatedCompositeFieldContainer[DropCount]
    num_values: int
    def __init__(self, rank: _Optional[int] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., step: _Optional[int] = ..., next_seq: _Optional[int] = ..., idle_s: _Optional[float] = ..., num_drops: _Optional[int] = ..., backlog_bytes: _Optional[int] = ..., steps_per_s: _Optional[float] = ..., drops: _Optional[_Iterable[_Union[DropCount, _Mapping]]] = ..., num_values: _Optional[int] = ...) -> None: ...

class DropCount(_message.Message):
    __slots__ = ("reason", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    count: int
    def __init__(self, reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class SinkStatus(_message.Message):
    __slots__ = ("name", "state", "cursor", "lag", "detail", "num_delivered", "num_dead")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    NUM_DELIVERED_FIELD_NUMBER: _ClassVar[int]
    NUM_DEAD_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    cursor: int
    lag: int
    detail: str
    num_delivered: int
    num_dead: int
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., cursor: _Optional[int] = ..., lag: _Optional[int] = ..., detail: _Optional[str] = ..., num_delivered: _Optional[int] = ..., num_dead: _Optional[int] = ...) -> None: ...

class LastValue(_message.Message):
    __slots__ = ("key", "step", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    step: int
    value: float
    def __init__(self, key: _Optional[str] = ..., step: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...

class FinishRequest(_message.Message):
    __slots__ = ("status", "detail", "exits")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    EXITS_FIELD_NUMBER: _ClassVar[int]
    status: str
    detail: str
    exits: _containers.RepeatedCompositeFieldContainer[RankExit]
    def __init__(self, status: _Optional[str] = ..., detail: _Optional[str] = ..., exits: _Optional[_Iterable[_Union[RankExit, _Mapping]]] = ...) -> None: ...

class RankExit(_message.Message):
    __slots__ = ("rank", "exit_code", "signal", "message", "pid")
    RANK_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    rank: int
    exit_code: int
    signal: int
    message: str
    pid: int
    def __init__(self, rank: _Optional[int] = ..., exit_code: _Optional[int] = ..., signal: _Optional[int] = ..., message: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class StacksRequest(_message.Message):
    __slots__ = ("ranks", "wait_s")
    RANKS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    ranks: _containers.RepeatedScalarFieldContainer[int]
    wait_s: float
    def __init__(self, ranks: _Optional[_Iterable[int]] = ..., wait_s: _Optional[float] = ...) -> None: ...

class StacksReply(_message.Message):
    __slots__ = ("stacks", "num_left_out")
    STACKS_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    stacks: _containers.RepeatedCompositeFieldContainer[RankStack]
    num_left_out: int
    def __init__(self, stacks: _Optional[_Iterable[_Union[RankStack, _Mapping]]] = ..., num_left_out: _Optional[int] = ...) -> None: ...

class RankStack(_message.Message):
    __slots__ = ("rank", "host", "pid", "state", "step", "text", "trouble")
    RANK_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    rank: int
    host: str
    pid: int
    state: str
    step: int
    text: str
    trouble: str
    def __init__(self, rank: _Optional[int] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., state: _Optional[str] = ..., step: _Optional[int] = ..., text: _Optional[str] = ..., trouble: _Optional[str] = ...) -> None: ...

class FinishReply(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: str
    def __init__(self, status: _Optional[str] = ...) -> None: ...
