"""The real pynvml on the stub, call by call: what is refused is left out, what fails is asked again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

SOURCE = Path(__file__).parents[2] / "src"
LOOK = """
import json, sys
from ddplog.sampling.nvml import Nvml, NoGpusError

beats = []
try:
    nvml = Nvml(lambda: beats.append(1))
except NoGpusError as exc:
    print(json.dumps({"error": str(exc)}))
    sys.exit()
rounds = []
for _ in range(3):
    rounds.append({gpu.uuid[4:12]: nvml.values(gpu.uuid) for gpu in nvml.gpus})
    if len(sys.argv) > 1 and len(rounds) == 1:
        open(sys.argv[1], "w").write("gpus 2\\n")
xids = [[x.uuid[4:12], x.code, x.gpu_instance] for x in nvml.xids() + nvml.xids()]
print(json.dumps({"rounds": rounds, "xids": xids, "beats": len(beats)}))
"""


@pytest.fixture
def look(stub):
    """Return what three rounds of the stub's GPUs read; with `then`, the stub has only `gpus 2` after the first."""

    def run(*lines, then=False, **environ):
        stub.say(*lines)
        done = subprocess.run(
            [sys.executable, "-c", LOOK, *([str(stub.path)] if then else [])],
            env={"PYTHONPATH": str(SOURCE), **stub.environ, **environ}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return json.loads(done.stdout)

    return run


A0 = "a0000000"
A1 = "a1010101"


def test_a_metric_that_a_device_refuses_is_left_out_and_not_asked_for_again(look):
    """3: not supported. Even if it would answer now."""
    found = look("gpus 2", "fail nvmlDeviceGetPowerUsage 3 1", then=True)
    for values in found["rounds"]:
        assert values[A0]["gpu/power_w"] == 100.5
        assert "gpu/power_w" not in values[A1], "not 0 either"
        assert values[A1]["gpu/temp_c"] == 41.0


@pytest.mark.parametrize("code", [15, 999, 10])
def test_a_metric_that_fails_otherwise_is_left_out_this_time(look, code):
    """A GPU that fell off the bus, an unknown error, a time-out."""
    found = look("gpus 2", f"fail nvmlDeviceGetTemperature {code} 0", then=True)
    assert ["gpu/temp_c" in values[A0] for values in found["rounds"]] == [False, True, True]
    assert all("gpu/temp_c" in values[A1] for values in found["rounds"])


@pytest.mark.parametrize("code", [2, 4, 13, 25])
def test_how_older_drivers_say_no(look, code):
    found = look("gpus 2", f"fail nvmlDeviceGetTotalEccErrors {code}", then=True)
    assert not any("gpu/ecc_corrected" in values[A0] for values in found["rounds"])


def test_a_driver_that_has_the_older_calls_only(look):
    found = look("gpus 1", "fail nvmlDeviceGetMemoryInfo_v2 13", "fail nvmlDeviceGetCurrentClocksEventReasons 13")
    assert found["rounds"][0][A0]["gpu/mem_used_bytes"] == float(1 << 30)
    assert found["rounds"][0][A0]["gpu/throttle/hw_slowdown"] == 1.0


def test_rates_begin_with_the_second_look(look):
    rounds = look("gpus 1")["rounds"]
    assert ["gpu/nvlink_tx_bytes_per_s" in values[A0] for values in rounds] == [False, True, True]


def test_where_gpm_counts_the_links_the_driver_is_not_asked_to_block_for_them(look):
    rounds = look("gpus 1", "gpm", "fail nvmlDeviceGetPcieThroughput 999")["rounds"]
    assert [values[A0].get("gpu/pcie_tx_bytes_per_s") for values in rounds] == [
        None,
        20.25 * (1 << 20),
        20.25 * (1 << 20),
    ]
    assert "gpm/sm_active_pct" not in rounds[0][A0]
    assert rounds[1][A0]["gpm/dram_active_pct"] == 10.25


def test_every_xid_is_told_once(look):
    found = look("gpus 2", "xid 1 79", "xid 0 48", "mig 1", "xid 1 31 2")
    assert found["xids"] == [[A1, 79, None], [A0, 48, None], [A1, 31, 2]]


@pytest.mark.parametrize("function", ["nvmlEventSetCreate", "nvmlDeviceRegisterEvents", "nvmlEventSetWait_v2"])
def test_without_events_there_are_metrics_all_the_same(look, function):
    found = look("gpus 1", "xid 0 79", f"fail {function} 3")
    assert "gpu/util_pct" in found["rounds"][0][A0]
    assert function == "nvmlDeviceRegisterEvents" or found["xids"] == []


@pytest.mark.parametrize(
    ("lines", "environ"),
    [
        ((), {}),  # no GPU
        (("gpus 1", "fail nvmlInitWithFlags 9"), {}),  # no driver
        (("gpus 1", "fail nvmlDeviceGetHandleByIndex_v2 15"), {}),
        (("gpus 1",), {"LD_LIBRARY_PATH": ""}),  # no NVML
    ],
)
def test_without_a_gpu_it_says_so(look, lines, environ):
    assert look(*lines, **environ).keys() == {"error"}


def test_it_beats_between_the_calls_of_each_device(look):
    assert look("gpus 2")["beats"] > 3 * 2
