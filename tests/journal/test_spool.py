"""The spool: who may enter it, which job is whose, and files that are whole or not there."""

import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ddplog.errors import ConfigError
from ddplog.journal.spool import (
    NETWORK_FILESYSTEMS,
    RANK_VARIABLES,
    JobInfo,
    declare_job,
    default_spool,
    filesystem_magic,
    job_key,
    locked,
    make_private,
    new_run_id,
    open_spool,
    read_job,
    write_atomic,
)

SOURCE = str(Path(__file__).parents[2] / "src")
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if name not in (*RANK_VARIABLES, "DDPLOG_JOB", "DDPLOG_SECRET", "TORCHELASTIC_RUN_ID")
} | {"PYTHONPATH": SOURCE}


def job_info(**changes):
    values = {
        "run_id": "r1", "project": "p", "name": None, "dir": "/runs", "sinks": ("jsonl",), "tags": ("a", "b"),
        "config": {"lr": 0.1}, "created_unix_ns": 7, "launcher_pid": 5, "launcher": "torchrun", "node_rank": 2,
        "settings": {"grace_s": 1.0},
    }  # fmt: skip
    return JobInfo(**values | changes)


# -- who may enter


def test_a_private_folder_is_made_with_its_parents(tmp_path):
    make_private(tmp_path / "a" / "b", "spool")

    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    make_private(tmp_path / "a" / "b", "spool")  # one that is there, and ours, will do


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o770, 0o755, 0o777])
def test_a_folder_that_others_may_enter_is_refused(tmp_path, mode):
    """It holds the job's secret; and whoever may write there may make links for us to follow."""
    folder = tmp_path / "spool"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        make_private(folder, "spool")

    assert (caught.value.setting, caught.value.value) == ("spool", str(folder))
    assert f"{mode:o}" in caught.value.allowed


@pytest.mark.parametrize("target", ["folder", "missing", "file"])
def test_a_link_is_refused_wherever_it_leads(tmp_path, target):
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match="spool"):
        make_private(tmp_path / "link", "spool")


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch(mode=0o600)
    with pytest.raises(ConfigError, match="spool"):
        make_private(tmp_path / "file", "spool")
    with pytest.raises(ConfigError, match="spool"):
        make_private(tmp_path / "file" / "below", "spool")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(tmp_path):
    folder = tmp_path / "spool"
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, -1)
    with pytest.raises(ConfigError, match="12345"):
        open_spool(str(folder))


def test_the_default_spool_is_this_users():
    """Two users on one node must not meet."""
    assert default_spool().name == f"ddplog-{os.getuid()}"
    assert str(default_spool().parent) in ("/var/tmp", "/tmp")


def test_a_spool_on_a_network_filesystem_is_refused(tmp_path, monkeypatch):
    """Reliability case 18. A journal is a shared mapping: over NFS a reader would see old pages, and a fault would kill training."""
    monkeypatch.setattr("ddplog.journal.spool.filesystem_magic", lambda path: 0x6969)
    with pytest.raises(ConfigError, match="nfs"):
        open_spool(str(tmp_path / "spool"))
    monkeypatch.setattr("ddplog.journal.spool.filesystem_magic", lambda path: 0xEF53)

    assert open_spool(str(tmp_path / "spool")) == tmp_path / "spool"


def statfs_type(path):
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = (ctypes.c_long * 64)()
    assert libc.statfs(os.fsencode(path), buffer) == 0
    return buffer[0] & 0xFFFFFFFF


@pytest.mark.parametrize("path", ["/", "/proc", "/proc/self", "/sys", "/dev", "/dev/shm", "/tmp", "/var/tmp", "."])
def test_the_filesystem_is_the_kernels_word(path):
    """statfs(2) through libc is the truth; a filesystem that is not a network's counts as 0."""
    if not Path(path).exists():
        pytest.skip(f"no {path} here")
    known = statfs_type(path)

    assert filesystem_magic(Path(path)) == (known if known in NETWORK_FILESYSTEMS else 0)


@pytest.mark.parametrize(
    ("path", "magic"),
    [
        ("/home/me", 0x6969), ("/home/me/deep/er", 0x6969), ("/homes", 0), ("/lustre/x", 0x0BD00BD0),
        ("/with space/x", 0x65735546), ("/home/me/scratch/x", 0), ("/smb", 0xFE534D42), ("/", 0),
    ],
)  # fmt: skip
def test_the_innermost_mount_counts(monkeypatch, path, magic):
    """Recorded /proc/self/mountinfo lines: optional fields before the hyphen, escaped blanks, a mount over a mount."""
    lines = """\
25 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 25 0:40 / /home/me rw shared:2 master:3 - nfs4 server:/home rw
31 30 0:41 / /home/me/scratch rw - xfs /dev/sdb rw
32 25 0:42 / /lustre rw - lustre a@tcp:/l rw
33 25 0:43 / /with\\040space rw - fuse.sshfs b: rw
34 25 0:44 / /smb rw - ext4 /dev/sdc rw
35 25 0:45 / /smb rw - smb3 //s/x rw
"""
    monkeypatch.setattr(Path, "read_text", lambda self: lines)
    monkeypatch.setattr(Path, "resolve", lambda self: self)

    assert filesystem_magic(Path(path)) == magic


