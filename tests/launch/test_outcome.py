"""What a job's end means."""

import signal

import pytest

from ddplog.launch.outcome import (
    FINISHED,
    RankFailure,
    command_ended,
    describe_exit,
    describe_signal,
    find_cause,
    launcher_failed,
    launcher_signalled,
    ranks_failed,
)

SLURM = {"SLURM_JOB_ID": "7"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}


def failure(rank, exit_code, timestamp_s=100.0, message=""):
    return RankFailure(rank=rank, pid=1000 + rank, exit_code=exit_code, timestamp_s=timestamp_s, message=message)


def test_finished_has_no_cause():
    assert (FINISHED.status, FINISHED.detail, FINISHED.exit_code, FINISHED.death_signal) == ("finished", "", 0, None)


@pytest.mark.parametrize(
    ("number", "text"), [(9, "signal 9 (SIGKILL)"), (15, "signal 15 (SIGTERM)"), (63, "signal 63"), (0, "signal 0")]
)
def test_signals_are_named_where_they_have_a_name(number, text):
    assert describe_signal(number) == text


def test_an_exit_code_below_zero_is_a_signal():
    assert describe_exit(-9) == "signal 9 (SIGKILL)"
    assert describe_exit(7) == "exit code 7"
    assert failure(0, -9).signal == 9
    assert failure(0, 9).signal is None


def test_the_first_failure_is_the_cause():
    assert find_cause([failure(0, 1, 103), failure(1, 7, 101), failure(2, -9, 102)]).rank == 1


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        ([failure(0, 1), failure(2, -9)], 2),
        ([failure(0, -signal.SIGTERM), failure(1, 7)], 1),
        ([failure(0, -signal.SIGABRT), failure(1, 1)], 1),
        ([failure(0, -signal.SIGABRT), failure(1, -signal.SIGTERM)], 0),
        ([failure(3, 1), failure(2, 1)], 2),
        ([failure(0, -signal.SIGTERM, 100.2), failure(1, -signal.SIGSEGV, 100.9)], 1),
    ],
    ids=[
        "killed before exited",
        "stopped by torchrun last",
        "watchdog after exit",
        "watchdog before stopped",
        "rank",
        "whole seconds",
    ],
)
def test_within_one_second_consequences_come_last(failures, cause):
    """torchrun's clock has seconds; a peer whose collective broke exits in the same one."""
    assert find_cause(failures).rank == cause


def test_failed_ranks_make_torchruns_exit_code_and_keep_every_rank():
    failures = [failure(0, -15, 101), failure(2, 7, 100)]
    outcome = ranks_failed(failures)
    assert (outcome.status, outcome.detail) == ("failed", "rank 2: exit code 7")
    assert (outcome.exit_code, outcome.death_signal, outcome.failures) == (1, None, tuple(failures))


def test_the_detail_has_the_recorded_message():
    outcome = ranks_failed([failure(1, 1, message="ValueError: no such file")])
    assert outcome.detail == "rank 1: exit code 1: ValueError: no such file"


def test_a_killed_rank_is_named_with_its_signal():
    assert ranks_failed([failure(2, -9)]).detail == "rank 2: signal 9 (SIGKILL)"


def test_a_broken_launcher_is_a_failed_run():
    outcome = launcher_failed("torchrun: no rendezvous")
    assert (outcome.status, outcome.detail, outcome.exit_code) == ("failed", "torchrun: no rendezvous", 1)


@pytest.mark.parametrize(
    ("number", "environ", "status", "detail"),
    [
        (signal.SIGINT, {}, "killed", "signal 2 (SIGINT)"),
        (signal.SIGTERM, {}, "killed", "signal 15 (SIGTERM)"),
        (signal.SIGHUP, SLURM, "killed", "signal 1 (SIGHUP)"),
        (signal.SIGINT, SLURM, "killed", "signal 2 (SIGINT)"),
        (signal.SIGTERM, SLURM, "preempted", "signal 15 (SIGTERM) under SLURM"),
        (signal.SIGUSR1, SLURM, "preempted", "signal 10 (SIGUSR1) under SLURM"),
        (signal.SIGTERM, KUBERNETES, "preempted", "signal 15 (SIGTERM) under Kubernetes"),
    ],
)
def test_a_signalled_launcher_is_killed_or_preempted(number, environ, status, detail):
    outcome = launcher_signalled(number, environ, dies=False)
    assert (outcome.status, outcome.detail, outcome.exit_code, outcome.death_signal) == (status, detail, 1, None)
    assert outcome.is_hurried == (number != signal.SIGINT)


def test_a_launcher_that_must_die_of_its_signal_says_so():
    assert launcher_signalled(signal.SIGINT, {}, dies=True).death_signal == signal.SIGINT


@pytest.mark.parametrize(
    ("exit_code", "received", "environ", "expected"),
    [
        (0, [], {}, ("finished", "", 0, None)),
        (7, [], {}, ("failed", "exit code 7", 7, None)),
        (-11, [], {}, ("failed", "signal 11 (SIGSEGV)", 0, 11)),
        (-9, [], SLURM, ("failed", "signal 9 (SIGKILL)", 0, 9)),
        (-15, [15], {}, ("killed", "signal 15 (SIGTERM)", 0, 15)),
        (-2, [2, 2], {}, ("killed", "signal 2 (SIGINT)", 0, 2)),
        (0, [15], {}, ("killed", "signal 15 (SIGTERM)", 0, None)),
        (3, [15], {}, ("killed", "signal 15 (SIGTERM), then exit code 3", 3, None)),
        (0, [15], SLURM, ("preempted", "signal 15 (SIGTERM) under SLURM", 0, None)),
        (0, [10], SLURM, ("preempted", "signal 10 (SIGUSR1) under SLURM", 0, None)),
        (0, [10, 12], {}, ("finished", "", 0, None)),
        (4, [12], SLURM, ("failed", "exit code 4", 4, None)),
    ],
)
def test_a_commands_end(exit_code, received, environ, expected):
    outcome = command_ended(exit_code, received, environ)
    assert (outcome.status, outcome.detail, outcome.exit_code, outcome.death_signal) == expected


def test_a_scheduler_gives_little_time_and_a_user_gives_more():
    assert command_ended(-15, [15], {}).is_hurried
    assert not command_ended(-2, [2], {}).is_hurried
    assert not command_ended(0, [], SLURM).is_hurried
