#!/usr/bin/env python3
"""Train a model by hpcnn's recipe in PyTorch, for comparison with a run of `hpcnn train`.

The twin starts from the same weights, sees the same batches in the same order, and follows the same learning rates;
only the arithmetic is PyTorch's. Give it the configuration of a run:

    hpcnn train resnet20 --set data.source=cifar --set train.epochs=6 --out runs/a
    python scripts/bench_accuracy.py runs/a/config.toml

It prints one line an epoch: mean training loss, test accuracy, seconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from hpcnn import configuration
from hpcnn.analysis.torch_twin import TorchTwin
from hpcnn.data import DataSet, open_data
from hpcnn.data.loader import Loader, Part, evaluation_batches
from hpcnn.data.sampler import steps_per_epoch
from hpcnn.nn import models
from hpcnn.nn.model import Model
from hpcnn.train import learning_rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="TOML file or preset; optimizer sgd without Nesterov momentum")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="PyTorch's threads")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    config = configuration.load(args.config, args.set)
    train = config.train
    if train.optimizer != "sgd" or train.nesterov or train.clip_norm or train.steps:
        sys.exit("bench_accuracy: the twin has plain SGD with momentum over whole epochs only.")
    with open_data(config.data, "train") as data, open_data(config.data, "test") as test:
        spec = models.configured(config.model, data.image_shape, data.num_classes)
        model = Model(spec, train.seed)
        twin = TorchTwin(spec, momentum=train.momentum, weight_decay=train.weight_decay)
        twin.load(model.parameters, model.statistics)
        per_epoch = steps_per_epoch(len(data), train.global_batch)
        total = train.epochs * per_epoch
        rate = learning_rate.build(train, steps_per_epoch=per_epoch, total_steps=total)
        begin, losses = time.perf_counter(), 0.0
        settings = {"global_batch": train.global_batch, "seed": train.seed}
        settings["part"] = Part.whole(train.global_batch, data.image_shape)
        with Loader(data, config.data, first_step=0, num_steps=total, **settings) as loader:
            for step, batch in enumerate(loader):
                losses += twin.step(batch.images, batch.labels, rate.rate(step), label_smoothing=train.label_smoothing)
                if (step + 1) % per_epoch == 0:
                    epoch = (step + 1) // per_epoch
                    accuracy = measure(twin, test)
                    seconds = time.perf_counter() - begin
                    print(
                        f"epoch {epoch}  loss {losses / per_epoch:.4f}  test acc {accuracy:.4f}  {seconds:.0f} s",
                        flush=True,
                    )
                    begin, losses = time.perf_counter(), 0.0


def measure(twin: TorchTwin, test: DataSet) -> float:
    """Return the share of test images whose class the twin finds."""
    correct = sum(
        int((twin.forward(b.images).argmax(1) == b.labels).sum())
        for b in evaluation_batches(test, 500, lambda count: Part.whole(count, test.image_shape))
    )
    return correct / len(test)


if __name__ == "__main__":
    main()
