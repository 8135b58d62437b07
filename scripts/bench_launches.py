"""Time what Python does in training steps on a GPU, without one: every launch does its work but for CuPy's last call.

    python scripts/bench_launches.py --models resnet50 --batch 64 --profile 40

Arrays are CuPy's, on memory that nobody has; CuPy must be installed, a GPU or a driver need not be there. What the
driver takes for a launch, and CuPy to hand it over (5 to 10 us together), comes on top of the numbers shown.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import os
import pstats
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from hpcnn import configuration, ops
from hpcnn.analysis.bench_step import TimedUpdate
from hpcnn.comm.world import World, start
from hpcnn.config import Config
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.ops.cuda import device, gpu, halo, tensor_map
from hpcnn.ops.cuda.types import bfloat16
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.planner import make_plan
from hpcnn.timeline import Timeline
from hpcnn.train import optimizers

OPERATORS = (
    *("activation_backward", "activation_forward", "add_forward", "batchnorm_backward", "batchnorm_forward", "cast"),
    *("conv2d_backward_input", "conv2d_backward_weight", "conv2d_forward", "linear_backward_input"),
    *("linear_backward_weight", "linear_forward", "softmax_cross_entropy", "maxpool2d_forward", "maxpool2d_backward"),
    *("global_avgpool_forward", "global_avgpool_backward"),
)
FIRST_ADDRESS = 0x7F00_0000_0000
GRAIN = 512


class Nowhere(gpu.Gpu):
    """A GPU that is not there: launches are counted, and end where CuPy would take over."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._device = SimpleNamespace(use=lambda: None)
        self.index, self.architecture, self.num_processors, self.name = 0, 90, 132, "nowhere"
        self._errors = (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError)
        self._debug = False
        self._modules, self._functions, self._checked, self._shared = {}, {}, {}, {}
        self._local = threading.local()
        self._ndarray, self._structures = cupy.ndarray, {}
        self._null = self._constant(gpu.NULL)
        self.launches: Counter[str] = Counter()
        self._free: dict[int, list[Any]] = {}
        self._next = FIRST_ADDRESS
        self._memory = cupy.cuda.memory.UnownedMemory(FIRST_ADDRESS, 1 << 44, None, 0)

    def allocate(self, size: int) -> Any:
        """Return a piece of memory of its own; nothing comes back, so a step must call `rewind`."""
        pointer = self._cupy.cuda.MemoryPointer(self._memory, self._next - FIRST_ADDRESS)
        self._next += -(-size // GRAIN) * GRAIN
        return pointer

    def rewind(self, address: int) -> None:
        """Allocate from here again, as CuPy's pool does it step by step."""
        self._next = address

    def here(self) -> int:
        """Return where the next array begins."""
        return self._next

    def upload(self, x: Any, dtype: Any = None) -> Any:
        """See `Device`."""
        host = np.asarray(x, dtype)
        return self.empty(host.shape, host.dtype)

    def download(self, x: Any) -> np.ndarray:
        """See `Device`."""
        return np.zeros(x.shape, x.dtype)

    def measure(self, run: Any, repeats: int = 5) -> float:
        """See `Device`."""
        return 1.0

    def _load(self, source: str, kernel: str) -> Any:
        def launch(*_: Any) -> None:
            self.launches[kernel] += 1

        return launch

    def _allow_shared(self, source: str, kernel: str, function: Any, num_bytes: int) -> None:
        self._shared[source, kernel] = num_bytes


class NoCopies:
    """Of the images, which are there."""

    def locked(self, count: int, dtype: Any) -> np.ndarray:
        """See `hpcnn.gpu.Copies`."""
        return np.empty(count, dtype)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_: SimpleNamespace(done=True)


@contextmanager
def no_gpu() -> Iterator[Nowhere]:
    """Serve CuPy's arrays by a GPU that is not there."""
    import cupy

    nowhere = Nowhere()
    cupy.cuda.set_allocator(nowhere.allocate)
    for name in ("fill", "set", "__setitem__"):
        setattr(cupy.ndarray, name, lambda self, *_: None)
    for name in ("__iadd__", "__mul__", "__rmul__", "__sub__"):
        setattr(cupy.ndarray, name, lambda self, *_: self)
    tensor_map._encode = lambda function, *args: tensor_map._empty()
    halo.computes_right = lambda *_: True
    os.environ["HPCNN_TUNING"] = "off"
    with device.use(nowhere):
        yield nowhere


def make_step(config: Config, batch: int, nowhere: Nowhere, world: World) -> Callable[[], None]:
    """Return a training step whose arrays lie where those of the last one lay."""
    size = (*config.data.image_shape[:2], 3)
    spec = models.configured(config.model, size, config.data.num_classes)
    activation = bfloat16() if config.train.compute == "bf16" else np.float32
    model = Model(spec, config.train.seed, activation=activation, place="cuda")
    plan = make_plan(spec, "data", 1, batch)
    buckets = choose_buckets(spec, "allreduce", bucket_bytes=4_000_000, ranks=1, global_batch=batch)
    exchange = make_exchange(config.exchange, spec, plan, buckets, model.parameters, world)
    program = Program(model, plan, world, exchange)
    program.copies = NoCopies()
    program.timeline = Timeline(num_steps=0)
    program.timeline.marks = SimpleNamespace(push=lambda name: None, pop=lambda: None, synchronise=lambda: None)
    optimizer = optimizers.build(config.train, model.parameters)
    labels = np.zeros(batch, np.int64)
    uploaded = program.upload(np.zeros((batch, *size), np.float32))
    samples, steps, begin = np.arange(batch), iter(range(1 << 30)), nowhere.here()

    def step() -> None:
        number = next(steps)
        nowhere.rewind(begin)
        context = program.context(training=True, seed=1, step=number, samples=samples, global_batch=batch)
        program.train_step(uploaded, labels, context, TimedUpdate(optimizer, number))

    return step


@contextmanager
def timed_operators() -> Iterator[dict[str, list[float]]]:
    """Note the seconds of every call of an operator inside a `with` block."""
    times: dict[str, list[float]] = {name: [] for name in OPERATORS}
    before = {name: getattr(ops, name) for name in OPERATORS}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **options)
            times[name].append(time.perf_counter() - begin)
            return result

        return run

    for name, function in before.items():
        setattr(ops, name, timed(name, function))
    try:
        yield times
    finally:
        for name, function in before.items():
            setattr(ops, name, function)


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Return the shortest processor time of a step: others may use the processor too."""
    durations = []
    for _ in range(repeats):
        begin = time.thread_time()
        step()
        durations.append(time.thread_time() - begin)
    return min(durations)


def report(name: str, step: Callable[[], None], nowhere: Nowhere, repeats: int, rows: int) -> None:
    """Print a model's numbers."""
    for _ in range(3):
        step()
    nowhere.launches.clear()
    step()
    launches = sum(nowhere.launches.values())
    step_s = seconds(step, repeats)
    print(f"{name}: {step_s * 1e3:.2f} ms a step, {launches} launches, {step_s / launches * 1e6:.2f} us a launch")
    with timed_operators() as times:
        seconds(step, repeats)
    for operator, found in sorted(times.items(), key=lambda item: -sum(item[1])):
        if found:
            total = sum(found) / repeats
            print(f"  {total * 1e3:7.3f} ms {len(found) // repeats:5d} x {np.median(found) * 1e6:7.2f} us  {operator}")
    if rows:
        for kernel, count in nowhere.launches.most_common(rows):
            print(f"  {count:5d} x {kernel}")
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(repeats):
            step()
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vgg16"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--compute", default="bf16", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="show the functions that take longest")
    args = parser.parse_args()
    world = start()
    with no_gpu() as nowhere:
        ops.backend.set_compute("tf32" if args.compute == "tf32" else "fp32")
        for name in args.models:
            config = configuration.load(name, ["device=cuda", f"train.compute={args.compute}"])
            config = dataclasses.replace(config, exchange=dataclasses.replace(config.exchange, wait="step"))
            report(name, make_step(config, args.batch, nowhere, world), nowhere, args.repeats, args.profile)


if __name__ == "__main__":
    main()
