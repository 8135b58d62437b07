"""The contract of a carrier: how the gradients of some layers become global, and their parameters current everywhere.

Every stretch of the flat vectors has one carrier, and every layer with parameters belongs to one. In each step the
`Exchange` calls, of every carrier,

    input_ready, error_ready, gradient_ready    as the program comes to its layers
    arrived, take                               the global gradients of `owned` are complete; make them if need be
    publish                                     the `owned` parameters have been moved: tell the other ranks
    published                                   all parameters of the layers are current here

Only `take` may wait; what a carrier starts is carried on by the engine.
"""

from __future__ import annotations

from hpcnn.arrays import Array
from hpcnn.comm.collective import Collective
from hpcnn.geometry import Block
from hpcnn.plan.buckets import Bucket


class Carrier:
    """Base: a bucket whose gradients are complete as soon as they are computed, for one rank alone.

    Attributes
    ----------
    layers : tuple of str
        Those served, in the order in which backward finishes them.
    owned : tuple of Block
        Stretches of the flat vectors that this rank updates.
    counted : tuple of Block
        Stretches that this rank adds to sums over all parameters; over the ranks they cover every element once.
    label : str
        The layers, for people.
    replaces_gradient : bool
        Whether the layers' own gradients are not wanted: the carrier makes the global ones from inputs and errors.
    owns_whole_tensors : bool
        Whether `owned` has all of every tensor, rather than slices.
    """

    moves = True
    """Whether this step's update is for these layers."""
    replaces_gradient = False
    owns_whole_tensors = True

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.layers = bucket.layers
        self.label = bucket.label
        self.owned: tuple[Block, ...] = (Block(bucket.start, bucket.stop),)
        self.counted: tuple[Block, ...] = self.owned
        self._missing = len(self.layers)

    def input_ready(self, layer: str, x: Array) -> None:
        """Take note of a layer's input; it must not be changed and is only valid during this step."""

    def error_ready(self, layer: str, error: Array) -> None:
        """Take note of the gradient of a layer's output; the same rules."""

    def shard_ready(self, layer: str) -> None:
        """Take note that a layer's gradients of the next virtual shard are in the flat vector, before `gradient_ready`.

        Only carriers that sum over shards hear of it.
        """
        raise NotImplementedError

    def gradient_ready(self, layer: str) -> None:
        """Take note that this rank's gradients of a layer are in the flat vector; begin with the last one."""
        self._missing -= 1
        if self._missing == 0:
            self._missing = len(self.layers)
            self.begin()

    def begin(self) -> None:
        """Start making the gradients global."""

    @property
    def arrived(self) -> bool:
        """Whether `take` would not wait for other ranks."""
        return all(collective.done for collective in self.reducing)

    @property
    def published(self) -> bool:
        """Whether the parameters of the layers are current."""
        return all(collective.done for collective in self.publishing)

    @property
    def reducing(self) -> tuple[Collective, ...]:
        """The collectives that make the gradients global."""
        return ()

    @property
    def publishing(self) -> tuple[Collective, ...]:
        """The collectives that make the parameters current."""
        return ()

    def take(self) -> None:
        """Return with the global gradients of `owned` in the flat vector."""
        for collective in self.reducing:
            collective.wait()

    def publish(self) -> None:
        """Start telling the other ranks the parameters of `owned`."""

    def collect(self, flat: Array) -> None:
        """Complete the first replica's copy of this stretch of a vector of which each has the `owned` part."""
