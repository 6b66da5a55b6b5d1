"""A stop reaches its goal: though something swallowed it, though the main thread is busy, and without breaking the way
out. Each program runs in a process of its own, and is to end by itself or by the stop within its bound."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
"""Bound on each program; they take 1 to 4 s on an idle machine."""
BEGIN = """
import contextlib, os, signal, sys, time
from sft_core import stop

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
signal.signal(signal.SIGHUP, signal.SIG_DFL)

class Swallows:
    def __init__(self, number):
        self.number = number
    def __del__(self):  # what is raised here is printed and forgotten
        os.kill(os.getpid(), self.number)
        for _ in range(1000):
            pass

def work(seconds=40):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    print("went on")
"""


def run(program: str, *sent: tuple[float, signal.Signals]) -> subprocess.CompletedProcess[str]:
    """The program's end. `sent`: signals, each that many seconds after it has said "ready" or the one before."""
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(program)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        said = ""
        if sent:
            said = process.stdout.readline()
            assert said == "ready\n"
        for wait, number in sent:
            time.sleep(wait)
            process.send_signal(number)
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, said + out, err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_swallowed_stop_is_raised_again(number: signal.Signals) -> None:
    done = run(f"""
        stop.listen(50.0, lambda number: print("heard", number))
        try:
            Swallows({int(number)})
            print("swallowed")
            work()
        except stop.Stopped as stopped:
            print("stopped by", stopped.number)
    """)
    assert sorted(done.stdout.splitlines()) == sorted(
        [f"heard {int(number)}", "swallowed", f"stopped by {int(number)}"]
    )
    assert done.stderr == ""


def test_one_that_a_library_caught_is_raised_again() -> None:
    done = run("""
        stop.listen(50.0, lambda number: None)
        try:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                work(1)
            except BaseException:
                pass
            print("caught")
            work()
        except stop.Stopped:
            print("stopped")
    """)
    assert done.stdout == "caught\nstopped\n"


def test_what_is_done_on_the_way_out_is_left_alone() -> None:
    """For longer than the stop waits to be noticed; a generator's `finally` and an error within it among it."""
    done = run("""
        @contextlib.contextmanager
        def saving():
            try:
                yield
            finally:
                try:
                    raise ValueError
                except ValueError:
                    time.sleep(2.5 * stop.AGAIN_SECONDS)
                print("saved")

        stop.listen(50.0, lambda number: None)
        try:
            with saving():
                os.kill(os.getpid(), signal.SIGTERM)
                work()
        except stop.Stopped:
            print("stopped")
    """)
    assert done.stdout == "saved\nstopped\n"


def test_a_second_ctrl_c_ends_a_process_that_is_busy() -> None:
    done = run(
        """
        stop.listen(50.0, lambda number: None)
        print("ready", flush=True)
        try:
            work()
        finally:
            work()
        """,
        (0.5, signal.SIGINT),
        (1.0, signal.SIGINT),
    )
    assert (done.returncode, done.stdout) == (130, "ready\n")


def test_ctrl_c_that_is_sent_twice_at_once_is_one() -> None:
    """As `uv run` does, which passes it on to a program that had it from the terminal."""
    done = run(
        """
        stop.PRESS_SECONDS = 30.0
        stop.listen(50.0, lambda number: None)
        print("ready", flush=True)
        try:
            work()
        except stop.Stopped:
            time.sleep(1)
            print("saved")
        """,
        (0.5, signal.SIGINT),
        (0.05, signal.SIGINT),
    )
    assert (done.returncode, done.stdout) == (0, "ready\nsaved\n")


def test_a_stop_that_takes_too_long_ends_the_process() -> None:
    done = run("""
        stop.listen(1.0, lambda number: None)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            work()
        finally:
            work()
    """)
    assert (done.returncode, done.stdout) == (143, "")


def test_more_time_is_allowed_where_there_is_something_to_save() -> None:
    done = run("""
        stop.listen(1.0, lambda number: None)
        with stop.allowing(50.0):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                work()
            except stop.Stopped:
                time.sleep(3)
                print("saved")
    """)
    assert (done.returncode, done.stdout) == (0, "saved\n")


