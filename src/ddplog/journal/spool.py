"""Owns the spool: where a job's folder is, who may enter it, and the few files beside the journals.

    <spool>/                      0700, owner checked
      <hash of the run's folder>.secret    the job secret of a run whose id was given: two launchers may take part in it
      <job_key>-<run>/            one per run per node
        job.json                  what the run is: JobInfo, and its format; written once, completed under job.lock
        job.lock                  POSIX lock around job.json
        secret                    0600, 64 hex digits: the job secret
        spawn.lock                who starts the agent; holds the CLOCK_BOOTTIME at which that was last tried
        agent.lock                POSIX lock held by the agent while it lives
        aggregator.json           {"endpoint", "pid", "run_dir", "control"}; present while one runs here
        c.sock                    the aggregator's gRPC socket (short: a unix socket's path has 108 bytes)
        done                      everything here has been acknowledged; deleted with the folder an hour later
        <rank>.<incarnation>/     a journal: head, alive, NNNNNN.seg
        system-<rank>.<incarnation>/    what the node's sampler writes about one life of a rank: a journal, too
        logs/                     agent.log, aggregator.log

The job key names the launching process, so that two jobs on one node never meet and a restarted worker comes
back to its run: `DDPLOG_JOB` where `ddplog run` set it, else a hash of user, boot id, pid namespace and the
launcher's pid and start time. The launcher is the nearest ancestor that does not carry the variables that it gives
its ranks: those of the innermost launcher, since a torchrun in a batch job has SLURM's rank variables itself.
horovodrun puts a process of its own between itself and each rank, which is passed over; where it starts ranks through
ssh they have no ancestor in common, and its rendezvous server's address takes the launcher's place.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from ddplog.errors import ConfigError

NETWORK_FILESYSTEMS: Final = {
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x517B: "smb",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x65735546: "fuse",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x19830326: "beegfs",
    0x20030528: "orangefs",
}
"""statfs(2) magic numbers where mmap is not coherent between clients or a fault is a SIGBUS."""

SYSTEM_FOLDER: Final = "system-"
"""How the names of samplers' journals begin."""
JOB_VARIABLE: Final = "DDPLOG_JOB"
DONE: Final = "done"
RANK_VARIABLES: Final = (
    "RANK",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "HOROVOD_RANK",
    "SLURM_PROCID",
    "MV2_COMM_WORLD_RANK",
    "JSM_NAMESPACE_RANK",
)
_HOROVOD: Final = "HOROVOD_RANK"
_HOROVOD_SERVER: Final = ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT")
_INNERMOST: Final = (
    "TORCHELASTIC_RUN_ID",
    _HOROVOD,
    "CROSS_RANK",
    "OMPI_COMM_WORLD_RANK",
    "MV2_COMM_WORLD_RANK",
    "PMI_RANK",
    "JSM_NAMESPACE_RANK",
)
"""What only a launcher's own ranks carry, in the order of worker/identity.py: where one is there, it alone counts."""


JOB_FORMAT: Final = 1
"""Of job.json. New fields have defaults; another number is for a change that an older ddplog would get wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo:
    """What the helpers of one run on one node need to know."""

    run_id: str
    project: str
    name: str | None
    dir: str
    """Absolute folder of runs."""
    sinks: tuple[str, ...]
    tags: tuple[str, ...]
    config: Mapping[str, Any]
    created_unix_ns: int
    launcher_pid: int
    """The process whose end means that no further rank will come; 0: none known."""
    launcher: str
    """`ddplog run`, `torchrun`, ... or `python`: who started the ranks."""
    node_rank: int
    """This node's number in the job."""
    settings: Mapping[str, Any]
    """The remaining settings the helpers use (grace_s, late_s, ...)."""
    launcher_ticks: int = 0
    """When the launcher started: its pid may be another process's by the time that an agent is started again."""

    @property
    def run_dir(self) -> Path:
        return Path(self.dir) / self.run_id


def is_system(name: str) -> bool:
    """Tell whether a journal's folder is a sampler's, from its name."""
    return name.startswith(SYSTEM_FOLDER)


