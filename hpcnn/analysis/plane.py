"""From entropies to the quantities of an information plane, and how often its inequalities fail.

The data-processing inequality holds for information, not for estimates of it; violations are counted, not mended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hpcnn.analysis.chain import MapGroups
from hpcnn.analysis.entropy import dual_total_correlation, total_correlation

ROUNDING = 1e-6
"""Bits by which information may grow without being called a violation."""
SATURATED = 0.95
"""Entropy in parts of log2 N from which a kernel is called too narrow."""
COLLAPSED = 0.99
"""Mean kernel between samples from which it is called too wide."""


def of_layers(values: Mapping[str, np.ndarray], S_input: float, S_labels: float) -> dict[str, np.ndarray]:
    """Return the quantities of all layers at one step, as `plane_file.py` names them.

    Parameters
    ----------
    values : mapping
        "S", "S_x", "S_y", "sigma", "kernel_mean", each of shape (layers,): entropies alone, with the images and with
        the labels, and what is known of the kernels; the same of errors with "errors/", "errors/S_top" with the last.
    S_input, S_labels : float
        Entropies of images and labels.
    """
    found = {name: values[name] for name in ("S", "sigma", "kernel_mean")}
    found["I_x"] = S_input + values["S"] - values["S_x"]
    found["I_y"] = S_labels + values["S"] - values["S_y"]
    found["forward_violated"] = np.diff(found["I_x"]) > ROUNDING
    if "errors/S" in values:
        S = values["errors/S"]
        found |= {f"errors/{name}": values[f"errors/{name}"] for name in ("S", "sigma", "kernel_mean")}
        found["errors/I_top"] = (S[-1] + S - values["errors/S_top"])[:-1]
        found["errors/backward_violated"] = np.diff(found["errors/I_top"]) < -ROUNDING
    return found


def of_maps(groups: MapGroups, S: np.ndarray, S_x: np.ndarray, S_input: float) -> dict[str, np.ndarray]:
    """Return the quantities of a layer's maps at one step.

    Parameters
    ----------
    groups : MapGroups
    S, S_x : ndarray, shape (groups,)
        Joint entropies of each group's maps, alone and with the images.
    S_input : float
        Of the images.

    Returns
    -------
    dict of str to ndarray
        I_x of single maps, pairs and growing groups; of each pair {1, 2} redundancy_synergy, I_1 + I_2 - I_12, and
        non_redundant, 2 I_12 - I_1 - I_2, which is what only one of them tells plus twice what both tell together;
        total_correlation and dual_total_correlation of all maps, and both normalised.
    """
    single, pairs, growing, _ = groups.split(S_input + S - S_x)
    alone, _, joint, without = groups.split(S)
    first, second = (single[[pair[side] for pair in groups.pairs]] for side in (0, 1))
    total, dual = total_correlation(alone, joint[-1]), dual_total_correlation(without, joint[-1])
    return {
        "single_I_x": single,
        "pair_I_x": pairs,
        "growing_I_x": growing,
        "redundancy_synergy": first + second - pairs,
        "non_redundant": 2 * pairs - first - second,
        "total_correlation": np.array(total[0]),
        "total_correlation_normalised": np.array(total[1]),
        "dual_total_correlation": np.array(dual[0]),
        "dual_total_correlation_normalised": np.array(dual[1]),
    }


class Violations(NamedTuple):
    """How often an inequality failed between neighbouring layers."""

    checked: int
    failed: int
    worst: float
    """By how many bits, at most; 0 where it never failed."""

    @property
    def share(self) -> float:
        """Part of the checks that failed."""
        return self.failed / self.checked if self.checked else 0.0


def violations(shared: np.ndarray, *, grows: bool = False) -> Violations:
    """Return how often information grew from a layer to the next, or, if it is to grow, fell.

    Parameters
    ----------
    shared : ndarray, shape (steps, layers)
        Of layers that are a Markov chain.
    """
    steps = np.diff(shared, axis=1)
    excess = -steps if grows else steps
    excess = excess[np.isfinite(excess)]
    failed = excess > ROUNDING
    return Violations(excess.size, int(failed.sum()), float(excess[failed].max(initial=0.0)))


def warnings(
    layers: Sequence[str], S: np.ndarray, kernel_mean: np.ndarray, log2_samples: float, what: str = "output"
) -> list[str]:
    """Return a line for each layer whose last kernel is too narrow or too wide to tell anything."""
    found = []
    for layer, entropy, mean in zip(layers, S, kernel_mean, strict=True):
        if entropy > SATURATED * log2_samples:
            found.append(
                f"{layer} {what}: entropy is {entropy / log2_samples:.0%} of log2 samples (kernel mean {mean:.2g}): the"
                " kernel is too narrow to tell samples alike. Raise analysis.width_scale or analysis.samples."
            )
        elif mean > COLLAPSED:
            found.append(
                f"{layer} {what}: the kernel between samples is {mean:.3f} in the mean: it is too wide to tell them"
                " apart, or they are all alike. Lower analysis.width_scale."
            )
    return found
