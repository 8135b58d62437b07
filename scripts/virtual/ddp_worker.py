#!/usr/bin/env python3
"""One rank of AlexNet in PyTorch with DistributedDataParallel over gloo; needs PyTorch and nothing of the package.

Rank 0 writes the seconds of every step, and what its host sent in it, as JSON. The form is the fastest that PyTorch
has on a processor: channels-last tensors, the fused optimizer, gradients kept in the buckets in which they travel.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")


def alexnet(num_classes: int, dropout: float = 0.5) -> Any:
    """Return the network of `hpcnn.nn.models.alexnet`, for images of 224 to 227 pixels a side."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(256 * 6 * 6, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, num_classes),
    )


def main() -> None:
    """Train on random images and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--global-batch", type=int, required=True)
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    import torch
    from torch import distributed
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(1)
    model = alexnet(1000).to(memory_format=torch.channels_last)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True)
    torch.manual_seed(2 + rank)
    count = args.global_batch // size + (rank < args.global_batch % size)
    images = torch.randn(count, 3, args.image_size, args.image_size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (count,))
    records = []
    for _ in range(args.steps):
        begin, sent = time.perf_counter(), int(SENT.read_text())
        optimizer.zero_grad()
        loss = cross_entropy(parallel(images), labels)
        loss.backward()
        optimizer.step()
        value = float(loss.detach())
        records.append(
            {"step_s": time.perf_counter() - begin, "loss": value, "bytes_sent": int(SENT.read_text()) - sent}
        )
    if rank == 0:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        args.out.write_text(json.dumps({"parameters": parameters, "version": torch.__version__, "steps": records}))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
