"""Real jobs whose ranks are sampled: the real agent, sampler and pynvml, on GPUs of the stub."""

import contextlib
import json
import os
import signal

import numpy as np
import psutil
import pytest
from system.jobs import wait_until

from ddplog.errors import DdplogError
from ddplog.journal.reader import Hole, JournalReader
from ddplog.sampling.nvml import THROTTLE_REASONS
from ddplog.store.reader import open_run

pytestmark = pytest.mark.system

TRAIN = """
import json, os, sys, time
from pathlib import Path

rank = int(os.environ["RANK"])
table = json.loads(Path("table.json").read_text())
setting, gpu = table[rank]
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
if setting is not None:
    os.environ["CUDA_VISIBLE_DEVICES"] = setting
if gpu is not None:  # what the driver would say of this process
    with open(os.environ["NVML_STUB"], "a") as file:
        file.write(f"process {gpu} {os.getpid()} {100 + rank}\\n")
import ddplog

run = ddplog.init()
if rank == 0 and "none" in sys.argv:
    run.define_metric("sys/*", reduce="none")
step = 0
while not Path("end").exists():
    run.log({"loss": float(rank)}, step=step)
    step += 1
    time.sleep(0.05)
run.finish()
Path(f"steps.{rank}").write_text(str(step))
"""


def start(job, table, *words, **environ):
    """Start a rank for each (CUDA_VISIBLE_DEVICES, the device that NVML sees it compute on)."""
    (job.folder / "table.json").write_text(json.dumps(table))
    return job.start(*job.ranks(len(table), job.script(TRAIN), *words), **environ)


def uuid(device):
    """The stub's; a MIG instance is device 100 + 10 * GPU + its GPU instance."""
    return f"{'MIG' if device >= 100 else 'GPU'}-{(0xA0000000 + 0x01010101 * device) & 0xFFFFFFFF:08x}-0000-1111-2222-333333333333"


def num_points(job, key):
    with contextlib.suppress(DdplogError), open_run(job.run_dir) as run:
        return len(run.metric(key))
    return 0


def num_whole(job, key, world_size):
    """How many points of a metric have a value of every rank."""
    with contextlib.suppress(DdplogError), open_run(job.run_dir) as run:
        return int((run.metric(key).n == world_size).sum())
    return 0


def per_rank(run, key):
    """Return every rank's values of a metric: rank -> the distinct ones, sorted."""
    values = run.rank_values(key)
    return {rank: sorted(set(values.value[values.rank == rank].tolist())) for rank in np.unique(values.rank).tolist()}


def sampled_keys(run):
    names = run.keys()
    return {key for key in names if key.startswith("sys/")}


def finish(job, process):
    (job.folder / "end").touch()
    job.end(process)
    return job.open()


