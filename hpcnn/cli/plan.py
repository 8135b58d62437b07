"""`hpcnn plan`: what every layer would hold, compute and send, before a single rank is started."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hpcnn import configuration
from hpcnn.analysis.forecast import forecast, model_of, read_plan
from hpcnn.cli.manual import Manual, explain
from hpcnn.cli.table import format_table, quantity
from hpcnn.errors import PlanError
from hpcnn.plan import costs, planner
from hpcnn.plan.buckets import FLOAT_BYTES, Bucket
from hpcnn.plan.exchanges import bucket_loads
from hpcnn.plan.machine import DEFAULT
from hpcnn.plan.machine import load as load_machine
from hpcnn.plan.prediction import Prediction
from hpcnn.plan.search import Runner, Search
from hpcnn.plan.site import Site
from hpcnn.plan.turns import peak_elements
from hpcnn.spec import ModelSpec
from hpcnn.train.groups import config_of_group, count_groups

MOST_RANKS = 64
"""Of more ranks, the busiest of the first so many is shown: folded pairs and larger blocks come first."""

MANUAL = Manual(
    """Prints, for a number of ranks, what every layer would hold, compute and send, how gradients would travel, and
    the predicted time of a step. Starts no ranks and reads no images but a data set's header. With
    plan.preset=auto it searches for the fastest plan and says what each layer would lose otherwise.""",
    examples=(
        ("hpcnn plan vgg16 --ranks 8", "the preset's plan, on an ordinary CPU cluster"),
        ("hpcnn plan my.toml --ranks 8 --machine machine.toml --set plan.preset=auto --save plan.toml", "search, keep"),
        ("hpcnn plan yolo16 --ranks 4 --plan plan.toml", "describe a plan that was saved or edited"),
    ),
    files=(("FILE.toml", "with --save: the plan, for `hpcnn train --plan`"), ("FILE", "with --json: predictions")),
    see_also=("hpcnn profile", "hpcnn train"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("plan", help="print each layer's layout and costs for a number of ranks")
    explain(parser, MANUAL)
    what, machine = parser.add_argument_group("what to plan"), parser.add_argument_group("the machine")
    what.add_argument("config", help="TOML file or preset")
    what.add_argument("--ranks", type=int, required=True, metavar="N", help="number of MPI ranks (required)")
    what.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting (repeatable)")
    machine.add_argument(
        "--machine", type=Path, metavar="FILE", help="file of `hpcnn profile` (default: an ordinary CPU cluster)"
    )
    machine.add_argument("--ranks-per-node", type=int, default=1, metavar="K", help="ranks a node (default: 1)")
    plans = parser.add_argument_group("plans and results")
    plans.add_argument(
        "--save", type=Path, metavar="FILE.toml", help="write the plan, for `train --plan` (default: only print)"
    )
    plans.add_argument(
        "--plan", type=Path, metavar="FILE.toml", help="describe this saved plan (default: plan.preset's)"
    )
    plans.add_argument(
        "--json", type=Path, metavar="FILE", help="write what is predicted to this file (default: only print)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the plan; no MPI is started."""
    if args.ranks < 1 or args.ranks_per_node < 1:
        raise PlanError(
            f"plan: --ranks (={args.ranks}) and --ranks-per-node (={args.ranks_per_node}) must be at least 1."
        )
    config = configuration.load(args.config, args.set)
    groups = count_groups(config, args.ranks)
    config, ranks = config_of_group(config, groups), args.ranks // groups
    model = model_of(config)
    machine_file = args.machine or config.exchange.machine
    machine = load_machine(machine_file) if machine_file else DEFAULT
    site = Site.of(config, machine, tuple(rank // args.ranks_per_node for rank in range(ranks)))
    plan_text = None if args.plan is None else read_plan(args.plan)
    plan, buckets, predicted, search = forecast(config, model, site, plan_text)
    if groups > 1:
        print(f"{groups} groups of {ranks} ranks, each with a replica; this is the plan of one, without averages")
    print(_describe(model, plan, predicted, search))
    print(f"\n{_describe_exchange(model, plan, buckets, config.exchange.algorithm, site)}")
    if args.save:
        args.save.write_text(planner.to_toml(plan))
        print(f"saved {args.save}")
    if args.json:
        args.json.write_text(json.dumps(_as_json(predicted, search), indent=1) + "\n")
    return 0


def _as_json(predicted: Prediction, search: Search | None) -> dict[str, object]:
    numbers = {name: getattr(predicted, name) for name in ("step_s", "compute_s", "exposed_s", "memory_bytes")}
    if search is None:
        return numbers
    presets = {name: {"kind": one.kind, "step_s": one.prediction.step_s} for name, one in search.presets.items()}
    return numbers | {"kind": search.best.kind, "presets": presets}


def _describe(model: ModelSpec, plan: planner.Plan, predicted: Prediction, search: Search | None) -> str:
    layers = costs.layer_costs(model, plan)
    share = plan.place(model, plan.global_batch).images[0][0].size
    head = (
        f"{model.name}: {quantity(model.num_parameters)} parameters,"
        f" {quantity(model.forward_flops, 'flop')} a sample forward\n"
        f"{plan.ranks} ranks, global batch {plan.global_batch}, largest share {share} samples, "
        f"{quantity(sum(layer.activation_bytes for layer in layers), 'B')} of outputs and "
        f"{quantity(sum(layer.flops for layer in layers), 'flop')} a step on that rank\n"
        f"predicted: {quantity(predicted.step_s, 's')} a step, of which {quantity(predicted.compute_s, 's')} computing"
        f" and {quantity(predicted.exposed_s, 's')} waiting for messages; {quantity(predicted.memory_bytes, 'B')} of"
        " arrays\n"
    )
    runners = search.runners() if search is not None else {}
    columns = ["layer", "kind", "layout", "output", "parameters", "output B", "flop/step", "messages", "sent"]
    columns += ["compute ms", "waits ms"] + (["instead: slower by"] if search is not None else [])
    rows = []
    for layer, time in zip(layers, predicted.layers, strict=True):
        row = [
            layer.name,
            layer.kind,
            _layout(plan, layer.name),
            "x".join(map(str, layer.output_shape)),
            str(layer.num_parameters),
            quantity(layer.activation_bytes),
            quantity(layer.flops),
            str(time.num_messages),
            quantity(time.num_bytes, "B") if time.num_bytes else "-",
            f"{1e3 * time.compute_s:.3g}",
            f"{1e3 * time.exposed_s:.3g}",
        ]
        rows.append(row + ([_instead(runners.get(layer.name))] if search is not None else []))
    table = format_table(columns, rows, left=3)
    if plan.fused:
        table += "\n* borders are computed here as well as by their owner, rather than fetched"
    if plan.settled:
        table += "\n^ gradients of these borders are sent to their owner"
    table += _describe_turns(model, plan)
    return f"{head}\n{table}" + ("" if search is None else f"\n\n{_describe_presets(search)}")


def _layout(plan: planner.Plan, name: str) -> str:
    """Return a layer's layout with its grid: "data 2 spatial 1x3*"."""
    layout = dict(plan.layouts)[name]
    parts = [("data", layout.sample, str(layout.sample)), ("filter", layout.channel, str(layout.channel))]
    parts += [("row", layout.inner, str(layout.inner))]
    parts.insert(1, ("spatial", layout.height * layout.width, f"{layout.height}x{layout.width}"))
    words = [f"{word} {text}" for word, number, text in parts if number > 1]
    marks = "*" * (name in plan.fused) + "^" * (name in plan.settled)
    return (" ".join(words) or "one rank") + marks


def _instead(runner: Runner | None) -> str:
    """Return the runner-up's layout and by what it would be slower, in the whole step."""
    if runner is None:
        return "-"
    compute, waits = (f"{1e3 * seconds:+.3g}" for seconds in (runner.compute_s, runner.exposed_s))
    return f"{_layout(runner.plan, runner.layer)}: {1e3 * runner.step_s:.3g} ms (compute {compute}, waits {waits})"


def _describe_presets(search: Search) -> str:
    best = search.best.prediction
    rows = [
        (name, one.kind, *_numbers(one.prediction), f"{one.prediction.step_s / best.step_s:.2f}")
        for name, one in (*search.presets.items(), ("auto", search.best))
    ]
    columns = ("plan", "exchange", "step s", "compute s", "waits s", "arrays", "over auto")
    return f"what was compared\n{format_table(columns, rows, left=2)}"


def _numbers(one: Prediction) -> tuple[str, ...]:
    times = (f"{seconds:.4g}" for seconds in (one.step_s, one.compute_s, one.exposed_s))
    return (*times, quantity(one.memory_bytes, "B"))


def _describe_turns(model: ModelSpec, plan: planner.Plan) -> str:
    placed, lines = plan.place(model, plan.global_batch).layers, []
    for group in plan.groups(model):
        box, (rows, columns) = placed[group.name].computed[0], group.turns
        whole, turns = (quantity(peak_elements(group, box, whole=one) * FLOAT_BYTES, "B") for one in (True, False))
        lines.append(
            f"\n{group.layers[0].name} to {group.name} in {rows} x {columns} turns: at most {turns} of feature maps and"
            f" gradients at a time, instead of {whole}"
        )
    return "".join(lines)


def _describe_exchange(
    model: ModelSpec, plan: planner.Plan, buckets: tuple[Bucket, ...], algorithm: str, site: Site
) -> str:
    rows = []
    for bucket in buckets:
        kind = bucket.kind if bucket.every == 1 else f"{bucket.kind} every {bucket.every} steps"
        head = (bucket.label, kind, quantity(bucket.size * FLOAT_BYTES, "B"))
        if algorithm in ("mpi", "nccl") or plan.ranks == 1:
            rows.append((*head, "-", "-", "-", "-"))
            continue
        everyone = [
            bucket_loads(
                *(bucket, model, algorithm, rank, plan.ranks, plan.global_batch, site.machine, site.nodes),
                wire_bytes=site.wire_bytes,
            )
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
