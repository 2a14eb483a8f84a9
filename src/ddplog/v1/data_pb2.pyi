from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Envelope(_message.Message):
    __slots__ = ("hello", "welcome", "batch", "ack", "heartbeat", "bye", "reject", "stack_request", "stack", "loss")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    BYE_FIELD_NUMBER: _ClassVar[int]
    REJECT_FIELD_NUMBER: _ClassVar[int]
    STACK_REQUEST_FIELD_NUMBER: _ClassVar[int]
    STACK_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    welcome: Welcome
    batch: Batch
    ack: Ack
    heartbeat: Heartbeat
    bye: Bye
    reject: Reject
    stack_request: StackRequest
    stack: Stack
    loss: Loss
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., welcome: _Optional[_Union[Welcome, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., bye: _Optional[_Union[Bye, _Mapping]] = ..., reject: _Optional[_Union[Reject, _Mapping]] = ..., stack_request: _Optional[_Union[StackRequest, _Mapping]] = ..., stack: _Optional[_Union[Stack, _Mapping]] = ..., loss: _Optional[_Union[Loss, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "run_id", "node_id", "writers", "oldest_version", "has_more")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    WRITERS_FIELD_NUMBER: _ClassVar[int]
    OLDEST_VERSION_FIELD_NUMBER: _ClassVar[int]
    HAS_MORE_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    run_id: str
    node_id: str
    writers: _containers.RepeatedCompositeFieldContainer[Writer]
    oldest_version: int
    has_more: bool
    def __init__(self, protocol_version: _Optional[int] = ..., run_id: _Optional[str] = ..., node_id: _Optional[str] = ..., writers: _Optional[_Iterable[_Union[Writer, _Mapping]]] = ..., oldest_version: _Optional[int] = ..., has_more: bool = ...) -> None: ...

class Writer(_message.Message):
    __slots__ = ("incarnation", "rank", "world_size", "local_rank", "node_rank", "pid", "host", "boot_id", "started_unix_ns", "is_alive", "oldest_seq", "role", "belongs_to")
    class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        RANK: _ClassVar[Writer.Role]
        SYSTEM: _ClassVar[Writer.Role]
    RANK: Writer.Role
    SYSTEM: Writer.Role
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    IS_ALIVE_FIELD_NUMBER: _ClassVar[int]
    OLDEST_SEQ_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    BELONGS_TO_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    rank: int
    world_size: int
    local_rank: int
    node_rank: int
    pid: int
    host: str
    boot_id: str
    started_unix_ns: int
    is_alive: bool
    oldest_seq: int
    role: Writer.Role
    belongs_to: bytes
    def __init__(self, incarnation: _Optional[bytes] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., local_rank: _Optional[int] = ..., node_rank: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., boot_id: _Optional[str] = ..., started_unix_ns: _Optional[int] = ..., is_alive: bool = ..., oldest_seq: _Optional[int] = ..., role: _Optional[_Union[Writer.Role, str]] = ..., belongs_to: _Optional[bytes] = ...) -> None: ...

class WriterCursor(_message.Message):
    __slots__ = ("incarnation", "next_seq", "attempt")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    next_seq: int
    attempt: int
    def __init__(self, incarnation: _Optional[bytes] = ..., next_seq: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol_version", "store_uuid", "cursors", "created_unix_ns")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    STORE_UUID_FIELD_NUMBER: _ClassVar[int]
    CURSORS_FIELD_NUMBER: _ClassVar[int]
    CREATED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    store_uuid: bytes
    cursors: _containers.RepeatedCompositeFieldContainer[WriterCursor]
    created_unix_ns: int
    def __init__(self, protocol_version: _Optional[int] = ..., store_uuid: _Optional[bytes] = ..., cursors: _Optional[_Iterable[_Union[WriterCursor, _Mapping]]] = ..., created_unix_ns: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("incarnation", "first_seq", "num_records", "crc32", "payload", "epoch")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    NUM_RECORDS_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    first_seq: int
    num_records: int
    crc32: int
    payload: bytes
    epoch: int
    def __init__(self, incarnation: _Optional[bytes] = ..., first_seq: _Optional[int] = ..., num_records: _Optional[int] = ..., crc32: _Optional[int] = ..., payload: _Optional[bytes] = ..., epoch: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("cursors",)
    CURSORS_FIELD_NUMBER: _ClassVar[int]
    cursors: _containers.RepeatedCompositeFieldContainer[WriterCursor]
    def __init__(self, cursors: _Optional[_Iterable[_Union[WriterCursor, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("node_id", "progress", "is_over")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    IS_OVER_FIELD_NUMBER: _ClassVar[int]
    node_id: str
    progress: _containers.RepeatedCompositeFieldContainer[Progress]
    is_over: bool
    def __init__(self, node_id: _Optional[str] = ..., progress: _Optional[_Iterable[_Union[Progress, _Mapping]]] = ..., is_over: bool = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("incarnation", "step", "through_seq", "drops", "backlog_bytes", "exit_status")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    THROUGH_SEQ_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    BACKLOG_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    step: int
    through_seq: int
    drops: _containers.RepeatedCompositeFieldContainer[Drop]
    backlog_bytes: int
    exit_status: int
    def __init__(self, incarnation: _Optional[bytes] = ..., step: _Optional[int] = ..., through_seq: _Optional[int] = ..., drops: _Optional[_Iterable[_Union[Drop, _Mapping]]] = ..., backlog_bytes: _Optional[int] = ..., exit_status: _Optional[int] = ...) -> None: ...

class Drop(_message.Message):
    __slots__ = ("reason", "count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    count: int
    def __init__(self, reason: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class Loss(_message.Message):
    __slots__ = ("incarnation", "first_seq", "next_seq")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    FIRST_SEQ_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    first_seq: int
    next_seq: int
    def __init__(self, incarnation: _Optional[bytes] = ..., first_seq: _Optional[int] = ..., next_seq: _Optional[int] = ...) -> None: ...

class Bye(_message.Message):
    __slots__ = ("incarnation", "next_seq", "finished")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    next_seq: int
    finished: bool
    def __init__(self, incarnation: _Optional[bytes] = ..., next_seq: _Optional[int] = ..., finished: bool = ...) -> None: ...

class Reject(_message.Message):
    __slots__ = ("reason", "incarnation", "next_seq", "message")
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[Reject.Reason]
        UNKNOWN_WRITER: _ClassVar[Reject.Reason]
        OUT_OF_ORDER: _ClassVar[Reject.Reason]
        CORRUPT: _ClassVar[Reject.Reason]
        WRONG_RUN: _ClassVar[Reject.Reason]
        VERSION: _ClassVar[Reject.Reason]
        NOT_YOURS: _ClassVar[Reject.Reason]
    UNSPECIFIED: Reject.Reason
    UNKNOWN_WRITER: Reject.Reason
    OUT_OF_ORDER: Reject.Reason
    CORRUPT: Reject.Reason
    WRONG_RUN: Reject.Reason
    VERSION: Reject.Reason
    NOT_YOURS: Reject.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NEXT_SEQ_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: Reject.Reason
    incarnation: bytes
    next_seq: int
    message: str
    def __init__(self, reason: _Optional[_Union[Reject.Reason, str]] = ..., incarnation: _Optional[bytes] = ..., next_seq: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class StackRequest(_message.Message):
    __slots__ = ("incarnations",)
    INCARNATIONS_FIELD_NUMBER: _ClassVar[int]
    incarnations: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, incarnations: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Stack(_message.Message):
    __slots__ = ("incarnation", "text", "trouble")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    text: str
    trouble: str
    def __init__(self, incarnation: _Optional[bytes] = ..., text: _Optional[str] = ..., trouble: _Optional[str] = ...) -> None: ...
