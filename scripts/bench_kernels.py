"""Time the convolution kernels of a GPU layer by layer, beside PyTorch with cuDNN in the same process.

    python scripts/bench_kernels.py --models vgg16 resnet50 alexnet --batch 64 256 --compute tf32 bf16 --out kernels.md

Every distinct convolution of the models is run forward and for each gradient, on the same memory for both (channels
last is NHWC), cuDNN in benchmark mode, ours with the tile sizes that its tuning table chose. Ours takes float32 weights
and converts them inside the timed call, as a training step does; PyTorch's are of the compute type already. Both take
turns; times are medians of CUDA events around calls that wait behind a kernel that spins, so that Python does not
count. Results are compared with PyTorch's in float32 before anything is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcnn import configuration
from hpcnn.data import open_data
from hpcnn.nn import models
from hpcnn.ops import backend
from hpcnn.spec import INPUT, ConvSpec

PEAK_TFLOPS = {
    "H100 80GB HBM3": {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4},
    "H200": {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4},
    "A100": {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0},
}
"""Dense peaks by the vendor's data sheets."""

SHORTEST_TURN_S, MOST_CALLS = 1.5e-3, 30
QUEUEING_S, CYCLES_PER_SECOND = 150e-6, 2e9
"""How long Python may take to queue a call, generously, and what a GPU's clock does meanwhile."""
LARGEST_ERROR = 1e-2
"""Relative norm of the difference to PyTorch's float32 result: cuDNN's own may be off by half of it, and a kernel that
computes something else is off by more. How exact ours are is for the tests to say, which compare with float64."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One pass of one layer; times in seconds."""

    models: tuple[str, ...]
    layer: str
    batch: int
    compute: str
    kind: str
    flops: int
    own_s: float
    peer_s: float
    error: float
    chosen: str


def layers(names: list[str]) -> dict[tuple[ConvSpec, bool], Counter[str]]:
    """Return the distinct convolutions of some models: spec without names, whether it reads the images; and whose."""
    found: dict[tuple[ConvSpec, bool], Counter[str]] = {}
    for name in names:
        config = configuration.load(name)
        with closing(open_data(config.data, "train")) as data:
            spec = models.configured(config.model, data.image_shape, data.num_classes)
        for layer in spec.layers:
            if isinstance(layer, ConvSpec):
                plain = dataclasses.replace(layer, name="", inputs=(), bias=False, activation=None)
                found.setdefault((plain, layer.inputs == (INPUT,)), Counter())[name] += 1
    return found


