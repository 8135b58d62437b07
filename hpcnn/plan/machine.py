"""What the machine does in how many seconds: messages in a node and between nodes, additions, layers, updates.

`hpcnn profile` measures a `Machine` and writes it to machine.toml; without a file the built-in one stands in, so that
what is decided by price is decided everywhere alike. A file may also describe a machine that nobody has measured
(`Described`), with the network above its nodes; some come with the package (`named`). Everything is plain arithmetic on
the numbers of the file: ranks that have read the same text come to the same prices, bit for bit, and so to the same
decisions.
"""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from hpcnn import bounded
from hpcnn.errors import PlanError
from hpcnn.plan.fabric import Fabric

SMALLEST, LARGEST = 1e-18, 1e18
"""Numbers of a file: no machine has others, and times that are added to such ones do not pass."""
LONGEST_SEGMENT_BYTES, SHORTEST_SEGMENT_BYTES, SEGMENT_S = 1 << 20, 1 << 16, 0.01
"""Messages are cut so that a piece takes about so long, within bounds: shorter ones cost more waiting, longer ones
scratch memory, and the time that a more urgent message waits for one that is already under way."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """What a message costs between two ranks that send to each other at the same time, as all others do.

    The straight line alpha + beta n is always there. A measured table, where there is one, goes before it: messages
    change their protocol with their length, so their times bend and jump.
    """

    alpha_s: float
    """Seconds of a message, however short."""
    beta_s_per_byte: float
    """Seconds of each of its bytes."""
    crossing: float = 1.0
    """Between nodes: bytes count so many times where ranks of one node exchange with different nodes, or some of them
    only send and others only receive: such messages get into each other's way."""
    sizes: tuple[int, ...] = ()
    """Measured lengths in bytes, ascending; between nodes what all ranks of a node send in all."""
    copy_s: tuple[float, ...] = ()
    """Seconds of an exchange of each length in which what arrives is stored."""
    sum_s: tuple[float, ...] = ()
    """The same where what arrives is added to what is there."""

    def seconds(
        self,
        num_bytes: float,
        *,
        summing: bool = False,
        gamma_s_per_byte: float = 0.0,
        own_bytes: float | None = None,
    ) -> float:
        """Return the seconds of one exchange of messages of `num_bytes`.

        Between two lengths of the table the line through both holds, above the longest the line through the last two;
        without a table alpha + beta n, and gamma more for each byte that is added: where ranks share the link, the
        `own_bytes` of one of them, as they add at the same time.
        """
        table = self.sum_s if summing else self.copy_s
        if not table:
            added = num_bytes if own_bytes is None else own_bytes
            return self.alpha_s + num_bytes * self.beta_s_per_byte + (added * gamma_s_per_byte if summing else 0.0)
        sizes = self.sizes
        if num_bytes <= sizes[0] or len(sizes) == 1:
            return table[0] + max(0.0, num_bytes - sizes[0]) * self.beta_s_per_byte
        right = min(bisect_left(sizes, num_bytes), len(sizes) - 1)
        slope = (table[right] - table[right - 1]) / (sizes[right] - sizes[right - 1])
        if num_bytes > sizes[right]:
            return table[right] + (num_bytes - sizes[right]) * max(0.0, slope)
        return table[right - 1] + (num_bytes - sizes[right - 1]) * slope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast one rank computes, on layers of ordinary shapes while the other ranks compute as well."""

    conv_forward_flops_per_s: float = 5e10
    conv_input_gradient_flops_per_s: float = 5e10
    conv_weight_gradient_flops_per_s: float = 5e10
    linear_flops_per_s: float = 2e10
    update_bytes_per_s: float = 1e10
    """Weights, gradients and velocities read and written by SGD with momentum, 20 bytes a float32 parameter."""
    memory_bytes_per_s: float = 8e9
    """Read and written by operators that compute little: pooling, activations, sums."""
    call_s: float = 2e-5
    """Seconds of an operator on next to nothing."""
    layer_s: float = 0.0
    """Seconds of a layer, forward and again backward, besides its operators."""
    beside_s_per_byte: float = 1e-9
    """Seconds by which a byte that is sent meanwhile, and another received, lengthen a rank's computation."""
    beside_share: float = 0.0
    """Part by which it is longer while anything is under way, however short: who carries it on looks for it."""
    pace_beside: float = 1.0
    """Speed of messages while ranks compute, in terms of that while they wait: less where cores are few."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Measured seconds of one layer's passes; see `work.py`."""

    layer: str
    """`work.signature` of the layer."""
    extent: tuple[int, int, int, int, int]
    """Samples, output rows and columns, channels made and channels read."""
    seconds: tuple[float, float, float, float]
    """Forward, error, weight gradient, input gradient."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Where the numbers come from."""

    hosts: int
    ranks: int
    cores: int
    """Cores that a rank could run on."""
    mpi: str
    """What the MPI library says of itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """Where the numbers of a machine come from that was not measured, and how ranks are put on it."""

    sources: str
    """What each number rests on; for people."""
    ranks_per_node: int = 1
    cores_per_rank: int = 1
    thread_efficiency: float = 1.0
    """How fast a rank computes, by `cores_per_rank` times one core alone."""

    @property
    def cores(self) -> float:
        """Single cores that compute as fast as one rank."""
        return self.cores_per_rank * self.thread_efficiency


DEFAULT_NODE = Link(alpha_s=8e-6, beta_s_per_byte=2e-10)
"""Shared memory: 5 GB/s in each direction."""

DEFAULT_NETWORK = Link(alpha_s=30e-6, beta_s_per_byte=5e-10)
"""An ordinary cluster's network, between 10 and 25 Gbit/s."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Prices of everything that a plan counts. The defaults are those of an ordinary CPU cluster.

    Links that could not be measured (`network` on a single host, `node` with one rank a host) are None and priced as
    the default's.
    """

    start_s: float = 10e-6
    """Seconds that a collective costs each rank besides its steps."""
    gamma_s_per_byte: float = 1.5e-10
    """Seconds to add one byte's worth of numbers to others."""
    stall_s: float = 0.0
    """Seconds by which ranks that compute are out of step when they meet: noise, or the periods of quotas."""
    node: Link | None = None
    """Between ranks of the same node."""
    network: Link | None = None
    """Between nodes."""
    rates: Rates = Rates()
    timings: tuple[Timing, ...] = ()
    """Of the layers of models that were measured (`hpcnn profile --model`)."""
    fabric: Fabric | None = None
    """The network above the nodes' ports; None: it is never in the way."""
    measured: Measured | None = None
    described: Described | None = None

    def __hash__(self) -> int:  # prices are looked up by machine: few numbers must do, not whole tables
        return hash((self.start_s, self.gamma_s_per_byte, self.fabric, self.measured))

    def segment_bytes(self, *, single_node: bool) -> int:
        """Return where messages are best cut: a power of two."""
        beta = self.link(same_node=single_node).beta_s_per_byte
        segment = LONGEST_SEGMENT_BYTES
        while segment > SHORTEST_SEGMENT_BYTES and segment * beta > SEGMENT_S:
            segment //= 2
        return segment

    def link(self, *, same_node: bool) -> Link:
        """Return the link between two ranks."""
        if same_node:
            return self.node or DEFAULT_NODE
        return self.network or DEFAULT_NETWORK


