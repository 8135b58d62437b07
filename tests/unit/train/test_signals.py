import os
import signal
import subprocess
import sys
import threading

import pytest

from hpcnn.train.signals import EXIT_STOPPED, SIGNALS, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_nothing_else(number):
    with StopRequest() as request:
        assert not request.requested
        os.kill(os.getpid(), number)
        assert request.requested
        assert request.reason == number.name


def test_the_first_signal_gives_the_reason():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.reason == "SIGUSR1"


def test_one_request_that_arrives_twice_is_one_request():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.requested


def test_the_handlers_of_before_are_back_afterwards():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_outside_the_main_thread_it_only_holds_the_flag():
    seen = []

    def hold():
        with StopRequest() as request:
            request.requested = True
            seen.append(request.requested)

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert seen == [True]


CHILD = """
import os, signal, time
from hpcnn.train import signals
signals._SAME_REQUEST_S = 0.2
with signals.StopRequest() as request:
    os.kill(os.getpid(), signal.{name})
    assert request.requested
    time.sleep(0.3)
    os.kill(os.getpid(), signal.{name})
    raise SystemExit(signals.EXIT_STOPPED)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", EXIT_STOPPED)])
def test_a_second_request_to_end_leaves_at_once_and_a_second_to_checkpoint_does_not(name, code):
    child = subprocess.run([sys.executable, "-c", CHILD.format(name=name)], timeout=30, check=False)
    assert child.returncode == code


def test_a_rank_that_ends_keeps_its_exit_code_though_the_launcher_hurries_it():
    program = (
        "import os, signal, sys; from hpcnn.train.signals import EXIT_STOPPED, StopRequest\n"
        "with StopRequest() as request: request.retire()\n"
        "os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGUSR1);"
        "sys.exit(EXIT_STOPPED)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == EXIT_STOPPED
