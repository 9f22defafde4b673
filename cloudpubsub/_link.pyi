from collections.abc import Sequence

from cloudpubsub._application_message import Message

PACKET_MAX: int
FRAME_HEADER_MAX: int

class _Inbound:
    level: int
    connack: int
    session_present: bool
    disconnect: int
    reason_string: str
    pingresps: int
    received_bytes: int
    def space(self, minimum: int = 16384) -> memoryview: ...
    def received(self, n: int) -> None: ...
    def waiting_bytes(self) -> int: ...

class Receiver(_Inbound):
    def __init__(self, packet_max: int, level: int = 4) -> None: ...
    def restart(self) -> None: ...
    def take(
        self, messages_max: int, weight_max: int
    ) -> tuple[list[tuple[Message, int]], int, int, bytearray, bool]: ...

def frame_pubacks(ids: Sequence[int]) -> bytes: ...

class Frames:
    has_news: bool
    fault: int
    closing: bytes | None
    def take(self, data: memoryview | bytearray, n: int) -> int: ...
    def take_ping(self) -> bytes | None: ...
    def take_idle(self) -> int: ...

def make_frame(
    out: memoryview | bytearray, opcode: int, data: bytes | bytearray | memoryview, key: bytes
) -> int: ...