# -- which job


KEY = """
import os
from ddplog.journal.spool import job_key
print(*job_key(os.environ, has_launcher={has_launcher}), os.getpid(), os.getppid())
"""
LAUNCHER = """
import os, subprocess, sys
for rank in range(2):
    extra = dict(item.split("=") for item in sys.argv[3:])
    environ = os.environ | extra | {sys.argv[1]: str(rank)}
    words = [sys.executable, "-c", sys.argv[2]]
    if rank == 1:
        words = ["/bin/sh", "-c", '"$0" "$@"; exit $?', *words]  # a wrapper script around one of the ranks
    subprocess.run(words, env=environ, check=True)
"""


def ask(*words, **environ):
    """Return (key, launcher pid, own pid, parent's pid) of each rank."""
    done = subprocess.run(words, env=CLEAN | environ, capture_output=True, text=True, check=True, timeout=60)
    return [(key, *map(int, pids)) for key, *pids in (line.split() for line in done.stdout.splitlines())]


def launch(variable, *extra, **environ):
    code = KEY.format(has_launcher=True)
    return ask(sys.executable, "-c", LAUNCHER, variable, code, *extra, **environ)


@pytest.mark.system
@pytest.mark.parametrize("variable", RANK_VARIABLES)
def test_ranks_of_one_launcher_share_a_job_and_two_launchers_do_not(variable):
    """torchrun's own run id is "none" by default and proves nothing: the process that started the ranks does."""
    first, second = launch(variable), launch(variable)

    assert first[0][0] == first[1][0], "a shell between launcher and rank made another job"
    assert second[0][0] == second[1][0]
    assert first[0][0] != second[0][0]


@pytest.mark.system
@pytest.mark.parametrize("mark", ["TORCHELASTIC_RUN_ID=none", "HOROVOD_RANK=0", "OMPI_COMM_WORLD_RANK=0"])
def test_two_launchers_inside_one_batch_job_are_two_jobs(mark):
    """A batch script, and what it starts, carries SLURM's rank variables itself: two torchruns in it are not one."""
    first, second = (launch("RANK", mark, SLURM_PROCID="0") for _ in range(2))

    assert first[0][0] == first[1][0]
    assert first[0][0] != second[0][0]


@pytest.mark.system
def test_the_launcher_is_the_process_whose_end_is_the_jobs():
    """Not a shell around one rank: torchrun may start that rank again."""
    plain, wrapped = launch("RANK")

    assert plain[1] == plain[3]
    assert wrapped[1] == plain[1] != wrapped[3]


HOROVODRUN = """
import os, subprocess, sys
if sys.argv[1:2] == ["--multiprocessing-fork"]:
    shell = "env HOROVOD_RANK=" + sys.argv[2] + ' "$0" -c "$1"; exit $?'
    sys.exit(subprocess.run(["/bin/sh", "-c", shell, sys.executable, os.environ["CODE"]]).returncode)
for rank in "01":
    words = [sys.executable, "-c", os.environ["SELF"], "--multiprocessing-fork", rank]
    subprocess.run(words, check=True, start_new_session=True)
print("launcher", 0, os.getpid(), 0)
"""


@pytest.mark.system
def test_horovodruns_own_processes_around_each_rank_are_not_the_launcher():
    """Of each rank its parent is another process of horovodrun's (multiprocessing, spawn), or a shell below that one."""
    code = KEY.format(has_launcher=True)
    first, second, launcher = ask(sys.executable, "-c", HOROVODRUN, CODE=code, SELF=HOROVODRUN)
    other, *_ = ask(sys.executable, "-c", HOROVODRUN, CODE=code, SELF=HOROVODRUN)

    assert first[0] == second[0] != other[0]
    assert first[1] == second[1] == launcher[2]


@pytest.mark.system
def test_horovodruns_ranks_that_ssh_started_meet_by_its_server():
    """On other hosts than horovodrun's they have no ancestor in common."""
    code = KEY.format(has_launcher=True)
    server = {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "HOROVOD_GLOO_RENDEZVOUS_PORT": "34818"}

    def start(rank, **environ):
        ((key, *_),) = ask(
            "/bin/sh", "-c", 'env HOROVOD_RANK="$1" "$0" -c "$2"; exit $?', sys.executable, rank, code, **environ
        )
        return key

    assert start("0", **server) == start("1", **server)
    assert start("0", **server) != start("1", **server | {"HOROVOD_GLOO_RENDEZVOUS_PORT": "34819"})
    assert start("0") != start("1")


