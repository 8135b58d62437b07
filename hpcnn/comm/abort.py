"""No rank fails silently, and none hangs the others.

An exception that nobody catches ends only one process; the others would wait for its messages until the allocation
runs out. Two cases are told apart:

- A mistake of ours (anything but an HpcnnError): the rank prints its traceback and aborts the job at once.
- A user's mistake (an HpcnnError): most are met by all ranks alike. Each rank waits a moment for the others; if all
  have come to an end, one of them prints one line, and all finish in good order with a non-zero exit code. If some are
  still at work, probably waiting for this one, the rank prints its line and aborts the job.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from hpcnn.comm.failure import rank_failure
from hpcnn.comm.library import load
from hpcnn.comm.wait import Patience, wait
from hpcnn.errors import ConfigError, HpcnnError, one_line, out_of_memory

if TYPE_CHECKING:
    from mpi4py import MPI

FAILURE = 1
USAGE = 2
INTERRUPTED = 130

SETTLE_S = 5.0
"""How long a failed rank waits for the others to end as well."""

STAGGER_S, LONGEST_STAGGER_S = 0.25, 2.0
"""Ranks that give up waiting at the same moment do so in order of rank, this far apart: the first ends the rest."""

FORWARD_S = 0.1
"""How long an aborting rank lets the launcher read its last words."""

DEATH_S = 10.0
"""How long an aborting rank waits for its end before it ends itself."""


def run_and_exit(main: Callable[[], int], *, settle_s: float = SETTLE_S) -> int:
    """Call `main` and return the exit code of this process, having reported an error once (collective after `start`).

    Every rank runs the same `main`, and exits with the returned number.

    Parameters
    ----------
    main : callable
        Returns the exit code of a good end, which is not always 0.
    settle_s : float
        How long a rank that failed waits for the others to end as well, in seconds.

    Returns
    -------
    int
        What `main` returned; 2 for a ConfigError, 1 for another HpcnnError, 130 when interrupted. If ranks differ, the
        code of the lowest rank that failed. Does not return when another exception leaves `main` on one of several
        ranks: the job is aborted. Nor when it leaves a background thread, for `main` may wait for that thread.
    """
    hook, threading.excepthook = threading.excepthook, _thread_hook
    try:
        return _run(main, settle_s)
    finally:
        threading.excepthook = hook


def _run(main: Callable[[], int], settle_s: float) -> int:
    try:
        code = main()
    except HpcnnError as error:
        return _settle(USAGE if isinstance(error, ConfigError) else FAILURE, str(error), settle_s)
    except MemoryError as error:
        return _settle(FAILURE, out_of_memory(error), settle_s)
    except KeyboardInterrupt:
        return _settle(INTERRUPTED, "interrupted", settle_s)
    except SystemExit as stop:
        is_code = stop.code is None or isinstance(stop.code, int)
        code, words = (int(stop.code or 0), "") if is_code else (FAILURE, str(stop.code))
        return _settle(code, words if code else None, settle_s)
    except BaseException as error:
        lost = None if _watch.comm is None else rank_failure(error)
        if lost is not None:
            return _settle(FAILURE, str(lost), settle_s)
        _surprise(error, threading.current_thread())
        return FAILURE
    return _settle(code, None, settle_s)


def install(comm: MPI.Intracomm) -> None:
    """Report and abort on exceptions that nobody catches, in any thread; `comm` is for the hooks alone.

    With a single rank Python's own hooks stay: it may be an interactive session, and nobody waits for it.
    """
    _watch.comm = comm
    if comm.size > 1:
        sys.excepthook = _main_hook
        threading.excepthook = _thread_hook


class _Watch:
    """The communicator over which ranks learn of each other's end; None before MPI starts."""

    comm: MPI.Intracomm | None = None


_watch = _Watch()


def _main_hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if sys._getframe().f_back is not None:
        # Not the end of the program: compiled modules also report here what they met in a destructor, such as the HDF5
        # library on a full disk. Whoever called them hears of it by an exception of his own.
        return
    if isinstance(error, HpcnnError):
        _settle(FAILURE, str(error))
    elif isinstance(error, KeyboardInterrupt):
        _settle(INTERRUPTED, "interrupted")
    else:
        _surprise(error, threading.current_thread())


def _thread_hook(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _surprise(args.exc_value, args.thread)


def _surprise(error: BaseException, thread: threading.Thread | None) -> None:
    """Print the traceback and end the job; returns only in the main thread of a single rank."""
    background = thread is not None and thread is not threading.main_thread()
    where = f" in thread '{thread.name}'" if thread is not None and background else ""
    comm = _watch.comm
    if isinstance(error, HpcnnError):
        report, words = "", one_line(str(error))
    elif comm is not None and comm.size > 1 and isinstance(error, load().Exception):
        reason = str(error).splitlines()[0].rstrip(" :,")
        report = ""
        words = (
            f"the MPI library cannot go on: {reason}. Most often another rank has died or its host is gone; look above"
            " for its last words, and go on with --resume."
        )
    else:
        report = "".join(traceback.format_exception(error))
        words = "".join(traceback.format_exception_only(error)).strip()
    if comm is None or comm.size == 1:
        _say(f"{report}hpcnn: error{where}: {words}\n")
        if background:
            os._exit(FAILURE)
    else:
        _say(f"{report}hpcnn: error on rank {comm.rank}{where}: {words}\n")
        _abort(FAILURE)


def _settle(code: int, words: str | None, settle_s: float = SETTLE_S) -> int:
    """Wait for the other ranks' ends, report the first failure once, and return the exit code.

    `words` is None where `main` returned in good order. Such a rank waits as long as it takes: others may still be
    writing their last files.
    """
    words = words and one_line(words)
    comm = _watch.comm
    if comm is None or comm.size == 1:
        if words:
            _say(f"hpcnn: error: {words}\n")
        return code
    codes = np.empty(comm.size, np.int32)
    try:
        request = comm.Iallgather(np.array([code], np.int32), codes)
        all_ended = wait(request.Test, Patience(awake=False), None if words is None else settle_s)
    except load().Exception:  # a rank is dead, which cannot harm one that has come to a good end
        if words is None:
            return code
        all_ended = False
    if not all_ended:
        time.sleep(min(comm.rank * STAGGER_S, LONGEST_STAGGER_S))
        _say(f"hpcnn: error on rank {comm.rank}: {words or f'exit code {code}'}\n")
        _abort(code or FAILURE)
    failed = np.flatnonzero(codes)
    if failed.size == 0:
        return 0
    first = int(failed[0])
    if comm.rank == first and words:
        _say(f"hpcnn: error: {words}\n" if failed.size == comm.size else f"hpcnn: error on rank {first}: {words}\n")
    return int(codes[first])


def end_job(words: str) -> NoReturn:
    """Report an error in one line and abort the job: for what the ranks can no longer raise together."""
    _say(f"hpcnn: error: {words}\n")
    _abort(FAILURE)


def _abort(code: int) -> NoReturn:
    """End the job, giving the launcher time to pass on what was said: it drops what it has not read by then."""
    time.sleep(FORWARD_S)
    load().COMM_WORLD.Abort(code)
    # Some libraries only ask the launcher to end all processes, and return. This one has nothing more to do or say.
    time.sleep(DEATH_S)
    os._exit(code)


_say_lock = threading.Lock()


def _say(text: str) -> None:
    """Write to standard error in one piece, so that the lines of several ranks do not mix."""
    with _say_lock:
        sys.stderr.write(text)
        sys.stderr.flush()