class Case:
    """Operands of one layer in one compute type, shared by both sides."""

    def __init__(self, spec: ConvSpec, batch: int, compute: str) -> None:
        import cupy
        import torch

        from hpcnn.ops.cuda import types

        draw = torch.Generator("cuda").manual_seed(1)

        def random(*shape: int) -> Any:
            return torch.randn(shape, generator=draw, device="cuda", dtype=torch.float32)

        height, width, channels = spec.input_shape
        rows, columns, filters = spec.output_shape
        self.spec, self.compute = spec, compute
        self.x, self.grad = random(batch, height, width, channels), random(batch, rows, columns, filters)
        self.weight = random(filters, *spec.kernel_size, channels // spec.groups) / math.sqrt(
            channels * math.prod(spec.kernel_size)
        )
        self.master = cupy.from_dlpack(self.weight)
        self.geometry = {
            "stride": spec.stride,
            "padding": spec.padding,
            "dilation": spec.dilation,
            "groups": spec.groups,
        }
        if compute == "bf16":
            self.x, self.grad, self.weight = (t.to(torch.bfloat16) for t in (self.x, self.grad, self.weight))
            self.own_x, self.own_grad = (
                cupy.from_dlpack(t.view(torch.int16)).view(types.bfloat16()) for t in (self.x, self.grad)
            )
        else:
            self.own_x, self.own_grad = cupy.from_dlpack(self.x), cupy.from_dlpack(self.grad)
        (top, bottom), (left, right) = spec.padding
        self.even = (top, left) if (top, left) == (bottom, right) else None

    def own(self, kind: str) -> Callable[[], Any]:
        """Return our call."""
        from hpcnn import ops

        match kind:
            case "forward":
                return lambda: ops.conv2d_forward(self.own_x, self.master, **self.geometry)
            case "input":
                size = self.spec.input_shape[:2]
                return lambda: ops.conv2d_backward_input(self.own_grad, self.master, size, **self.geometry)
        kernel = self.spec.kernel_size
        return lambda: ops.conv2d_backward_weight(self.own_x, self.own_grad, kernel, bias=False, **self.geometry)[0]

    def peer(self, kind: str, tensors: tuple[Any, Any, Any] | None = None) -> Callable[[], Any]:
        """Return PyTorch's call, on other tensors x, grad and weight where given."""
        import torch

        x, grad, weight = (t.permute(0, 3, 1, 2) for t in tensors or (self.x, self.grad, self.weight))
        spec = self.spec
        if self.even is None:
            raise SystemExit(f"bench_kernels: {spec} has uneven padding, which PyTorch does not take.")
        rest = (spec.stride, self.even, spec.dilation, False, [0, 0], spec.groups)
        if kind == "forward":
            return lambda: torch.ops.aten.convolution(x, weight, None, *rest)
        mask = (kind == "input", kind == "weight", False)
        backward = torch.ops.aten.convolution_backward
        return lambda: backward(grad, x, weight, None, *rest, mask)[0 if kind == "input" else 1]

    def error(self, kind: str) -> float:
        """Return how far our result is from PyTorch's in float32, as a relative norm.

        cuDNN may transform windows of several taps (Winograd, FFT), which costs it some figures in float32.
        """
        import torch

        exact = self.peer(kind, tuple(t.float() for t in (self.x, self.grad, self.weight)))
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = False
        expected = exact().permute(0, 2, 3, 1)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = self.compute == "tf32", True
        result = self.own(kind)()
        if result.dtype == np.float32:
            got = torch.from_dlpack(result)
        else:
            got = torch.from_dlpack(result.view(np.int16)).view(torch.bfloat16).float()
        return float((got - expected).norm() / expected.norm())


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Return how long the GPU took for `repeats` calls, by CUDA events.

    A kernel that only spins comes first, until Python has queued all calls: they then follow one another as they would
    in a step that keeps the GPU busy, however slow Python is.
    """
    import torch

    from hpcnn.ops.cuda.device import device

    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cycles = int(repeats * QUEUEING_S * CYCLES_PER_SECOND)
    device().launch("delay", "delay", (1,), (1,), np.int64(cycles))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def in_turn(calls: tuple[Callable[[], Any], ...], turns: int) -> list[float]:
    """Return the median seconds of a call of each, the sides taking turns."""
    counts = []
    for call in calls:
        seconds(call, 2)
        counts.append(min(MOST_CALLS, math.ceil(SHORTEST_TURN_S / max(seconds(call, 2) / 2, 1e-6))))
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(turns):
        for call, count, found in zip(calls, counts, times, strict=True):
            found.append(seconds(call, count) / count)
    return [statistics.median(found) for found in times]


def measure(names: list[str], batches: list[int], computes: list[str], turns: int) -> Iterator[Row]:
    """Yield the rows of a table."""
    import torch

    from hpcnn.ops.cuda import products

    torch.backends.cudnn.benchmark = True
    for compute in computes:
        backend.set_compute("tf32" if compute == "tf32" else "fp32")
        torch.backends.cudnn.allow_tf32 = compute == "tf32"
        for (spec, first), owners in layers(names).items():
            for batch in batches:
                case = Case(spec, batch, compute)
                flops = 2 * batch * math.prod(spec.output_shape) * spec.input_shape[2] // spec.groups
                flops *= math.prod(spec.kernel_size)
                for kind in ("forward", "weight") if first else ("forward", "input", "weight"):
                    error = case.error(kind)
                    chosen = products.latest()
                    own_s, peer_s = in_turn((case.own(kind), case.peer(kind)), turns)
                    yield Row(
                        models=tuple(owners),
                        layer=text(spec),
                        batch=batch,
                        compute=compute,
                        kind=kind,
                        flops=flops,
                        own_s=own_s,
                        peer_s=peer_s,
                        error=error,
                        chosen=chosen,
                    )
                del case
                torch.cuda.empty_cache()


def text(spec: ConvSpec) -> str:
    """Return a layer in one short string."""
    height, width, channels = spec.input_shape
    kernel = "x".join(map(str, spec.kernel_size))
    stride = f"/{spec.stride[0]}" if spec.stride != (1, 1) else ""
    return f"{height}x{width}x{channels} {kernel}{stride} {spec.out_channels}"


def geometric_mean(numbers: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, numbers)))


def table(rows: list[Row], device: str) -> str:
    """Return a Markdown table of all rows, and one of geometric means."""
    peaks = next((peak for name, peak in PEAK_TFLOPS.items() if name in device), None)
    lines = [
        "| compute | batch | pass | layers | speed beside cuDNN, geometric mean | lowest | highest |",
        "|---|---|---|---|---|---|---|",
    ]
    for compute in dict.fromkeys(row.compute for row in rows):
        for batch in dict.fromkeys(row.batch for row in rows):
            for kind in ("forward", "input", "weight", "all"):
                ratios = [
                    row.peer_s / row.own_s
                    for row in rows
                    if (row.compute, row.batch) == (compute, batch) and kind in (row.kind, "all")
                ]
                if ratios:
                    mean = geometric_mean(ratios)
                    lines.append(
                        f"| {compute} | {batch} | {kind} | {len(ratios)} | {mean:.2f} | {min(ratios):.2f}"
                        f" | {max(ratios):.2f} |"
                    )
    lines += [
        "",
        "Each pass: TFLOP/s, share of peak, speed beside cuDNN.",
        "",
        "| layer (input, kernel/stride, filters) | batch | compute | forward | input gradient | weight gradient |",
        "|---|---|---|---|---|---|",
    ]
    passes: dict[tuple[str, int, str], dict[str, str]] = {}
    for row in rows:
        rate = row.flops / row.own_s / 1e12
        share = f", {rate / peaks[row.compute]:.0%}" if peaks else ""
        shown = f"{rate:.0f}{share}, {row.peer_s / row.own_s:.2f}"
        passes.setdefault((row.layer, row.batch, row.compute), {})[row.kind] = shown
    for key, found in passes.items():
        cells = [*map(str, key), *(found.get(kind, "") for kind in ("forward", "input", "weight"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet50", "alexnet"])
    parser.add_argument("--batch", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--compute", nargs="+", default=["fp32", "tf32", "bf16"], choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--turns", type=int, default=5, help="timed turns of each side")
    parser.add_argument("--out", type=Path, help="Markdown file; the rows also go to a .json beside it")
    args = parser.parse_args()
    import torch

    device = torch.cuda.get_device_name()
    rows, bad = [], []
    for row in measure(args.models, args.batch, args.compute, args.turns):
        rows.append(row)
        ratio = row.peer_s / row.own_s
        print(
            f"{row.compute} {row.batch:4d} {row.kind:8s} {row.layer:28s} {row.own_s * 1e3:8.3f} ms"
            f" {row.flops / row.own_s / 1e12:6.1f} TFLOP/s  {ratio:5.2f} of cuDNN  error {row.error:.1e}  {row.chosen}",
            flush=True,
        )
        if not row.error <= LARGEST_ERROR:
            bad.append(row)
    heading = (
        f"{device}, PyTorch {torch.__version__}, cuDNN {torch.backends.cudnn.version()},"
        f" {datetime.date.today().isoformat()}: `{' '.join(['python', *sys.argv])}`\n\n"
    )
    shown = table(rows, device)
    print(heading + shown.partition("\n\n")[0])
    if args.out:
        args.out.write_text(heading + shown + "\n")
        args.out.with_suffix(".json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    if bad:
        raise SystemExit(f"bench_kernels: {len(bad)} results are further from PyTorch's than they may be, see above.")


if __name__ == "__main__":
    main()
