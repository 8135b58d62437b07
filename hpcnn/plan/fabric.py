"""What lies between the nodes of a machine: a fat tree of switches or a torus, and where messages share its links.

Nodes are numbered as the job's ranks meet them and stand side by side: nodes 0 to k - 1 under the first switch, or
along the last axis of the torus. All messages of a step are under way together, on the one path that a rule gives
each; the step lasts as long as the busiest link needs for what passes it.

Legend: L messages of a step, M nodes.

References
----------
Leiserson, "Fat-trees: universal networks for hardware-efficient supercomputing", IEEE Trans. Computers C-34 (10), 1985.
Dally, Seitz, "Deadlock-free message routing in multiprocessor interconnection networks", IEEE Trans. Computers
C-36 (5), 1987: dimension order.
"""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Literal, NamedTuple

import numpy as np

from hpcnn.errors import PlanError


class Passage(NamedTuple):
    """What the messages of a step find on their way."""

    busiest: float
    """Bytes on the busiest link above the nodes, in those that a node's own port would pass in the same time."""
    hops: int
    """Switches beyond the first, on the longest path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fabric:
    """The network above the ports of the nodes (`Machine.network` is one port)."""

    kind: Literal["fat-tree", "torus"]
    hop_s: float = 0.0
    """Seconds that each switch beyond the first adds to a message."""
    switch_nodes: tuple[int, ...] = ()
    """Fat tree: nodes under a switch of the first level, the second, ...; whatever is above joins them all."""
    oversubscription: tuple[float, ...] = ()
    """Fat tree: of the switches of each level, bandwidth of all nodes under one by that of its links upwards."""
    shape: tuple[int, ...] = ()
    """Torus: nodes along every axis."""
    link_speed: float = 1.0
    """Torus: bandwidth of a link, in that of a node's port."""

    def problem(self) -> str:
        """Return what is wrong with the numbers, or nothing."""
        if self.kind == "torus":
            if not self.shape or min(self.shape) < 1:
                return f"'fabric.shape' (={list(self.shape)}) must name the nodes along each axis, each at least 1"
            return "" if not self.switch_nodes + self.oversubscription else "'fabric.switch_nodes' is for fat trees"
        if self.shape:
            return "'fabric.shape' is for tori"
        if len(self.switch_nodes) != len(self.oversubscription):
            return "'fabric.switch_nodes' and 'fabric.oversubscription' must be equally long"
        if any(below < 1 or above % below for below, above in zip((1, *self.switch_nodes), self.switch_nodes)):
            return f"'fabric.switch_nodes' (={list(self.switch_nodes)}) must each be a multiple of the one before"
        return "" if all(o > 0 for o in self.oversubscription) else "'fabric.oversubscription' must be positive"

    def check_nodes(self, num_nodes: int) -> None:
        """Raise PlanError if there are not so many nodes."""
        if self.kind == "torus" and num_nodes > prod(self.shape):
            raise PlanError(
                f"machine: a torus of {' x '.join(map(str, self.shape))} has {prod(self.shape)} nodes, and {num_nodes}"
                " are asked for. Take fewer ranks, or enlarge fabric.shape."
            )

    def passage(self, source: np.ndarray, target: np.ndarray, num_bytes: np.ndarray) -> Passage:
        """Return what messages find that travel between different nodes at once.

        Parameters
        ----------
        source, target : (L,) array of int
            Nodes that send and receive.
        num_bytes : (L,) array
            Length of each message.
        """
        if not source.size:
            return Passage(0.0, 0)
        if self.kind == "torus":
            return self._round_the_torus(source, target, num_bytes)
        busiest, hops = 0.0, 0
        for level, (nodes, factor) in enumerate(zip(self.switch_nodes, self.oversubscription, strict=True)):
            below, above = source // nodes, target // nodes
            leaves = below != above
            if not leaves.any():
                break
            for switch in (below, above):
                busiest = max(busiest, np.bincount(switch[leaves], num_bytes[leaves]).max() * factor / nodes)
            hops = 2 * (level + 1)
        return Passage(float(busiest), hops)

    def _round_the_torus(self, source: np.ndarray, target: np.ndarray, num_bytes: np.ndarray) -> Passage:
        """Route along the first axis first, the shorter way round; upwards where both are equally long."""
        here, there = list(np.unravel_index(source, self.shape)), np.unravel_index(target, self.shape)
        busiest, hops = 0.0, np.zeros(source.size, dtype=np.int64)
        for axis, size in enumerate(self.shape):
            up = (there[axis] - here[axis]) % size
            for direction, steps in ((1, np.where(2 * up <= size, up, 0)), (-1, np.where(2 * up > size, size - up, 0))):
                loads = np.zeros(prod(self.shape))
                for step in range(int(steps.max())):
                    moving = steps > step
                    at = [one[moving] for one in here]
                    at[axis] = (at[axis] + direction * step) % size
                    loads += np.bincount(np.ravel_multi_index(at, self.shape), num_bytes[moving], loads.size)
                busiest = max(busiest, float(loads.max()) / self.link_speed)
                hops += steps
            here[axis] = there[axis]
        return Passage(busiest, int(hops.max()) - 1)
