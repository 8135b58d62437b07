"""Errors a user can cause and mend.

A message reads `<who>: <what is wrong, name (=value)>; <the rule>. <what to do>.` and never names a rank:
the handler in `cli` adds it. Anything else that is raised is a mistake of ours and aborts the job.
"""

from __future__ import annotations

MOST_CHARACTERS = 2000
"""Of an error; a longer one is cut in the middle."""


class HpcnnError(ValueError):
    """Base of every error that the command line turns into one clear line and a non-zero exit."""


class ConfigError(HpcnnError):
    """A key, value or combination in the configuration that cannot be run."""


class ShapeError(HpcnnError):
    """Arrays or layers whose shapes do not fit together."""


class PlanError(HpcnnError):
    """A split of the work that is impossible, or not proven right."""


class DataError(HpcnnError):
    """A data set that is missing, damaged, or not what it says."""


class CheckpointError(HpcnnError):
    """A checkpoint that is missing, damaged, or of another model."""


class CommError(HpcnnError):
    """A launch or message pattern that cannot work."""


class RankFailure(CommError):  # noqa: N818 - what the standard calls it
    """A rank that died, or that the others gave up."""


class NumericsError(HpcnnError):
    """A loss, gradient or parameter that is no longer a finite number."""


class DivergenceError(NumericsError):
    """Ranks whose copies of the parameters are no longer equal."""


class DeviceError(HpcnnError):
    """A GPU that is missing, too old, out of memory, or for which the kernels do not compile."""


def one_line(words: str) -> str:
    """Return a message as one line: names out of files may hold anything, what commands a terminal included."""
    if len(words) > MOST_CHARACTERS:
        words = f"{words[: MOST_CHARACTERS // 2]} [...] {words[-MOST_CHARACTERS // 2 :]}"
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in words)


def out_of_memory(error: MemoryError) -> str:
    """Return what to say of memory that could not be had."""
    reason = f" ({error})" if str(error) else ""
    return f"memory: there is not enough{reason}. Use smaller images, models or batches, more ranks, or larger nodes."
