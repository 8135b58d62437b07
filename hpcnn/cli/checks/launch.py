"""Whether launcher, MPI library and Slurm agree on who the ranks are.

A launcher that does not speak the library's protocol starts N processes of which each takes itself for the only one.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpcnn.cli.checks.problem import Problem, advice
from hpcnn.cli.environment import Facts

FAMILIES = {
    "Open MPI": ("open mpi", "openrte", "prte"),
    "MVAPICH": ("mvapich",),
    "Intel MPI": ("intel", "impi"),
    "Cray MPICH": ("cray",),
    "MPICH": ("mpich", "hydra"),
}
"""Implementations, by words that their launchers and libraries say of themselves; the first that fits."""

HYDRA = {"MPICH", "MVAPICH", "Intel MPI", "Cray MPICH"}
"""Those that start each other's ranks: all speak PMI-1 and share an ABI."""

SRUN = {
    "Open MPI": "Open MPI speaks PMIx: `srun --mpi=pmix`",
    "Intel MPI": "Intel MPI speaks PMI-2: `srun --mpi=pmi2` with I_MPI_PMI_LIBRARY=/path/to/libpmi2.so",
    "MPICH": "MPICH speaks PMI-2: `srun --mpi=pmi2`",
    "Cray MPICH": "Cray MPICH has a plugin of its own: `srun --mpi=cray_shasta`",
}
"""What starts ranks under Slurm."""

NEEDED_LEVEL = "multiple"


def family(text: str) -> str | None:
    """Return which implementation a version text is of, None if it is not known.

    Only its first line counts, and of "/path/of/mpiexec (version)" the version: paths and options name others, too.
    """
    first, _, version = text.partition("\n")[0].lower().partition(" (")
    lower = version if first.startswith("/") and version else f"{first} {version}"
    return next((name for name, words in FAMILIES.items() if any(word in lower for word in words)), None)


def starter(environment: Mapping[str, str]) -> str | None:
    """Return what started this process, by the variables that it left: an implementation, "srun" or None."""
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return "Open MPI"
    if "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_ID", "").isdecimal():
        return "srun"
    return "MPICH" if "PMI_SIZE" in environment else None


def strangers(launcher: str, library: str) -> Problem:
    """Return the problem of ranks that MPI does not connect; both arguments are version texts, "" if not known."""
    theirs, ours = family(launcher) or launcher, family(library) or library
    if theirs and ours and not fits(theirs, ours):
        return Problem(
            f"ranks do not find each other: the launcher is {theirs}'s, the MPI library {ours}'s",
            f"Start with the mpiexec of {ours}, or load {theirs}'s library (MPI4PY_LIBMPI=/path/to/libmpi.so).",
        )
    return Problem(
        f"ranks do not find each other (launcher {launcher or 'unknown'}, library {library or 'unknown'})",
        "Use the launcher that belongs to the MPI library; under Slurm `srun --mpi=pmix` or `--mpi=pmi2`.",
    )


def clash(launcher: str, library: str) -> Problem | None:
    """Return the problem of a launcher and a library that are known not to understand each other.

    Such ranks are as many worlds of one, or die while MPI starts. Both arguments are version texts, or a family's name.
    """
    theirs, ours = family(launcher), family(library)
    if theirs is None or ours is None or fits(theirs, ours):
        return None
    if theirs == "Open MPI" and "pmix" in library.lower():
        return None  # an MPICH that was built to speak Open MPI's protocol says so among its configure options
    return strangers(theirs, ours)


def srun_fix(library: str) -> str:
    """Return how ranks of a library, named by its version text, are started under Slurm."""
    how = SRUN.get(family(library) or "", "`srun --mpi=pmix` or `--mpi=pmi2`, whichever the library was built for")
    return f"{how} (`srun --mpi=list` shows what there is)."


def fits(launcher: str, library: str) -> bool:
    """Return whether ranks of a library are known to find each other under a launcher, both named by family."""
    return launcher == library or {launcher, library} <= HYDRA


def judge(library: Facts, num_ranks: int, environment: Mapping[str, str]) -> list[Problem]:
    """Return what the library that was started lacks, and where Slurm's numbers contradict the world's."""
    found = []
    level = library.get("thread_level", NEEDED_LEVEL)
    if level != NEEDED_LEVEL:
        fix = "Load an MPI built with threads; Cray: `export MPICH_MAX_THREAD_SAFETY=multiple`."
        found.append(Problem(f"MPI gives threads the level '{level}'; messages in the background need multiple", fix))
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    if starter(environment) == "srun" and tasks.isdecimal() and int(tasks) != num_ranks:
        found.append(
            Problem(f"srun started {tasks} tasks and MPI connects {num_ranks}", srun_fix(library.get("vendor", "")))
        )
    asked = environment.get("SLURM_NTASKS", "")
    if starter(environment) not in ("srun", None) and asked.isdecimal() and int(asked) != num_ranks:
        what = f"{num_ranks} ranks in an allocation of {asked} tasks (SLURM_NTASKS)"
        found.append(
            advice(what, f"Start {asked} ranks, or ask Slurm for {num_ranks}: `#SBATCH --ntasks={num_ranks}`.")
        )
    return found
