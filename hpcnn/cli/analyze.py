"""`hpcnn analyze`: look at what a run recorded, one subcommand an analysis."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hpcnn.cli.manual import Manual, explain
from hpcnn.errors import DataError

if TYPE_CHECKING:
    from hpcnn.analysis.plane_file import Plane


MANUAL = Manual(
    """Prints and draws what a run has recorded of its network in analysis.h5, because a setting of [analysis] asked for
    it.""",
    examples=(("hpcnn analyze information-plane runs/a", "what layers share with images and labels"),),
    see_also=("hpcnn train", "docs/papers.md"),
)
INFORMATION_PLANE = Manual(
    """Prints what each layer shared with images and labels at the last measurement and how often the data-processing
    inequalities failed, warns of kernels that tell nothing, and draws all measurements (with hpcnn[plots]).""",
    examples=(
        ("hpcnn analyze information-plane runs/a", "its table and pictures"),
        ("hpcnn analyze information-plane runs/a --no-plots", "the table only"),
    ),
    files=(
        ("information-plane.svg, .png", "in --out: the plane, a path for each layer"),
        ("inequalities.svg, .png", "both chains of information over the steps"),
        ("feature-maps.svg, .png", "pairs and growing groups of maps, where analysis.maps_every is set"),
    ),
    see_also=("hpcnn train", "docs/experiments.md"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the subcommands and their flags; each sets `analyze`, the function that `run` calls."""
    parser = subparsers.add_parser("analyze", help="tables and pictures of what a run recorded about its network")
    explain(parser, MANUAL)
    kinds = parser.add_subparsers(dest="kind", metavar="information-plane", required=True)
    plane = kinds.add_parser("information-plane", help="what layers share with images and labels")
    explain(plane, INFORMATION_PLANE)
    plane.add_argument("run", type=Path, help="run folder")
    plane.add_argument("--out", type=Path, metavar="DIR", help="where pictures go (default: RUN/information-plane)")
    plane.add_argument("--no-plots", action="store_true", help="print the table only (default: draw as well)")
    plane.set_defaults(analyze=information_plane)


def run(args: argparse.Namespace) -> int:
    """Call the subcommand."""
    return int(args.analyze(args))


def _table(found: Plane) -> str:
    """Return the last measurement, a layer a line."""
    from hpcnn.cli.table import format_table

    columns = found.columns
    names = {"S": "S(T)", "I_x": "I(X;T)", "I_y": "I(T;Y)", "saturation": "of log2 N", "kernel_mean": "mean K"}
    names |= {"sigma": "sigma"}
    header = ["layer", *names.values()]
    rows = [[layer, *(f"{columns[name][-1, index]:.3g}" for name in names)] for index, layer in enumerate(found.layers)]
    if "errors/I_top" in columns:
        header.append("I(last error; error)")
        for row, value in zip(rows, [*columns["errors/I_top"][-1], None], strict=True):
            row.append("" if value is None else f"{value:.3g}")
    return format_table(header, rows)


def information_plane(args: argparse.Namespace) -> int:
    """Print the last measurement and how often the inequalities failed, and draw all measurements."""
    import numpy as np

    from hpcnn.analysis import plane
    from hpcnn.analysis.plane_file import FILE, read

    path = args.run / FILE
    found = read(path) if path.exists() else None
    if found is None or not len(found.columns.get("step", ())):
        raise DataError(
            f"analyze: '{args.run}' has no information plane in {FILE}; train with"
            " --set analysis.information_plane_every_steps=50."
        )
    columns, settings = found.columns, found.attributes
    print(_table(found))
    steps, log2_samples = columns["step"], float(np.log2(settings["samples"]))
    print(
        f"\n{len(steps)} measurements, last after step {steps[-1]}; {settings['samples']} {settings['images']} images,"
        f" alpha {settings['alpha']:g}, width {settings['width']} x {settings['width_scale']:g};"
        f" S(X) {settings['S_input']:.3f}, S(Y) {settings['S_labels']:.3f}, at most {log2_samples:.3f} bits"
    )
    inside = np.array(found.chain)
    checks = [("forward, I(X; T)", plane.violations(columns["I_x"][:, inside]))]
    if "errors/I_top" in columns:
        shared = columns["errors/I_top"][:, inside[:-1]]
        checks.append(("backward, I(last error; error)", plane.violations(shared, grows=True)))
    for name, one in checks:
        print(
            f"inequality {name}: failed {one.failed} of {one.checked} times ({one.share:.1%}),"
            f" by {one.worst:.3f} bits at most"
        )
    said = plane.warnings(found.layers, columns["S"][-1], columns["kernel_mean"][-1], log2_samples)
    if "errors/S" in columns:
        last = columns["errors/S"][-1], columns["errors/kernel_mean"][-1]
        said += plane.warnings(found.layers, *last, log2_samples, "error")
    for line in said:
        print(f"warning: {line}")
    if not args.no_plots:
        from hpcnn.report.information_plane import draw

        for drawn in draw(found, args.out or args.run / "information-plane"):
            print(f"wrote {drawn}")
    return 0
