"""Measures what a program does besides its operators: `plan.machine.Rates.layer_s`."""

from __future__ import annotations

import numpy as np

from hpcnn import configuration
from hpcnn.analysis.bench_step import TimedUpdate
from hpcnn.analysis.profile_layers import time_passes
from hpcnn.analysis.stopwatch import Stopwatch
from hpcnn.nn.model import Model
from hpcnn.nn.models.builder import GraphBuilder
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.plan.exchanges import buckets_of
from hpcnn.plan.machine import DEFAULT
from hpcnn.plan.planner import make_plan
from hpcnn.plan.site import Site
from hpcnn.train import optimizers

NUM_LAYERS = 40
"""So many that what a step has once hardly counts."""
LEAST_S = 0.5
"""How long steps are timed."""

SIDE, CHANNELS, CLASSES = 4, 8, 2


def layer_seconds(watch: Stopwatch) -> float:
    """Return the seconds of a layer, each way, that are not its operators' (collective).

    Every rank trains a chain of tiny convolutions by itself. What its steps take longer than the same convolutions
    alone is how the program goes from one to the next.
    """
    graph = GraphBuilder("chain", (SIDE, SIDE, CHANNELS))
    for index in range(NUM_LAYERS):
        graph.conv(f"conv{index}", CHANNELS, 1)
    graph.global_average_pool("pool")
    graph.linear("fc", CLASSES)
    spec = graph.finish(CLASSES)
    config = configuration.load("lenet5")
    world = watch.world.split(watch.world.rank)
    model, plan = Model(spec, seed=1), make_plan(spec, "data", 1, 1)
    buckets = buckets_of(config, spec, plan, Site.of(config, DEFAULT, world.engine.nodes))
    exchange = make_exchange(config.exchange, spec, plan, buckets, model.parameters, world)
    program, optimizer = Program(model, plan, world, exchange), optimizers.build(config.train, model.parameters)
    images, labels = np.ones((1, *spec.input_shape), np.float32), np.zeros(1, np.int64)
    context = program.context(training=True, seed=1, step=0, samples=np.arange(1), global_batch=1)

    def step() -> None:
        program.train_step(images, labels, context, TimedUpdate(optimizer, 0))

    shape = (1, SIDE, SIDE, CHANNELS)
    step_s, passes = watch.seconds([step], at_least_s=LEAST_S)[0], time_passes(spec.layers[1], shape, shape, watch)
    return max(0.0, (step_s / NUM_LAYERS - sum(passes)) / 2)
