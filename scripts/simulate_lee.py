"""Simulate the strong scaling that Lee et al. published for Cori: VGG-16 and ResNet-50 on up to 8192 cores.

    python scripts/simulate_lee.py --out lee

writes nodes.csv, .svg and .png (a rank a node, 32 threads, as they ran) and cores.csv, .svg and .png (a rank a core),
and prints the last points beside the published ones. docs/scaling.md has the results, and what they rest on.

References
----------
Lee, Agrawal, Balaprakash, Choudhary, Liao, "Communication-efficient parallelization strategy for deep convolutional
neural network training", MLHPC 2018.
Lee, Jha, Agrawal, Choudhary, Liao, "Parallel deep convolutional neural network training by exploiting the overlapping
of computation and communication", HiPC 2017.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from hpcnn import configuration
from hpcnn.analysis.forecast import model_of
from hpcnn.plan import machine as machines
from hpcnn.plan.machine import Machine
from hpcnn.plan.simulation import Series, Simulation, simulate
from hpcnn.report.simulation import plot_simulation, write_csv

THEIRS = Series("data", "factors", "pairwise")
SERIES = (
    THEIRS,
    Series("data", "allreduce", "ring"),
    Series("data", "allreduce", "butterfly"),
    Series("auto", "auto", "auto"),
)
PUBLISHED = {"vgg16": (8192, 2516.36), "resnet50": (8192, 2734.25)}
"""By model: cores, and speed-up."""

VGG_A = {256: 62.97, 512: 77.97}
"""HiPC 2017: by batch, the speed-up of 128 nodes over one."""

SETTINGS = ("model.sync_batchnorm=false", "exchange.overlap=true", "exchange.wait=layer")


def main() -> None:
    """Simulate, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("lee"), help="folder; default: lee")
    parser.add_argument("--slower", type=float, default=1.0, help="times as many seconds a byte between nodes")
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for name, batch, most in (("nodes", 256, 256), ("cores", 8192, 8192)):
        machine = slowed(machines.load(f"cori-haswell-{name}"), args.slower)
        done = {model: run(model, machine, batch, most) for model in PUBLISHED}
        write_csv(done, out / f"{name}.csv")
        title = f"strong scaling, {batch} samples a step, a rank a {name[:-1]} of cori-haswell-{name}, simulated"
        plot_simulation(done, [out / f"{name}.svg", out / f"{name}.png"], title, PUBLISHED)
        for model, simulation in done.items():
            report(name, model, simulation)
    for batch, speed_up in VGG_A.items():
        machine = slowed(machines.load("cori-haswell-nodes"), args.slower)
        simulation = run("vgg11", machine, batch, 128, (THEIRS,))
        one, *_, last = simulation.of(THEIRS)
        print(f"VGG-A, {batch} samples, 128 nodes over one: {last.speed_up / one.speed_up:.1f}; published {speed_up}")
    print(f"{time.perf_counter() - begin:.1f} s, {time.process_time():.1f} s of processor time")


def slowed(machine: Machine, factor: float) -> Machine:
    """Return a machine whose bytes take longer between nodes."""
    link = machine.link(same_node=False)
    return replace(machine, network=replace(link, beta_s_per_byte=factor * link.beta_s_per_byte))


def run(model: str, machine: Machine, batch: int, most: int, series: tuple[Series, ...] = SERIES) -> Simulation:
    """Return a model's simulation on 1, 2, 4, ... ranks; their exchange takes every layer by itself."""
    ranks = [1 << power for power in range(most.bit_length())]
    done = []
    for some, extra in (((THEIRS,), ("exchange.bucket_bytes=1",)), (tuple(s for s in series if s != THEIRS), ())):
        config = configuration.load(model, [*SETTINGS, *extra, f"train.global_batch={batch}"])
        done += [simulate(config, model_of(config), machine, ranks, some)] if some else []
    return replace(done[-1], points=tuple(point for one in done for point in one.points))


def report(ranks: str, model: str, simulation: Simulation) -> None:
    """Print the last point of every series."""
    for series in SERIES:
        point = simulation.of(series)[-1]
        step = point.prediction
        print(
            f"{model}, ranks are {ranks}: {series.label}: {point.cores} cores, {1e3 * step.step_s:.1f} ms a step,"
            f" {1e3 * step.exposed_s:.1f} ms waiting, speed-up {point.speed_up:.0f};"
            f" published {PUBLISHED[model][1]:.0f}"
        )


if __name__ == "__main__":
    main()
