"""Images that need no disk: a pattern for each class under noise, drawn from counters.

They are learnable, of any shape, and the same on every rank and in every run.
"""

from __future__ import annotations

import numpy as np

from hpcnn import rng
from hpcnn.arrays import Shape
from hpcnn.data.dataset import fingerprint

COARSE = 8
"""Rows and columns of a pattern before it is stretched over the image."""


class SyntheticDataSet:
    """`num_samples` images of `num_classes` classes; see `DataSet`. `split` ("train", "test") draws other images."""

    def __init__(self, image_shape: Shape, num_classes: int, num_samples: int, split: str) -> None:
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.class_names = tuple(f"class{index}" for index in range(num_classes))
        channels = image_shape[2]
        self.mean, self.std = np.full(channels, 0.5, np.float32), np.full(channels, 0.25, np.float32)
        self._noise = rng.key(0, "synthetic noise", len(split))
        self._patterns: dict[int, np.ndarray] = {}
        order = rng.generator(0, "synthetic labels", len(split))
        self._labels = order.integers(0, num_classes, num_samples)

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`."""
        size = int(np.prod(self.image_shape))
        words = rng.bits(self._noise, rng.sample_elements(np.asarray(indices), -(-size // 8)))
        noise = words.view(np.uint8)[:, :size].reshape(-1, *self.image_shape)
        labels = self._labels[indices]
        images = noise >> 1
        for image, label in zip(images, labels, strict=True):
            image += self._pattern(int(label))
        return images, labels

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        return fingerprint((len(self), *self.image_shape), self._labels, self.class_names)

    def close(self) -> None:
        """See `DataSet.close`."""

    def _pattern(self, label: int) -> np.ndarray:
        """Return the pattern of a class, uint8 (H, W, C) up to 127; the last few hundred are kept."""
        if label not in self._patterns:
            if len(self._patterns) >= 256:
                self._patterns.pop(next(iter(self._patterns)))
            rows, columns, channels = self.image_shape
            coarse = rng.generator(0, "synthetic pattern", label).integers(0, 128, (COARSE, COARSE, channels), np.uint8)
            stretched = coarse[np.arange(rows) * COARSE // rows][:, np.arange(columns) * COARSE // columns]
            self._patterns[label] = np.ascontiguousarray(stretched)
        return self._patterns[label]
