"""`hpcnn plan`: what every layer would hold, compute and send, before a single rank is started."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcnn import config as configuration
from hpcnn.cli.table import format_table, quantity
from hpcnn.data import open_data
from hpcnn.errors import PlanError
from hpcnn.nn import models
from hpcnn.plan import costs, planner
from hpcnn.plan.buckets import FLOAT_BYTES, Bucket, make_buckets
from hpcnn.plan.choice import allreduce_algorithm
from hpcnn.spec import ModelSpec


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("plan", help="print each layer's layout and costs for a number of ranks")
    parser.add_argument("config", help="TOML file or preset")
    parser.add_argument("--ranks", type=int, required=True, help="number of MPI ranks")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--save", type=Path, help="write the plan to this TOML file, for `train --plan`")


def run(args: argparse.Namespace) -> int:
    """Print the plan; no MPI is started."""
    if args.ranks < 1:
        raise PlanError(f"plan: --ranks (={args.ranks}) must be at least 1.")
    config = configuration.load(args.config, args.set)
    with open_data(config.data, "train") as data:
        model = models.build(config.model.name, data.image_shape, data.num_classes, config.model.dropout)
    plan = planner.make_plan(model, config.plan.preset, args.ranks, config.train.global_batch)
    print(_describe(model, plan, config))
    if args.save:
        args.save.write_text(planner.to_toml(plan))
        print(f"saved {args.save}")
    return 0


def _describe(model: ModelSpec, plan: planner.Plan, config: configuration.Config) -> str:
    layers = costs.layer_costs(model, plan)
    share = plan.input_layout.samples(0, plan.global_batch).size
    buckets = make_buckets(model.layers, config.exchange.bucket_bytes)
    head = (
        f"{model.name}: {quantity(model.num_parameters)} parameters,"
        f" {quantity(model.forward_flops, 'flop')} a sample forward\n"
        f"{plan.ranks} ranks, global batch {plan.global_batch}, largest share {share} samples, "
        f"{quantity(sum(layer.activation_bytes for layer in layers), 'B')} of outputs and "
        f"{quantity(sum(layer.flops for layer in layers), 'flop')} a step on that rank\n"
    )
    table = format_table(
        ("layer", "kind", "layout", "output", "parameters", "output B", "flop/step"),
        [
            (
                layer.name,
                layer.kind,
                layer.layout,
                "x".join(map(str, layer.output_shape)),
                str(layer.num_parameters),
                quantity(layer.activation_bytes),
                quantity(layer.flops),
            )
            for layer in layers
        ],
        left=3,
    )
    return f"{head}\n{table}\n\n{_describe_exchange(buckets, config.exchange.algorithm, plan.ranks)}"


def _describe_exchange(buckets: tuple[Bucket, ...], algorithm: str, ranks: int) -> str:
    rows = []
    for bucket in buckets:
        chosen = allreduce_algorithm(bucket.size * FLOAT_BYTES, ranks) if algorithm == "auto" else algorithm
        gradient = quantity(bucket.size * FLOAT_BYTES, "B")
        if chosen == "mpi" or ranks == 1:
            sent = ("-", "-")
        else:
            cost = max(
                (costs.bucket_costs((bucket,), chosen, rank, ranks)[0] for rank in range(min(ranks, 64))),
                key=lambda c: (c.bytes_sent, c.messages),
            )
            sent = (str(cost.messages), quantity(cost.bytes_sent, "B"))
        rows.append((f"{bucket.layers[-1]} .. {bucket.layers[0]}", chosen, gradient, *sent))
    note = "gradient buckets, in the order they travel (messages and bytes: the busiest rank, a step)"
    return f"{note}\n{format_table(('layers', 'algorithm', 'gradient', 'messages', 'sent'), rows, left=2)}"
