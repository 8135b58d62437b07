"""The page, read by a parser: well-formed, nothing from outside, all there, true numbers, no markup of others."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from hpcnn.cli import main as cli
from hpcnn.errors import ConfigError, DataError
from tests.run_folder import write_run

pytest.importorskip("matplotlib", reason="needs hpcnn[report]")
pytest.importorskip("jinja2", reason="needs hpcnn[report]")

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "<script>alert(1)</script>\"'><img src=http://evil.example onerror=alert(2)>${7*7}{{7*7}}$\\frac{$&amp;"


class Page(HTMLParser):
    """Follows the tags of a page and keeps what tests ask for; a tag that closes another one is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.rows and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def values(self, name):
        """Return the cells behind the first line of a table that is called `name`."""
        return next(row[1:] for row in self.rows if row and row[0] == name)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def report(tmp_path, *folders, figures=None):
    out = tmp_path / "out" / "report.html"
    words = ["report", *map(str, folders), "--out", str(out)]
    assert cli.main([*words, *(["--figures", str(figures)] if figures else [])]) == 0
    return Page(out.read_text(encoding="utf-8")), out


def assert_self_contained(page, out):
    """Nothing is fetched, nothing runs, and no name stands twice."""
    for _tag, attrs in page.tags:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert (attrs.get(name) or "#").startswith("#")
        assert "url(" not in (attrs.get("style") or "").replace("url(#", "")
    assert not {"script", "iframe", "object", "link", "img", "base", "form"} & {tag for tag, _ in page.tags}
    assert "@import" not in out.read_text()
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    targets = {href[1:] for href in page.attributes("href") if href.startswith("#")}
    assert targets <= set(ids)


@pytest.fixture(scope="module")
def standard(tmp_path_factory):
    """Return the page of a run, its file, the run's folder, and that of its figures."""
    place = tmp_path_factory.mktemp("standard")
    folder = write_run(place / "run")
    return *report(place, folder, figures=place / "figures"), folder, place / "figures"


def test_the_page_of_a_run_is_whole_and_needs_nothing_from_outside(standard):
    page, out, _, figures = standard
    assert_self_contained(page, out)
    captions = {"loss", "accuracy", "lr", "images-per-second", "shares", "step-1", "timeline-1", "ranks-1"}
    assert captions == {attrs["id"] for tag, attrs in page.tags if tag == "figure"}
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == len(captions)
    assert all(attrs["role"] == "img" and attrs["aria-label"] for tag, attrs in page.tags if tag == "svg")
    for title in ("Where the time went", "What to try next", "Training", "Steps", "Layers", "Messages", "Environment"):
        assert title in page.text
    assert "MPICH 9.9.9" in page.text
    # the same figures for papers
    names = {path.name for path in figures.iterdir()}
    assert names == {f"{name}.{kind}" for name in captions for kind in ("svg", "png")}
    assert (figures / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "currentColor" not in (figures / "loss.svg").read_text()


def test_numbers_are_those_of_the_records(standard):
    page, _, folder, _ = standard
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    half = [record for record in records if record["event"] == "step"][4:]
    step_s = math.fsum(record["step_s"] for record in half)
    exposed = math.fsum(record["exposed_comm_s"] for record in half) / step_s
    assert page.values("images/s") == [f"{64 * len(half) / step_s:.0f}"]
    assert page.values("step ms") == [f"{1e3 * step_s / len(half):.3g}"]
    assert page.values("exposed communication") == [f"{100 * exposed:.1f}%"]
    assert page.values("test accuracy") == ["75.00%"]
    assert page.values("ranks") == ["2"]
    assert page.values("peak memory of a rank") == ["123 MB"]
    assert page.values("gradient sum of conv1") == ["1", "500 B", "5"]
    conv1 = page.values("conv1")
    assert conv1[3] == "156"
    assert conv1[-3:] == ["1", "2.5", "4"]


def test_several_runs_are_compared(tmp_path, make_run):
    page, out = report(tmp_path, make_run("a"), make_run("b", num_steps=12, traced=False))
    assert_self_contained(page, out)
    assert page.values("run") == ["a", "b"]
    assert page.values("steps") == ["8", "12"]
    assert "start it with --trace" in page.text
    assert {"timeline-1", "step-2"} <= set(page.attributes("id"))
    assert "timeline-2" not in page.attributes("id")


def test_what_others_wrote_is_shown_and_not_obeyed(tmp_path, make_run):
    folder = make_run(HOSTILE.replace("/", "|"), host=HOSTILE)
    for name in ("plan.toml", "trace.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("conv1", json.dumps(HOSTILE)[1:-1]).replace("node0", "\\u0000<b>"))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"event": "end", "step": 8, "stopped": HOSTILE}) + "\n")
    study = tmp_path / "study <b>"
    study.mkdir()
    columns = f"model,plan,ranks,step_s,images_per_second,status\n{HOSTILE},{HOSTILE},1,1,1,done\n"
    (study / "scaling.csv").write_text(columns + f"b,c,2,1,1,done\nb,{HOSTILE},2,,,{HOSTILE}\n")
    page, out = report(tmp_path, folder, study)
    assert_self_contained(page, out)
    assert f"stopped: {HOSTILE}" in page.text
    assert not {"b", "script", "img"} & {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) > 5


def test_a_run_without_a_step_has_a_page(tmp_path, make_run):
    page, out = report(tmp_path, make_run(records=[], ended=False, traced=False))
    assert_self_contained(page, out)
    assert "The run has made no step yet" in page.text


def test_a_run_of_which_only_metrics_are_left_has_a_page(tmp_path, make_run):
    folder = make_run(records=[{"event": "step", "step": 1, "loss": 1.0}], ended=False)
    for name in ("config.toml", "plan.toml", "environment.json", "trace.json"):
        (folder / name).unlink()
    page, out = report(tmp_path, folder)
    assert_self_contained(page, out)
    assert "There is no plan.toml" in page.text


def test_a_plan_of_another_model_is_told(tmp_path, make_run):
    folder = make_run()
    (folder / "plan.toml").write_text('ranks = 2\nglobal_batch = 64\n[[layer]]\nname = "x"\n[[layer]]\nsample = 3\n')
    page, _ = report(tmp_path, folder)
    assert "plan.toml is not a plan" in page.text


def test_a_missing_library_and_a_page_that_cannot_be_written_are_told(tmp_path, make_run, monkeypatch):
    folder = make_run(traced=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        cli.main(["report", str(folder), "--out", str(tmp_path / "file" / "report.html")])
    with pytest.raises(DataError, match="is not a folder"):
        cli.main(["report", str(tmp_path / "nowhere")])
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(DataError, match=r"hpcnn\[report\]"):
        cli.main(["report", str(folder)])


def chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(chromium() is None, reason="there is no chromium (Debian: apt install chromium)")
def test_a_browser_without_a_network_has_nothing_to_complain_of(tmp_path, make_run):
    _, out = report(tmp_path, make_run("<i>a"), make_run("b"))
    command = [
        chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--no-proxy-server",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
        "--dump-dom", out.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, check=True)
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == 11
    assert "<i>" not in done.stdout
