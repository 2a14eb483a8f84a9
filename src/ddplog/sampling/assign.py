"""Decides which GPU is a rank's, from what the rank's environment said and what NVML sees. Touches nothing.

CUDA numbers the devices of a process by its own rules, without asking NVML:

  - CUDA_VISIBLE_DEVICES not set: all of them. Where GPUs are split (MIG), a process sees one instance: the first.
  - A list of indices: in the order of CUDA_DEVICE_ORDER. PCI_BUS_ID is NVML's order; the default is fastest first, which
    is the same among GPUs of one kind, and not known here otherwise. Anything that does not begin with a number ends
    the list, and so do a negative number and one beyond the last; one that comes twice makes the list empty.
  - `GPU-<uuid>` or the beginning of it, if only one GPU has that; `MIG-<uuid>`; `MIG-GPU-<uuid>/<gi>/<ci>`, as drivers
    before 470 named instances. The first that is not found ends the list; one that comes twice makes it empty.
  - Of split GPUs, one process uses one instance: the first of its list.

Of several that a rank may use, the one on which its process computes is its own, as NVML says; before it computes, and
where NVML sees other pids than we do (a container's), the one at its local rank.
Source: CUDA C++ Programming Guide, environment variables; MIG User Guide, device enumeration; torch/cuda/__init__.py,
_parse_visible_devices and _transform_uuid_to_ordinals, to which the tests compare.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

_NUMBER: Final = re.compile(r"[+-]?\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A MIG device: a compute instance of a part of a GPU."""

    uuid: str
    gpu_instance: int
    compute_instance: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A GPU as NVML lists it, in the order of the PCI bus."""

    uuid: str
    is_split: bool = False
    """Whether MIG is on: then only its instances compute."""
    instances: tuple[Instance, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """The UUIDs of what CUDA can use of it."""
        return tuple(instance.uuid for instance in self.instances) if self.is_split else (self.uuid,)


def visible(gpus: Sequence[Gpu], setting: str | None) -> tuple[str, ...]:
    """Return the UUIDs that a process may use, in the order in which CUDA numbers them.

    Args:
        gpus: The node's.
        setting: CUDA_VISIBLE_DEVICES; None: not set.
    """
    if setting is None:
        found = [device for gpu in gpus for device in gpu.devices]
        split = [device for gpu in gpus if gpu.is_split for device in gpu.devices]
        return tuple(split[:1]) if split else tuple(found)
    found = _by_name(gpus, setting) if setting.startswith(("GPU-", "MIG-")) else _by_index(gpus, setting)
    instances = {instance.uuid for gpu in gpus for instance in gpu.instances}
    return tuple(found[:1]) if found and found[0] in instances else tuple(found)


def assigned(devices: Sequence[str], local_rank: int, computing: Collection[str]) -> str | None:
    """Return the UUID of the rank's own device; None if it has none.

    Args:
        devices: What visible() returned.
        local_rank: Of the rank on its node.
        computing: Devices on which NVML sees the rank's process.
    """
    if not devices:
        return None
    expected = devices[local_rank % len(devices)]
    used = [device for device in devices if device in computing]
    return expected if expected in used or not used else used[0]


def _by_index(gpus: Sequence[Gpu], setting: str) -> list[str]:
    found: list[int] = []
    for word in setting.split(","):
        match = _NUMBER.match(word.strip())
        index = int(match.group()) if match else -1
        if index in found:
            return []
        if not 0 <= index < len(gpus):
            break
        found.append(index)
    return [device for index in found for device in gpus[index].devices]


def _by_name(gpus: Sequence[Gpu], setting: str) -> list[str]:
    prefix = setting[:4]
    found: list[str] = []
    for word in setting.split(","):
        if not word.startswith(prefix):
            break
        matching = _matching(gpus, word)
        if len(matching) != 1:
            break
        if matching[0] in found:
            return []
        found += matching
    return found


def _matching(gpus: Sequence[Gpu], word: str) -> list[str]:
    if word.startswith("MIG-GPU-"):
        uuid, _, place = word.removeprefix("MIG-").partition("/")
        return [
            instance.uuid
            for gpu in gpus
            for instance in gpu.instances
            if gpu.uuid == uuid and f"{instance.gpu_instance}/{instance.compute_instance}" == place
        ]
    if word.startswith("MIG-"):
        return [uuid for gpu in gpus for uuid in gpu.devices if gpu.is_split and uuid.startswith(word)]
    return [gpu.uuid for gpu in gpus if not gpu.is_split and gpu.uuid.startswith(word)]
