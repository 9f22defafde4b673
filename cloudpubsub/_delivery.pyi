from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cloudpubsub._application_message import Message
from cloudpubsub._topic import Matcher

BATCH_MAX: int
PUBACK_BYTES: int

class Handling:
    is_interrupted: bool
    has_drops: bool
    def begins(self) -> None: ...
    def ends(self) -> None: ...
    @property
    def busy_since_s(self) -> float | None: ...

class Pubacks:
    def __len__(self) -> int: ...
    def take(self) -> bytearray: ...

class Batch:
    weight: int
    def __init__(
        self,
        messages: Iterable[tuple[Message, int]] = (),
        weight: int = 0,
        *,
        matcher: Matcher[Any] | None = None,
        acks: Pubacks | None = None,
        wake: Callable[[], None] | None = None,
    ) -> None: ...
    def __len__(self) -> int: ...
    def next(self) -> tuple[Message, int] | None: ...
    def step(self) -> None: ...
    def acknowledge(self, packet_id: int) -> None: ...
    def run(
        self, handling: Handling
    ) -> tuple[Sequence[Callable[[Message], object]], int, BaseException | None] | None: ...
