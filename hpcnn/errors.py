"""Errors a user can cause and mend.

A message reads `<who>: <what is wrong, name (=value)>; <the rule>. <what to do>.` and never names a rank:
the handler in `cli` adds it. Anything else that is raised is a mistake of ours and aborts the job.
"""


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
    """A loss or gradient that is no longer a finite number."""


class DeviceError(HpcnnError):
    """A GPU that is missing, too old, out of memory, or for which the kernels do not compile."""
