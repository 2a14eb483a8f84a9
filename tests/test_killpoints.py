import os
import signal

import pytest

from ddplog import killpoints
from ddplog.errors import ConfigError


@pytest.fixture(autouse=True)
def _disarm():
    yield
    killpoints.arm({})


def end_of_child(act):
    """Fork, act, and return the child's wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("environ", [{}, {"DDPLOG_KILL_AT": ""}, {"DDPLOG_KILL_AT": " , "}])
def test_nothing_is_armed_unless_the_variable_says_so(environ):
    killpoints.arm({"DDPLOG_KILL_AT": "agent.after_ack:1"})
    killpoints.arm(environ)
    for point in killpoints.POINTS:
        killpoints.reach(point)


def test_an_armed_point_kills_its_process_and_no_other_point_does():
    killpoints.arm({"DDPLOG_KILL_AT": "agent.after_ack:1, writer.after_rename:0"})
    assert end_of_child(lambda: killpoints.reach("agent.after_ack")) == signal.SIGKILL
    assert end_of_child(lambda: killpoints.reach("writer.after_rename")) == 0
    assert end_of_child(lambda: killpoints.reach("agent.before_bye")) == 0


def test_a_kill_is_written_down_first(tmp_path):
    path = tmp_path / "kills"
    killpoints.arm({"DDPLOG_KILL_AT": "agent.after_ack:1", "DDPLOG_KILL_LOG": str(path)})
    for _ in range(2):
        end_of_child(lambda: killpoints.reach("agent.after_ack"))
    assert [line.split()[0] for line in path.read_text().splitlines()] == ["agent.after_ack"] * 2


@pytest.mark.parametrize("text", ["nowhere:1", "agent.after_ack", "agent.after_ack:", "agent.after_ack:x", "agent.after_ack:2",
                                  "agent.after_ack:-1", "agent.after_ack:nan", "agent.after_ack:1,nowhere:1"])  # fmt: skip
def test_what_cannot_be_armed_is_refused_and_changes_nothing(text):
    with pytest.raises(ConfigError) as caught:
        killpoints.arm({"DDPLOG_KILL_AT": text})
    assert caught.value.setting == "DDPLOG_KILL_AT"
    assert caught.value.value == text
    for point in killpoints.POINTS:
        killpoints.reach(point)


def test_an_unknown_point_is_told_what_there_is():
    with pytest.raises(ConfigError, match=r"no kill point 'nowhere'; there are .*forwarder\.after_cursor"):
        killpoints.arm({"DDPLOG_KILL_AT": "nowhere:1"})
