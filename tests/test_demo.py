"""The demo: that it passes, that it fails when it must, and that it leaves nothing behind."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console

from cloudpubsub.cli.stop import Stop
from cloudpubsub.demo import command, story
from cloudpubsub.demo.checker import Checker, Verdict
from cloudpubsub.demo.promise import Promise
from cloudpubsub.demo.readings import readings
from cloudpubsub.demo.scene import PHASES, Event, Scene
from cloudpubsub.demo.screen import draw, verdict_lines
from cloudpubsub.demo.witness import Witness
from tests.brokers import Rumqttd

_ROOT = Path(__file__).parent.parent


def _environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(directory)}


class _RunningDemo:
    """`cloudpubsub demo --json` as a process; its progress lines are awaited."""

    def __init__(self, directory: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cloudpubsub", "demo", "--json", *flags],
            cwd=_ROOT,
            env=_environment(directory),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said: list[str] = []
        self._more = threading.Condition()
        self._is_over = False
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._more:
                self._said.append(line)
                self._more.notify_all()
        with self._more:
            self._is_over = True
            self._more.notify_all()

    def wait_said(self, text: str) -> None:
        with self._more:
            self._more.wait_for(lambda: self._is_over or any(text in line for line in self._said), 60)
            assert any(text in line for line in self._said), "".join(self._said)

    def end(self) -> tuple[int, dict[str, Any]]:
        """Exit code, and the document on stdout."""
        assert self.process.stdout is not None
        document = json.loads(self.process.stdout.read())
        return self.process.wait(60), document

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None and self.process.stderr is not None
        self.process.stdout.close()
        self.process.stderr.close()

    @property
    def said(self) -> str:
        return "".join(self._said)


@contextmanager
def _demo(directory: Path, *flags: str) -> Iterator[_RunningDemo]:
    demo = _RunningDemo(directory, *flags)
    try:
        yield demo
    finally:
        demo.close()


def _child(demo: _RunningDemo, module: str) -> psutil.Process:
    for child in psutil.Process(demo.process.pid).children():
        if module in child.cmdline():
            return child
    raise AssertionError(f"no {module} runs")


# ---- the whole


@pytest.mark.timeout(600)  # on a machine that others keep busy
def test_a_short_demo_passes_and_uses_disk_and_recovery(tmp_path: Path) -> None:
    with _demo(tmp_path, "--seconds", "8", "--rate", "3000") as demo:
        code, found = demo.end()
    assert (code, found["ok"]) == (0, True), (found, demo.said)
    # How many there are, and whether it caught up in time after an outage, is up to the machine.
    assert found["sent"] == found["received"] > 1000
    assert (found["lost"], found["out_of_order"], found["unexpected"], found["lost_ranges"]) == (0, 0, 0, [])
    assert found["kills"] == 1 and found["recovery"]["messages"] > 100
    assert found["spilled_bytes"] > 0 and found["spool_segments_peak"] > 0
    assert len(found["outages"]) == 2
    assert found["outages"][0]["backlog"] >= found["recovery"]["messages"]
    assert "killed with SIGKILL" in demo.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_demo_and_its_children(tmp_path: Path, number: signal.Signals) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_said("over a good link")
        children = psutil.Process(demo.process.pid).children(recursive=True)
        demo.process.send_signal(number)
        code, found = demo.end()
    assert (code, found["interrupted"], found["ok"]) == (128 + number, number.name, False)
    assert len(children) >= 2
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert list(tmp_path.iterdir()) == []


def test_no_child_outlives_a_demo_that_was_killed(tmp_path: Path) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_said("over a good link")
        children = psutil.Process(demo.process.pid).children(recursive=True)
        demo.process.kill()
        assert len(children) >= 2
        assert psutil.wait_procs(children, timeout=60)[1] == []


def test_a_gateway_that_dies_by_itself_fails_the_demo(tmp_path: Path) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_said("over a good link")
        _child(demo, "cloudpubsub.demo.gateway").kill()
        code, found = demo.end()
    assert (code, found["ok"]) == (1, False)
    assert "the gateway ended with -9" in found["error"]


def test_a_broker_that_dies_fails_the_demo(tmp_path: Path) -> None:
    with _demo(tmp_path) as demo:
        demo.wait_said("over a good link")
        _child(demo, "cloudpubsub.demo.broker").kill()
        code, found = demo.end()
    assert (code, found["ok"], found["error"]) == (1, False, "the broker ended")


def test_without_its_extra_the_demo_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else real(name))
    assert command.run(argparse.Namespace(seconds=8, rate=100, json=False)) == 2
    said = capsys.readouterr().err
    assert "needs rich" in said and "pip install 'cloudpubsub[demo]'" in said


# ---- the checker


def _checked(numbers: list[object], used: int, excused: tuple[int, ...] = ()) -> Verdict:
    checker = Checker()
    for number in excused:
        checker.excuse(number)
    for item in numbers:
        checker.take(item)
    return checker.verdict(used)


def test_everything_once_and_in_order_is_good() -> None:
    verdict = _checked(list(range(100)), 100)
    assert verdict.is_good and (verdict.sent, verdict.received) == (100, 100)


def test_a_message_sent_again_is_a_duplicate_and_harmless() -> None:
    verdict = _checked([0, 1, 2, 1, 2, 3], 4)
    assert verdict.is_good and (verdict.duplicates, verdict.out_of_order) == (2, 0)


def test_a_gap_is_a_loss() -> None:
    verdict = _checked([0, 1, 4, 5, 7], 9)
    assert not verdict.is_good
    assert (verdict.lost, verdict.lost_ranges) == (4, ((2, 4), (6, 7), (8, 9)))


def test_a_late_first_arrival_is_out_of_order() -> None:
    verdict = _checked([0, 2, 1, 3], 4)
    assert not verdict.is_good and (verdict.lost, verdict.out_of_order) == (0, 1)


def test_numbers_never_used_and_no_numbers_at_all_are_unexpected() -> None:
    verdict = _checked([0, 1, 5, None, "2", -1, True, 1 << 40], 2)
    assert not verdict.is_good and (verdict.lost, verdict.unexpected) == (0, 6)


def test_nothing_sent_is_no_success() -> None:
    assert not _checked([], 0).is_good


@pytest.mark.parametrize("numbers", [[0, 1, 3], [0, 1, 2, 3]])
def test_what_was_not_promised_may_arrive_or_not(numbers: list[object]) -> None:
    verdict = _checked(numbers, 4, excused=(2,))
    assert verdict.is_good and (verdict.sent, verdict.received, verdict.unpromised) == (3, 3, len(numbers) - 3)


def test_the_front_passes_what_is_excused() -> None:
    checker = Checker()
    checker.excuse(1)
    for number in (0, 2, 3):
        checker.take(number)
    assert checker.front == 4


@given(st.lists(st.integers(0, 12), max_size=40), st.integers(0, 14))
def test_the_checker_agrees_with_a_plain_model(numbers: list[int], used: int) -> None:
    verdict = _checked(list(numbers), used)
    first = list(dict.fromkeys(numbers))
    late = sum(any(earlier > number for earlier in first[:place]) for place, number in enumerate(first))
    missing = [number for number in range(used) if number not in first]
    assert verdict.lost == len(missing)
    assert verdict.received == used - len(missing)
    assert verdict.duplicates == len(numbers) - len(first)
    assert verdict.out_of_order == late
    assert verdict.unexpected == sum(number >= used for number in first)
    assert [number for first_lost, end in verdict.lost_ranges for number in range(first_lost, end)] == missing


def test_a_doctored_stream_over_a_real_broker_fails(rumqttd: Rumqttd) -> None:
    witness = Witness(rumqttd.port)
    witness.start()
    sender = Client(CallbackAPIVersion.VERSION2)
    sender.connect("127.0.0.1", rumqttd.port)
    sender.loop_start()
    numbers = [*range(50), *range(51, 60), 61, 60, *range(62, 100), 70]  # 50 is lost, 60 late, 70 comes twice
    for number in numbers:
        sender.publish("demo/doctored", json.dumps({"seq": number, "t": time.monotonic()}), qos=1)
    sender.publish("demo/doctored", b"no reading", qos=1).wait_for_publish(60)
    sender.disconnect()
    sender.loop_stop()
    deadline_s = time.monotonic() + 60
    while witness.arrivals <= len(numbers) and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    witness.stop()
    verdict = witness.checker.verdict(100)
    assert not verdict.is_good
    assert (verdict.lost, verdict.lost_ranges, verdict.out_of_order) == (1, ((50, 51),), 1)
    assert (verdict.duplicates, verdict.unexpected) == (1, 1)


# ---- verdict and exit code

_GOOD = Verdict(sent=10, received=10, lost=0, out_of_order=0, duplicates=3, unexpected=0, unpromised=0, lost_ranges=())
_LOST = Verdict(
    sent=10, received=8, lost=2, out_of_order=0, duplicates=0, unexpected=0, unpromised=0, lost_ranges=((4, 6),)
)
_LATE = Verdict(sent=10, received=10, lost=0, out_of_order=1, duplicates=0, unexpected=0, unpromised=0, lost_ranges=())
_FIGURES: dict[str, Any] = {
    "outages": [{"outage_s": 4.0, "backlog": 16_000, "drain_s": None, "delivered": 0}],
    "recovery": {"messages": 12_000, "from_memory": 1_000, "seconds": 0.002},
    "spilled_bytes": 3 << 20,
    "spool_bytes_peak": 2 << 20,
    "spool_segments_peak": 2,
    "delay_ms": {"p50": 1.0, "p99": 2.0},
}


@pytest.mark.parametrize(
    ("verdict", "is_flushed", "code"), [(_GOOD, True, 0), (_LOST, True, 1), (_LATE, True, 1), (_GOOD, False, 1)]
)
def test_the_exit_code_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: Verdict, is_flushed: bool, code: int
) -> None:
    def tell(self: story.Story) -> Verdict:
        self.figures = {**_FIGURES, "is_flushed": is_flushed}
        return verdict

    monkeypatch.setattr(story.Story, "tell", tell)
    assert command.run(argparse.Namespace(seconds=8.0, rate=100.0, json=False)) == code
    assert ("PASSED" if code == 0 else "FAILED") in capsys.readouterr().out.splitlines()[-1]
    assert command.run(argparse.Namespace(seconds=8.0, rate=100.0, json=True)) == code
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["lost"]) == (code == 0, verdict.lost)


def test_a_loss_names_the_numbers() -> None:
    assert any("4-5" in line for line in verdict_lines(_LOST, {**_FIGURES, "is_flushed": True}, False))


# ---- the parts


def test_a_promise_outlives_a_killed_process(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from cloudpubsub.demo.promise import Promise\n"
        "promise = Promise(Path(sys.argv[1])); promise.begun = 8; promise.kept = 7\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "promise"
    ended = subprocess.run([sys.executable, "-c", script, str(path)], cwd=_ROOT, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    promise = Promise(path)
    assert (promise.begun, promise.kept) == (8, 7)
    promise.close()


def test_readings_are_numbers_on_valid_topics() -> None:
    found = list(islice(readings(), 200))
    kinds = {topic.split("/")[2] for topic, _ in found}
    assert kinds >= {"cpu", "memory", "load", "disk", "network"}
    for topic, value in found:
        assert not set(topic) & set("+#\0 ") and all(topic.split("/"))
        assert json.loads(json.dumps(value, allow_nan=False)) == value


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("gateway", ["starting", "running", "killed", "closing", "ended"])
def test_the_live_view_fits_a_terminal(width: int, gateway: str) -> None:
    scene = Scene(planned_s=32, rate=4000, gateway=gateway, gateway_run=2, ring_bytes=1 << 19, sent=20_000, received=9)
    scene.is_linked = gateway != "killed"
    scene.events = [Event(1.0, f"event {number} " + "long " * 30) for number in range(9)]
    for number in range(len(PHASES)):
        scene.phase, scene.elapsed_s = number, float(number)
        scene.sample()
        out = io.StringIO()
        Console(width=width, file=out).print(draw(scene, width))
        lines = out.getvalue().splitlines()
        assert len(lines) <= 24 and max(map(len, lines)) <= width
        assert "event 8" in lines[-2] and any("19,991" in line for line in lines)


def test_a_stop_can_be_set_by_a_thread_and_by_a_signal() -> None:
    with Stop() as stop:
        assert not stop.is_set
        threading.Thread(target=stop.set).start()
        assert stop.wait(60) and stop.signal is None
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(60) and stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
