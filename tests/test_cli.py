"""The commands `pub` and `sub` as processes, against real brokers."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import psutil
import pytest
from paho.mqtt.publish import single

from cloudpubsub import __version__
from cloudpubsub.__main__ import main
from cloudpubsub.demo.relay import Relay
from tests.brokers import Broker, Mosquitto, Rumqttd, TlsFiles
from tests.collector import Collector

_ROOT = Path(__file__).parent.parent


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CLOUDPUBSUB_")}


def _start(*flags: object, **more: Any) -> subprocess.Popen[bytes]:
    settings: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", "cloudpubsub", *map(str, flags)], cwd=_ROOT, env=_environment(), **{**settings, **more}
    )


def _run(*flags: object, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    with _start(*flags) as process:
        try:
            out, err = process.communicate(data, timeout=120)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _wait(is_true: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, "waited in vain"
        threading.Event().wait(0.01)


def _unread(pipe: IO[bytes]) -> int:
    """Bytes in a pipe that nobody has read yet."""
    answer = array("i", [0])
    fcntl.ioctl(pipe.fileno(), termios.FIONREAD, answer)
    return answer[0]


@pytest.fixture
def running() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a command that is ended after the test if it has not ended by then."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*flags: object, **more: Any) -> subprocess.Popen[bytes]:
        started.append(_start(*flags, **more))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    pass  # what the test wrote last was not read


Start = Callable[..., "subprocess.Popen[bytes]"]

# ---- usage


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["nonsense"],
        ["pub"],
        ["pub", "-t", "a"],
        ["pub", "-l"],
        ["pub", "-t", "a", "-l", "-m", "x"],
        ["pub", "-t", "a/#", "-m", "x"],
        ["pub", "-t", "", "-m", "x"],
        ["pub", "-t", "a", "-m", "x", "-p", "0"],
        ["pub", "-t", "a", "-m", "x", "-p", "port"],
        ["pub", "-t", "a", "-m", "x", "-h", "a/b"],
        ["pub", "-t", "a", "-m", "x", "-P", "secret"],
        ["pub", "-t", "a", "-m", "x", "--key", "k.pem"],
        ["pub", "-t", "a", "-m", "x", "--timeout", "-1"],
        ["pub", "-t", "a", "-m", "x", "--timeout", "nan"],
        ["pub", "-t", "a", "-m", "x", "--tim", "1"],
        ["sub"],
        ["sub", "-t", "a#"],
        ["sub", "-t", "a", "-c"],
        ["sub", "-t", "a", "-C", "0"],
        ["sub", "-t", "a", "-v", "--json"],
        ["demo", "--seconds", "1"],
        ["demo", "--rate", "inf"],
    ],
)
def test_wrong_usage_ends_with_2(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CLOUDPUBSUB_BROKER", raising=False)
    try:
        code: object = main(flags)
    except SystemExit as exc:
        code = exc.code
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    assert said.err and "secret" not in said.err and "Traceback" not in said.err


def test_version_is_the_packages() -> None:
    done = _run("--version")
    assert (done.returncode, done.stdout) == (0, f"cloudpubsub {__version__}\n".encode())


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--help"], ["demo", "pub", "sub", "bench", "--version"]),
        (["pub", "--help"], ["--spool", "--timeout", "-h", "-l", "--cafile"]),
        (["sub", "--help"], ["-C", "-W", "-c", "-h", "-v", "--json"]),
        (["demo", "--help"], ["--seconds", "--rate", "--json"]),
        (["bench", "--help"], ["--payload-bytes", "--durability", "--peers", "--list", "--results"]),
    ],
)
def test_help_names_the_flags(flags: list[str], named: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    said = capsys.readouterr().out
    assert ended.value.code == 0 and all(name in said for name in named)


# ---- pub


def test_lines_of_any_bytes_arrive_as_they_are(broker: Broker, tmp_path: Path) -> None:
    lines = [b"first", b"", bytes(range(256)).replace(b"\n", b""), "gr\u00fc\u00df".encode(), b"\r", b"x" * 100_000]
    lines += [b"%d" % number for number in range(5_000)]
    lines.append(b"without an end")
    with Collector(broker.port) as collector:
        done = _run("pub", "-p", broker.port, "-t", "a/b", "-l", "--spool", tmp_path / "spool", data=b"\n".join(lines))
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        collector.wait_for(len(set(lines)), 60)
        assert collector.first_deliveries() == list(dict.fromkeys(lines))
        assert collector.duplicates == 0


def test_a_line_is_published_as_soon_as_it_is_read(rumqttd: Rumqttd, running: Start) -> None:
    with Collector(rumqttd.port) as collector:
        process = running("pub", "-p", rumqttd.port, "-t", "a", "-l")
        assert process.stdin is not None
        for number in range(1, 4):
            process.stdin.write(b"line %d\n" % number)
            process.stdin.flush()
            collector.wait_for(number, 60)
        process.stdin.close()
        assert process.wait(60) == 0


def test_one_message_retained(mosquitto: Mosquitto) -> None:
    assert _run("pub", "-p", mosquitto.port, "-t", "kept", "-m", "h\u00e9", "-r").returncode == 0
    assert _run("pub", "-p", mosquitto.port, "-t", "gone", "-m", "x").returncode == 0
    done = _run("sub", "-p", mosquitto.port, "-t", "#", "-C", 1, "--json")
    assert json.loads(done.stdout) == {"topic": "kept", "payload": "h\u00e9", "qos": 1, "retain": True}


def test_what_a_cut_link_leaves_is_sent_by_the_next_run(broker: Broker, tmp_path: Path) -> None:
    lines = [b"%d" % number for number in range(3_000)]
    with Relay(broker.port) as relay, Collector(broker.port) as collector:
        flags = ("pub", "-p", relay.port, "-t", "a", "-l", "--spool", tmp_path / "spool")
        relay.cut()
        done = _run(*flags, "--timeout", "0.5", "--json", data=b"\n".join(lines[:2_000]))
        report = json.loads(done.stdout)
        assert done.returncode == 1
        assert b"2,000 messages not acknowledged: kept in" in done.stderr
        assert (report["published"], report["acknowledged"], report["unacknowledged"]) == (2_000, 0, 2_000)
        assert (report["ok"], report["lost"]) == (False, 0)

        relay.restore()
        done = _run(*flags, "--json", data=b"\n".join(lines[2_000:]))
        report = json.loads(done.stdout)
        assert (done.returncode, report["ok"], report["from_earlier_runs"]) == (0, True, 2_000)
        assert (report["published"], report["acknowledged"], report["unacknowledged"]) == (1_000, 3_000, 0)
        collector.wait_for(3_000, 60)
        assert collector.first_deliveries() == lines


def test_the_next_run_needs_no_new_message(rumqttd: Rumqttd, tmp_path: Path) -> None:
    with Relay(rumqttd.port) as relay, Collector(rumqttd.port) as collector:
        flags = ("pub", "-p", relay.port, "-t", "a", "-l", "--spool", tmp_path / "spool")
        relay.cut()
        assert _run(*flags, "--timeout", "0", data=b"one\ntwo\n").returncode == 1
        relay.restore()
        assert _run(*flags).returncode == 0
        collector.wait_for(2, 60)
        assert collector.first_deliveries() == [b"one", b"two"]


def test_a_killed_run_loses_nothing(rumqttd: Rumqttd, tmp_path: Path, running: Start) -> None:
    with Relay(rumqttd.port) as relay, Collector(rumqttd.port) as collector:
        flags = ("pub", "-p", relay.port, "-t", "a", "-l", "--spool", tmp_path / "spool")
        process = running(*flags)
        assert process.stdin is not None
        process.stdin.write(b"acknowledged\n")
        process.stdin.flush()
        collector.wait_for(1, 60)
        relay.cut()
        process.stdin.write(b"in the ring only\n")
        process.stdin.flush()
        # It reads a line in microseconds; that it has is seen by its pipe being empty and its main thread asleep.
        _wait(
            lambda: (
                psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING
                and process.stdin is not None
                and _unread(process.stdin) == 0
            )
        )
        process.kill()
        process.wait()
        relay.restore()
        assert _run(*flags).returncode == 0
        collector.wait_for(2, 60)
        assert collector.first_deliveries() == [b"acknowledged", b"in the ring only"]


def test_without_a_spool_the_rest_is_lost_and_said_so(rumqttd: Rumqttd) -> None:
    with Relay(rumqttd.port) as relay:
        relay.cut()
        done = _run("pub", "-p", relay.port, "-t", "a", "-l", "--timeout", "0.2", data=b"1\n2\n3\n")
    assert done.returncode == 1
    assert b"3 messages not acknowledged and lost (Connection refused)" in done.stderr
    assert b"no spool" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_offline_ends_with_1_and_keeps_the_rest(
    rumqttd: Rumqttd, tmp_path: Path, running: Start, number: signal.Signals
) -> None:
    with Relay(rumqttd.port) as relay:
        relay.cut()
        process = running("pub", "-p", relay.port, "-t", "a", "-l", "--spool", tmp_path / "spool", "--timeout", "600")
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b"one\ntwo\n")
        process.stdin.flush()
        assert b"Connection refused" in process.stderr.readline()  # it runs
        _wait(lambda: process.stdin is not None and _unread(process.stdin) == 0)
        process.send_signal(number)
        assert process.wait(60) == 1
        assert b"2 messages not acknowledged: kept in" in process.stderr.read()


def test_a_signal_with_everything_acknowledged_ends_with_0(rumqttd: Rumqttd, running: Start) -> None:
    with Collector(rumqttd.port) as collector:
        process = running("pub", "-p", rumqttd.port, "-t", "a", "-l")
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(b"one\n")
        process.stdin.flush()
        collector.wait_for(1, 60)
        process.send_signal(signal.SIGTERM)
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_a_line_too_long_is_left_out_and_said_so(rumqttd: Rumqttd) -> None:
    lines = [b"before", b"x" * 300_000, b"y" * 5_000_000, b"after", b"z" * 262_145]
    with Collector(rumqttd.port) as collector:
        done = _run("pub", "-p", rumqttd.port, "-t", "a", "-l", data=b"\n".join(lines))
        assert done.returncode == 1
        assert done.stderr.count(b"left out: longer than 262,144 bytes") == 3
        collector.wait_for(2, 60)
        assert collector.first_deliveries() == [b"before", b"after"]


def test_input_waits_while_memory_is_full(rumqttd: Rumqttd, running: Start) -> None:
    lines = [b"%06d" % number + b"." * 4_000 for number in range(5_000)]  # 20 MB, and 4 MiB of memory
    with Relay(rumqttd.port) as relay, Collector(rumqttd.port) as collector:
        relay.cut()
        process = running("pub", "-p", relay.port, "-t", "a", "-l")
        assert process.stdin is not None and process.stderr is not None
        stdin = process.stdin
        written = threading.Event()

        def feed() -> None:
            stdin.write(b"\n".join(lines))
            stdin.close()
            written.set()

        feeder = threading.Thread(target=feed)
        feeder.start()
        while b"no room for more messages" not in (said := process.stderr.readline()):
            assert said
        assert not written.is_set()
        assert psutil.Process(process.pid).memory_info().rss < 80 << 20
        relay.restore()
        assert process.wait(60) == 0
        feeder.join()
        collector.wait_for(len(lines), 60)
        assert collector.first_deliveries() == lines


def test_a_spool_in_use_is_refused(rumqttd: Rumqttd, tmp_path: Path, running: Start) -> None:
    with Collector(rumqttd.port) as collector:
        flags = ("pub", "-p", rumqttd.port, "-t", "a", "-l", "--spool", tmp_path / "spool")
        first = running(*flags)
        assert first.stdin is not None
        first.stdin.write(b"mine\n")
        first.stdin.flush()
        collector.wait_for(1, 60)
        done = _run(*flags)
        assert done.returncode == 1 and b"owns the spool" in done.stderr and b"Traceback" not in done.stderr


def test_tls_by_cafile(need_mosquitto: None, tmp_path: Path, tls_files: TlsFiles) -> None:
    with Mosquitto(tmp_path / "broker", tls=tls_files, require_certificate=True) as broker:
        flags = ("pub", "-h", "localhost", "-p", broker.tls_port, "-t", "a", "-m", "x", "--timeout", "4")
        mine = ("--cert", tls_files.client_cert, "--key", tls_files.client_key)
        assert _run(*flags, "--cafile", tls_files.ca, *mine, "--timeout", "60").returncode == 0
        done = _run(*flags, "--cafile", tls_files.foreign_ca, *mine)
        assert done.returncode == 1 and b"certificate" in done.stderr


def test_user_and_password(need_mosquitto: None, tmp_path: Path) -> None:
    with Mosquitto(tmp_path / "broker", users={"gateway": "open sesame"}) as broker:
        flags = ("pub", "-p", broker.port, "-t", "a", "-m", "x", "-u", "gateway")
        assert _run(*flags, "-P", "open sesame").returncode == 0
        done = _run(*flags, "-P", "wrong word", "--timeout", "3")
        assert done.returncode == 1
        assert b"refused" in done.stderr and b"wrong word" not in done.stderr


# ---- sub


def _send(broker: Broker, topic: str, *payloads: bytes) -> None:
    for payload in payloads:
        single(topic, payload, qos=1, hostname="127.0.0.1", port=broker.port)


def _read_lines(process: subprocess.Popen[bytes], number: int) -> list[bytes]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(number)]


def _subscribed(broker: Broker, process: subprocess.Popen[bytes], topic: str) -> None:
    """Wait until what is published to `topic` reaches the command; one message of the test is printed for that."""
    assert process.stdout is not None
    ready = threading.Event()

    def knock() -> None:
        while not ready.wait(0.1):
            _send(broker, topic, b"knock")

    thread = threading.Thread(target=knock)
    thread.start()
    try:
        assert b"knock" in process.stdout.readline()
    finally:
        ready.set()
        thread.join()
    _send(broker, topic, b"end of knocking")
    while b"end of knocking" not in process.stdout.readline():
        assert process.poll() is None


@pytest.mark.parametrize(
    ("flags", "printed"),
    [
        ([], [b"one\n", b"\n", b"\xff\x00\n"]),
        (["-v"], [b"a/b one\n", b"a/b \n", b"a/b \xff\x00\n"]),
    ],
)
def test_payloads_are_printed(broker: Broker, running: Start, flags: list[str], printed: list[bytes]) -> None:
    process = running("sub", "-p", broker.port, "-t", "a/+", "-t", "other", *flags)
    _subscribed(broker, process, "other")
    _send(broker, "a/b", b"one", b"", b"\xff\x00")
    assert _read_lines(process, 3) == printed


def test_json_holds_text_or_base64(rumqttd: Rumqttd, running: Start) -> None:
    process = running("sub", "-p", rumqttd.port, "-t", "#", "--json")
    _subscribed(rumqttd, process, "other")
    _send(rumqttd, "a", "\u00fc\n".encode(), b"\xff")
    text, binary = map(json.loads, _read_lines(process, 2))
    assert text == {"topic": "a", "payload": "\u00fc\n", "qos": 1, "retain": False}
    assert binary == {"topic": "a", "payload_base64": base64.b64encode(b"\xff").decode(), "qos": 1, "retain": False}


def test_a_message_on_two_filters_is_printed_once(rumqttd: Rumqttd, running: Start) -> None:
    process = running("sub", "-p", rumqttd.port, "-t", "a/#", "-t", "a/b/#", "-t", "other")
    _subscribed(rumqttd, process, "other")
    _send(rumqttd, "a/b/c", b"twice asked for")
    _send(rumqttd, "other", b"last")
    lines = _read_lines(process, 2)
    # A broker may deliver once for each filter; of what it delivers each is printed once.
    copies = lines.count(b"twice asked for\n")
    assert lines[0] == b"twice asked for\n" and copies in (1, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_sub_with_0(rumqttd: Rumqttd, running: Start, number: signal.Signals) -> None:
    process = running("sub", "-p", rumqttd.port, "-t", "a")
    _subscribed(rumqttd, process, "a")
    process.send_signal(number)
    assert process.wait(60) == 0
    assert process.stderr is not None and process.stderr.read() == b""


def test_a_time_limit_ends_sub(rumqttd: Rumqttd) -> None:
    assert _run("sub", "-p", rumqttd.port, "-t", "a", "-W", "0.5").returncode == 0
    done = _run("sub", "-p", rumqttd.port, "-t", "a", "-W", "0.5", "-C", "3")
    assert done.returncode == 1 and b"only 0 messages of 3 came in time" in done.stderr


def test_a_count_ends_sub_and_a_kept_session_has_the_rest(mosquitto: Mosquitto, running: Start) -> None:
    flags = ("sub", "-p", mosquitto.port, "-i", "reader", "-c", "-t", "a")
    process = running(*flags)
    _subscribed(mosquitto, process, "a")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    _send(mosquitto, "a", *(b"%d" % number for number in range(50)))
    first = _run(*flags, "-C", "20", "-W", "60")
    assert (first.returncode, first.stdout.split(), first.stderr) == (0, [b"%d" % number for number in range(20)], b"")
    rest = _run(*flags, "-C", "30", "-W", "60")
    assert (rest.returncode, rest.stdout.split()) == (0, [b"%d" % number for number in range(20, 50)])


def test_a_reader_that_goes_ends_sub_quietly_and_loses_nothing(mosquitto: Mosquitto, running: Start) -> None:
    flags = ("sub", "-p", mosquitto.port, "-i", "reader", "-c", "-t", "a")
    process = running(*flags)
    _subscribed(mosquitto, process, "a")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    _send(mosquitto, "a", b"unread", b"and this")
    assert (process.wait(60), process.stderr.read()) == (0, b"")
    again = _run(*flags, "-C", "2", "-W", "60")
    assert (again.returncode, again.stdout) == (0, b"unread\nand this\n")


def test_a_full_disk_ends_sub_with_1(rumqttd: Rumqttd, running: Start) -> None:
    with open("/dev/full", "wb") as full:
        process = running("sub", "-p", rumqttd.port, "-t", "a", stdout=full)
    while process.poll() is None:
        _send(rumqttd, "a", b"x")
    assert process.returncode == 1
    assert process.stderr is not None and b"stdout: No space left on device" in process.stderr.read()


def test_a_slow_reader_does_not_keep_sub_from_ending(rumqttd: Rumqttd, running: Start) -> None:
    process = running("sub", "-p", rumqttd.port, "-t", "a")
    _subscribed(rumqttd, process, "a")
    _send(rumqttd, "a", *[b"x" * 60_000] * 5)  # more than a pipe holds, and nobody reads
    _wait(lambda: process.stdout is not None and _unread(process.stdout) >= 60_000)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
