from collections.abc import Callable
from typing import Literal

from cloudpubsub._properties import UserProperties
from cloudpubsub._spool import Log

def append(
    log: Log,
    topic: str,
    payload: bytes | bytearray | memoryview | str,
    retain: bool = False,
    userdata: bytes | bytearray | memoryview = b"",
    properties: bytes | None = None,
    ttl_ms: int = 0,
    may_block: bool = True,
) -> int: ...

class Producer:
    _log: Log
    _ttl_ms: int
    _may_block: Callable[[], bool] | None
    def publish(
        self,
        topic: str,
        payload: bytes | bytearray | memoryview | str,
        *,
        retain: bool = False,
        userdata: bytes | bytearray | memoryview = b"",
        ttl: float | None = None,
        user_properties: UserProperties | None = None,
        wait: Literal["synced"] | None = None,
    ) -> int: ...
