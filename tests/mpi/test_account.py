"""What a run says it took. First in the listing: no test before has taken memory, which a process never gives back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from hpcnn import configuration
from hpcnn.train.metrics import peak_memory_bytes
from hpcnn.train.setup import assemble
from hpcnn.train.trainer import Trainer
from tests.worlds import world


def test_the_last_record_tells_the_memory_of_the_rank_that_took_most(folder: Path) -> None:
    on = world()
    most = max(on.broadcast_obj(on.gather_obj(peak_memory_bytes())))
    if on.rank == on.size - 1:
        np.ones(most + 100_000_000, np.uint8)
    before = max(on.broadcast_obj(on.gather_obj(peak_memory_bytes())))
    config = configuration.load("lenet5", ["checkpoint.every_epochs=0", "train.global_batch=25", "train.steps=1"])
    trainer = Trainer(assemble(config, on), folder, progress_stream=io.StringIO(), result_stream=io.StringIO())
    trainer.prepare()
    trainer.train()
    after = max(on.broadcast_obj(on.gather_obj(peak_memory_bytes())))
    end = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert most + 100_000_000 < before <= end["peak_memory_bytes"] <= after
