"""How every figure of a report looks, and how it becomes part of a page or a file of its own."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcnn.errors import ConfigError, DataError
from hpcnn.train.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design", 2008: told apart by all kinds of colour vision. On a dark page blue
# is lighter (`--blue` of page.html).
BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE, GREY = (
    "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999",
)  # fmt: skip
SERIES = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, GREY)
DASHES = ("-", "--", "-.", ":")
SPLIT = {"compute": BLUE, "exposed communication": VERMILLION, "waiting for images": ORANGE, "other": GREY}
"""Colours of the parts of a step, the same in every figure."""

LONGEST_NAME = 36

INK = "#010203"
"""Stands for the colour of text and axes: on the page it becomes that of the page, in files black."""
_STYLE: Any = {
    "font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8, "legend.frameon": False, "legend.handlelength": 1.4,
    "legend.columnspacing": 1.2, "lines.linewidth": 1.4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.alpha": 0.25, "grid.color": INK,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False, "path.simplify_threshold": 0.5,
    "axes.formatter.useoffset": False,
}  # fmt: skip


def require_libraries() -> None:
    """Raise DataError where what draws and lays out is not installed."""
    for name in ("matplotlib", "jinja2"):
        try:
            __import__(name)
        except ImportError:
            raise DataError(f"report: {name} is not installed; pip install 'hpcnn[report]'.") from None


@contextmanager
def style() -> Iterator[None]:
    """Draw and save figures of the block like the others; names from files are never taken for formulas."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Missing glyphs, axes over a single step, numbers beyond all measure: none of it is the reader's to mend.
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def new_figure(width: float = 5.4, height: float = 2.8) -> Figure:
    """Return an empty figure; inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def short(name: str) -> str:
    """Return a name that leaves room for the drawing."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def tooltip(artist: Any, tips: list[str], text: str) -> None:
    """Have a browser show `text` over something drawn; `tips` collects the texts of a figure for `inline_svg`."""
    artist.set_gid(f"tip-{len(tips)}")
    tips.append(text)


def inline_svg(figure: Figure, key: str, label: str, tips: list[str]) -> str:
    """Return a figure as SVG to stand in a page.

    Parameters
    ----------
    key : str
        Unlike that of every other figure of the page: names inside are made of it.
    label : str
        What it shows, for those who do not see it.
    tips : list of str
        As `tooltip` has collected them.
    """
    text = _svg(figure, key)
    text = text[text.index("<svg") :].replace(INK, "currentColor").replace(BLUE.lower(), "var(--blue)")
    # Sizes give way to the page; what is drawn keeps its proportions.
    opening = re.match(r"<svg[^>]*>", text)
    viewbox = re.search(r'viewBox="[^"]*"', text)
    if opening is None or viewbox is None:
        raise RuntimeError("matplotlib wrote no SVG")
    head = f'<svg {viewbox[0]} role="img" aria-label="{html.escape(label)}">'
    text = head + re.sub(r'xlink:href="#', 'href="#', text[opening.end() :])
    text = re.sub(r'<g id="tip-(\d+)">', lambda found: f"<g><title>{html.escape(tips[int(found[1])])}</title>", text)
    # Names given by matplotlib ("figure_1", "patch_2") are the same in all figures and refer to nothing.
    return re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as `<name>.svg` and `<name>.png` and return the paths.

    Raises
    ------
    ConfigError
        If a file cannot be written.
    """
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(paths[0]) as temporary:
            temporary.write_text(_svg(figure, name).replace(INK, "#000000"), encoding="utf-8")
        with replacing(paths[1]) as temporary:
            figure.savefig(temporary, format="png", dpi=200, facecolor="white")
    except OSError as error:
        raise ConfigError(
            f"report: cannot write figures into '{folder}': {error.strerror}. Name another folder with --figures."
        ) from None
    return paths


def _svg(figure: Figure, key: str) -> str:
    import matplotlib

    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(stream, format="svg", metadata=nothing)
    return stream.getvalue()
