"""Images that need no disk: a pattern for each class under noise, drawn from counters.

They are learnable, of any shape, and the same on every rank and in every run.
"""

from __future__ import annotations

from math import prod

import numpy as np

from hpcnn import rng
from hpcnn.arrays import Shape
from hpcnn.data.dataset import InMemory, fingerprint

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

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `DataSet.read`."""
        labels = self._labels[indices]
        images = np.empty((len(labels), *self.image_shape), np.uint8)
        size = prod(self.image_shape)
        for image, index, label in zip(images, np.asarray(indices).tolist(), labels.tolist(), strict=True):
            # Image by image: the 64-bit words of a whole batch would not stay in the cache. Eight bytes of noise each.
            words = rng.bits(self._noise, rng.sample_elements(np.array([index]), -(-size // 8)))
            noise = words.astype("<u8", copy=False).reshape(-1).view(np.uint8)[:size]
            np.right_shift(noise.reshape(self.image_shape), 1, out=image)
            image += self._pattern(label)
        return images, labels

    def labels_of(self, indices: np.ndarray) -> np.ndarray:
        """See `DataSet.labels_of`."""
        return self._labels[indices]

    def fingerprint(self) -> str:
        """See `DataSet.fingerprint`."""
        return fingerprint((len(self), *self.image_shape), self._labels, self.class_names)

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