DEFAULT = Machine()
"""The machine that is assumed where none was measured."""


def named() -> tuple[str, ...]:
    """Return the names of the machines that come with the package, described in hpcnn/machines."""
    folder = resources.files("hpcnn") / "machines"
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir()))


def load(path: str | Path) -> Machine:
    """Return the machine in a file, written by `hpcnn profile` or by hand, or one of those `named`.

    Raises
    ------
    PlanError
        If the file cannot be read, is not TOML, or describes no machine (see `from_toml`).
    """
    if str(path) in named():
        text = (resources.files("hpcnn") / "machines" / f"{path}.toml").read_text()
        return from_toml(text, f"machines/{path}.toml")
    try:
        text = bounded.text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(
            f"machine: cannot read '{path}' ({error}); `hpcnn profile --out {path}` writes one, and these come with"
            f" hpcnn: {', '.join(named())}."
        ) from None
    return from_toml(text, str(path))


def from_toml(text: str, origin: str = "machine.toml") -> Machine:
    """Return the machine that a TOML text describes; `origin` names the text in errors.

    Raises
    ------
    PlanError
        If the text is not TOML, a key is unknown, missing or of the wrong type, a number is not finite and positive,
        or a table's columns differ in length.
    """
    try:
        tree = bounded.toml(text)
    except ValueError as error:
        raise _broken(origin, f"is not valid TOML: {error}") from None
    _refuse_unknown(origin, tree, Machine, "")
    try:
        machine = msgspec.convert(tree, Machine, strict=True)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        key = where.strip("`").removeprefix("$.") or "the document"
        raise _broken(origin, f"'{key}': {what[:1].lower()}{what[1:]}") from None
    for timing in machine.timings:
        if min(timing.extent) < 1 or not all(0 <= value <= LARGEST for value in (*timing.extent, *timing.seconds)):
            raise _broken(origin, f"'timings': '{timing.layer}' (={list(timing.extent)}) must have positive extents")
    for name, value in _numbers(dataclasses.asdict(dataclasses.replace(machine, timings=()))):
        if name.endswith(".crossing") and value < 1:
            raise _broken(origin, f"'{name}' (={value}) must be at least 1")
        if (
            not math.isfinite(value)
            or value < 0
            or (value == 0 and not name.endswith(("_per_byte", "_share", "stall_s", "hop_s", "layer_s")))
        ):
            raise _broken(origin, f"'{name}' (={value}) must be a positive number")
        if value != 0 and not SMALLEST <= value <= LARGEST:
            raise _broken(origin, f"'{name}' (={value}) must lie between {SMALLEST} and {LARGEST}")
    if machine.described is not None:
        _check_described(origin, machine)
    elif machine.measured is None:  # written last: without it the file has been cut off
        raise _broken(origin, "the section [measured] is missing")
    if machine.fabric is not None and machine.fabric.problem():
        raise PlanError(f"machine: {origin}: {machine.fabric.problem()}.")
    for name in ("node", "network"):
        _check_table(origin, name, getattr(machine, name))
    return machine


