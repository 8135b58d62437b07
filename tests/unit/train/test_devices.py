"""`hpcnn train` and `hpcnn evaluate` with device = "cuda", on a GPU of the tests' own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from hpcnn.cli.main import main
from hpcnn.timeline import Marks
from tests.device import FakeCopies, fake_gpu

SETTINGS = ("train.global_batch=32", "data.source=synthetic", "data.image_shape=[28,28,1]", "data.num_samples=128")


class NoMarks(Marks):
    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...

    def synchronise(self) -> None: ...


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("hpcnn.train.setup.open_device", lambda config, world: None)
    monkeypatch.setattr("hpcnn.parallel.program.CopyStream", lambda: FakeCopies(1))
    monkeypatch.setattr("hpcnn.gpu.Ranges", NoMarks)
    monkeypatch.setattr("hpcnn.gpu.peak_memory_bytes", lambda: 4321)
    monkeypatch.setattr("hpcnn.gpu.out_of_memory", nullcontext)
    with fake_gpu():
        yield


def run(command: str, *words: object, **settings: object) -> None:
    sets = [*SETTINGS, *(f"{key.replace('__', '.')}={value}" for key, value in settings.items())]
    everything = [command, *map(str, words), *(word for one in sets for word in ("--set", one))]
    assert main(everything) == 0


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_run_goes_on_in_the_other_place_as_it_would_have_in_its_own(tmp_path: Path, first: str, then: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("train", "lenet5", "--out", whole, device="cpu", train__steps=8, train__schedule="constant")
    run("train", "lenet5", "--out", parts, device=first, train__steps=4, train__schedule="constant")
    resumed = ("train", "lenet5", "--out", parts, "--resume")
    run(*resumed, device=then, train__steps=8, train__schedule="constant")
    losses = [[record["loss"] for record in records(folder) if record["event"] == "step"] for folder in (whole, parts)]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]
    assert records(parts)[-1].get("peak_device_memory_bytes") == (4321 if then == "cuda" else None)


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_a_checkpoint_of_a_gpu_is_evaluated_anywhere(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train", "lenet5", "--out", tmp_path / "run", device="cuda", train__steps=4)
    trained = records(tmp_path / "run")[-1]
    capsys.readouterr()
    run("evaluate", tmp_path / "run", "--json", device=place)
    score = json.loads(capsys.readouterr().out)
    assert (score["accuracy"], score["loss"]) == (trained["test_accuracy"], trained["test_loss"])
