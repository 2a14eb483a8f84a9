"""Learns how processes ended that are not our children: from their pidfds, on Linux 6.15 and later.

The kernel keeps the exit status with a pidfd that was opened while the process lived, and tells it once the parent has
reaped the process. On an older kernel nothing is learned, and only `ddplog run` knows how its ranks ended.
Source: PIDFD_GET_INFO with PIDFD_INFO_EXIT, include/uapi/linux/pidfd.h (6.15).
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
from collections.abc import Callable
from typing import Final

_INFO: Final = struct.Struct("<QQ11Ii")
"""mask, cgroup id, pid and ten ids that are of no use here, wait(2) status: the first version of the kernel's struct."""
_GET_INFO: Final = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11
_EXIT: Final = 1 << 3
_REAPED_WITHIN_NS: Final = 10_000_000_000
"""How long after its process's end a status is waited for: a parent may never look."""


def has_ended(pidfd: int) -> bool:
    """Tell whether a pidfd's process has ended. By poll(): select() takes no descriptor above 1023."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


class Process:
    """A rank's process, watched from while it lives.

    Args:
        find: Returns its pid, 0 once it is gone. Asked again once the pidfd is there: then it is no later process's.
    """

    def __init__(self, find: Callable[[], int]) -> None:
        self.status: int | None = None
        self._descriptor = -1
        pid = find()
        if pid <= 0:
            return
        try:
            self._descriptor = os.pidfd_open(pid)
        except OSError:
            return
        if find() != pid:
            self.close()

    def look(self) -> int | None:
        """Return the wait(2) status if it is known by now."""
        if self._descriptor >= 0 and has_ended(self._descriptor):
            info = bytearray(_INFO.size)
            _INFO.pack_into(info, 0, _EXIT, *[0] * 13)
            try:
                fcntl.ioctl(self._descriptor, _GET_INFO, info)
            except OSError:  # an older kernel
                self.close()
                return None
            mask, *_, status = _INFO.unpack(info)
            if mask & _EXIT:
                self.status = status
                self.close()
        return self.status

    def may_tell(self, waited_ns: int) -> bool:
        """Whether its status is still to come, so long after its journal was closed."""
        return self._descriptor >= 0 and waited_ns < _REAPED_WITHIN_NS

    def close(self) -> None:
        """Close the pidfd; twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __repr__(self) -> str:
        return f"<Process pidfd={self._descriptor} status={self.status}>"