def to_toml(machine: Machine) -> str:
    """Return the machine, a measured one, as TOML text that `from_toml` reads back to an equal one."""
    import tomli_w  # written by rank 0 only

    return tomli_w.dumps(_without_empty(dataclasses.asdict(machine)))


def _check_described(origin: str, machine: Machine) -> None:
    about = machine.described
    if machine.measured is not None:
        raise PlanError(f"machine: {origin}: has both [measured] and [described]; a machine is one of them.")
    if about is not None and (min(about.ranks_per_node, about.cores_per_rank) < 1 or about.thread_efficiency > 1):
        raise PlanError(
            f"machine: {origin}: 'described': ranks_per_node (={about.ranks_per_node}) and cores_per_rank"
            f" (={about.cores_per_rank}) must be at least 1, thread_efficiency (={about.thread_efficiency}) at most 1."
        )
    if not machine.network or (about and about.ranks_per_node > 1 and not machine.node):
        raise PlanError(f"machine: {origin}: [network], and for several ranks a node [node], must be described.")


def _check_table(origin: str, name: str, link: Link | None) -> None:
    if link is None:
        return
    lengths = {len(column) for column in (link.sizes, link.copy_s, link.sum_s)}
    if len(lengths) != 1:
        raise _broken(origin, f"'{name}': sizes, copy_s and sum_s must be equally long")
    if any(left >= right for left, right in pairwise(link.sizes)):
        raise _broken(origin, f"'{name}.sizes' (={list(link.sizes)}) must ascend")


def _refuse_unknown(origin: str, tree: dict[str, Any], kind: type, prefix: str) -> None:
    sections: dict[str, type] = {"node": Link, "network": Link, "rates": Rates, "fabric": Fabric}
    sections |= {"measured": Measured, "described": Described}
    names = {field.name for field in dataclasses.fields(kind)}
    for name, value in tree.items():
        if name not in names:
            raise _broken(origin, f"unknown key '{prefix}{name}'")
        if kind is Machine and isinstance(value, dict) and name in sections:
            _refuse_unknown(origin, value, sections[name], f"{name}.")
        if kind is Machine and name == "timings" and isinstance(value, list):
            for table in (one for one in value if isinstance(one, dict)):
                _refuse_unknown(origin, table, Timing, "timings.")


def _numbers(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in tree.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            found += [(f"{prefix}{name}", one) for one in value]
        elif isinstance(value, int | float):
            found.append((f"{prefix}{name}", value))
    return found


def _broken(origin: str, what: str) -> PlanError:
    return PlanError(f"machine: {origin}: {what}. Measure it again with `hpcnn profile --out {origin}`.")


def _without_empty(tree: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without_empty(value) if isinstance(value, dict) else value
        for name, value in tree.items()
        if value is not None and value != ()
    }
