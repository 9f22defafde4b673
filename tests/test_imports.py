"""What `import cloudpubsub` brings along, for which a gateway waits at every start; and nothing is imported after that,
where it could go wrong: by a thread while another one forks, or at exit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import paho
import pytest

import cloudpubsub
from tests.brokers import HOST
from tests.links import WAYS, Link

# Each takes milliseconds on a fast machine; paho takes more than all the rest together.
LATER = {
    "asyncio", "base64", "concurrent.futures", "difflib", "email", "hashlib", "http.client", "ipaddress", "json",
    "paho.mqtt.client", "pathlib", "platform", "random", "secrets", "select", "shutil", "socket", "ssl", "subprocess",
    "tempfile", "tomllib", "urllib.parse", "urllib.request", "uuid",
}  # fmt: skip

SPOOL = """
import cloudpubsub
with cloudpubsub.Spool(sys.argv[1]) as spool:
    position = spool.append("topic", b"payload")
    [message] = spool.read()
    spool.ack(position)
print(message.user_properties)
print(*sys.modules)
"""

CLIENT = """
import atexit, threading
atexit.register(lambda: print(*(set(sys.modules) - known)))  # before the package's own, so after it
import cloudpubsub

broker, ca, protocol, word, spool = sys.argv[1:]
received = threading.Event()
client = cloudpubsub.Client(
    broker, client_id=word, spool=spool, protocol=protocol, tls=cloudpubsub.TLS(ca=ca) if ca else None
)
known = set(sys.modules)
client.start()
client.subscribe(word, lambda message: received.set())
client.wait_subscribed(60)
client.wait(client.publish(word, b"payload", user_properties={"name": "value"}), 60)
assert received.wait(60)
assert client.stats().connected and client.health().ok
"""


def run(code: str, *arguments: str) -> list[str]:
    """The lines that `code` prints in an interpreter into which nothing but itself imports anything."""
    paths = [str(Path(package.__path__[0]).parent) for package in (cloudpubsub, paho)]
    command = [sys.executable, "-ISB", "-c", f"import sys\nsys.path[:0] = {paths}\n{code}", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_only_some_need_is_not_imported() -> None:
    [modules] = run("import cloudpubsub\nprint(*sys.modules)")
    assert "cloudpubsub._spool" in modules.split()
    assert not LATER & set(modules.split())


def test_a_spool_alone_needs_none_of_it_either(tmp_path: Path) -> None:
    _, modules = run(SPOOL, str(tmp_path / "spool"))
    assert not LATER & set(modules.split())


@pytest.mark.parametrize("link", [way for way in WAYS if way.kind == "rumqttd"], indirect=True)
def test_once_there_is_a_client_nothing_more_is_imported(link: Link, tmp_path: Path) -> None:
    broker = f"{'mqtts' if link.way.secure else 'mqtt'}://{HOST}:{link.port}"
    ca = link.files.ca if link.way.secure else ""
    assert run(CLIENT, broker, ca, link.way.protocol, link.word, str(tmp_path / "spool")) == [""]
