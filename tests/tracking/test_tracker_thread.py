"""The tracker's thread: everything once, acknowledged after it was kept, and no failure unsaid."""

from __future__ import annotations

import logging
import threading

import pytest

from esper.messages import Metrics, RunEnded
from esper.tracking import TrackerError, TrackerRunner
from esper.tracking.tracker_thread import MAX_AHEAD, SeenMessages


class Listener:
    """Remembers what it is told; can be made to fail."""

    wants_model = False

    def __init__(self, fail_at: str = "", error: Exception | None = None) -> None:
        self.fail_at, self.error = fail_at, error or OSError("no space left on device")
        self.messages, self.acts, self.end = [], [], None

    def _act(self, name: str) -> None:
        self.acts.append(name)
        if name == self.fail_at:
            raise self.error

    def open(self, info) -> None:
        self._act("open")

    def record(self, messages) -> None:
        self._act("record")
        self.messages += messages

    def flush(self) -> None:
        self._act("flush")

    def close(self, status, summary) -> None:
        self._act("close")
        self.end = (status, summary)


def run(bus, info, trackers, **options) -> TrackerRunner:
    runner = TrackerRunner(bus, info, trackers, poll_s=0.01, **options)
    runner.start()
    return runner


def test_every_message_comes_once_and_in_order(bus, info, story, publish):
    listener = Listener()
    runner = run(bus, info, [listener])
    told = story(300)
    publish(info.run, told)
    assert runner.drain(20.0)
    runner.close("FINISHED")
    for kind in {type(message) for _, message in told}:
        assert [m for m in listener.messages if type(m) is kind] == [m for _, m in told if type(m) is kind]
    assert listener.end == ("FINISHED", told[-1][1].summary)
    assert bus.counts()["acknowledged"] == len(told)


def test_messages_stay_pending_until_they_were_flushed(bus, info, story, publish):
    runner = run(bus, info, [Listener()], flush_s=3600.0)
    publish(info.run, story(20))
    assert runner.drain(20.0)
    assert bus.counts()["acknowledged"] == 0
    runner.close("FINISHED")
    assert bus.counts()["acknowledged"] == len(story(20))


def test_a_tracker_that_fails_is_said_once_and_raised_at_close_while_the_others_go_on(bus, info, story, publish, caplog):
    broken, sound = Listener(fail_at="record"), Listener()
    runner = run(bus, info, [broken, sound])
    with caplog.at_level(logging.ERROR, "esper.tracking"):
        publish(info.run, story(50))
        assert runner.drain(20.0)
        publish(info.run, story(50, since=50))
        assert runner.drain(20.0)
    assert len(caplog.records) == 1 and "no space left" in caplog.text
    assert runner.error is not None
    with pytest.raises(TrackerError, match=r"Listener failed.*no space left"):
        runner.close("FINISHED")
    assert broken.acts == ["open", "record"]
    assert sound.end[0] == "FINISHED"


def test_two_failures_are_both_named(bus, info, story, publish):
    runner = run(bus, info, [Listener("record"), Listener("close", ValueError("later"))])
    publish(info.run, story(5))
    with pytest.raises(TrackerError, match=r"no space left.*later"):
        runner.close("FINISHED")


def test_a_bus_that_breaks_is_raised_at_close(bus, info):
    runner = run(bus, info, [Listener()])
    runner._consumers["events"].read = lambda count: 1 / 0
    with pytest.raises(TrackerError, match=r"bus.*division"):
        runner.close("FINISHED")


def test_starting_does_not_wait_for_a_tracker_that_opens_slowly(bus, info):
    go_on, slow = threading.Event(), Listener()
    slow.open = lambda info: go_on.wait() and slow.acts.append("open")
    runner = run(bus, info, [slow])
    assert slow.acts == []
    go_on.set()
    runner.close("FINISHED", grace_s=0.0)
    assert slow.acts[0] == "open"


def test_a_run_without_an_end_is_closed_with_the_status_given(bus, info, story, publish):
    listener = Listener()
    runner = run(bus, info, [listener])
    publish(info.run, story(20, until=15))
    runner.close("KILLED")
    assert listener.end == ("KILLED", {})
    runner.close("FAILED")
    assert listener.acts.count("close") == 1


def test_a_tracker_that_never_returns_does_not_hold_the_program_for_ever(bus, info, story, publish):
    go_on, slow = threading.Event(), Listener()
    slow.close = lambda status, summary: go_on.wait()
    runner = run(bus, info, [slow])
    publish(info.run, story(5))
    with pytest.raises(TrackerError, match="did not finish within 0 s"):
        runner.close("FINISHED", timeout_s=0.2)
    go_on.set()


def test_two_groups_each_get_everything(bus, info, story, publish):
    first, second = Listener(), Listener()
    runners = [run(bus, info, [first]), run(bus, info, [second], group="progress")]
    publish(info.run, story(30))
    for runner in runners:
        runner.close("FINISHED")
    assert sum(isinstance(m, Metrics) for m in first.messages) == sum(isinstance(m, Metrics) for m in second.messages) == 30
    assert sum(isinstance(m, RunEnded) for m in second.messages) == 1


def test_a_message_handed_out_twice_is_taken_once():
    seen = SeenMessages()
    order = ["1-1", "1-3", "1-2", "1-3", "1-1", "2-1", "1-4", "2-1"]
    assert [seen.is_new("events", "main", entry) for entry in order] == [
        True,
        True,
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert seen.is_new("telemetry", "main", "1-1") and seen.is_new("events", "other", "1-1")


def test_remembering_takes_constant_memory_even_after_a_loss():
    seen = SeenMessages()
    for sequence in range(2, 3 * MAX_AHEAD):
        assert seen.is_new("events", "main", f"1-{sequence}")
    assert sum(map(len, seen._ahead.values())) == 0
    assert not seen.is_new("events", "main", "1-1")
