"""The package with the oldest paho that pyproject.toml allows; everything else runs with the newest.

That paho is put into `build/`, once, and found before the environment's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import paho.mqtt
import pytest

from tests.conftest import in_ci
from tests.making import ROOT

# The contract, and a message's whole way in both directions on a broker that is always there; TLS where Mosquitto is.
TESTS = [
    "tests/test_paho_contract.py",
    "tests/test_end_to_end_brokers.py::test_nothing_is_lost_when_the_broker_is_killed[rumqttd]",
    "tests/test_end_to_end_subscribing.py::test_messages_come_in_the_order_of_publishing[rumqttd]",
    "tests/test_end_to_end_subscribing.py::test_unsubscribed_handlers_are_not_called[rumqttd]",
    "tests/test_subscribe_again.py::test_everything_is_subscribed_again_after_a_loss",
    "tests/test_publish_tls.py::test_a_known_authority_and_the_right_host_are_accepted[localhost]",
    "tests/test_publish_tls.py::test_a_server_that_never_answers_the_handshake_is_given_up",
]
_NO_NETWORK = re.compile(
    "from versions: none|NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|ConnectionResetError|"
    "Temporary failure|Network is unreach"
)


def allowed() -> tuple[str, str]:
    """The oldest version, and the first that is too new."""
    found = re.search(r'^ +"paho-mqtt>=([\d.]+),<([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1], found[2]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


@pytest.fixture
def oldest() -> tuple[str, Path]:
    """Version and directory of the oldest paho."""
    version = allowed()[0]
    version += ".0" * (2 - version.count("."))
    target = ROOT / "build" / f"paho-{version}"
    if target.exists():
        return version, target
    partly = target.with_name(f"{target.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(partly), f"paho-mqtt=={version}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    if run.returncode:
        shutil.rmtree(partly, ignore_errors=True)
        if _NO_NETWORK.search(run.stderr) and not in_ci():
            pytest.skip(f"PyPI cannot be reached for paho-mqtt {version}: the oldest paho was NOT TESTED")
        pytest.fail(run.stdout + run.stderr)
    try:
        partly.rename(target)
    except OSError:
        shutil.rmtree(partly)  # another run was faster
    return version, target


def test_the_environment_has_a_paho_that_is_allowed() -> None:
    low, high = allowed()
    assert numbers(low) <= numbers(paho.mqtt.__version__) < numbers(high)


def test_the_oldest_paho_will_do(oldest: tuple[str, Path]) -> None:
    version, directory = oldest
    if paho.mqtt.__version__ == version:
        pytest.skip("this run has that paho itself")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(directory), "CLOUDPUBSUB_PAHO": version},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-10_000:] + run.stderr[-2_000:]
