"""What looks on while a program runs without training: who is shown the values, and the exchange that does nothing."""

from __future__ import annotations

from typing import Protocol

from hpcnn.arrays import Array


class Watch(Protocol):
    """Is shown what this rank has of values; the arrays must not be changed and die with the pass."""

    def output(self, layer: str, value: Array) -> None:
        """Look at a layer's output, of the box that this rank has of it."""

    def error(self, layer: str, value: Array) -> None:
        """Look at the gradient of a layer's output, its fused activation undone (a batch norm's is not)."""


class _Unwatched:
    def output(self, layer: str, value: Array) -> None: ...

    def error(self, layer: str, value: Array) -> None: ...


UNWATCHED = _Unwatched()


class Quiet:
    """Stands where the exchange does: no gradient is wanted, nothing travels and no parameter moves."""

    def parameters_needed(self, layer: str) -> None:
        """See `Exchange`."""

    def input_ready(self, layer: str, x: Array) -> None:
        """See `Exchange`."""

    def wants_gradient(self, layer: str) -> bool:
        """Return that it is not."""
        return False

    def error_ready(self, layer: str, error: Array) -> None:
        """See `Exchange`."""

    def gradient_ready(self, layer: str) -> None:
        """See `Exchange`."""

    def backward_done(self, layer: str) -> None:
        """See `Exchange`."""
