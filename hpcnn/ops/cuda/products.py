"""Matrix products of convolutions: what is to be computed, who offers to compute it, and who does.

The three passes of a convolution, and of a fully connected layer, are products of matrices that are never laid out
(implicit GEMM). A `Problem` states one in integers. Each module of kernels offers `Candidate`s for it, all of which
compute the same up to the order of sums; the fastest on this device is found once and then taken.

Operands by kind of pass, in the order in which `run` passes them on; `weight` is always the float32 (K, R, S, C /
groups) of the parameters, C-ordered, and every other array but a bias has the element type `Problem.storage`:

forward
    x (N, H, W, C), weight, bias (K,) or None, y (N, P, Q, K), activation or None
input
    grad_output (N, P, Q, K), weight, bias (C,) or None, grad_input (N, H, W, C), activation or None; bias and
    activation serve fully connected layers, for which this pass may be the forward one
weight
    x (N, H, W, C), grad_output (N, P, Q, K), grad_weight (K, R, S, C / groups) of float32, overwritten

Weights, their gradients and biases are views of flat vectors: no more than 4-byte aligned, whatever their shape. Images
may be views too (some samples of a batch).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from hpcnn.arrays import Array, Padding, Pair, Shape
from hpcnn.ops import backend
from hpcnn.ops.cuda import tuning, types
from hpcnn.ops.cuda.device import device, when_changed

Kind: TypeAlias = Literal["forward", "input", "weight"]
Compute: TypeAlias = Literal["fp32", "tf32", "bf16"]


class Geometry(NamedTuple):
    """A convolution in integers, in the order of `types.CONV2D`."""

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    p: int
    q: int
    stride_h: int
    stride_w: int
    pad_top: int
    pad_left: int
    dilation_h: int
    dilation_w: int
    groups: int


@dataclass(frozen=True)
class Problem:
    """One pass of a convolution.

    Attributes
    ----------
    kind : {"forward", "input", "weight"}
        The convolution itself, the gradient of its input, or that of its filters.
    compute : {"fp32", "tf32", "bf16"}
        What factors are rounded to before they are multiplied; sums are float32.
    geometry : Geometry
        Extents of the forward convolution, whatever the kind.
    """

    kind: Kind
    compute: Compute
    geometry: Geometry

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.compute, self.geometry))

    @cached_property
    def struct(self) -> np.ndarray:
        """`struct Conv2d`, as kernels take it."""
        return np.array(tuple(self.geometry), types.CONV2D)

    @property
    def storage(self) -> np.dtype[Any]:
        """Element type of images and their gradients."""
        return types.bfloat16() if self.compute == "bf16" else np.dtype(np.float32)

    @property
    def gemm(self) -> tuple[int, int, int]:
        """Rows, columns and depth (the summed extent) of the product, of one group."""
        g = self.geometry
        filters, channels, taps = g.k // g.groups, g.c // g.groups, g.r * g.s
        if self.kind == "forward":
            return g.n * g.p * g.q, filters, taps * channels
        if self.kind == "input":
            return g.n * g.h * g.w, channels, taps * filters
        return filters, taps * channels, g.n * g.p * g.q

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolution, padding included."""
        g = self.geometry
        return 2 * g.n * g.p * g.q * g.k * g.r * g.s * (g.c // g.groups)

    @property
    def key(self) -> str:
        """A name for tables, unique among problems."""
        return f"{self.kind} {self.compute} {' '.join(map(str, self.geometry))}"


class Candidate(NamedTuple):
    """A way to compute a problem; `run` takes the operands of its kind."""

    name: str
    run: Callable[..., None]


MODULES = ("halo", "wgmma", "mma", "simt", "naive")
"""Modules of this package that offer candidates, the likely fastest first."""

_forced: str | None = None
_chosen: dict[tuple[Problem, str | None], Candidate] = {}


@contextmanager
def force(prefix: str) -> Iterator[None]:
    """Take the first candidate whose name begins with `prefix`, inside a `with` block; for tests and measurements."""
    global _forced
    before, _forced = _forced, prefix
    try:
        yield
    finally:
        _forced = before


def candidates(problem: Problem) -> list[Candidate]:
    """Return who offers to compute a problem on the device in use, the likely fastest first."""
    return [candidate for module in _modules() for candidate in module.candidates(problem)]


def run(problem: Problem, *operands: Any) -> None:
    """Compute a problem by whoever is fastest; see the head of this file for the operands."""
    key = (problem, _forced)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = choose(problem, candidates(problem), operands)
    chosen.run(*operands)


def choose(problem: Problem, offered: Sequence[Candidate], operands: Sequence[Any]) -> Candidate:
    """Return the candidate that `force` names, or the fastest.

    Raises
    ------
    LookupError
        If no candidate has the forced name.
    """
    if _forced is not None:
        offered = [candidate for candidate in offered if candidate.name.startswith(_forced)][:1]
        if not offered:
            raise LookupError(f"products: no candidate named {_forced}* for {problem.key}.")
    elif len(offered) > 1 and not _narrow(problem):
        offered = [candidate for candidate in offered if candidate.name != "naive"]  # never the fastest, often endless
    by_name = {candidate.name: candidate for candidate in offered}

    def measure(name: str) -> float:
        return device().measure(lambda: by_name[name].run(*operands))

    return by_name[tuning.fastest(problem.key, list(by_name), measure)]


def latest() -> str:
    """Return the name of the candidate that was chosen last, for tables."""
    return next(reversed(_chosen.values())).name


def forget() -> None:
    """Choose anew from now on."""
    _chosen.clear()


when_changed(forget)


def _narrow(problem: Problem) -> bool:
    """Return whether tiles of matrices would be empty for the most part, as in a convolution channel by channel."""
    return problem.kind != "weight" and problem.geometry.groups > 1 and problem.gemm[1] < 16


def compute_of(x: Array) -> Compute:
    """Return what products of an array like `x` are computed in."""
    return backend.compute() if x.dtype == np.float32 else "bf16"


@lru_cache(4096)
def convolution(
    kind: Kind,
    compute: Compute,
    x_shape: Shape,
    filters: tuple[int, int, int],
    size: Pair,
    stride: Pair,
    padding: Padding,
    dilation: Pair,
    groups: int,
) -> Problem:
    """Return a pass of the convolution of x (N, H, W, C) with filters (K, R, S), whose output is of `size` (P, Q)."""
    offsets = padding[0][0], padding[1][0]
    return Problem(kind, compute, Geometry._make((*x_shape, *filters, *size, *stride, *offsets, *dilation, groups)))


def scratch(num_floats: int) -> Array:
    """Return uninitialised float32 numbers on the device, for partial sums."""
    return device().empty((num_floats,), np.float32)


def _modules() -> list[ModuleType]:
    """Return the modules of kernels."""
    return [importlib.import_module(f"hpcnn.ops.cuda.{name}") for name in MODULES]