def test_check_raises_what_was_swallowed() -> None:
    done = run("""
        stop.listen(50.0, lambda number: None)
        Swallows(signal.SIGTERM)
        try:
            stop.check()
            print("promoted")
        except stop.Stopped:
            print("stopped")
    """)
    assert done.stdout == "stopped\n"


def test_a_signal_that_is_handed_over_stops_nothing_here() -> None:
    done = run("""
        stop.listen(50.0, lambda number: None)
        with stop.handed_over(signal.SIGTERM, lambda: print("asked")) as came:
            os.kill(os.getpid(), signal.SIGTERM)
            work(2.5 * stop.AGAIN_SECONDS)
        stop.check()
        print(len(came))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            work()
        except stop.Stopped:
            print("stopped")
    """)
    assert done.stdout == "asked\nwent on\n1\nstopped\n"


def test_a_stop_of_a_forked_process_is_none_of_ours() -> None:
    """It has our handlers and our descriptors."""
    done = run("""
        stop.listen(50.0, lambda number: print("heard", number))
        child = os.fork()
        if not child:
            try:
                work()
            except BaseException:
                pass
            os._exit(0)
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        work(2.5 * stop.AGAIN_SECONDS)
    """)
    assert done.stdout == "went on\n"


def test_signals_that_are_ignored_stay_so() -> None:
    """nohup, and a script's background command."""
    done = run("""
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop.listen(50.0, lambda number: None)
        os.kill(os.getpid(), signal.SIGHUP)
        work(0.1)
        print(stop.asked())
    """)
    assert done.stdout == "went on\nNone\n"


def test_who_listens_a_second_time_listens_once() -> None:
    """Two commands called as functions: the first one's thread went on reading signals, and raised them for ever."""
    done = run("""
        stop.listen(50.0, lambda number: print("first"))
        stop.listen(50.0, lambda number: print("second"))
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except stop.Stopped:
            print("stopped")
        stop.leave()
        signal.signal(signal.SIGTERM, lambda *_: print("mine"))
        os.kill(os.getpid(), signal.SIGTERM)
        work(2.5)
        print(signal.set_wakeup_fd(-1))
    """)
    assert done.stdout == "second\nstopped\nmine\nwent on\n-1\n"


def test_prefects_own_signal_is_raised_again_in_a_flow() -> None:
    """As in a deployed flow run: Prefect handles SIGTERM, raises TerminationSignal, and afterwards sends it again."""
    done = run("""
        from prefect.utilities.engine import capture_sigterm
        with capture_sigterm():
            try:
                with stop.insisting():
                    Swallows(signal.SIGTERM)
                    print("swallowed", flush=True)
                    work()
            except BaseException as error:
                print(type(error).__name__, flush=True)
                raise
    """)
    assert done.stdout == "swallowed\nTerminationSignal\n"
    assert done.returncode == -signal.SIGTERM


def test_ctrl_c_at_a_terminal_ends_the_processes_that_share_the_work() -> None:
    """It goes to all of them; each is at something that takes long. Nobody prints a traceback, nobody stays."""
    program = """
        from sft_core.processes import process_mapper
        stop.listen(50.0, lambda number: None)
        try:
            with process_mapper(2) as mapper:
                for _ in mapper(time.sleep, [0.1, *[300.0] * 4]):
                    print("ready", flush=True)
        except stop.Stopped:
            print("stopped")
    """
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(program)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=SECONDS)  # to the end of the pipe: all of them hold it
    assert (process.returncode, out) == (0, "stopped\n")


def test_the_processes_that_share_the_work_die_with_a_killed_one() -> None:
    program = """
        from sft_core.processes import process_mapper
        with process_mapper(2) as mapper:
            for _ in mapper(time.sleep, [0.1, *[300.0] * 4]):
                print("ready", flush=True)
    """
    command = [sys.executable, "-c", BEGIN + textwrap.dedent(program)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.kill()
        assert process.stdout.read() == ""  # the end of the pipe, which all of them hold
