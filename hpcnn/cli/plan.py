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
from hpcnn.plan.buckets import FLOAT_BYTES, Bucket
from hpcnn.plan.exchanges import bucket_loads, choose_buckets
from hpcnn.plan.machine import DEFAULT, Machine
from hpcnn.plan.machine import load as load_machine
from hpcnn.spec import ModelSpec

MOST_RANKS = 64
"""Of more ranks, the busiest of the first so many is shown: folded pairs and larger blocks come first."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("plan", help="print each layer's layout and costs for a number of ranks")
    parser.add_argument("config", help="TOML file or preset")
    parser.add_argument("--ranks", type=int, required=True, help="number of MPI ranks")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--machine", type=Path, help="file of `hpcnn profile`, for what is chosen by time")
    parser.add_argument("--save", type=Path, help="write the plan to this TOML file, for `train --plan`")


def run(args: argparse.Namespace) -> int:
    """Print the plan; no MPI is started."""
    if args.ranks < 1:
        raise PlanError(f"plan: --ranks (={args.ranks}) must be at least 1.")
    config = configuration.load(args.config, args.set)
    with open_data(config.data, "train") as data:
        model = models.build(config.model.name, data.image_shape, data.num_classes, config.model.dropout)
    plan = planner.make_plan(model, config.plan.preset, args.ranks, config.train.global_batch)
    machine_file = args.machine or config.exchange.machine
    machine = load_machine(machine_file) if machine_file else DEFAULT
    print(_describe(model, plan, config, machine))
    if args.save:
        args.save.write_text(planner.to_toml(plan))
        print(f"saved {args.save}")
    return 0


def _describe(model: ModelSpec, plan: planner.Plan, config: configuration.Config, machine: Machine) -> str:
    layers = costs.layer_costs(model, plan)
    share = plan.place(model, plan.global_batch).images[0][0].size
    buckets = choose_buckets(
        model,
        config.exchange.kind,
        bucket_bytes=config.exchange.bucket_bytes,
        ranks=plan.ranks,
        global_batch=plan.global_batch,
        machine=machine,
        plan=plan,
    )
    head = (
        f"{model.name}: {quantity(model.num_parameters)} parameters,"
        f" {quantity(model.forward_flops, 'flop')} a sample forward\n"
        f"{plan.ranks} ranks, global batch {plan.global_batch}, largest share {share} samples, "
        f"{quantity(sum(layer.activation_bytes for layer in layers), 'B')} of outputs and "
        f"{quantity(sum(layer.flops for layer in layers), 'flop')} a step on that rank\n"
    )
    table = format_table(
        ("layer", "kind", "layout", "output", "parameters", "output B", "fetched", "flop/step"),
        [
            (
                layer.name,
                layer.kind,
                layer.layout + ("*" if layer.name in plan.fused else ""),
                "x".join(map(str, layer.output_shape)),
                str(layer.num_parameters),
                quantity(layer.activation_bytes),
                quantity(layer.moved_bytes, "B") if layer.moved_bytes else "-",
                quantity(layer.flops),
            )
            for layer in layers
        ],
        left=3,
    )
    if plan.fused:
        table += "\n* borders are computed here as well as by their owner, rather than fetched"
    return f"{head}\n{table}\n\n{_describe_exchange(model, plan, buckets, config.exchange.algorithm, machine)}"


def _describe_exchange(
    model: ModelSpec, plan: planner.Plan, buckets: tuple[Bucket, ...], algorithm: str, machine: Machine
) -> str:
    rows = []
    for bucket in buckets:
        head = (bucket.label, bucket.kind, quantity(bucket.size * FLOAT_BYTES, "B"))
        if algorithm == "mpi" or plan.ranks == 1:
            rows.append((*head, "-", "-", "-", "-"))
            continue
        everyone = [
            bucket_loads(bucket, model, algorithm, rank, plan.ranks, plan.global_batch, machine)
            for rank in range(min(plan.ranks, MOST_RANKS))
        ]
        for loads in zip(*everyone, strict=True):
            busiest = max(loads, key=lambda load: (load.num_bytes, load.messages))
            sent = (busiest.item, busiest.algorithm, str(busiest.messages), quantity(busiest.num_bytes, "B"))
            rows.append((*head, *sent))
            head = ("", "", "")
    note = "what travels, in the order in which backward completes it (messages and bytes: the busiest rank, a step)"
    columns = ("layers", "exchange", "gradient", "what", "algorithm", "messages", "sent")
    return f"{note}\n{format_table(columns, rows, left=2)}"
