"""The benchmarks run, count right and report sanely; how fast they are is not a matter for tests."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import _harness, _native, _suite, _targets, end_to_end, enqueue, spill
from bench._harness import Meter, Sample, Samples

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(300)


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _report(name: str, *arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(_run(f"bench.{name}", "--quick", "--json", *arguments))
    _is_sane(report)
    return report


def _is_sane(report: dict[str, Any]) -> None:
    for name, figures in report["subjects"].items():
        assert figures["messages"] > 0, name
        for key in ("per_second", "ns_per_message"):
            low, middle, high = (figures[key][part] for part in ("min", "median", "max"))
            assert 0 < low <= middle <= high < math.inf, (name, key)
        assert figures["peak_rss_bytes"] >= 0, name
    for name, times in report["ratios"].items():
        assert 0 < times["min"] <= times["median"] <= times["max"] < math.inf, name
        assert times["min"] <= times["low95"] <= times["median"] <= times["high95"] <= times["max"], name


_ALONE = ("bench", "bench.footprint", "bench.knobs")


@pytest.mark.parametrize("module", [*_ALONE, *(f"bench.{name}" for name in _suite.QUESTIONS)])
def test_each_explains_itself(module: str) -> None:
    assert "--quick" in _run(module, "--help")


def test_enqueue_measures_every_subject() -> None:
    report = _report("enqueue", "--own-only")
    assert set(report["subjects"]) == set(enqueue.SUBJECTS) - set(enqueue._SLOWNESS)
    assert report["environment"]["versions"]["paho-mqtt"]


def test_other_libraries_are_measured_or_named_as_missing() -> None:
    report = _report("end_to_end", "--broker", "sink")
    assert set(report["subjects"]) | set(report["missing"]) == set(end_to_end.SUBJECTS)
    assert "paho-mqtt" in report["subjects"]
    assert report["parameters"]["broker"] == "sink"


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("broker", ["mosquitto", "rumqttd", "sink"])
def test_end_to_end_on_each_broker(broker: str, tls: bool, request: pytest.FixtureRequest) -> None:
    if broker == "mosquitto":
        request.getfixturevalue("need_mosquitto")
    report = _report("end_to_end", "--broker", broker, "--own-only", "--payload-bytes", "300", *["--tls"] * tls)
    assert set(report["subjects"]) == {"cloudpubsub", "cloudpubsub, memory only", "raw sender"}
    assert report["parameters"]["tls"] is tls


def test_spill_measures_every_subject() -> None:
    report = _report("spill", "--payload-bytes", "1024")
    assert set(report["subjects"]) == {name for name in spill.SUBJECTS if name.endswith(", 1024 B")}
    # Everything went to the disk once: records with their headers, and little else.
    assert 1.0 < report["subjects"]["spill, 1024 B"]["written_per_payload_byte"]["median"] < 1.5


@pytest.mark.parametrize("broker", ["source", "rumqttd"])
def test_subscribe_counts_every_message(broker: str) -> None:
    report = _report("subscribe", "--broker", broker, "--rounds", "2")  # what a round leaves is not for the next
    assert {"cloudpubsub", "paho-mqtt", "raw subscriber"} <= set(report["subjects"])


def test_drain_empties_the_backlog_and_looks_at_memory() -> None:
    report = _report("drain")
    beside = [f"cloudpubsub, beside a busy {what}" for what in ("Python thread", "process")]
    assert {"cloudpubsub", *beside, "raw sender"} <= set(report["subjects"])
    assert {f"{beside[0]} / cloudpubsub", " / ".join(beside)} <= set(report["ratios"])
    held = report["subjects"]["memory with a backlog"]
    # The ring has been filled, and the flusher has a buffer; nothing grows with the backlog.
    assert held["anonymous_and_shared_growth_bytes"]["median"] < held["ring_bytes"]["median"] + (16 << 20)


def test_latency_is_that_of_every_message() -> None:
    report = _report("latency", "--own-only")
    for figures in report["subjects"].values():
        assert 0 < figures["p1_us"]["median"] <= figures["p50_us"]["median"] <= figures["p100_us"]["median"]


def test_the_rest_leaves_json_tables_targets_and_plots(tmp_path: Path) -> None:
    text = _run("bench", "idle", "wear", "sizes", "outage", "--quick", "--results", str(tmp_path))
    kept = json.loads((tmp_path / "results.json").read_text())
    assert {report["bench"] for report in kept["benches"]} == {"idle", "wear", "sizes", "outage"}
    for report in kept["benches"]:
        _is_sane(report)
        for name in report["subjects"]:
            assert f"| {name} |" in text
        if report["bench"] == "wear":
            assert report["subjects"]["spilling, process, 1024 B"]["written_per_message_byte"]["median"] > 1
        if report["bench"] == "outage":
            assert report["series"]["acked"][-1] > 0
            assert {0.0, 1.0} == set(report["series"]["link"])
    assert any(one["met"] is None for one in kept["targets"])  # of what was not asked
    assert "an idle client" in (tmp_path / "results.md").read_text()
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "outage.svg").stat().st_size > 1000


def test_the_command_runs_one_question_with_the_settings_of_the_user(tmp_path: Path) -> None:
    arguments = ["drain", "--quick", "--json", "--ring-bytes", str(1 << 20), "--directory", str(tmp_path)]
    report = json.loads(_run("cloudpubsub", "bench", *arguments))
    assert report["benches"][0]["parameters"]["settings"] == {"ring_bytes": 1 << 20}
    assert report["benches"][0]["subjects"]["memory with a backlog"]["ring_bytes"]["median"] == 1 << 20
    assert not list(tmp_path.iterdir())


def test_the_command_names_the_questions() -> None:
    text = _run("cloudpubsub", "bench", "--list")
    assert [line.split()[0] for line in text.splitlines()] == list(_suite.QUESTIONS)


def test_a_question_that_is_none_is_wrong_usage() -> None:
    command = [sys.executable, "-m", "cloudpubsub", "bench", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "enqueue" in done.stderr


def _samples(**rates: list[float | None]) -> Samples:
    samples = Samples()
    for name, values in rates.items():
        samples[name] = [None if rate is None else Sample(1000, 1000 / rate, 1.0, 1, 0) for rate in values]
    return samples


def test_a_target_needs_the_lower_bound_of_the_confidence() -> None:
    def met(ratios: list[float]) -> object:
        samples = _samples(**{"cloudpubsub": list(ratios), "raw sender": [1.0] * len(ratios)})
        report = {
            "bench": "end_to_end",
            "parameters": {"broker": "mosquitto", "tls": False},
            "subjects": _harness.summary(samples),
            "ratios": _harness.ratios(samples, ("raw sender",)),
        }
        return next(one for one in _targets.judge([report]) if one["what"].startswith("end to end on mosquitto"))["met"]

    assert met([0.99, 0.98, 0.97] * 5) is True
    assert met([0.90, 0.98, 0.97] * 5) is False
    assert met([0.5] * 7 + [2.0] * 8) is False


def test_what_lacks_is_named_and_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(_module: str, subject: str, **_: Any) -> Sample:
        asked.append(subject)
        if subject == "a":
            raise _native.Missing("something")
        if subject == "b":
            raise RuntimeError("it is\nbroken")
        return Sample(1, 1.0, 1.0, 1, 0)

    monkeypatch.setattr(_harness, "measure", measure)
    samples = _harness.in_turns("x", {"a": {}, "b": {}, "c": {}}, 3, lambda _: None, others=["b"])
    assert asked == ["a", "b", "c", "c", "c"]
    assert samples.missing == {"a": "something is missing", "b": "broken"}
    assert list(samples) == ["c"]
    with pytest.raises(RuntimeError, match="broken"):
        _harness.in_turns("x", {"b": {}}, 1, lambda _: None)


def test_who_takes_part_in_fewer_rounds_is_compared_within_them(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"a": 10.0, "b": 5.0}
    monkeypatch.setattr(_harness, "measure", lambda _module, subject: Sample(10, 10 / rates[subject], 1.0, 1, 0))
    samples = _harness.in_turns("x", {"a": {}, "b": {}}, 6, lambda _: None, fewer={"b": 3})
    assert len(samples.of("a")) == 6
    assert [sample is not None for sample in samples["b"]] == [True, False, True, False, True, False]
    assert _harness.ratio(samples, "a", "b")["median"] == pytest.approx(2.0)


def test_a_subject_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(RuntimeError, match=r"bench\.end_to_end, raw sender: .*"):
        _harness.measure(
            "bench.end_to_end",
            "raw sender",
            **{"messages": 10, "host": "127.0.0.1", "port": 1, "ca": None, "window": 10, "batch": 10, "nap_s": 0},
        )


def test_a_wrong_count_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match="9 of 10"):
        _harness.check(False, "9 of 10 were acknowledged")


def test_subjects_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(_module: str, subject: str, **_: Any) -> Sample:
        order.append(subject)
        return Sample(1, 1.0, 1.0, 1, 0)

    monkeypatch.setattr(_harness, "measure", note)
    _harness.in_turns("x", {"a": {}, "b": {}, "c": {}}, 3, lambda _: None)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_the_best_parameters_are_chosen_by_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "measure", lambda _module, _subject, size: Sample(size, 1.0, 1.0, 1, 0))
    assert _harness.best_of("x", "a", [{"size": 2}, {"size": 9}, {"size": 4}], lambda _: None) == {"size": 9}


def test_ratios_pair_the_samples_of_a_round() -> None:
    times = _harness.ratio(_samples(a=[10, 40, None, 90], b=[10, 20, 1, 30]), "a", "b")
    assert {key: round(times[key], 9) for key in ("median", "min", "max")} == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_the_meter_adds_up_and_sees_memory() -> None:
    meter = Meter()
    with meter:
        held = bytearray(b"x" * (32 << 20))
    first_s = meter.seconds
    del held
    with meter:
        pass
    sample = meter.sample(1000, resent=2)
    assert sample.seconds > first_s > 0
    assert sample.rss_growth_bytes > 24 << 20
    assert sample.rate == pytest.approx(1000 / sample.seconds)
    assert sample.extra == {"resent": 2}


def test_rounds_end_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_harness, "measure", lambda _module, _subject: Sample(1, 1.0, 1.0, 1, 0))
    monkeypatch.setattr(_harness, "stop_at_s", 0.0)
    samples = _harness.in_turns("x", {"a": {}, "b": {}}, 9, lambda _: None)
    assert [len(samples.of(name)) for name in ("a", "b")] == [3, 3]


def test_footprint_measures_size_import_and_memory() -> None:
    report = json.loads(_run("bench.footprint", "--quick", "--json"))
    assert report["bytes"]["cloudpubsub"] > report["bytes"]["cloudpubsub, compiled"] > 0
    times = {name: it["wall_ms"] for name, it in report["import"].items()}
    assert list(times) == ["paho-mqtt", "cloudpubsub", "cloudpubsub, until a client is connected"]
    assert all(ms > 0 for ms in times.values())
    interpreter, client = report["kib"]["the interpreter"], report["kib"]["an idle client"]
    assert interpreter["rss"] < client["rss"]
    assert client["shared"] > 0, "a ring in tmpfs, of which something is used"