def samplers(job):
    """Return the living samplers of the job."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any("ddplog.agent.sampler" in word for word in words) and str(job.spool) in " ".join(words):
            found.append(process)
    return found


SHUFFLED = (
    ("5", 5),
    ("2,7", 2),  # it computes on another than the one at its local rank, 1
    (uuid(6), 6),
    ("GPU-a4", 4),  # the beginning of a UUID
    (None, 0),  # every GPU is visible: where it computes
    ("1", None),  # it has not computed yet
    ("3,0", None),  # its local rank modulo two: the first
    ("2,7", None),  # its local rank, 7, modulo two: the second
)
OWN = (5, 2, 6, 4, 0, 1, 3, 7)


def test_every_metric_of_8_gpus_reaches_the_store_under_the_right_one_of_8_ranks(job, stub):
    stub.say("gpus 8")
    process = start(job, SHUFFLED, DDPLOG_SINKS="jsonl")
    wait_until(lambda: num_whole(job, "sys/gpu/nvlink_tx_bytes_per_s", 8) >= 2, 60)
    stub.say("xid 4 79")
    wait_until(lambda: "XID" in str([event.message for event in open_events(job)]), 60)
    with finish(job, process) as run:
        constant = {
            "gpu/util_pct": lambda g: 10.0 + g,
            "gpu/mem_util_pct": lambda g: 50.0 + g,
            "gpu/mem_used_bytes": lambda g: (g + 1.0) * (1 << 30),
            "gpu/mem_total_bytes": lambda g: 80.0 * (1 << 30),
            "gpu/power_w": lambda g: 100.5 + g,
            "gpu/power_limit_w": lambda g: 700.0,
            "gpu/temp_c": lambda g: 40.0 + g,
            "gpu/sm_clock_mhz": lambda g: 1000.0 + g,
            "gpu/mem_clock_mhz": lambda g: 2000.0 + g,
            "gpu/pcie_tx_bytes_per_s": lambda g: 1024.0 * (1000 * (g + 1)),
            "gpu/pcie_rx_bytes_per_s": lambda g: 1024.0 * (1000 * (g + 1) + 1),
            "gpu/ecc_corrected": float,
            "gpu/ecc_uncorrected": lambda g: 1000.0 + g,
            "gpu/throttle_bits": lambda g: 68.0 if g % 2 else 1.0,
            "gpu/throttle/idle": lambda g: float(g % 2 == 0),
            "gpu/throttle/sw_power_cap": lambda g: float(g % 2),
            "gpu/throttle/hw_thermal": lambda g: float(g % 2),
            "gpu/throttle/hw_slowdown": lambda g: 0.0,
        }
        for key, value in constant.items():
            assert per_rank(run, f"sys/{key}") == {rank: [value(gpu)] for rank, gpu in enumerate(OWN)}, key
        assert {f"sys/gpu/throttle/{name}" for name in THROTTLE_REASONS} <= set(run.keys())
        for key, extra in (("tx", 0), ("rx", 100)):
            rates = per_rank(run, f"sys/gpu/nvlink_{key}_bytes_per_s")
            assert all(
                rates[rank] == pytest.approx([(gpu + 1 + extra) * (1 << 20)] * len(rates[rank]), rel=0.01)
                for rank, gpu in enumerate(OWN)
            )
        computing = {rank: gpu for rank, (_, gpu) in enumerate(SHUFFLED) if gpu is not None}
        assert per_rank(run, "sys/proc/gpu_mem_bytes") == {rank: [(100.0 + rank) * (1 << 20)] for rank in computing}
        assert per_rank(run, "sys/proc/gpu_sm_util_pct") == {rank: [5.0 + gpu] for rank, gpu in computing.items()}
        assert not [key for key in sampled_keys(run) if "gpm" in key], "not 0: the devices do not count them"

        util = run.metric("sys/gpu/util_pct")
        whole = util.n == 8
        assert set(util.value[whole].tolist()) == {13.5}
        assert {(7, 17.0, 4, 10.0)} == set(
            zip(*(c[whole].tolist() for c in (util.max_rank, util.max, util.min_rank, util.min)), strict=True)
        )
        host = run.rank_values("sys/host/mem_used_bytes")
        assert len(host) == len(set(host.step.tolist())), "once per node"
        assert host.rank[-1] == 0, "by the lowest rank of those that are there"
        for key in ("cpu_pct", "mem_available_bytes"):
            assert len(run.metric(f"sys/host/{key}"))
        assert per_rank(run, "sys/proc/rss_bytes").keys() == set(range(8))
        assert [(e.rank, e.level, e.message) for e in run.events() if "XID" in e.message] == [
            (3, "error", f"XID 79: rank 3, GPU {uuid(4)}")
        ]
        check_steps(job, run, 8)
        assert run.status == "finished"
        points = {key: run.metric(key) for key in ("sys/gpu/util_pct", "loss")}
    lines = [line for line in job.jsonl() if line["key"] == "sys/gpu/util_pct"]
    assert [line["step"] for line in lines if line["revision"] == 0] == points["sys/gpu/util_pct"].step.tolist()


def open_events(job):
    with contextlib.suppress(DdplogError), open_run(job.run_dir) as run:
        return run.events()
    return ()


def check_steps(job, run, world_size):
    """The ranks' own values are all there, and a sample's step is where its rank was then."""
    loss = run.metric("loss")
    last = [int((job.folder / f"steps.{rank}").read_text()) for rank in range(world_size)]
    assert int(loss.n.sum()) == sum(last)
    steps = run.rank_values("sys/step")
    for rank in range(world_size):
        seen = steps.value[steps.rank == rank]
        assert (np.diff(seen) >= 0).all()
        assert 0 <= seen[0] <= seen[-1] < last[rank]
    seconds = (steps.time_unix_ns - int(run.created.timestamp() * 1e9)) / 1e9
    assert ((seconds - steps.step > -0.01) & (seconds - steps.step < 60)).all()


def test_ranks_on_one_gpu_on_parts_of_one_and_on_none(job, stub):
    stub.say("gpus 3", "mig 2", "gpm")
    table = [("0", 0), ("0", 0), (uuid(121), 121), (f"MIG-{uuid(2)}/2/0", 122), ("", None), ("-1", None)]
    process = start(job, table, "none", DDPLOG_SINKS="jsonl")
    wait_until(lambda: num_points(job, "sys/gpm/sm_active_pct") >= 2, 60)
    stub.say("xid 2 31 2", "xid 0 48")
    wait_until(lambda: len([1 for event in open_events(job) if "XID" in event.message]) >= 3, 60)
    with finish(job, process) as run:
        assert per_rank(run, "sys/gpu/util_pct") == {0: [10.0], 1: [10.0]}, "not 0 where it is not supported"
        assert per_rank(run, "sys/gpu/mem_used_bytes") == {
            rank: [(device + 1.0) * (1 << 30)] for rank, device in ((0, 0), (1, 0), (2, 121), (3, 122))
        }
        assert per_rank(run, "sys/gpm/sm_active_pct") == {0: [2.25], 1: [2.25], 2: [2.25 + 121], 3: [2.25 + 122]}
        assert per_rank(run, "sys/gpm/tensor_active_pct")[0] == [5.25]
        assert per_rank(run, "sys/gpu/pcie_tx_bytes_per_s")[0] == [20.25 * (1 << 20)], "GPM does not block for it"
        assert "sys/gpm/fp64_active_pct" not in sampled_keys(run), "the device refuses this one of them"
        assert per_rank(run, "sys/proc/gpu_mem_bytes") == {rank: [(100.0 + rank) * (1 << 20)] for rank in range(4)}
        assert per_rank(run, "sys/proc/rss_bytes").keys() == set(range(6))
        assert sorted((e.rank, e.message) for e in run.events() if "XID" in e.message) == [
            (0, f"XID 48: rank 0, GPU {uuid(0)}"),
            (1, f"XID 48: rank 1, GPU {uuid(0)}"),
            (3, f"XID 31: rank 3, GPU {uuid(122)} of {uuid(2)}"),
        ]
        values = run.rank_metric("sys/gpu/mem_used_bytes")
        assert set(values.rank.tolist()) == {0, 1, 2, 3}
    lines = [line for line in job.jsonl("rank_point") if line["key"] == "sys/gpu/mem_used_bytes"]
    assert {line["rank"] for line in lines} == {0, 1, 2, 3}, "every rank's series reaches the tracker"
    assert len(lines) == len(values)


def test_a_call_to_the_driver_that_hangs_harms_nobody(job, stub):
    """Reliability case 26. The sampler is killed, and after three times no GPU is looked at; the host is, and training knows nothing of it."""
    stub.say("gpus 2", "hang nvmlDeviceGetPowerUsage 1")
    process = start(job, [("0", 0), ("1", 1)])
    wait_until(lambda: [e for e in open_events(job) if "not sampled any more" in e.message], 90)
    before = num_points(job, "sys/host/mem_used_bytes")
    wait_until(lambda: num_points(job, "sys/host/mem_used_bytes") >= before + 2, 60)
    with finish(job, process) as run:
        told = [(e.kind, e.level, e.message) for e in run.events() if "driver" in e.message]
        text = "sampler: a call to the driver did not return within 3 s: the sampler was killed"
        assert told == [
            ("alert", "warning", f"{text}, and another one started (1 of 3)"),
            ("alert", "warning", f"{text}, and another one started (2 of 3)"),
            ("alert", "error", f"{text} for the 3rd time: GPUs are not sampled any more in this job"),
        ]
        assert before >= 3, "each sampler has looked at the host before it called the driver"
        check_steps(job, run, 2)
        assert run.status == "finished"
        assert [writer.state for writer in run.writers()] == ["finished", "finished"]
    assert samplers(job) == []


def stored_and_written(job):
    """Return how many records of the samplers the store has, and how many their journals."""
    with open_run(job.run_dir) as run:
        stored = sum(writer.next_seq for writer in run.writers("system"))
    written = 0
    for head in job.spool.glob("*/system-*/head"):
        reader = JournalReader(head.parent)
        while (chunk := reader.read(1 << 20)) is not None:
            assert not isinstance(chunk, Hole)
            written += chunk.num_records
        reader.close()
    return stored, written


def test_a_sampler_that_is_killed_is_replaced_and_nothing_is_lost(job, stub):
    """And so is one whose agent was killed: it ends by itself, the next agent starts another."""
    stub.say("gpus 2")
    process = start(job, [("0", 0), ("1", 1)])
    wait_until(lambda: num_points(job, "sys/gpu/util_pct") >= 2, 60)
    (sampler,) = samplers(job)
    sampler.kill()
    before = num_points(job, "sys/gpu/util_pct")
    wait_until(lambda: num_points(job, "sys/gpu/util_pct") >= before + 2, 60)

    (second,) = samplers(job)
    assert second.pid != sampler.pid
    os.kill(job.agent_pid(), signal.SIGKILL)
    wait_until(lambda: not second.is_running() or second.status() == psutil.STATUS_ZOMBIE)
    before = num_points(job, "sys/gpu/util_pct")
    wait_until(lambda: num_points(job, "sys/gpu/util_pct") >= before + 2, 60)
    with finish(job, process) as run:
        assert per_rank(run, "sys/gpu/util_pct") == {0: [10.0], 1: [11.0]}
        assert len(run.writers("system")) >= 6
        assert [event for event in run.events() if event.level == "error"] == []
        assert (run.status, len(run.attempts)) == ("finished", 1)
        check_steps(job, run, 2)
    stored, written = stored_and_written(job)
    assert stored == written > 0
    assert samplers(job) == []


def test_a_job_without_gpus_has_the_host_and_its_processes(job):
    """No NVML on this machine, and no noise about it."""
    process = start(job, [(None, None)], LD_LIBRARY_PATH=None)
    wait_until(lambda: num_points(job, "sys/host/cpu_pct") >= 1, 60)
    with finish(job, process) as run:
        keys = sampled_keys(run)
        assert not any(key.startswith(("sys/gpu", "sys/gpm")) for key in keys)
        assert {"sys/proc/rss_bytes", "sys/proc/cpu_pct", "sys/step", "sys/host/mem_used_bytes"} <= keys
        assert run.events() == ()
    assert "ERROR" not in job.logs()
    assert "WARNING" not in job.logs()


def test_a_rank_may_not_log_below_sys(job):
    script = """
import warnings, ddplog
run = ddplog.init()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    run.log({"sys/gpu/util_pct": 1.0, "loss": 2.0}, step=0)
    run.log({"sys/gpu/util_pct": 1.0, "loss": 2.0}, step=1)
print(len(caught), caught[0].message, dict(run.drops))
run.log_params({"sys": {"cores": 8}})
run.finish()
"""
    out, _ = job.run(*job.ranks(1, job.script(script)), DDPLOG_SAMPLE_S="0")
    why = "sys/gpu/util_pct: names below sys/ are those of GPU and host metrics"
    assert out == f"1 ddplog: {why} (further ones are only counted) {{'bad_key': 2}}\n"
    with job.open() as run:
        assert run.keys() == ("loss",)
        assert [param.name for param in run.params()] == ["sys/cores"]
