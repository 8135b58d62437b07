"""The contract between the program, which makes gradients, and an exchange, which makes them global.

The program announces four events a layer, in the order of one step:

    parameters_needed   forward is about to use the layer's parameters; they must be current when this returns
    input_ready         forward has the layer's input
    error_ready         backward has the gradient of the layer's output, its fused activation undone
    gradient_ready      the layer's gradients of this rank's samples stand in the flat vector

After the last one the trainer calls `wait_gradients`, updates every block of `owned`, and calls `publish`.
An exchange may move data inside any event, but every rank meets the events in the same order.
"""

from __future__ import annotations

from typing import Protocol

from hpcnn.arrays import Array
from hpcnn.geometry import Block
from hpcnn.nn.parameter import ParameterSet


class Exchange(Protocol):
    """What the program and the trainer ask of an exchange."""

    @property
    def owned(self) -> tuple[Block, ...]:
        """Blocks of the flat parameter vector that this rank updates, valid after `wait_gradients`."""

    def parameters_needed(self, layer: str) -> None:
        """Return once the parameters of `layer` are current."""

    def input_ready(self, layer: str, x: Array) -> None:
        """Take note of a layer's input; it must not be changed and is only valid during this step."""

    def error_ready(self, layer: str, error: Array) -> None:
        """Take note of the gradient of a layer's output; the same rules."""

    def gradient_ready(self, layer: str) -> None:
        """Take note that this rank's gradients of `layer` are in the flat vector."""

    def wait_gradients(self) -> None:
        """Return once the gradients of all `owned` blocks are sums over the global batch (collective)."""

    def publish(self) -> None:
        """Make the updated blocks current on all ranks, now or before `parameters_needed` returns (collective)."""


class SerialExchange:
    """One rank: its own gradient is the global one. Also the base of exchanges that ignore some of the events."""

    def __init__(self, parameters: ParameterSet) -> None:
        self._all = (Block(0, parameters.grads.size),)

    @property
    def owned(self) -> tuple[Block, ...]:
        """Return the whole flat vector."""
        return self._all

    def parameters_needed(self, layer: str) -> None:
        """Do nothing: parameters are always current."""

    def input_ready(self, layer: str, x: Array) -> None:
        """Do nothing."""

    def error_ready(self, layer: str, error: Array) -> None:
        """Do nothing."""

    def gradient_ready(self, layer: str) -> None:
        """Do nothing."""

    def wait_gradients(self) -> None:
        """Do nothing: the gradient is complete."""

    def publish(self) -> None:
        """Do nothing: there is nobody else."""
