"""The benchmarks run, count right and report sanely; how fast they are is not a matter for tests."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import _harness, end_to_end, enqueue, spill
from bench._harness import Meter, Sample

ROOT = Path(__file__).resolve().parent.parent


def _run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _is_sane(report: dict[str, Any]) -> None:
    for name, figures in report["subjects"].items():
        assert figures["messages"] > 0, name
        for key in ("per_second", "ns_per_message"):
            low, middle, high = (figures[key][part] for part in ("min", "median", "max"))
            assert 0 < low <= middle <= high < math.inf, (name, key)
        assert figures["cpu_s_per_million"]["median"] > 0, name
        assert figures["peak_rss_bytes"] > 1 << 20, name
    for name, times in report["ratios"].items():
        assert 0 < times["min"] <= times["median"] <= times["max"] < math.inf, name


@pytest.mark.parametrize("module", ["bench", "bench.enqueue", "bench.end_to_end", "bench.spill", "bench.footprint"])
def test_each_explains_itself(module: str) -> None:
    assert "--quick" in _run(module, "--help")


def test_enqueue_measures_every_subject() -> None:
    report = json.loads(_run("bench.enqueue", "--quick", "--json"))
    _is_sane(report)
    expected = {name for name in enqueue.SUBJECTS if not any(name.startswith(gone) for gone in report["missing"])}
    assert set(report["subjects"]) == expected
    assert report["environment"]["versions"]["paho-mqtt"]


@pytest.mark.parametrize("broker", ["mosquitto", "rumqttd"])
def test_end_to_end_measures_every_subject(broker: str, request: pytest.FixtureRequest) -> None:
    if broker == "mosquitto":
        request.getfixturevalue("need_mosquitto")
    report = json.loads(_run("bench.end_to_end", "--quick", "--json", "--broker", broker))
    _is_sane(report)
    assert set(report["subjects"]) == set(end_to_end.SUBJECTS)
    assert report["parameters"]["broker"] == broker


def test_spill_measures_every_subject() -> None:
    report = json.loads(_run("bench.spill", "--quick", "--json"))
    _is_sane(report)
    assert set(report["subjects"]) == set(spill.SUBJECTS)
    # Everything went to the disk once: records with their headers, and little else.
    assert 1.0 < report["subjects"]["spill, 1024 B"]["written_per_payload_byte"]["median"] < 1.5


def test_all_together_leave_json_and_tables(tmp_path: Path) -> None:
    text = _run("bench", "--quick", "--results", str(tmp_path))
    kept = json.loads((tmp_path / "results.json").read_text())
    for report in kept["benches"]:
        _is_sane(report)
    assert {report["bench"] for report in kept["benches"]} == {"enqueue", "end_to_end", "spill"}
    assert (tmp_path / "results.md").read_text() in text
    for report in kept["benches"]:
        for name in report["subjects"]:
            assert f"| {name} |" in text


def test_a_subject_that_fails_ends_the_benchmark() -> None:
    with pytest.raises(RuntimeError, match=r"bench\.end_to_end, raw sender: .*"):
        _harness.measure("bench.end_to_end", "raw sender", messages=10, port=1, window=10, batch=10, nap_s=0)


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
    def samples(*rates: int) -> list[Sample]:
        return [Sample(rate, 1.0, 1.0, 1, 0) for rate in rates]

    times = _harness.ratio({"a": samples(10, 40, 90), "b": samples(10, 20, 30)}, "a", "b")
    assert times == {"median": 2.0, "min": 1.0, "max": 3.0}


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


def test_footprint_measures_size_import_and_memory() -> None:
    report = json.loads(_run("bench.footprint", "--quick", "--json"))
    assert report["bytes"]["cloudpubsub"] > report["bytes"]["cloudpubsub, compiled"] > 0
    assert report["import"]["cloudpubsub"]["wall_ms"] > 0
    interpreter, client = report["kib"]["the interpreter"], report["kib"]["an idle client"]
    assert interpreter["rss"] < client["rss"]
    assert client["shared"] > 0, "a ring in tmpfs, of which something is used"
