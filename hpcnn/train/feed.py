"""What stands between the loader and the loop: the next batch, and how long the loop waited for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from hpcnn.data.loader import Batch, Loader
from hpcnn.errors import HpcnnError
from hpcnn.gpu import Upload
from hpcnn.timeline import Timeline
from hpcnn.train.setup import Parts, batch_part


def make_loader(parts: Parts, first_step: int) -> Loader:
    """Return the loader of this rank's part of the batches from `first_step` on."""
    return Loader(
        parts.train_data,
        parts.config.data,
        global_batch=parts.draw.batch,
        seed=parts.config.train.seed,
        part=batch_part(parts.program, parts.recipe.global_batch),
        first_step=first_step,
        num_steps=parts.total_steps - first_step,
        rows=parts.draw.rows,
        share=parts.draw.share,
    )


class Feed:
    """The next batch of a loader, or the error that came instead, and how long the step waited for it.

    Attributes
    ----------
    batch : Batch
        The one to train with.
    images : ndarray or Upload
        Its images, on their way to where they are needed.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        timeline: Timeline,
        upload: Callable[[np.ndarray], np.ndarray | Upload] = lambda images: images,
    ) -> None:
        self.wait_seconds = 0.0
        self.error: HpcnnError | None = None
        self._batches = batches
        self._timeline = timeline
        self._upload = upload

    def fetch(self) -> None:
        """Take the next batch; an error is kept for the ranks to agree on."""
        begin = time.perf_counter()
        try:
            self.batch = next(self._batches)
            self.images = self._upload(self.batch.images)
        except HpcnnError as error:
            self.error = error
        end = time.perf_counter()
        self.wait_seconds += end - begin
        self._timeline.add("wait for images", "wait", begin, end)