def default_spool() -> Path:
    """Return the first of /var/tmp and /tmp that can be written."""
    for folder in ("/var/tmp", "/tmp"):
        if os.access(folder, os.W_OK | os.X_OK):
            return Path(folder) / f"ddplog-{os.getuid()}"
    return Path(f"/tmp/ddplog-{os.getuid()}")


def open_spool(setting: str | None) -> Path:
    """Make the spool folder if it is not there, and check that it is ours alone and node-local.

    Raises:
        ConfigError: If it is a link, another user's, open to others, on a network filesystem, or cannot be made.
    """
    path = Path(setting) if setting else default_spool()
    make_private(path, "spool")
    kind = filesystem_magic(path)
    if kind in NETWORK_FILESYSTEMS:
        raise ConfigError(
            "spool", str(path), f"is on {NETWORK_FILESYSTEMS[kind]}; a journal needs a node-local filesystem"
        )
    return path


def make_private(path: Path, setting: str) -> None:
    """Make a folder with mode 0700, or check one that exists.

    Raises:
        ConfigError: Naming `setting`, if it is a link, not a folder, another user's, or open to others.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
    except OSError as exc:
        raise ConfigError(setting, str(path), f"cannot make this folder: {exc.strerror}") from exc
    if stat.S_ISLNK(info.st_mode) or not stat.S_ISDIR(info.st_mode):
        raise ConfigError(setting, str(path), "must be a folder, not a link")
    if info.st_uid != os.geteuid():
        raise ConfigError(setting, str(path), f"belongs to user {info.st_uid}; it must be yours")
    if info.st_mode & 0o077:
        raise ConfigError(setting, str(path), f"has mode {info.st_mode & 0o7777:o}; it must be 700: chmod 700 {path}")


def filesystem_magic(path: Path) -> int:
    """Return f_type of statfs(2); Python's os.statvfs does not have it.

    Source: stat(1) reads the same field; on Linux /proc/self/mountinfo names it, which we map back.
    """
    names = {name: magic for magic, name in NETWORK_FILESYSTEMS.items()}
    names.update({"nfs4": 0x6969, "fuseblk": 0x65735546, "cifs": 0xFF534D42, "smb3": 0xFE534D42})
    best, found = "", 0
    resolved = str(path.resolve())
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return 0
    for line in lines:
        left, _, right = line.partition(" - ")
        mount = left.split()[4].replace("\\040", " ")
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, found = mount, names.get(right.split()[0].split(".")[0], 0)
    return found


def job_key(environ: Mapping[str, str], *, has_launcher: bool) -> tuple[str, int]:
    """Return the job key and the launcher's pid (0 if there is none).

    Args:
        environ: The environment of the calling process.
        has_launcher: Whether the environment says that something started this process as a rank.
    """
    given = environ.get(JOB_VARIABLE)
    seen = int(os.readlink("/proc/self"))  # our pid as /proc's mount shows it, which may be an outer namespace's
    marks = _marks(environ)
    anchor = _launcher(seen, marks) if has_launcher or given else seen
    meeting = ""
    if has_launcher and marks == (_HOROVOD,):
        horovodrun = _horovodrun(anchor)
        if horovodrun is None:
            meeting = ":".join(environ.get(name, "") for name in _HOROVOD_SERVER).strip(":")
        anchor = horovodrun or anchor
    pid = 0
    if has_launcher or given:
        # A shell around one rank is not the launcher, but the next best where pids are another namespace's.
        pid = anchor if seen == os.getpid() else os.getppid()
    if given:
        return given, pid
    namespace = os.readlink("/proc/self/ns/pid")
    identity = f"{os.getuid()}:{boot_id()}:{namespace}:{meeting or f'{anchor}:{start_ticks(anchor)}'}"
    return hashlib.sha256(identity.encode()).hexdigest()[:16], pid


def _marks(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return what the launcher gave its ranks and does not carry itself: a name, or name=value."""
    if environ.get(JOB_VARIABLE):  # with its value: a `ddplog run` inside another one carries the outer one's
        return (f"{JOB_VARIABLE}={environ[JOB_VARIABLE]}",)
    return next(((name,) for name in _INNERMOST if name in environ), RANK_VARIABLES)


