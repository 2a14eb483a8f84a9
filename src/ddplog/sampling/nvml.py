"""Reads the node's GPUs through NVML. May block for as long as the driver does: only the sampler's process calls it.

What a device, or its driver, refuses is not asked again and is left out: no value is better than a 0 that says nothing.
What fails otherwise is left out this time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import pynvml

from ddplog.sampling.assign import Gpu, Instance

_logger = logging.getLogger("ddplog.sampler")

_REFUSED: Final = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_DEPRECATED,
)
"""Answers that will not change: the last three are how older drivers, and MIG devices, say the same."""
_ALL_LINKS: Final = 0xFFFFFFFF
_NO_INSTANCE: Final = 0xFFFFFFFF
_MOST_XIDS: Final = 64
"""Read at once; a GPU that is gone may report them without end."""
_MIB: Final = float(1 << 20)
_KIB: Final = 1024.0

THROTTLE_REASONS: Final = {
    "idle": pynvml.nvmlClocksEventReasonGpuIdle,
    "clocks_setting": pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
    "sw_power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
    "sw_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw_power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "display_clocks": pynvml.nvmlClocksEventReasonDisplayClockSetting,
}
"""Name below `sys/gpu/throttle/` -> bit."""

_GPM: Final = {
    "gpm/graphics_active_pct": (pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL, 1.0),
    "gpm/sm_active_pct": (pynvml.NVML_GPM_METRIC_SM_UTIL, 1.0),
    "gpm/sm_occupancy_pct": (pynvml.NVML_GPM_METRIC_SM_OCCUPANCY, 1.0),
    "gpm/tensor_active_pct": (pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL, 1.0),
    "gpm/fp64_active_pct": (pynvml.NVML_GPM_METRIC_FP64_UTIL, 1.0),
    "gpm/fp32_active_pct": (pynvml.NVML_GPM_METRIC_FP32_UTIL, 1.0),
    "gpm/fp16_active_pct": (pynvml.NVML_GPM_METRIC_FP16_UTIL, 1.0),
    "gpm/dram_active_pct": (pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL, 1.0),
    "gpu/pcie_tx_bytes_per_s": (pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC, _MIB),
    "gpu/pcie_rx_bytes_per_s": (pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC, _MIB),
    "gpu/nvlink_tx_bytes_per_s": (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC, _MIB),
    "gpu/nvlink_rx_bytes_per_s": (pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC, _MIB),
}
"""Name below `sys/` -> (GPM metric, bytes of its unit)."""


class NoGpusError(Exception):
    """There is no NVML, no driver, or no GPU."""


class Xid(NamedTuple):
    """A critical error that the driver reported of a GPU."""

    uuid: str
    code: int
    gpu_instance: int | None
    """The part of a split GPU that it concerns; None: all of it."""


class Nvml:
    """The node's GPUs.

    Args:
        beat: Called between the calls to the driver, so that whoever watches sees that none of them hangs.

    Raises:
        NoGpusError: If there is nothing to read.
    """

    def __init__(self, beat: Callable[[], None]) -> None:
        self._beat = beat
        beat()
        try:
            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as exc:
            raise NoGpusError(str(exc)) from exc
        if not handles:
            raise NoGpusError("no GPU is visible")
        self._devices: dict[str, _Device] = {}
        self.gpus = tuple(self._describe(handle) for handle in handles)
        self._events = self._register(handles)

    def _describe(self, handle: Any) -> Gpu:
        self._beat()
        uuid = str(pynvml.nvmlDeviceGetUUID(handle))
        self._devices[uuid] = _Device(handle)
        try:
            is_split = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
            count = pynvml.nvmlDeviceGetMaxMigDeviceCount(handle) if is_split else 0
        except pynvml.NVMLError:
            return Gpu(uuid=uuid)
        instances = []
        for index in range(count):
            try:
                part = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                instance = Instance(
                    uuid=str(pynvml.nvmlDeviceGetUUID(part)),
                    gpu_instance=pynvml.nvmlDeviceGetGpuInstanceId(part),
                    compute_instance=pynvml.nvmlDeviceGetComputeInstanceId(part),
                )
            except pynvml.NVMLError:  # there may be fewer than the most
                continue
            instances.append(instance)
            self._devices[instance.uuid] = _Device(part, whole=handle, gpu_instance=instance.gpu_instance)
        return Gpu(uuid=uuid, is_split=is_split, instances=tuple(instances))

    def _register(self, handles: Iterable[Any]) -> Any:
        try:
            events = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError:
            return None
        for handle in handles:
            try:
                pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)
            except pynvml.NVMLError as exc:
                _logger.info("no XID events of a GPU: %s", exc)
        return events

    def values(self, uuid: str) -> dict[str, float]:
        """Return the metrics of a device below `sys/` that can be had now."""
        self._beat()
        return self._devices[uuid].values()

    def processes(self, uuid: str) -> dict[int, dict[str, float]]:
        """Return, by pid, the share of each process that computes on a device: metrics below `sys/proc/`."""
        self._beat()
        return self._devices[uuid].processes()

    def xids(self) -> list[Xid]:
        """Return the critical errors since the last call; does not wait for any."""
        self._beat()
        found: list[Xid] = []
        while self._events is not None and len(found) < _MOST_XIDS:
            try:
                event = pynvml.nvmlEventSetWait(self._events, 0)
                part = None if event.gpuInstanceId == _NO_INSTANCE else int(event.gpuInstanceId)
                found.append(Xid(str(pynvml.nvmlDeviceGetUUID(event.device)), int(event.eventData), part))
            except pynvml.NVMLError as exc:
                if exc.value != pynvml.NVML_ERROR_TIMEOUT:
                    _logger.info("no further XID events: %s", exc)
                    self._events = None
                break
        return found

    def __repr__(self) -> str:
        return f"<Nvml gpus={len(self.gpus)} devices={len(self._devices)}>"


class _Device:
    """A GPU, or a MIG instance of one.

    Args:
        handle: NVML's.
        whole: Of an instance, the GPU's handle.
        gpu_instance: Of an instance.
    """

    def __init__(self, handle: Any, whole: Any = None, gpu_instance: int = -1) -> None:
        self._handle = handle
        self._whole = whole
        self._gpu_instance = gpu_instance
        self._refused: set[Callable[[], Mapping[str, float]]] = set()
        self._readers = (
            self._utilisation,
            self._memory,
            self._power,
            self._power_limit,
            self._temperature,
            self._sm_clock,
            self._mem_clock,
            self._throttling,
            self._ecc_corrected,
            self._ecc_uncorrected,
            self._gpm,
            self._nvlink,
            self._pcie,
        )
        self._gpm_samples: list[Any] = []
        self._gpm_rates: set[str] = set()
        """What GPM tells, so that nothing else need be asked for it."""
        self._is_gpm_known = False
        """Whether it has told anything yet; the first sample only begins."""
        self._links: dict[str, tuple[float, float]] = {}
        """Name -> (seconds, bytes) of the last call."""
        self._seen_us = 0
        self._processes_refused = False
        self._shares_refused = False

    def values(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for read in self._readers:
            if read in self._refused:
                continue
            try:
                found.update(read())
            except pynvml.NVMLError as exc:
                if exc.value in _REFUSED:
                    self._refused.add(read)
        return found

    def _utilisation(self) -> dict[str, float]:
        rates = pynvml.nvmlDeviceGetUtilizationRates(self._handle)
        return {"gpu/util_pct": float(rates.gpu), "gpu/mem_util_pct": float(rates.memory)}

    def _memory(self) -> dict[str, float]:
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle, version=pynvml.nvmlMemory_v2)  # without the reserved
        except pynvml.NVMLError:
            memory = pynvml.nvmlDeviceGetMemoryInfo(self._handle)
        return {"gpu/mem_used_bytes": float(memory.used), "gpu/mem_total_bytes": float(memory.total)}

    def _power(self) -> dict[str, float]:
        return {"gpu/power_w": pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1000}

    def _power_limit(self) -> dict[str, float]:
        return {"gpu/power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(self._handle) / 1000}

    def _temperature(self) -> dict[str, float]:
        return {"gpu/temp_c": float(pynvml.nvmlDeviceGetTemperature(self._handle, pynvml.NVML_TEMPERATURE_GPU))}

    def _sm_clock(self) -> dict[str, float]:
        return {"gpu/sm_clock_mhz": float(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_SM))}

    def _mem_clock(self) -> dict[str, float]:
        return {"gpu/mem_clock_mhz": float(pynvml.nvmlDeviceGetClockInfo(self._handle, pynvml.NVML_CLOCK_MEM))}

    def _throttling(self) -> dict[str, float]:
        try:
            bits = int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle))
        except pynvml.NVMLError_FunctionNotFound:  # a driver before 535
            bits = int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle))
        found = {f"gpu/throttle/{name}": float(bool(bits & bit)) for name, bit in THROTTLE_REASONS.items()}
        return {"gpu/throttle_bits": float(bits), **found}

    def _ecc_corrected(self) -> dict[str, float]:
        return {"gpu/ecc_corrected": self._ecc(pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)}

    def _ecc_uncorrected(self) -> dict[str, float]:
        return {"gpu/ecc_uncorrected": self._ecc(pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)}

    def _ecc(self, kind: int) -> float:
        return float(pynvml.nvmlDeviceGetTotalEccErrors(self._handle, kind, pynvml.NVML_VOLATILE_ECC))

    def _gpm(self) -> dict[str, float]:
        """Return the means since the last call, of devices that count them (Hopper and later)."""
        if not self._gpm_samples:
            if not pynvml.nvmlGpmQueryDeviceSupport(self._whole or self._handle).isSupportedDevice:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            self._gpm_samples = [pynvml.nvmlGpmSampleAlloc(), pynvml.nvmlGpmSampleAlloc()]
            self._take_gpm_sample(self._gpm_samples[1])
            return {}
        self._gpm_samples.reverse()
        before, now = self._gpm_samples
        self._take_gpm_sample(now)
        wanted = pynvml.c_nvmlGpmMetricsGet_t()
        wanted.version, wanted.numMetrics = pynvml.NVML_GPM_METRICS_GET_VERSION, len(_GPM)
        wanted.sample1, wanted.sample2 = before, now
        for place, (metric, _) in enumerate(_GPM.values()):
            wanted.metrics[place].metricId = metric
        pynvml.nvmlGpmMetricsGet(wanted)
        found = {}
        for place, (name, (_, factor)) in enumerate(_GPM.items()):
            metric = wanted.metrics[place]
            if metric.nvmlReturn == pynvml.NVML_SUCCESS and metric.value == metric.value:
                found[name] = float(metric.value) * factor
        self._gpm_rates = {name for name in found if name.startswith("gpu/")}
        self._is_gpm_known = True
        return found

    def _take_gpm_sample(self, sample: Any) -> None:
        if self._whole is None:
            pynvml.nvmlGpmSampleGet(self._handle, sample)
        else:
            pynvml.nvmlGpmMigSampleGet(self._whole, self._gpu_instance, sample)

    def _nvlink(self) -> dict[str, float]:
        """Return the rates from the counters of all links together, in devices that GPM does not tell them of."""
        if "gpu/nvlink_tx_bytes_per_s" in self._gpm_rates:
            return {}
        names = {
            "gpu/nvlink_tx_bytes_per_s": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
            "gpu/nvlink_rx_bytes_per_s": pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
        }
        fields = pynvml.nvmlDeviceGetFieldValues(self._handle, [(number, _ALL_LINKS) for number in names.values()])
        now: dict[str, tuple[float, float]] = {}
        for name, field in zip(names, fields, strict=True):
            if field.nvmlReturn != pynvml.NVML_SUCCESS:
                raise pynvml.NVMLError(field.nvmlReturn)
            now[name] = field.timestamp / 1e6, field.value.ullVal * _KIB  # when the driver read it
        before, self._links = self._links, now
        return {
            name: (total - before[name][1]) / (at_s - before[name][0])
            for name, (at_s, total) in now.items()
            if before and at_s > before[name][0] and total >= before[name][1]
        }

    def _pcie(self) -> dict[str, float]:
        """Return the rates that the driver counts for 20 ms each, while it blocks; GPM tells them without."""
        if "gpu/pcie_tx_bytes_per_s" in self._gpm_rates or (self._gpm_samples and not self._is_gpm_known):
            return {}
        return {
            "gpu/pcie_tx_bytes_per_s": _KIB
            * pynvml.nvmlDeviceGetPcieThroughput(self._handle, pynvml.NVML_PCIE_UTIL_TX_BYTES),
            "gpu/pcie_rx_bytes_per_s": _KIB
            * pynvml.nvmlDeviceGetPcieThroughput(self._handle, pynvml.NVML_PCIE_UTIL_RX_BYTES),
        }

    def processes(self) -> dict[int, dict[str, float]]:
        found: dict[int, dict[str, float]] = {}
        if self._processes_refused:
            return found
        try:
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
                used = process.usedGpuMemory
                found[int(process.pid)] = {} if used is None else {"gpu_mem_bytes": float(used)}
        except pynvml.NVMLError as exc:
            self._processes_refused = exc.value in _REFUSED
            return found
        for pid, share in self._shares().items():
            if pid in found:
                found[pid]["gpu_sm_util_pct"] = share
        return found

    def _shares(self) -> dict[int, float]:
        """Return the newest share of the SMs' time of each process that has one."""
        newest: dict[int, tuple[int, float]] = {}
        if self._shares_refused:
            return {}
        try:
            for sample in pynvml.nvmlDeviceGetProcessUtilization(self._handle, self._seen_us):
                newest[int(sample.pid)] = max(
                    newest.get(int(sample.pid), (0, 0.0)), (int(sample.timeStamp), float(sample.smUtil))
                )
        except pynvml.NVMLError as exc:  # NotFound: nobody has computed since
            self._shares_refused = exc.value in _REFUSED
        self._seen_us = max([self._seen_us, *(at for at, _ in newest.values())])
        return {pid: share for pid, (at, share) in newest.items() if at}

    def __repr__(self) -> str:
        return f"<_Device refused={sorted(read.__name__ for read in self._refused)}>"
