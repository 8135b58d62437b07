"""Time training steps on a GPU beside PyTorch in the same process: forward, loss, backward and update.

    python scripts/bench_gpu_step.py --models resnet50 vgg16 --batch 128 --compute bf16 --compile --profile

PyTorch trains torchvision's model of the same name, channels-last, under autocast for bf16, with fused SGD; with
--compile also through torch.compile. Images lie on the device already, for both. All take turns; a turn is some steps
and one wait. --profile then records one step of each by PyTorch's profiler, which sees every kernel of the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing

import numpy as np

from hpcnn import configuration
from hpcnn.analysis.bench_step import TimedUpdate, random_batch
from hpcnn.comm.world import World, start
from hpcnn.config import Config
from hpcnn.data import open_data
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.ops.cuda.types import bfloat16
from hpcnn.parallel.exchange import make_exchange
from hpcnn.parallel.program import Program
from hpcnn.plan.exchanges import choose_buckets
from hpcnn.plan.planner import make_plan
from hpcnn.train import optimizers
from hpcnn.train.setup import open_device

LEARNING_RATE = 1e-3


def own_step(config: Config, batch: int, world: World) -> Callable[[], float]:
    """Return our step, which returns its loss."""
    open_device(config, world)
    with closing(open_data(config.data, "train")) as data:
        spec = models.configured(config.model, data.image_shape, data.num_classes)
        images, labels = random_batch(data.image_shape, data.num_classes, batch)
    activation = bfloat16() if config.train.compute == "bf16" else np.float32
    model = Model(spec, config.train.seed, activation=activation, place="cuda")
    plan = make_plan(spec, "data", 1, batch)
    buckets = choose_buckets(spec, "allreduce", bucket_bytes=4_000_000, ranks=1, global_batch=batch)
    exchange = make_exchange(config.exchange, spec, plan, buckets, model.parameters, world)
    program = Program(model, plan, world, exchange)
    optimizer = optimizers.build(config.train, model.parameters)
    uploaded, steps = program.upload(images), iter(range(1 << 30))

    def step() -> float:
        number = next(steps)
        context = program.context(training=True, seed=1, step=number, samples=np.arange(batch), global_batch=batch)
        return program.train_step(uploaded, labels, context, TimedUpdate(optimizer, number))[0]

    return step


def peer_step(name: str, config: Config, batch: int, *, compiled: bool) -> Callable[[], float]:
    """Return PyTorch's step; its loss is not fetched."""
    import torch
    import torchvision

    shape, classes = config.data.image_shape, config.data.num_classes
    images, labels = random_batch(shape, classes, batch)
    model = torchvision.models.get_model(name, num_classes=classes).cuda().to(memory_format=torch.channels_last)
    recipe = config.train
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
    )
    x = torch.from_numpy(images).cuda().permute(0, 3, 1, 2)
    y = torch.from_numpy(labels).cuda()
    run = torch.compile(model) if compiled else model
    cross_entropy = torch.nn.functional.cross_entropy

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, enabled=recipe.compute == "bf16"):
            loss = cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        return 0.0

    return step


def turn(step: Callable[[], float], steps: int) -> float:
    """Return the seconds of a step."""
    import torch

    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / steps


def profile(step: Callable[[], float], rows: int) -> str:
    """Return the kernels of a step by time, and how long the GPU was busy."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as recorded:
        turn(step, 1)
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total
            counts[event.name] += 1
    lines = [f"  GPU busy {sum(times.values()) / 1e3:.2f} ms in {sum(counts.values())} kernels"]
    lines += [f"  {total / 1e3:8.3f} ms {counts[name]:4d} x {name[:90]}" for name, total in times.most_common(rows)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vgg16"])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--compute", default="bf16", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="of a turn")
    parser.add_argument("--compile", action="store_true", help="also through torch.compile")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="show the longest kernels")
    args = parser.parse_args()
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.compute != "fp32"
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, batch {args.batch}, {args.compute}")
    world = start()
    for name in args.models:
        config = configuration.load(name, ["device=cuda", f"train.compute={args.compute}"])
        config = dataclasses.replace(config, exchange=dataclasses.replace(config.exchange, wait="step"))
        sides = {"hpcnn": own_step(config, args.batch, world)}
        sides["PyTorch"] = peer_step(name, config, args.batch, compiled=False)
        if args.compile:
            sides["torch.compile"] = peer_step(name, config, args.batch, compiled=True)
        for side, step in sides.items():
            begin = time.perf_counter()
            turn(step, 3)
            print(f"{name}: {side} warm after {time.perf_counter() - begin:.1f} s", flush=True)
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.turns):
            for side, step in sides.items():
                times[side].append(turn(step, args.steps))
        medians = {side: statistics.median(found) for side, found in times.items()}
        for side, median in medians.items():
            print(
                f"{name:9s} {side:14s} {median * 1e3:8.2f} ms a step, {args.batch / median:8.0f} images/s,"
                f" {medians['PyTorch'] / median:5.2f} of PyTorch",
                flush=True,
            )
        if args.profile:
            for side, step in sides.items():
                print(f"{name} {side}:\n{profile(step, args.profile)}", flush=True)
        del sides
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