def _launcher(pid: int, marks: tuple[str, ...]) -> int:
    while True:
        parent = int(_stat_fields(pid)[1])
        if parent <= 1 or not _carries(parent, marks):
            return parent if parent > 0 else pid
        pid = parent


def _horovodrun(pid: int) -> int | None:
    """Return the horovodrun at or above a process: its child, which multiprocessing started, runs a shell, which runs a rank.

    Returns:
        None if there is none: its ranks on other hosts are started through ssh.
    """
    while pid > 1:
        parent = int(_stat_fields(pid)[1])
        with suppress(OSError):
            if b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return parent
        pid = parent
    return None


def _carries(pid: int, marks: tuple[str, ...]) -> bool:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    given = {*entries, *(entry.partition(b"=")[0] for entry in entries)}
    return any(os.fsencode(mark) in given for mark in marks)


def start_ticks(pid: int) -> int:
    """Return when a process started, clock ticks since boot: with it, a pid is a process's for good; 0: there is none."""
    try:
        return int(_stat_fields(pid)[19])
    except OSError:
        return 0


def _stat_fields(pid: int) -> list[str]:
    """Return /proc/<pid>/stat from field 3 (state) on: [1] is the parent's pid, [19] the start time in ticks."""
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def boot_id() -> str:
    """Return the kernel's boot id."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def new_run_id(time_unix_ns: int) -> str:
    """Return a run id that sorts by time: 20260731-142233-7f3a."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(time_unix_ns / 1e9))
    return f"{stamp}-{secrets.token_hex(2)}"


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new content. Durable on return."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a POSIX record lock on `path`, waiting for it. The file must have no other user in this process."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def read_job(folder: Path) -> JobInfo:
    """Read job.json.

    A field that another release has added since is passed over, or has its default.

    Raises:
        FileNotFoundError: If the job has not been declared.
        ValueError: If it is of a format that is not ours, or no job.
    """
    path = folder / "job.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    found = raw.get("format", JOB_FORMAT)
    if found != JOB_FORMAT:
        raise ValueError(f"{path}: format {found}; this ddplog reads {JOB_FORMAT}")
    known = {field.name for field in fields(JobInfo)}
    given = {name: value for name, value in raw.items() if name in known}
    try:
        return JobInfo(**given | {"sinks": tuple(raw["sinks"]), "tags": tuple(raw["tags"])})
    except (KeyError, TypeError) as exc:
        raise ValueError(f"{path}: not a job: {exc!r}") from exc


def secret_path(spool: Path, run_dir: Path) -> Path:
    """Return where the launchers on this machine that take part in one run find its secret."""
    return spool / f"{hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:16]}.secret"


def _agree(path: Path) -> str:
    """Return what is in the file; the first one writes it."""
    while True:
        with suppress(FileNotFoundError):
            os.utime(path)  # it is in use: the clean-up leaves it
            return path.read_text()
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        write_atomic(temporary, secrets.token_hex(32).encode())
        with suppress(FileExistsError):
            os.link(temporary, path)
        temporary.unlink()


def declare_job(folder: Path, info: JobInfo, *, may_meet: bool = False) -> JobInfo:
    """Make the job's folder and job.json; the first rank's word stands, except what it left open.

    Args:
        folder: The job's.
        info: What this rank knows of it.
        may_meet: Whether another launcher on this machine may take part in the run, since its id was given.

    Returns:
        What the job is: `info`, or what an earlier rank declared.
    """
    make_private(folder, "spool")
    with locked(folder / "job.lock"):
        try:
            return read_job(folder)
        except FileNotFoundError:
            (folder / "logs").mkdir(mode=0o700, exist_ok=True)
            secret = os.environ.get("DDPLOG_SECRET")
            if not secret:
                secret = _agree(secret_path(folder.parent, info.run_dir)) if may_meet else secrets.token_hex(32)
            write_atomic(folder / "secret", secret.encode())
            write_atomic(folder / "job.json", json.dumps({"format": JOB_FORMAT, **asdict(info)}, default=str).encode())
            sync_directory(folder.parent)  # what is durable in the folder is found again after a power cut
            return info
