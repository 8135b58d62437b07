"""What is done to images on their way in: crop, mirror, normalise.

Legend: n images, H rows, W columns, C channels. The padding is black, zero before normalisation, as in the usual
CIFAR recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import as_strided

from hpcnn import arrays, rng

CACHED_BYTES = 1 << 18
"""Pixels that are normalised at once; they stay in a core's cache from the first pass to the last."""


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the image padded by `crop_padding` black pixels on each side, and a mirror image half the time.

    The draws are keyed by (seed, epoch) and the sample's index alone.
    """

    seed: int
    crop_padding: int = 0
    flip: bool = False

    def apply(self, images: np.ndarray, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Return the images, uint8 (n, H, W, C), as this epoch sees them; `samples` are their indices (n,)."""
        if not self.crop_padding and not self.flip:
            return images
        down, right, mirrored = self.draw(samples, epoch)
        if self.crop_padding:
            images = _crop(images, self.crop_padding, down, right)
        return _mirror(images, mirrored) if mirrored.any() else images

    def draw(self, samples: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return first row and column of each crop in the padded image, int64 (n,), and whether to mirror it, bool."""
        bits = rng.bits(rng.key(self.seed, "augment", epoch), np.asarray(samples))
        choices = np.uint64(2 * self.crop_padding + 1)
        # 31 random bits times the number of choices, shifted back: no division, and no value favoured noticeably.
        low = bits & np.uint64(0x7FFFFFFF)
        high = (bits >> np.uint64(31)) & np.uint64(0x7FFFFFFF)
        down, right = ((part * choices >> np.uint64(31)).astype(np.int64) for part in (low, high))
        return down, right, (bits >> np.uint64(63)).astype(bool) & self.flip


def normalise(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return (images / 255 - mean) / std as float32 (n, H, W, C), per channel."""
    n, H, W, C = images.shape
    result = arrays.empty(images.shape)
    # Whole rows of pixels: the innermost loop would otherwise be the few channels.
    scale = np.tile((1.0 / (255.0 * np.asarray(std, np.float64))).astype(np.float32), W)
    shift = np.tile((np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32), W)
    source, target = images.reshape(n * H, W * C), result.reshape(n * H, W * C)
    at_once = max(1, CACHED_BYTES // max(1, 4 * W * C))
    for start in range(0, n * H, at_once):
        block = target[start : start + at_once]
        block[...] = source[start : start + at_once]
        block *= scale
        block -= shift
    return result


def _crop(images: np.ndarray, pad: int, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    n, H, W, C = images.shape
    padded = np.zeros((n, H + 2 * pad, W + 2 * pad, C), np.uint8)
    padded[:, pad : pad + H, pad : pad + W] = images
    # All crops of all images, as a view: dimensions 1 and 2 are the place of the crop, and a row of it is one piece.
    image, row, column, _ = padded.strides
    crops = as_strided(padded, (n, 2 * pad + 1, 2 * pad + 1, H, W * C), (image, row, column, row, 1), writeable=False)
    return crops[np.arange(n), down, right].reshape(images.shape)


def _mirror(images: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    _, H, W, C = images.shape
    backwards = np.arange(W * C).reshape(W, C)[::-1].reshape(-1)
    result = images.copy()
    result[mirrored] = images[mirrored].reshape(-1, W * C).take(backwards, axis=1).reshape(-1, H, W, C)
    return result
