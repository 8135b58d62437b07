"""The jobs of a scaling study: by which launcher ranks are started, and a batch script for all of them.

A launcher is a command line in which {ranks}, {hosts} and {ranks_per_node} stand for the numbers of the job; `mpirun`
and `srun` are two that are known. The program and its arguments are put behind it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcnn.errors import CommError, ConfigError
from hpcnn.train.atomic import replacing

GRACE_S = 20.0
"""What a job may take to end when asked to: it writes a checkpoint, and launchers clean up behind it."""

KNOWN = ("mpirun", "srun", "sbatch")
BATCH_SCRIPT = "scale.sbatch"
# What a launcher leaves to its ranks. A job that is started from a rank must not take itself for one.
_OF_RANKS = ("PMI_", "PMIX_", "OMPI_COMM_", "OMPI_MCA_ess", "HYDI_", "MPI_LOCAL", "PRTE_")


@dataclass(frozen=True)
class Launcher:
    """How ranks are started.

    Attributes
    ----------
    words : tuple of str
        The command line up to the program, with {ranks} and its like.
    ranks_per_node : int or None
        What {hosts} is reckoned by: None, one.
    """

    words: tuple[str, ...]
    ranks_per_node: int | None = None

    @classmethod
    def of(cls, name: str, arguments: str = "", ranks_per_node: int | None = None) -> Launcher:
        """Return the launcher of this name, or that command line, with more arguments behind it.

        Raises
        ------
        ConfigError
            If the words are not a shell's, or tell nowhere how many ranks to start.
        """
        try:
            words, more = shlex.split(name), shlex.split(arguments)
        except ValueError as error:
            raise ConfigError(f"scale: --launcher and --launcher-args are not words of a shell: {error}.") from None
        if name == "mpirun":
            words = [_mpirun(), "-n", "{ranks}"]
        elif name in ("srun", "sbatch"):  # in a batch job, srun starts the ranks
            words = ["srun", "--ntasks={ranks}", "--kill-on-bad-exit=1"]
            words += ["--nodes={hosts}", "--ntasks-per-node={ranks_per_node}"] if ranks_per_node else []
        if not any("{ranks}" in word or "{hosts}" in word for word in words):
            raise ConfigError(
                f"scale: --launcher (={name!r}) must be one of {', '.join(KNOWN)}, or a command in which {{ranks}} or"
                " {hosts} stands for their number, such as 'mpirun -n {ranks} --bind-to core'."
            )
        launcher = cls((*words, *more), ranks_per_node)
        try:
            launcher.command(1)
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"scale: --launcher (={shlex.join(launcher.words)}): no meaning of {{{error.args[0]}}}; {{ranks}},"
                " {hosts} and {ranks_per_node} have one."
            ) from None
        return launcher

    def command(self, ranks: int) -> list[str]:
        """Return the words that start so many ranks of what is put behind them."""
        a_node = min(ranks, self.ranks_per_node or 1)
        numbers = {"ranks": ranks, "hosts": -(-ranks // a_node), "ranks_per_node": a_node}
        return [word.format(**numbers) for word in self.words]


def run(command: Sequence[str], log: Path, limit_s: float) -> str:
    """Run a job, its output into `log`, and return why it failed, or "".

    Raises
    ------
    CommError
        If the launcher is not there.

    Notes
    -----
    Whatever is raised meanwhile, KeyboardInterrupt too, ends the job first.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_RANKS)}
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        except OSError as error:
            raise CommError(
                f"scale: cannot start '{command[0]}': {error.strerror}. Load the MPI library's module, or name another"
                " --launcher."
            ) from None
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return f"no end after {limit_s:g} s; the job was ended (--limit)"
        finally:
            _end(process)
    return f"exit status {status}: {last_words(log)}" if status else ""


def last_words(log: Path) -> str:
    """Return the line of a job's output that says most about why it failed: hpcnn's own error, or else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.partition("error: ")[2] for line in lines if line.startswith("hpcnn: error: ")]
    return (errors or lines[-1:] or ["no output"])[0]


def batch_script(
    folder: Path, names: Sequence[str], ranks: int, command: Sequence[str], options: str, ranks_per_node: int | None
) -> str:
    """Return a script for sbatch: an array with a task for each name, which is put behind `command`.

    Parameters
    ----------
    folder : Path
        The study's, where the tasks' output goes.
    names : sequence of str
        Points to run.
    ranks : int
        Most ranks of any; every task is given as many.
    command : sequence of str
        What each task runs.
    options : str
        The site's own for sbatch, "--partition=compute --time=30" for instance.
    ranks_per_node : int, optional
        Left out: Slurm's choice.
    """
    own = [f"--job-name=hpcnn-scale --array=0-{len(names) - 1}", f"--ntasks={ranks}"]
    own += [f"--ntasks-per-node={min(ranks, ranks_per_node)}"] if ranks_per_node else []
    own += [f"--output={shlex.quote(str(folder / 'slurm-%A-%a.log'))}"]
    lines = ["#!/bin/bash", "# Written by `hpcnn scale`: a task of the array is a run of the study."]
    lines += [f"#SBATCH {option}" for option in (*own, options) if option]
    lines += ["set -euo pipefail", "points=(", *(f"    {shlex.quote(name)}" for name in names), ")"]
    return "\n".join([*lines, f'exec {shlex.join(command)} "${{points[$SLURM_ARRAY_TASK_ID]}}"', ""])


def submit(script: Path, text: str) -> str:
    """Write a batch script, hand it to Slurm, and return the job's number.

    Raises
    ------
    CommError
        If there is no sbatch, or it refuses; the script is left where it is.
    """
    with replacing(script) as temporary:
        temporary.write_text(text)
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except OSError:
        raise CommError(f"scale: there is no sbatch here; submit '{script}' where there is one.") from None
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise CommError(f"scale: sbatch refuses '{script}': {said} Give --sbatch-args what your site wants.")
    return done.stdout.strip().partition(";")[0]


def _mpirun() -> str:
    """Return the launcher beside this interpreter, whose MPI library it is, or the one on PATH."""
    for folder in (str(Path(sys.executable).parent), None):
        for name in ("mpirun", "mpiexec"):
            found = shutil.which(name, path=folder)
            if found:
                return found
    return "mpirun"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a job to end if it still runs, and after a while make it."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):  # the user does not want to wait either
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