@pytest.mark.system
def test_without_a_launcher_each_process_is_a_job():
    code = KEY.format(has_launcher=False)
    (first,), (second,) = ask(sys.executable, "-c", code), ask(sys.executable, "-c", code)

    assert first[0] != second[0]
    assert first[1] == second[1] == 0


@pytest.mark.system
def test_the_launchers_own_word_wins():
    assert [key for key, *_ in launch("RANK", DDPLOG_JOB="abc")] == ["abc", "abc"]


def test_the_job_of_a_process_stays():
    keys = {job_key({}, has_launcher=False)[0] for _ in range(3)}

    assert len(keys) == 1
    assert keys.pop().isalnum()
    assert job_key({"DDPLOG_JOB": ""}, has_launcher=False) == job_key({}, has_launcher=False)


def test_run_ids_sort_by_time_and_differ():
    day = 86400 * 10**9
    ids = [new_run_id(1_700_000_000 * 10**9 + n * day) for n in range(5)]

    assert ids == sorted(ids)
    assert len({new_run_id(0) for _ in range(20)}) > 1


# -- job.json


def test_a_job_comes_back_as_it_was_declared(tmp_path):
    info = job_info()

    assert declare_job(tmp_path / "j", info) == info
    assert read_job(tmp_path / "j") == info
    assert read_job(tmp_path / "j").run_dir == Path("/runs/r1")


def test_the_first_ranks_word_stands(tmp_path):
    first = declare_job(tmp_path / "j", job_info(run_id="first"))
    secret = (tmp_path / "j" / "secret").read_bytes()

    assert declare_job(tmp_path / "j", job_info(run_id="second", sinks=())) == first
    assert (tmp_path / "j" / "secret").read_bytes() == secret


def test_a_job_that_was_not_declared_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_job(tmp_path)


def test_the_secret_is_private_and_random_or_the_users(tmp_path, monkeypatch):
    monkeypatch.delenv("DDPLOG_SECRET", raising=False)
    secrets = []
    for name in ("a", "b"):
        declare_job(tmp_path / name, job_info())
        path = tmp_path / name / "secret"
        assert path.stat().st_mode & 0o777 == 0o600
        secrets.append(path.read_text())
    assert secrets[0] != secrets[1]
    assert all(len(bytes.fromhex(secret)) == 32 for secret in secrets)
    monkeypatch.setenv("DDPLOG_SECRET", "ab" * 32)
    declare_job(tmp_path / "c", job_info())

    assert (tmp_path / "c" / "secret").read_text() == "ab" * 32


DECLARE = """
import sys
from pathlib import Path
from ddplog.journal.spool import JobInfo, declare_job
sys.stdin.readline()
info = JobInfo(run_id=sys.argv[2], project="p", name=None, dir="/runs", sinks=(), tags=(), config={}, created_unix_ns=1,
               launcher_pid=0, launcher="python", node_rank=0, settings={})
print(declare_job(Path(sys.argv[1]), info).run_id)
"""


@pytest.mark.system
def test_ranks_that_declare_at_once_agree(tmp_path):
    """Every rank calls init() at the same moment, and each made up a run id of its own."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DECLARE, str(tmp_path / "j"), f"run-{n}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=CLEAN,
        )
        for n in range(6)
    ]  # fmt: skip
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]

    assert len(set(answers)) == 1
    assert read_job(tmp_path / "j").run_id == answers[0]
    assert [process.returncode for process in processes] == [0] * 6


# -- files


def test_a_file_is_replaced_whole_and_private(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    write_atomic(path, b"new")

    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_reader_sees_the_old_or_the_new_never_a_part(tmp_path):
    path = tmp_path / "f"
    contents = [json.dumps([n] * 20_000).encode() for n in range(2)]
    write_atomic(path, contents[0])
    seen = set()
    is_over = threading.Event()

    def read():
        while not is_over.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(40):
        write_atomic(path, contents[n % 2])
    is_over.set()
    reader.join()

    assert seen <= set(contents)


FULL = """
import resource, sys
from pathlib import Path
from ddplog.journal.spool import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    write_atomic(Path(sys.argv[1]), b"x" * 1000)
except OSError:
    print("refused")
"""


@pytest.mark.system
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, b"old")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, env=CLEAN, check=True
    )

    assert done.stdout == "refused\n"
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.system
def test_a_lock_keeps_another_process_out_until_it_is_given_back(tmp_path):
    code = (
        "import sys; from pathlib import Path; from ddplog.journal.spool import locked\n"
        "print('up', flush=True)\nwith locked(Path(sys.argv[1])): print('in', flush=True)"
    )
    with locked(tmp_path / "l"):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "l")], stdout=subprocess.PIPE, text=True, env=CLEAN
        )
        assert process.stdout.readline() == "up\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
    assert process.communicate(timeout=30)[0] == "in\n"
