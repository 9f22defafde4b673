"""What each setting does, measured: every curve is there, and what must be so is."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import _brokers, _harness, _plots, knobs
from tests.making import ROOT

pytestmark = pytest.mark.timeout(300)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.knobs", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)


def _points(report: dict[str, Any], curve: str, label: str) -> dict[Any, dict[str, float]]:
    """What the line of that label in the first panel of a curve is drawn from."""
    panels = next(one for one in report["curves"] if one["name"] == curve)["panels"]
    line = next(line for line in panels[0]["lines"] if line["label"] == label)
    return {x: report["subjects"][name][line["key"]] for x, name in line["points"]}


def test_every_curve_is_there_and_kept(tmp_path: Path) -> None:
    spools, results = tmp_path / "spools", tmp_path / "results"
    spools.mkdir()
    done = _run("--quick", "--json", "--directory", str(spools), "--results", str(results))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [curve["name"] for curve in report["curves"]] == list(knobs.CURVES)
    lacking = {name for name in ("mosquitto", "rumqttd") if _brokers.available()[name]}
    assert set(report["missing"]) == lacking
    for curve in report["curves"]:
        for panel in curve["panels"]:
            assert panel["lines"], panel["label"]
            for line in panel["lines"]:
                for _, name in line["points"]:
                    figure = report["subjects"][name][line["key"]]
                    assert 0 <= figure["min"] <= figure["median"] <= figure["max"] < math.inf, (name, line["key"])
    assert all(ratio["median"] > 0 for ratio in report["ratios"].values())
    assert report["parameters"]["file_system"] not in ("", "unknown")
    assert not list(spools.iterdir())

    # A ring of 16 MiB rides a second out; one of 256 KiB does not.
    written = _points(report, "ring", "pause of 1 s")
    assert written[16 << 20]["max"] == 0
    assert written[256 << 10]["min"] > 0
    # What a kill leaves is read, in whole segments.
    read = report["subjects"]["segment_bytes 256 KiB, killed when synced"]["mib_read"]
    assert 0 < read["max"] < report["subjects"]["segment_bytes 32 MiB, killed when synced"]["mib_read"]["min"]
    assert report["subjects"]["memory, 100 messages/s"]["syncs_per_second"]["max"] == 0
    assert report["subjects"]["power, 0.01 s, 100 messages/s"]["syncs_per_second"]["min"] > 0

    kept = json.loads((results / "knobs.json").read_text())
    assert kept["curves"] == report["curves"]
    assert kept["environment"]["date"]
    text = (results / "knobs.md").read_text()
    assert all(f"### {name}\n" in text for name in knobs.CURVES)
    if importlib.util.find_spec("matplotlib"):
        drawn = (results / "knobs.svg").read_text()
        assert "(knobs.svg)" in text
        _plots.draw([kept], tmp_path)
        assert (tmp_path / "knobs.svg").read_text() == drawn, "the same figures give the same file"
        for axis in _plots._knobs([kept]).axes:
            low, high = axis.get_ylim()
            drawn_lines = [line for line in axis.lines if not line.get_label().startswith("_")]
            shown = [value for line in drawn_lines for value in line.get_ydata() if value > 0]
            assert not shown or ((low == 0 or low > min(shown) / 100) and max(shown) <= high), axis.get_title()


def test_a_broker_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_brokers, "available", lambda: {"mosquitto": "mosquitto", "rumqttd": "iotcore", "sink": None})
    arguments = knobs.parser().parse_args(["--quick", "window"])
    report = knobs.run(arguments)
    assert report["missing"] == {"mosquitto": "mosquitto is missing", "rumqttd": "iotcore is missing"}
    assert not report["subjects"]
    text = knobs.show(report) + _harness.missing_line(report)
    assert "### window" in text and "rumqttd (iotcore is missing)" in text


def test_a_curve_that_is_none_is_wrong_usage() -> None:
    done = _run("--quick", "nothing")
    assert done.returncode == 2
    assert "window" in done.stderr
