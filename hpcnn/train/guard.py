"""Looks for silent damage: parameters that are no numbers, and ranks whose copies of the parameters have come apart.

Ranks that have the same part of a layer keep it equal to the bit: they add the same sums and make the same updates, or
receive the same numbers. A difference is a fault of memory, processor, GPU or network, or a mistake in the program, and
nothing else would tell of it: gradients are summed over all ranks and hide whose are wrong.
"""

from __future__ import annotations

import math
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from hpcnn import arrays
from hpcnn.comm.collectives import allgather
from hpcnn.comm.verdict import name_ranks
from hpcnn.comm.world import World
from hpcnn.config import Config
from hpcnn.errors import DivergenceError, NumericsError
from hpcnn.ops import squared_norm
from hpcnn.parallel.program import Program

_MOST_NAMES = 4


class Guard:
    """Checks the parameters of all ranks.

    Parameters
    ----------
    config : Config
        For how often to compare, and whether equal bits can be expected.
    program : Program
        With this rank's parts of the model; its plan says which layers are cut into how many: the ranks that have one
        part lie that far from each other.
    world : World
        Whoever has to raise together: the program's ranks, and perhaps more.
    """

    def __init__(self, config: Config, program: Program, world: World) -> None:
        self._config = config
        self._parameters = program.model.parameters
        self._world, self._everyone = program.world, world
        cut = program.plan.cut
        self._parts = {one.name: cut[one.name.partition("/")[0]] for one in self._parameters.parameters}
        # The library's own sums may differ in their last bits from rank to rank.
        self.compares = config.train.check_every_steps > 0 and world.size > 1 and config.exchange.algorithm != "mpi"

    def due(self, step: int) -> bool:
        """Return whether copies are to be compared after this step."""
        return self.compares and step % self._config.train.check_every_steps == 0

    def check_loss(self, loss: float, step: int) -> None:
        """Raise NumericsError if the loss of a step is no finite number, or too large; all ranks pass the same."""
        train = self._config.train
        if not loss <= (train.max_loss or sys.float_info.max):
            limit = f", at most train.max_loss (={train.max_loss})" if train.max_loss else ""
            raise NumericsError(
                f"train: the loss of step {step} is {loss}; it must be a finite number{limit}. Lower train.lr"
                f" (={train.lr}), lengthen train.warmup_epochs or set train.clip_norm; checkpoints written so far are"
                " intact."
            )

    def check(self, step: int) -> None:
        """Check the parameters as they are after `step` steps, all of them current (collective).

        Raises
        ------
        NumericsError
            On every rank, if any has a parameter that is no finite number.
        DivergenceError
            On every rank, if copies differ; it names the ranks that the fewest others agree with.
        """
        train = self._config.train
        with self._everyone.agreeing():
            if not math.isfinite(squared_norm(self._parameters.values)):
                raise NumericsError(
                    f"train: after step {step} some parameters are no finite numbers; they are not saved, and"
                    f" checkpoints written so far are intact. Lower train.lr (={train.lr}) or set train.clip_norm."
                )
        if self.compares:
            self.compare(step)

    def compare(self, step: int) -> None:
        """Compare what several ranks have copies of, in one small message (collective); raises DivergenceError."""
        error = self._difference(step)
        if self._everyone is not self._world:
            self._everyone.agree(error)
        elif error is not None:
            raise error

    def _difference(self, step: int) -> DivergenceError | None:
        """Return the same error on all ranks of the program, if copies differ (collective)."""
        checksums = self._checksums()
        names = list(checksums)
        cuts = sorted(set(self._parts.values()))
        mine = np.array(
            [[zlib.crc32(b"".join(checksums[name] for name in names if self._parts[name] == cut)) for cut in cuts]],
            np.int64,
        )
        everyone = self._gather(mine)
        if not any(odd_ranks(everyone[:, column], cut) for column, cut in enumerate(cuts)):
            return None
        details = self._gather(np.frombuffer(b"".join(checksums.values()), "<u4").astype(np.int64)[None])
        odd = {name: odd_ranks(details[:, column], self._parts[name]) for column, name in enumerate(names)}
        damaged = {name: ranks for name, ranks in odd.items() if ranks}
        return DivergenceError(self._describe(damaged, step))

    def _gather(self, row: np.ndarray) -> np.ndarray:
        counts = [1] * self._world.size
        return allgather(self._world.comm, row, counts=counts, algorithm="butterfly")

    def _checksums(self) -> dict[str, bytes]:
        """Return the CRC of every parameter's stretch of the flat vector, as it lies."""
        flat = arrays.to_host(self._parameters.values)
        return {
            name: zlib.crc32(flat[start:stop].view(np.uint8).data).to_bytes(4, "little")
            for name, (start, stop) in self._parameters.offsets.items()
        }

    def _describe(self, damaged: dict[str, list[int]], step: int) -> str:
        culprits = sorted({rank for ranks in damaged.values() for rank in ranks})
        names, more = list(damaged)[:_MOST_NAMES], len(damaged) - _MOST_NAMES
        shown = ", ".join(names) + (f" and {more} more" if more > 0 else "")
        who = name_ranks(culprits, self._world.hostnames)
        if self._undecided(damaged):
            what = f"{who} differ in {shown}, and no majority tells whose are right"
        else:
            what = f"{who} {'has' if len(culprits) == 1 else 'have'} other parameters than most ranks: {shown}"
        return (
            f"train: after step {step} {what}; copies of the parameters must be equal to the bit. They are not saved,"
            " and checkpoints written so far are intact. Look for faults of memory or GPU there and go on with"
            " --resume, or set train.on_divergence = 'rollback'."
        )

    def _undecided(self, damaged: dict[str, list[int]]) -> bool:
        """Whether all copies of some part are under suspicion."""
        size = self._world.size
        return any(
            set(range(part, size, self._parts[name])) <= set(ranks)
            for name, ranks in damaged.items()
            for part in {rank % self._parts[name] for rank in ranks}
        )


def odd_ranks(checksums: Sequence[int] | np.ndarray, parts: int) -> list[int]:
    """Return the ranks whose copy differs from that of the majority of those who have the same part.

    Without a majority, as between two, they are all returned.

    Parameters
    ----------
    checksums : sequence of int
        One a rank.
    parts : int
        Rank r has part r modulo `parts`.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for rank in range(len(checksums)):
        groups[rank % parts].append(rank)
    odd: list[int] = []
    for ranks in groups.values():
        (common, votes), *others = Counter(int(checksums[rank]) for rank in ranks).most_common()
        if others:
            known = 2 * votes > len(ranks)
            odd += [rank for rank in ranks if not known or int(checksums[rank]) != common]
    return sorted(odd)
