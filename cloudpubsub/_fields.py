"""The kinds of value a setting can have: each checks a Python value and reads one from text.

Used by `Options` alone.  `check` returns the value in its stored form; both raise OptionError naming the field.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import field
from typing import Any

from cloudpubsub._errors import OptionError

__all__ = [
    "Callback",
    "Choice",
    "Flag",
    "Integer",
    "Kind",
    "Path",
    "ProxyURL",
    "Seconds",
    "Text",
    "check_seconds",
    "setting",
]

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
_TEXT_MAX = 65_535


class Kind:
    """A kind of value.  `optional` settings may be None."""

    def __init__(self, *, optional: bool = False, secret: bool = False) -> None:
        self.optional = optional
        self.secret = secret

    @property
    def allowed(self) -> str:
        """What may stand there, as the end of a sentence."""
        raise NotImplementedError

    def check(self, name: str, value: Any) -> Any:
        """`value` in its stored form."""
        raise NotImplementedError

    def parse(self, name: str, text: str) -> Any:
        """The value that `text` (of an environment variable) means; "none" is None where that is allowed."""
        if self.optional and text.lower() == "none":
            return None
        return self._parse(name, text)

    def _parse(self, name: str, text: str) -> Any:
        return text

    def refuse(self, name: str, value: object) -> OptionError:
        """The error for a wrong value."""
        if self.secret:
            shown = f"the given {type(value).__name__}"
        else:
            shown = repr(value) if len(repr(value)) <= 100 else repr(value)[:97] + "…"
        return OptionError(name, shown, "expected " + self.allowed + (" or None" if self.optional else ""))


class Integer(Kind):
    """An int in `[low, high]`; with `size` a number of bytes, which text may give as 4MiB."""

    def __init__(
        self, low: int, high: int, unit: str = "", *, power_of_two: bool = False, multiple: int = 1,
        optional: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(optional=optional)
        self.low = low
        self.high = high
        self.unit = unit
        self.power_of_two = power_of_two
        self.multiple = multiple

    @property
    def allowed(self) -> str:
        what = "a power of two" if self.power_of_two else "an int"
        if self.multiple > 1:
            what = f"a multiple of {self.multiple}"
        return f"{what} from {self.low} to {self.high}" + (f" ({self.unit})" if self.unit else "")

    def check(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise self.refuse(name, value)
        if (self.power_of_two and value & (value - 1)) or value % self.multiple:
            raise self.refuse(name, value)
        return int(value)

    def _parse(self, name: str, text: str) -> int:
        units = "|".join(_UNITS) if self.unit == "bytes" else ""
        match = re.fullmatch(rf"\s*([0-9][0-9_]*)\s*({units})\s*", text, re.IGNORECASE | re.ASCII)
        try:
            return int(match[1]) * _UNITS[match[2].upper()] if match else int("")
        except ValueError:
            raise self.refuse(name, text) from None


class Seconds(Kind):
    """A finite number in `[low, high]`, kept as float; `unit` because one of them is a rate."""

    def __init__(self, low: float, high: float, *, unit: str = "seconds", optional: bool = False) -> None:
        super().__init__(optional=optional)
        self.low = low
        self.high = high
        self.unit = unit

    @property
    def allowed(self) -> str:
        return f"a number from {self.low:g} to {self.high:g} ({self.unit})"

    def check(self, name: str, value: Any) -> float:
        # Compared before converting: float() of a huge int would raise OverflowError.
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise self.refuse(name, value)
        return float(value)

    def _parse(self, name: str, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise self.refuse(name, text) from None
        if not math.isfinite(number):
            raise self.refuse(name, text)
        return number


class Choice(Kind):
    """One of a few words."""

    def __init__(self, *words: str, optional: bool = False) -> None:
        super().__init__(optional=optional)
        self.words = words

    @property
    def allowed(self) -> str:
        return " or ".join(f'"{word}"' for word in self.words)

    def check(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise self.refuse(name, value)
        return value


class Flag(Kind):
    """True or False; as text 1/0, true/false, yes/no, on/off."""

    allowed = "True or False"

    def check(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(name, value)
        return value

    def _parse(self, name: str, text: str) -> bool:
        word = text.strip().lower()
        if word not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            raise self.refuse(name, text)
        return word in ("1", "true", "yes", "on")


class Text(Kind):
    """A str of 1 to 65,535 bytes of UTF-8 without NUL, as MQTT asks.  `asked`: or a callable that gives one."""

    def __init__(self, *, asked: bool = False, optional: bool = False, secret: bool = False) -> None:
        super().__init__(optional=optional, secret=secret)
        self.asked = asked

    @property
    def allowed(self) -> str:
        return "1 to 65535 bytes of UTF-8 without NUL" + (", or a callable that returns them," if self.asked else "")

    def check(self, name: str, value: Any) -> Any:
        if self.asked and callable(value):
            return value
        if not isinstance(value, str) or "\0" in value:
            raise self.refuse(name, value)
        try:
            size_bytes = len(value.encode())
        except UnicodeEncodeError:
            raise self.refuse(name, value) from None
        if not 1 <= size_bytes <= _TEXT_MAX:
            raise self.refuse(name, value)
        return value


class Path(Kind):
    """The path of a directory, made absolute at once: a daemon changes its working directory later."""

    allowed = "a path (str or os.PathLike)"

    def check(self, name: str, value: Any) -> str:
        path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
        if not isinstance(path, str) or not path or "\0" in path:
            raise self.refuse(name, value)
        return os.path.abspath(path)


class ProxyURL(Kind):
    """The URL of a proxy."""

    allowed = "socks5://[user:password@]host:port, socks4://[user@]host:port or http://[user:password@]host:port"

    def check(self, name: str, value: Any) -> str:
        from cloudpubsub._proxy import parse_proxy  # with all that connecting takes, only for who has a proxy

        parse_proxy(value, name)
        return str(value)


class Callback(Kind):
    """A callable; it cannot stand in a file or in the environment."""

    allowed = "a callable"

    def check(self, name: str, value: Any) -> Callable[..., Any]:
        if not callable(value):
            raise self.refuse(name, value)
        return value  # type: ignore[no-any-return]

    def _parse(self, name: str, text: str) -> Any:
        raise OptionError(name, repr(text), "a callable can only be given in the program")


def setting(kind: Kind, default: Any, *, derived: bool = False, shown: bool = True) -> Any:
    """A field of Options.  `derived`: None stands for a value that is worked out from the others."""
    return field(default=default, repr=shown, metadata={"kind": kind, "derived": derived})


def check_seconds(name: str, value: object, *, optional: bool = False) -> None:
    """The time limit of a call: a number, or None where that is `optional`.  ValueError names it."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        allowed = "a number of seconds" + (", or None for no limit" if optional else "")
        raise ValueError(f"{name}: {value!r} is not allowed; expected {allowed}")
