"""The report: one HTML page of one or several runs, with everything in it, that needs no network."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcnn import __version__
from hpcnn.errors import ConfigError
from hpcnn.report import drawing, figures
from hpcnn.report.advice import Advice, advise, describe
from hpcnn.report.drawing import inline_svg
from hpcnn.report.figures import CURVES, Drawing
from hpcnn.report.layers import Layers, layers_of
from hpcnn.report.run import Run, read_run
from hpcnn.report.scale_table import FILE, ScaleTable, read_scale_table
from hpcnn.report.traced import Sent
from hpcnn.report.untrusted import clean
from hpcnn.report.words import milliseconds, number, percent, quantity
from hpcnn.train.atomic import replacing

MOST_SENT = 30
"""So many collectives are listed."""


@dataclass(frozen=True)
class RunView:
    """What the page says of one run."""

    run: Run
    overview: list[tuple[str, str]]
    headline: str
    story: str
    advice: list[Advice]
    split: Drawing | None
    timeline: Drawing | None
    ranks: Drawing | None
    layers: Layers
    sent: list[Sent]
    environment: list[tuple[str, str]]
    hosts: list[dict[str, Any]]
    notes: list[str]


@dataclass(frozen=True)
class Report:
    """What a report is made of; `drawings` are all figures, in the order of the page."""

    title: str
    views: list[RunView]
    curves: list[Drawing]
    shares: Drawing | None
    studies: list[tuple[ScaleTable, list[Drawing]]]

    @property
    def drawings(self) -> list[Drawing]:
        """All figures."""
        each = [drawn for view in self.views for drawn in (view.split, view.ranks, view.timeline)]
        scaled = [drawn for _, some in self.studies for drawn in some]
        return [drawn for drawn in (self.shares, *self.curves, *each, *scaled) if drawn is not None]


def make_report(folders: Sequence[Path]) -> Report:
    """Read run folders and the folders of scaling studies, and draw what they hold.

    Raises
    ------
    DataError
        If a library is missing, or a folder is not one of a run or a study.
    """
    drawing.require_libraries()
    tables = [read_scale_table(folder) for folder in folders if (folder / FILE).is_file()]
    paths = [folder for folder in dict.fromkeys(folders) if not (folder / FILE).is_file()]
    short = [path.resolve().name for path in paths]
    names = [name if short.count(name) == 1 else str(path) for name, path in zip(short, paths, strict=True)]
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    with drawing.style():
        curves = [figures.curve(runs, what) for what in CURVES] if runs else []
        return Report(
            title=", ".join([*(run.name for run in runs), *(table.name for table in tables)]),
            views=[_view(run, index) for index, run in enumerate(runs, start=1)],
            curves=[one for one in curves if one is not None],
            shares=figures.shares(runs),
            studies=[(table, figures.scaling(table, index)) for index, table in enumerate(tables, start=1)],
        )


def render(report: Report) -> str:
    """Return the page."""
    import jinja2
    from markupsafe import Markup, escape

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def coded(text: str) -> Markup:
        """Return a sentence with what stands between backquotes as code."""
        parts = [
            escape(part) if index % 2 == 0 else f"<code>{escape(part)}</code>"
            for index, part in enumerate(text.split("`"))
        ]
        return Markup("".join(parts))

    def svg(drawn: Drawing) -> Markup:
        return Markup(inline_svg(drawn.figure, drawn.key, drawn.caption, drawn.tips))  # drawn here, texts escaped

    environment.filters |= {"quantity": quantity, "ms": milliseconds, "percent": percent, "number": number}
    environment.filters["coded"] = coded
    with drawing.style():
        page = environment.get_template("page.html").render(
            report=report, svg=svg, version=__version__, overview=_overview(report.views), most_sent=MOST_SENT
        )
    return page


def write(text: str, path: Path) -> None:
    """Write the page; it is whole or not there.

    Raises
    ------
    ConfigError
        If the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"report: cannot write '{path}': {error.strerror}. Name a file in a folder where you may write with --out."
        ) from None


def save_figures(report: Report, folder: Path) -> list[Path]:
    """Write every figure as SVG and PNG and return the paths; raises ConfigError where that fails."""
    with drawing.style():
        return [path for drawn in report.drawings for path in drawing.save(drawn.figure, folder, drawn.key)]


