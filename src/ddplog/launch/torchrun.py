"""Runs torchrun in this process, so that each rank's exit code and signal are known. The only owner of torch.

Everything is torchrun's own: its parser, `torch.distributed.run.run` and `@record`. A failed job leaves the
same table on stderr and the same exit code, 1.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddplog.errors import ConfigError, DdplogError
from ddplog.launch.outcome import (
    FINISHED,
    Outcome,
    RankFailure,
    launcher_failed,
    launcher_signalled,
    ranks_failed,
)

if TYPE_CHECKING:
    import argparse


def is_installed() -> bool:
    """Return whether torch can be imported, without importing it."""
    return importlib.util.find_spec("torch") is not None


def make_parser() -> argparse.ArgumentParser:
    """Return torchrun's parser.

    Raises:
        DdplogError: If torch is not installed.
    """
    if not is_installed():
        raise DdplogError(
            "torch is not installed, and `ddplog run SCRIPT` uses its launcher: "
            "`pip install torch`, or start any other launcher with `ddplog run -- COMMAND`"
        )
    from torch.distributed.run import get_args_parser

    parser: argparse.ArgumentParser = get_args_parser()
    handled = parser.get_default("signals_to_handle")
    if handled and "SIGUSR1" not in handled:  # SLURM's --signal: torchrun alone would die and leave its ranks behind
        parser.set_defaults(signals_to_handle=f"{handled},SIGUSR1")
    return parser


def check_script(arguments: argparse.Namespace) -> None:
    """Check that the script is there, before anything starts.

    Raises:
        ConfigError: If it is not. A module (`-m`) is left to Python, which alone can tell.
    """
    script: str = arguments.training_script
    if arguments.module:
        return
    if arguments.no_python and not arguments.run_path:
        if shutil.which(script) is None:
            raise ConfigError("script", script, "there is no such program")
        return
    if not Path(script).exists():
        hint = f"; for a program write `ddplog run -- {script} ...`" if shutil.which(script) else ""
        raise ConfigError("script", script, f"there is no such file{hint}")


def run_torchrun(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Outcome:
    """Run the job until it ends. Blocks; main thread only, since torchrun installs signal handlers.

    Args:
        arguments: What `make_parser()`'s parser made of the command line.
        environ: Tells whether a scheduler runs us. The workers inherit `os.environ`.
    """
    with _noting_failures() as earlier:
        outcome = _run_torchrun(arguments, environ)
    known = {(failure.rank, failure.pid) for failure in outcome.failures}
    restarted = tuple(failure for failure in earlier if (failure.rank, failure.pid) not in known)
    return replace(outcome, failures=restarted + outcome.failures)


def _run_torchrun(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Outcome:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
    from torch.distributed.run import run

    try:
        record(run)(arguments)
    except ChildFailedError as exc:
        _show(exc)
        return ranks_failed(_read_failures(exc.failures))
    except SignalException as exc:
        _show(exc)
        return launcher_signalled(int(exc.sigval), environ, dies=False)
    except KeyboardInterrupt as exc:  # Ctrl-C before torchrun has installed its handlers.
        _show(exc)
        return launcher_signalled(signal.SIGINT, environ, dies=True)
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        return FINISHED if code == 0 else launcher_failed(f"torchrun: exit code {code}", code)
    except Exception as exc:  # noqa: BLE001 - torchrun may raise anything, and the run must still learn its end
        _show(exc)
        return launcher_failed(f"torchrun: {type(exc).__name__}: {_first_line(str(exc))}")
    return FINISHED


@contextmanager
def _noting_failures() -> Iterator[list[RankFailure]]:
    """Note every failure that torchrun's agent sees: it tells only those of the last group, not of a restarted one."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    seen: list[RankFailure] = []
    monitor = getattr(LocalElasticAgent, "_monitor_workers", None)
    if monitor is None:  # another torch: what it restarted stays untold
        yield seen
        return

    def note(agent: Any, group: Any) -> Any:
        result = monitor(agent, group)
        with suppress(Exception):  # whatever else another torch does there, the job goes on
            seen.extend(_read_failures(result.failures))
        return result

    LocalElasticAgent._monitor_workers = note  # noqa: SLF001 - there is no public place to learn it
    try:
        yield seen
    finally:
        LocalElasticAgent._monitor_workers = monitor  # noqa: SLF001


def _show(exc: BaseException) -> None:
    """Print what an uncaught exception prints: from torchrun's own frames on."""
    trace = exc.__traceback__
    sys.excepthook(type(exc), exc, trace.tb_next if trace is not None else None)


def _read_failures(failures: Mapping[int, Any]) -> Sequence[RankFailure]:
    """Translate torch's ProcessFailure objects, keyed by global rank."""
    return [
        RankFailure(
            rank=rank,
            pid=failure.pid,
            exit_code=failure.exitcode,
            timestamp_s=float(failure.timestamp),
            message=_read_message(failure.message),
        )
        for rank, failure in sorted(failures.items())
    ]


def _read_message(message: Any) -> str:
    """Return the exception's own line where the script was decorated with `@record`, else nothing."""
    if isinstance(message, Mapping):
        return _first_line(str(message.get("message", "")))
    return ""  # A string is torch's advice to use @record, or repeats the signal.


def _first_line(text: str, limit: int = 200) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= limit else line[: limit - 3] + "..."
