"""This machine, and this process: numbers that can only be bounded."""

import os

import psutil
import pytest

from ddplog.sampling.host import Host, Process


def test_rates_begin_with_the_second_look(monkeypatch):
    host = Host()
    first = host.values()
    assert set(first) == {"mem_used_bytes", "mem_available_bytes"}
    assert 0 < first["mem_used_bytes"] < psutil.virtual_memory().total

    times = psutil.cpu_times()
    monkeypatch.setattr(psutil, "cpu_times", lambda: times._replace(user=times.user + 3e6, idle=times.idle + 1e6))
    second = host.values()
    assert second["cpu_pct"] == pytest.approx(75, abs=1)
    assert all(value >= 0 for value in second.values())


def test_a_machine_that_shows_no_disk_and_no_link(monkeypatch):
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: {"lo": None})
    host = Host()
    host.values()
    assert {name.partition("_")[0] for name in host.values()} <= {"mem", "cpu"}


def test_a_counter_that_went_back_is_no_rate(monkeypatch):
    host = Host()
    total = [10]
    monkeypatch.setattr("ddplog.sampling.host._totals", lambda: {"net_sent_bytes_per_s": total[0]})
    host.values()
    total[0] = 5
    assert "net_sent_bytes_per_s" not in host.values()
    total[0] = 6
    assert host.values()["net_sent_bytes_per_s"] > 0


def test_a_process_and_one_that_is_gone():
    process = Process(os.getpid())
    assert set(process.values()) == {"rss_bytes"}
    values = process.values()
    assert values["rss_bytes"] > 1 << 20
    assert values["cpu_pct"] >= 0
    assert Process(0x7FFFFFFE).values() == {}