def _view(run: Run, index: int) -> RunView:
    layers = layers_of(run)
    hosts = run.fact("hosts")
    notes, overview = list(run.notes), _facts(run, layers)
    if run.trace is None and not (run.folder / "trace.json").exists():
        notes.append(
            "The run was not traced, so there is no timeline, no time of each layer and no comparison of the ranks:"
            " start it with --trace, which records the first 20 steps."
        )
    elif run.trace is not None and run.trace.num_dropped:
        notes.append(f"The trace lacks {run.trace.num_dropped} spans for which there was no room.")
    return RunView(
        run=run,
        overview=overview,
        headline=_headline(dict(overview)),
        story=describe(run),
        advice=advise(run, layers.model),
        split=figures.split_over_time(run, index),
        timeline=figures.timeline(run.trace, index) if run.trace else None,
        ranks=figures.ranks(run.trace, index) if run.trace else None,
        layers=layers,
        sent=run.trace.sent() if run.trace else [],
        environment=_environment(run),
        hosts=[host for host in hosts if isinstance(host, dict)] if isinstance(hosts, list) else [],
        notes=notes,
    )


def _facts(run: Run, layers: Layers) -> list[tuple[str, str]]:
    """Return what the overview says of a run."""
    config, speed, end = run.config, run.summary, run.end or {}
    hosts = run.fact("hosts")
    tested = [record["test_accuracy"] for record in (*run.epochs, end) if "test_accuracy" in record]
    state = "no step yet" if not run.steps else "not ended"
    if run.end is not None:
        state = f"stopped: {end['stopped']}" if end["stopped"] else "finished"
    found: list[tuple[str, str | None]] = [
        ("state", state),
        ("model", _configured(run, lambda c: c.model.name)),
        ("parameters", quantity(layers.model.num_parameters) if layers.model else None),
        ("data", _configured(run, lambda c: c.data.source)),
        ("device", _configured(run, lambda c: f"{c.device}, {c.train.compute}")),
        ("plan", _configured(run, lambda c: c.plan.preset)),
        ("exchange", _configured(run, lambda c: f"{c.exchange.kind}, {c.exchange.algorithm}")),
        ("ranks", None if run.num_ranks is None else str(run.num_ranks)),
        ("hosts", str(len(hosts)) if isinstance(hosts, list) else None),
        ("global batch", None if config is None else str(config.train.global_batch)),
        ("steps", str(run.steps[-1]["step"]) if run.steps else "0"),
        ("test accuracy", f"{100 * tested[-1]:.2f}%" if tested else None),
        ("images/s", number(speed.images_per_second) if speed else None),
        ("step ms", milliseconds(speed.step_s) if speed else None),
        ("exposed communication", percent(speed.exposed_comm_share) if speed else None),
        ("peak memory of a rank", quantity(end["peak_memory_bytes"], "B") if "peak_memory_bytes" in end else None),
        ("of its GPU", quantity(end["peak_device_memory_bytes"], "B") if "peak_device_memory_bytes" in end else None),
    ]
    return [(name, "–" if value is None else clean(value)) for name, value in found]


def _headline(facts: dict[str, str]) -> str:
    """Return the run in one line: "lenet5 on builtin, plan data, 4 ranks on 1 host: ..."."""
    places = [f"{facts[name]} {name[:-1] if facts[name] == '1' else name}" for name in ("ranks", "hosts")]
    return (
        f"{facts['model']} on {facts['data']}, plan {facts['plan']}, {' on '.join(places)}, {facts['steps']} steps"
        f" ({facts['state']}): {facts['images/s']} images/s, test accuracy {facts['test accuracy']}"
    )


def _configured(run: Run, read: Callable[[Any], str]) -> str | None:
    return None if run.config is None else read(run.config)


def _overview(views: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """Return the lines of the overview: a name, and what every run has for it; without lines that say nothing."""
    lines = [(entries[0][0], [value for _, value in entries]) for entries in zip(*(view.overview for view in views))]
    return [(name, values) for name, values in lines if any(value != "–" for value in values)]


def _environment(run: Run) -> list[tuple[str, str]]:
    """Return what the run ran on and with, one line a thing."""
    command = run.fact("command")
    found: list[tuple[str, Any]] = [
        ("started", run.fact("started")),
        ("command", shlex.join(map(str, command)) if isinstance(command, list) else None),
        ("hpcnn", run.fact("program", "hpcnn")),
        ("git revision", run.fact("program", "revision")),
        ("Python", run.fact("program", "python")),
        ("system", run.fact("program", "system")),
        ("MPI library", run.fact("mpi")),
        ("processor", run.fact("processor", "model")),
        ("vector units", _joined(run.fact("processor", "vector_units"))),
        ("GPUs of rank 0's host", _joined(run.fact("gpus"))),
        ("layers computed by", run.fact("operators", "implementation")),
        ("packages", _joined(run.fact("packages"))),
        ("variables", _joined(run.fact("variables"))),
        ("Slurm", _joined(run.fact("slurm"))),
        ("run folder", run.folder),
    ]
    return [(name, clean(value)) for name, value in found if value not in (None, "")]


def _joined(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else value
