from typing import Final

class Message:
    __match_args__ = ("topic", "payload", "position")
    topic: Final[str]
    payload: Final[bytes]
    position: Final[int | None]
    userdata: Final[bytes]
    retain: Final[bool]
    duplicate: Final[bool]
    qos: Final[int]
    def __init__(
        self,
        topic: str,
        payload: bytes,
        position: int | None = None,
        userdata: bytes = b"",
        retain: bool = False,
        duplicate: bool = False,
        qos: int = 1,
        properties: bytes = b"",
    ) -> None: ...
    @property
    def user_properties(self) -> tuple[tuple[str, str], ...]: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...
