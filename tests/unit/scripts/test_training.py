"""What the benchmarks on virtual hosts compare, and how they write it down."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hpcnn.nn import models

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from virtual import training  # noqa: E402
from virtual.cluster import Cluster, why_not  # noqa: E402
from virtual.ddp_worker import alexnet  # noqa: E402
from virtual.shape import ClusterError  # noqa: E402


def test_pytorch_trains_the_same_network_as_hpcnn() -> None:
    torch = pytest.importorskip("torch")
    from hpcnn.analysis.torch_twin import TorchTwin

    spec = models.build("alexnet", (227, 227, 3), 1000)
    with torch.device("meta"):  # no time is spent on initial values
        rival = alexnet(1000)
    rival = rival.to_empty(device="cpu").eval()
    assert training.num_parameters() == sum(parameter.numel() for parameter in rival.parameters()) == 61_100_840
    names = [layer.name for layer in spec.layers if layer.parameters]
    layers = [layer for layer in rival if hasattr(layer, "weight")]
    assert len(names) == len(layers)
    values = {}
    with torch.no_grad():
        for name, layer in zip(names, layers):
            bound = (6.0 / layer.weight[0].numel()) ** 0.5
            weight, bias = layer.weight.uniform_(-bound, bound), layer.bias.uniform_(-0.1, 0.1)
            if name == "fc1":  # hpcnn flattens rows, columns, channels; PyTorch channels, rows, columns
                weight = weight.reshape(-1, 256, 6, 6).permute(0, 2, 3, 1).flatten(1)
            elif weight.ndim == 4:
                weight = weight.permute(0, 2, 3, 1)
            values |= {f"{name}/weight": SimpleNamespace(value=weight.numpy())}
            values |= {f"{name}/bias": SimpleNamespace(value=bias.numpy())}
        images = np.random.default_rng(1).standard_normal((2, 227, 227, 3), np.float32)
        logits = rival(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    twin = TorchTwin(spec)
    twin.load(values)
    expected = twin.forward(images)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert [0.5, 0.5] == [layer.p for layer in rival if type(layer) is torch.nn.Dropout]


def test_an_exchange_is_named_by_its_settings() -> None:
    settings = training.settings_of("kind=sharded,overlap=false")
    assert {"exchange.kind": "sharded", "exchange.overlap": "false"} == settings
    assert {"plan.preset": "spatial", "train.lr": "0"} == training.settings_of("preset=spatial,train.lr=0", "plan")
    for text in ("sharded", "kind=", "kind=sharded,", ""):
        with pytest.raises(ClusterError, match=r"exchange .* must be settings like 'kind=sharded"):
            training.settings_of(text)
        with pytest.raises(ClusterError, match=r"plan .* must be settings like 'preset=spatial'"):
            training.settings_of(text, "plan")


def test_the_summary_of_steps_is_made_of_medians() -> None:
    steps = [{"event": "step", "step_s": value, "loss": None} for value in (3.0, 1.0, 9.0)]
    assert {"step_s": 3.0, "fastest_s": 1.0, "num_steps": 3} == training.summary(steps)


def test_a_section_of_a_document_is_replaced_and_the_rest_is_not(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n<!-- begin: y -->\n<!-- end: y -->\n")
    training.write_section(document, "x", training.table([["k", "v"], ["one", "1"]]))
    table = "| k | v |\n| --- | ---: |\n| one | 1 |\n"
    whole = f"a\n<!-- begin: x -->\n{table}<!-- end: x -->\nb\n<!-- begin: y -->\n<!-- end: y -->\n"
    assert whole == document.read_text()
    with pytest.raises(ClusterError, match="has no section 'z'"):
        training.write_section(document, "z", "")


def test_every_benchmark_document_section_exists() -> None:
    text = (SCRIPTS.parent / "docs" / "benchmarks.md").read_text()
    for name in ("ddp", "overlap", "accuracy-plans"):
        assert f"<!-- begin: {name} -->\n" in text
        assert f"<!-- end: {name} -->" in text


@pytest.mark.parametrize(
    ("script", "wrong", "message"),
    [
        ("bench_ddp", ["--steps", "2"], "steps (=2) must be more"),
        ("bench_ddp", ["--exchange", "ring"], "'ring'"),
        ("bench_overlap", ["--exchange", "ring"], "'ring'"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    script: str, wrong: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [script, *wrong])
    assert 2 == module.main()
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_pytorch_is_told_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module("bench_ddp")
    monkeypatch.setattr(sys, "argv", ["bench_ddp"])
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert 2 == module.main()
    assert "has no PyTorch. `pip install torch`, or give --no-ddp." in capsys.readouterr().err


def test_hpcnn_trains_on_virtual_hosts_and_its_settled_steps_come_back() -> None:
    reason = why_not()
    if reason:
        pytest.skip(f"no virtual hosts here: {reason}")
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("the machine is busy")
    with Cluster(2, rate="1gbit", cpu=0.9, name=f"o{os.getpid()}") as cluster:
        settings = training.settings_of("algorithm=ring")
        steps = training.train_hpcnn(cluster, "lenet5", settings, steps=4, global_batch=8, limit_s=100)
    assert [3, 4] == [step["step"] for step in steps]
    assert all(step["bytes_sent"] > 4 * 61_000 for step in steps)  # half of 61,706 numbers there, half back


def test_the_overlap_of_virtual_hosts_is_measured_and_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = why_not()
    if reason:
        pytest.skip(f"no virtual hosts here: {reason}")
    module = importlib.import_module("bench_overlap")
    out = tmp_path / "out.json"
    argv = ["lenet5", "--hosts", "2", "--rate", "100mbit", "--cpu", "0.9", "--exchange", "kind=sharded"]
    argv += ["--global-batch", "8", "--steps", "2", "--repeats", "1", "--out", str(out)]
    argv += ["--set", "data.image_shape=[28, 28, 1]"]
    monkeypatch.setattr(sys, "argv", ["bench_overlap", *argv])
    monkeypatch.setattr(module, "Cluster", lambda *args, **kind: Cluster(*args, **(kind | {"name": f"o{os.getpid()}"})))
    assert 0 == module.main()
    found = json.loads(out.read_text())["results"]["100mbit"]["kind=sharded"]
    assert pytest.approx(4 * 61_706, rel=1e-3) == found["num_bytes"]
    assert found["comm_s"] > 8 * found["num_bytes"] / 100e6 * 0.9
    assert "| kind=sharded |" in capsys.readouterr().out
