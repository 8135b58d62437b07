"""How gradients become global and parameters current, while the program computes.

The program announces events a layer, in the order of one step:

    parameters_needed   forward is about to use the layer's parameters; they are current when this returns
    input_ready         forward has the layer's input
    begin_backward      forward is through; from here on `update` is how this step moves parameters
    error_ready         backward has the gradient of the layer's output, its fused activation undone
    shard_ready         where sums go by virtual shards: those of the next shard stand in the flat vector
    gradient_ready      the layer's gradients of this rank's samples stand in the flat vector
    backward_done       backward is through with the layer: its parameters may change
    end_backward        backward is through with all layers

Layers that are computed in turns (`parallel/turns.py`) are announced together, when their group begins forward and
when it is through with backward, which makes their inputs once more: parameters must not change between the two. What
they read and the gradients of their outputs are never whole, and not announced.

Every layer belongs to a carrier (`carrier.py`), and carriers of several kinds may serve one model. At every event the
exchange looks which carriers have their global gradients, has those parameters moved and the carrier publish them:
communication of any layer then travels beside the computation of any other, across the border between two steps.
All ranks meet the events in the same order, but carriers get ready in any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from hpcnn.arrays import Array
from hpcnn.comm.engine import Engine
from hpcnn.geometry import Block
from hpcnn.parallel.exchange.carrier import Carrier
from hpcnn.parallel.exchange.lazy import Rounds


class Update(Protocol):
    """How one step moves parameters, once their gradients are global."""

    @property
    def together(self) -> bool:
        """Whether `look` must see all gradients before the first parameter moves."""

    def look(self, counted: Sequence[Block]) -> None:
        """Take note of all gradients; every rank passes its share of the flat vector (collective)."""

    def move(self, block: Block) -> None:
        """Update the parameters of a stretch of the flat vector."""


class Exchange:
    """All carriers of a model.

    Parameters
    ----------
    carriers : sequence of Carrier
        One for every stretch of the flat vector, in the order in which backward completes them.
    engine : Engine
        Carries on what the carriers start; None on one rank, where nothing travels.
    overlap : bool
        Let communication travel beside the computation; otherwise it is carried on only while a rank waits for it.
    wait : str
        "layer": a step is over when its backward is, and each layer waits for its parameters in the next forward;
        "step": a step is over when all parameters are current.
    rounds : Rounds, optional
        Of lazy carriers.

    Attributes
    ----------
    ends_round : bool
        Whether the coming step ends the round of lazy carriers in any case; to be set before every step.
    """

    def __init__(
        self,
        carriers: Sequence[Carrier],
        engine: Engine | None,
        *,
        overlap: bool = True,
        wait: str = "layer",
        rounds: Rounds | None = None,
    ) -> None:
        self.carriers = tuple(carriers)
        self.rounds = rounds
        self.ends_round = False
        self._engine = engine
        self._overlap = overlap
        self._lazy = overlap and wait == "layer"
        self._of = {layer: carrier for carrier in carriers for layer in carrier.layers}
        self._update: Update | None = None
        # Carriers whose parameters the last update has not moved yet, and how many of their layers backward still uses.
        self._pending: list[Carrier] = []
        self._in_use: dict[Carrier, int] = {}
        if overlap and engine is not None:
            engine.carry_on_in_background()

    @property
    def overlap(self) -> bool:
        """Whether communication gets on while nobody waits for it."""
        return self._overlap and self._engine is not None

    @property
    def owned(self) -> tuple[Block, ...]:
        """Stretches of the flat vector that this rank updates."""
        return tuple(block for carrier in self.carriers for block in carrier.owned)

    @property
    def owns_whole_tensors(self) -> bool:
        """Whether `owned` has every tensor, rather than slices of some."""
        return all(carrier.owns_whole_tensors and carrier.bucket.cut == 1 for carrier in self.carriers)

    def parameters_needed(self, layer: str) -> None:
        """Return once the parameters of `layer` are current."""
        carrier = self._of[layer]
        self._move_arrived()
        self._finish(carrier)
        self._wait_until(lambda: carrier.published, f"parameters of {layer}")

    def input_ready(self, layer: str, x: Array) -> None:
        """Take note of a layer's input; it must not be changed and is only valid during this step."""
        self._of[layer].input_ready(layer, x)

    def wants_gradient(self, layer: str) -> bool:
        """Return whether the layer's gradients of this rank's samples are to be computed."""
        return not self._of[layer].replaces_gradient

    def begin_backward(self, update: Update) -> None:
        """Take the update that moves parameters from here on; that of the last step has moved all by now."""
        assert not self._pending, "forward has used every layer with parameters"
        if self.rounds is not None:
            self.rounds.begin_step(last=self.ends_round)
        self._update = update
        self._pending = list(self.carriers)
        self._in_use = {carrier: len(carrier.layers) for carrier in self.carriers}

    def error_ready(self, layer: str, error: Array) -> None:
        """Take note of the gradient of a layer's output; the same rules as for inputs."""
        self._of[layer].error_ready(layer, error)

    def gradient_ready(self, layer: str) -> None:
        """Take note that this rank's gradients of `layer` are in the flat vector."""
        self._of[layer].gradient_ready(layer)

    def shard_ready(self, layer: str) -> None:
        """Take note that the gradients of one more virtual shard stand in the flat vector, before `gradient_ready`."""
        self._of[layer].shard_ready(layer)

    def backward_done(self, layer: str) -> None:
        """Take note that the parameters of `layer` may change."""
        self._in_use[self._of[layer]] -= 1
        if self._overlap:
            self._move_arrived()

    def end_backward(self) -> None:
        """Let the step's communication go on beside the next forward, or finish it, as configured (collective)."""
        update = self._update
        assert update is not None
        if update.together:
            for carrier in self._pending:
                carrier.take()
            update.look([block for carrier in self.carriers if carrier.moves for block in carrier.counted])
            for carrier in reversed(self._pending):  # the bottom layers first: the next forward begins with them
                self._publish(carrier)
            self._pending = []
        if self.rounds is not None:
            self.rounds.end_step()
        if self._lazy:
            self._move_arrived()
        else:
            self.settle()

    @property
    def complete(self) -> bool:
        """Whether all gradients of the steps so far are in the parameters, or will be once they have settled."""
        return self.rounds is None or self.rounds.number == 0

    @property
    def round_steps(self) -> int:
        """Length of the next round of lazy carriers; 0 without any."""
        return 0 if self.rounds is None else self.rounds.steps

    def resume_rounds(self, steps: int) -> None:
        """Go on with rounds of the length that `round_steps` was, where there are lazy carriers."""
        if self.rounds is not None and steps and self.rounds.adaptive:
            self.rounds.steps = steps

    def settle(self) -> None:
        """Return once all parameters are current on this rank (collective)."""
        for carrier in reversed(self.carriers):
            self._finish(carrier)
        self._wait_until(lambda: all(carrier.published for carrier in self.carriers), "all parameters")

    def collect(self, flat: Array) -> None:
        """Complete the first replicas' copies of a vector of which each rank has the `owned` stretches (collective)."""
        for carrier in self.carriers:
            carrier.collect(flat)

    def _finish(self, carrier: Carrier) -> None:
        """Return once a carrier's parameters have moved, having moved whatever else could be meanwhile."""
        while carrier in self._pending:
            self._wait_until(lambda: any(map(self._ready, self._pending)), f"gradients of {carrier.label}")
            self._move_ready()

    def _move_arrived(self) -> None:
        if self._update is not None and not self._update.together:
            self._move_ready()

    def _move_ready(self) -> None:
        in_use = self._in_use
        ready = [carrier for carrier in self._pending if not in_use[carrier] and carrier.arrived]
        for carrier in reversed(ready):  # the bottom layers first
            carrier.take()
            self._publish(carrier)
            self._pending.remove(carrier)

    def _publish(self, carrier: Carrier) -> None:
        assert self._update is not None
        if carrier.moves:
            for block in carrier.owned:
                self._update.move(block)
        carrier.publish()

    def _wait_until(self, condition: Callable[[], bool], label: str) -> None:
        if not condition():
            assert self._engine is not None, "on one rank there is nothing to wait for"
            self._engine.wait_until(condition, label)

    def _ready(self, carrier: Carrier) -> bool:
        return self._in_use[carrier] == 0 and carrier.arrived
