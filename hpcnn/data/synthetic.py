"""Images that need no disk: a pattern for each class under noise, drawn from counters.

They are learnable, of any shape, and the same on every rank and in every run.
"""

from __future__ import annotations

import numpy as np

from hpcnn import rng
from hpcnn.arrays import Shape
from hpcnn.data.dataset import InMemory, Windows, fingerprint
from hpcnn.geometry import Block

COARSE = 8
"""Rows and columns of a pattern before it is stretched over the image."""
KEPT_BYTES = 1 << 26
"""Room for patterns that are kept; others are stretched again when their class comes by."""
SEED = 0


class SyntheticDataSet(InMemory):
    """`num_samples` images of `num_classes` classes; see `DataSet`. `split` ("train", "test") draws other images.

    A pixel is half a pattern's value plus half a noise byte; labels are drawn as well.
    """

    def __init__(self, image_shape: Shape, num_classes: int, num_samples: int, split: str) -> None:
        self.image_shape = tuple(image_shape)
        self.num_classes = num_classes
        self.class_names = tuple(f"class{index}" for index in range(num_classes))
        # Two independent uniform bytes, halved: their exact mean and deviation are .498 and .205.
        self.mean, self.std = (np.full(image_shape[2], value, np.float32) for value in (0.498, 0.205))
        self._noise = rng.key(SEED, f"synthetic {split} noise")
        drawn = rng.bits(rng.key(SEED, f"synthetic {split} labels"), np.arange(num_samples))
        self._labels = (drawn % np.uint64(num_classes)).astype(np.int64)
        self._patterns: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: np.ndarray, windows: Windows | None = None) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`."""
        windows = windows or Windows.whole(len(indices), self.image_shape)
        return windows.cut(indices, self.image_shape, self._rows), self._labels[indices]

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `DataSet.labels_of`."""
        return self._labels[indices]

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        return fingerprint((len(self), *self.image_shape), self._labels, self.class_names)

    def _rows(self, index: int, rows: Block) -> np.ndarray:
        """Return some rows of an image, (rows, W, C)."""
        _, W, C = self.image_shape
        start, stop = rows.start * W * C, rows.stop * W * C
        # Eight bytes of noise a word. Image by image: the words of a whole batch would not stay in the cache.
        first = start // 8
        words = rng.bits(self._noise, rng.sample_elements(np.array([index]), np.arange(first, -(-stop // 8))))
        noise = words.astype("<u8", copy=False).reshape(-1).view(np.uint8)[start - 8 * first : stop - 8 * first]
        return (noise >> 1).reshape(rows.size, W, C) + self._pattern(int(self._labels[index]))[rows.start : rows.stop]

    def _pattern(self, label: int) -> np.ndarray:
        """Return the pattern of a class, uint8 (H, W, C) up to 127."""
        if label in self._patterns:
            return self._patterns[label]
        H, W, C = self.image_shape
        coarse = rng.bits(rng.key(SEED, "synthetic pattern", label), np.arange(COARSE * COARSE * C))
        coarse = (coarse & np.uint64(127)).astype(np.uint8).reshape(COARSE, COARSE, C)
        pattern = coarse[np.arange(H) * COARSE // H][:, np.arange(W) * COARSE // W]
        if (len(self._patterns) + 1) * pattern.nbytes > KEPT_BYTES and self._patterns:
            self._patterns.pop(next(iter(self._patterns)))
        self._patterns[label] = pattern
        return pattern
