"""What `make perf` makes of its samples: verdicts, tables, plots, strace's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from perf import bars, report, svg
from perf.bars import Verdict, verdicts
from perf.procstat import parse_strace

HOST = dict.fromkeys(("date", "processor", "memory", "kernel", "load", "commit", "fio", "nbdkit", "qemu"), "?")


def figures(rate: float) -> dict[str, float]:
    names = ("p50", "p90", "p99", "p99.9", "cpu_gib", "cpu_million", "machine_gib", "switches", "waits")
    return {"rate": rate, "bytes": 1, "requests": 1} | dict.fromkeys(names, 10.0)


def results(job: str, **rates: list[float]) -> dict[str, Any]:
    samples = {name.replace("_", " "): [figures(rate) for rate in of] for name, of in rates.items()}
    return {
        "memory": {
            "samples": {job: samples}, "units": {job: "iops"}, "size": 1 << 20, "host": HOST, "repeats": 3,
            "seconds": 1,
        }
    }  # fmt: skip


def verdict(of: dict[str, Any], what: str) -> Verdict:
    return next(v for v in verdicts(of) if v.what == what)


def test_a_ratio_is_one_of_medians_with_its_range_over_the_rounds() -> None:
    of = results("randread 4k depth 1", hast_memsync=[200, 300, 100], nbdkit=[100, 100, 200])
    found = verdict(of, "randread 4k depth 1: hast memsync / nbdkit")
    assert found.reached == 2.0
    assert found.range == (0.5, 3.0)
    assert found.met


def test_what_was_not_measured_is_not_met() -> None:
    assert all(v.met is None and v.word() == "not measured" for v in verdicts({}))


@pytest.mark.parametrize(("least", "reached", "met"), [(True, 1, True), (True, 0.9, False), (False, 1.1, False)])
def test_bars_have_a_side(least: bool, reached: float, met: bool) -> None:
    assert Verdict("", "", reached, 1, least).met is met


def test_a_recorded_run_is_calibrated_by_a_server_that_was_in_it() -> None:
    job = "randwrite 4k depth 1"
    then = bars.RECORDED["C hastd memsync"][job]["rate"]
    # The machine is twice as fast as it was: hast, three times as fast as the C hastd was, is 1.5 times so.
    twice = 2 * bars.RECORDED["nbdkit"][job]["rate"]
    found = verdict(results(job, hast_memsync=[3 * then], nbdkit=[twice]), f"{job}: hast memsync / C hastd")
    assert found.reached == pytest.approx(3)
    assert "1.50x by nbdkit" in found.note


def test_every_recorded_figure_that_a_bar_asks_for_is_there() -> None:
    assert len(list(bars.against_c_hastd({}))) == 16


def test_a_report_of_what_there_is(tmp_path: Path) -> None:
    assert report.write(tmp_path) == "Nothing has been measured.\n"
    text = "\n".join(report.lines(results("randread 4k depth 1", hast_memsync=[20000, 22000, 18000]), []))
    assert "| hast memsync | 20k ±10% | 1.00 |" in text


@pytest.mark.parametrize(("percent", "quiet"), [(3.0, True), (40.0, False)])
def test_a_machine_that_was_not_quiet_is_told_of(percent: float, quiet: bool) -> None:
    of = results("randread 4k depth 1", hast_memsync=[1, 2, 3])
    for sample in of["memory"]["samples"]["randread 4k depth 1"]["hast memsync"]:
        sample["foreign %"] = percent
    assert ("The machine was not quiet" in "\n".join(report.lines(of, []))) is not quiet


def test_plots_are_well_formed() -> None:
    series = {f"<{n}>": {"1": n + 1.0, "8": 1000.0 * n} for n in range(20)}
    for logarithmic in (False, True):
        root = ElementTree.fromstring(svg.chart("a & b", "x", "y", series, logarithmic))
        assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 40


def test_strace_table() -> None:
    text = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.001000           1      1000        10 epoll_wait
 40.00    0.000500           1       500           pwrite64
------ ----------- ----------- --------- --------- ----------------
100.00    0.001500           1      1500        10 total
"""
    assert parse_strace(text) == {"epoll_wait": 1000, "pwrite64": 500}
