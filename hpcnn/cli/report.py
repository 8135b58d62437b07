"""`hpcnn report`: one page that says of runs where their time went, to be read without a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from hpcnn.cli.manual import Manual, explain

MANUAL = Manual(
    """Says of runs where their time went and what to try next, with curves, the layers as predicted and traced, one
    step of all ranks, messages and hosts, on one HTML page that needs no network. Several runs stand beside each other;
    the folder of a scaling study gives speed-up and efficiency. Timeline and times of layers need a run that was
    started with --trace. Needs hpcnn[report].""",
    examples=(
        ("hpcnn report runs/a", "writes report.html"),
        ("hpcnn report runs/a runs/b --out b-against-a.html", "two runs beside each other"),
        ("hpcnn report studies/a --figures figures", "a scaling study, and its figures for a paper"),
    ),
    files=(
        ("report.html", "(--out) the page"),
        ("DIR/*.svg, DIR/*.png", "(--figures) the figures"),
    ),
    see_also=("hpcnn train", "hpcnn scale", "hpcnn plan"),
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its flags."""
    parser = subparsers.add_parser("report", help="make an HTML page of runs: where the time went, curves, layers")
    explain(parser, MANUAL)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder of `hpcnn train`, or folder of `hpcnn scale`"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", default=Path("report.html"), help="the page (default: report.html)"
    )
    parser.add_argument(
        "--figures", type=Path, metavar="DIR", help="write each figure as SVG and PNG into this folder (default: none)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page; no MPI is started."""
    from hpcnn.report import page

    report = page.make_report(args.runs)
    page.write(page.render(report), args.out)
    print(f"wrote {args.out}")
    for view in report.views:
        print(f"{view.run.name}: {view.story}")
        for note in view.run.notes:
            print(f"  note: {note}")
    if args.figures:
        paths = page.save_figures(report, args.figures)
        print(f"wrote {len(paths)} files into {args.figures}")
    return 0
