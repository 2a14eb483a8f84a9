"""`python -m ddplog.forward`: the arguments of one forwarder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ddplog import killpoints
from ddplog.errors import ConfigError, DdplogError
from ddplog.forward.process import EXIT_UNUSABLE, ProcessHost, forward


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one forwarder, and exit with its status: whoever calls this by name needs the status too."""
    sys.exit(_run(argv))


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddplog.forward", description="Deliver one run to one sink.")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--sink", required=True, help="name or name://target")
    parser.add_argument("--once", action="store_true", help="deliver what is there and end")
    parser.add_argument(
        "--parent-pid", type=int, default=os.getppid(), help="whose death makes this process end once it is idle"
    )
    arguments = parser.parse_args(argv)
    host = ProcessHost(arguments.parent_pid)
    try:
        killpoints.arm(os.environ)
        return forward(arguments.run_dir, arguments.sink, host, once=arguments.once)
    except DdplogError as exc:
        sys.stderr.write(f"ddplog.forward: {exc}\n")
        return EXIT_UNUSABLE if isinstance(exc, ConfigError) else 1


if __name__ == "__main__":
    main()
