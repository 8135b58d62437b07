"""Convolutions by one thread an output element: the specification of all other kernels, and the last resort."""

from __future__ import annotations

from math import prod
from typing import Any

from hpcnn.arrays import Array
from hpcnn.ops.cuda import types
from hpcnn.ops.cuda.device import device
from hpcnn.ops.cuda.products import Candidate, Problem

THREADS = 128


def candidates(problem: Problem) -> list[Candidate]:
    """Return the one candidate there is: it computes every problem."""
    kernel = f"conv2d_{problem.kind}_naive_{types.suffix(problem.storage)}"

    def launch(out: Array, *args: Any) -> None:
        blocks = -(-prod(out.shape) // THREADS)
        device().launch("conv2d_naive", kernel, (blocks,), (THREADS,), *args, problem.struct)

    def run(x: Array, weight: Array, bias: Array | None, y: Array, activation: str | None) -> None:
        launch(y, x, weight, bias, y, types.ACTIVATIONS[activation])

    def run_weight(x: Array, grad_output: Array, grad_weight: Array) -> None:
        launch(grad_weight, x, grad_output, grad_weight)

    return [Candidate("naive", run_weight if problem.kind == "weight" else run)]
