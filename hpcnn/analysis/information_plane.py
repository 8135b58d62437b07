"""The information plane of a network in training: what each layer shares with the images and with the labels.

At every measurement the program shows outputs and errors of a fixed set of N samples (`activations.py`); each rank
adds up kernel exponents of its channels, and has whole matrices of some layers afterwards (`kernels.py`). A thread
finds their eigenvalues while training goes on; before the next measurement the ranks put their numbers together, and
rank 0 keeps them (`plane_file.py`). Arithmetic is float64, but for distances within a feature map, which have its type.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from hpcnn.analysis import chain
from hpcnn.analysis.activations import Activations
from hpcnn.analysis.entropy import entropy, entropy_with_labels, kernel, label_entropy, mean_off_diagonal
from hpcnn.analysis.kernels import Layer, products_of_rows, scatter, shares
from hpcnn.analysis.plane_file import PlaneFile, Setting, Values
from hpcnn.analysis.widths import WidthRule, exponent
from hpcnn.data.loader import Part, read_samples
from hpcnn.errors import ConfigError
from hpcnn.geometry import split
from hpcnn.train.setup import Parts, batch_part

WRITE_EVERY = 20
"""Measurements after which the file is written, if no checkpoint comes before."""


class InformationPlane:
    """Measures the information plane between training steps: an `Observer`.

    Parameters
    ----------
    parts : Parts
        The run's data, model and program; `config.analysis` says what to measure.

    Raises
    ------
    ConfigError
        If there are fewer images than samples, or layers are named that are not there.
    PlanError
        If the plan leaves no rank with a value that is wanted.
    """

    def __init__(self, parts: Parts) -> None:
        self.config, self.world, self._program = parts.config.analysis, parts.world, parts.program
        settings = self.config
        data = parts.train_data if settings.images == "train" else parts.test_data
        if data is None or len(data) < settings.samples:
            have = "none" if data is None else len(data)
            raise ConfigError(
                f"config: 'analysis.samples' (={settings.samples}) must be no more than the {settings.images} images"
                f" (={have}). Set fewer, or another analysis.images."
            )
        self._data = data
        self._samples = np.arange(settings.samples) * len(data) // settings.samples
        spec = parts.model.spec
        self._specs = chain.measured_layers(spec, settings.layers)
        self._activations = Activations(self._program, self._specs, self._samples, errors=settings.errors)
        rule = WidthRule(settings.width, settings.width_scale, settings.width_quantile)
        maps = settings.kernel == "maps"
        self._layers = [
            Layer(one.output_shape, rule, maps=maps, widen=settings.widen_joint and maps) for one in self._specs
        ]
        self._groups = {
            index: chain.MapGroups.of(layer.channels, settings.maps, settings.pairs, parts.config.train.seed)
            for index, layer in enumerate(self._layers)
            if settings.maps_every and layer.maps and layer.channels > 1
        }
        self._rule, self._through = rule, chain.passed_through(spec)
        self._thread = ThreadPoolExecutor(1, "hpcnn-analysis")
        self._pending: tuple[int, float, Future[Values]] | None = None
        self._count = 0
        self._last = np.zeros((2, len(self._layers)))  # widths, of outputs and of errors, without the rule's factor
        self._file: PlaneFile | None = None

    # -- the observer -----------------------------------------------------------------------------------------------

    def begin(self, folder: Path, step: int) -> None:
        """Read the samples, and what the run has recorded up to `step` (collective)."""
        with self.world.agreeing():
            whole = read_samples(self._data, self._samples, Part.whole(len(self._samples), self._data.image_shape))
            self._part = read_samples(self._data, self._samples, batch_part(self._program, len(self._samples)))
        self._labels = whole.labels
        self._same = np.equal.outer(self._labels, self._labels).astype(np.float64)
        products = products_of_rows(whole.images)
        width = self._rule.scale * self._rule.width(products, whole.images[0].size, self._same)
        self._input = exponent(products, width)
        with self.world.agreeing():
            if self.world.rank == 0:
                self._file = PlaneFile(folder, self._setting(), step)
        kept = None if self._file is None else (self._file.num_measured, self._file.last_widths())
        self._count, last = self.world.broadcast_obj(kept)
        if last is not None:
            self._last = last / self._rule.scale

    def due(self, step: int) -> bool:
        """Return whether this step is measured."""
        return step % self.config.information_plane_every_steps == 0

    def observe(self, step: int) -> None:
        """Measure the network as it is after `step` (collective)."""
        begin = time.perf_counter()
        self._collect()
        outputs, errors = self._activations.collect(self._part.images, self._part.labels)
        every = self.config.maps_every
        groups = self._groups if every and self._count % every == 0 else {}
        values: Values = {}
        jobs = [self._measure_outputs(outputs, groups, values)]
        if errors:
            jobs.append(self._measure_errors(errors, values))
        self._count += 1

        def solve() -> Values:
            for job in jobs:
                job()
            return values

        future = self._thread.submit(solve)
        self._pending = step, time.perf_counter() - begin, future

    def settle(self) -> None:
        """Write what was measured (collective)."""
        self._collect()
        with self.world.agreeing():
            if self._file is not None:
                self._file.write()

    # -- measurements -----------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Put together what the ranks have found of the last measurement (collective)."""
        if self._pending is None:
            return
        step, seconds, future = self._pending
        self._pending = None
        begin = time.perf_counter()
        values = future.result()
        flat = np.concatenate([one.ravel() for one in values.values()])
        self._program.sum_over_ranks(flat)
        whole, start = {}, 0
        for name, one in values.items():
            whole[name] = flat[start : start + one.size].reshape(one.shape)
            start += one.size
        self._last[0] = whole["sigma"] / self._rule.scale
        if "errors/sigma" in whole:
            self._last[1] = whole["errors/sigma"] / self._rule.scale
        if self._file is not None:
            self._file.add(step, seconds + time.perf_counter() - begin, whole)
        if self._count % WRITE_EVERY == 0:
            with self.world.agreeing():
                if self._file is not None:
                    self._file.write()

    def _exponents(
        self, arrays: list[np.ndarray], groups: dict[int, chain.MapGroups], last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:
        """Return exponents of this rank's share of layers, the widths it knows, and products of its share of groups.

        Widths are of this rank's layers or maps, and zero elsewhere: their sum over ranks is the mean width of a layer
        (collective).
        """
        n, world = len(self._samples), self.world
        stack, widths = np.zeros((len(arrays), n, n)), np.zeros(len(arrays))
        grouped: dict[int, np.ndarray] = {}
        for index, (layer, x) in enumerate(zip(self._layers, arrays, strict=True)):
            members = None
            if index in groups:
                members = groups[index].members(layer.channels)
                grouped[index] = np.zeros((len(members), n, n))
                own = split(layer.channels, world.size, world.rank)
                members = members[:, own.start : own.stop]
            widths[index] = layer.add(x, stack[index], members, grouped.get(index))
        whole = scatter(stack, world)
        for index, products in zip(range(*shares(len(arrays), world)[world.rank]), whole, strict=True):
            layer, width = self._layers[index], 1.0
            if not layer.maps:
                width = layer.rule.scale * layer.rule.width(products, layer.features, self._same, last[index])
                widths[index] = width
            products[...] = exponent(products, width)
        return whole, widths, {index: scatter(one, world) for index, one in grouped.items()}

    def _measure_outputs(
        self, outputs: list[np.ndarray], groups: dict[int, chain.MapGroups], values: Values
    ) -> Callable[[], None]:
        """Return the job that fills in `values` of outputs (collective)."""
        exponents, widths, grouped = self._exponents(outputs, groups, self._last[0])
        count, world, alpha = len(self._layers), self.world, self.config.alpha
        values |= {name: np.zeros(count) for name in ("S", "S_x", "S_y", "kernel_mean")} | {"sigma": widths}
        layers = range(*shares(count, world)[world.rank])
        mine: list[tuple[np.ndarray, np.ndarray, int]] = []
        for index in groups:
            size = len(groups[index].members(self._layers[index].channels))
            names = [f"maps/{self._specs[index].name}/{name}" for name in ("S", "S_x")]
            values |= {name: np.zeros(size) for name in names}
            own = range(*shares(size, world)[world.rank])
            mine += [(values[names[0]], values[names[1]], place) for place in own]

        def job() -> None:
            for index, own in zip(layers, exponents, strict=True):
                k = kernel(own)
                values["S"][index] = entropy(k, alpha)
                values["S_x"][index] = entropy(kernel(own + self._input), alpha)
                values["S_y"][index] = entropy_with_labels(k, self._labels, alpha)
                values["kernel_mean"][index] = mean_off_diagonal(k)
            matrices = (one for some in grouped.values() for one in some)
            for (alone, with_input, place), own in zip(mine, matrices, strict=True):
                together = exponent(own)
                alone[place] = entropy(kernel(together), alpha)
                with_input[place] = entropy(kernel(together + self._input), alpha)

        return job

    def _measure_errors(self, errors: list[np.ndarray], values: Values) -> Callable[[], None]:
        """Return the job that fills in `values` of errors (collective)."""
        exponents, widths, _ = self._exponents(errors, {}, self._last[1])
        count, world, alpha = len(self._layers), self.world, self.config.alpha
        ranges = shares(count, world)
        owner = next(rank for rank, share in enumerate(ranges) if count - 1 in range(*share))
        top = exponents[-1].copy() if world.rank == owner else np.empty((len(self._samples),) * 2)
        world.broadcast(top, owner)
        names = ("errors/S", "errors/S_top", "errors/kernel_mean")
        values |= {name: np.zeros(count) for name in names} | {"errors/sigma": widths}

        def job() -> None:
            for index, own in zip(range(*ranges[world.rank]), exponents, strict=True):
                k = kernel(own)
                values["errors/S"][index] = entropy(k, alpha)
                values["errors/S_top"][index] = entropy(kernel(own + top), alpha)
                values["errors/kernel_mean"][index] = mean_off_diagonal(k)

        return job

    def _setting(self) -> Setting:
        """Return what all measurements have in common."""
        alpha = self.config.alpha
        return Setting(
            config=self.config,
            layers=tuple(layer.name for layer in self._specs),
            chain=tuple(layer.name in self._through for layer in self._specs),
            samples=self._samples,
            S_input=entropy(kernel(self._input), alpha),
            S_labels=label_entropy(self._labels, alpha),
            groups={self._specs[index].name: groups for index, groups in self._groups.items()},
        )
