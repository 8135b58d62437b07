"""What is done to images on their way in: crop, mirror, normalise.

Legend: n images, H rows, W columns, C channels; a tile has h rows, w columns. The padding is black,
zero before normalisation, as in the usual CIFAR recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcnn import arrays, rng
from hpcnn.data.dataset import DataSet, Windows
from hpcnn.geometry import Block

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

    def read(self, data: DataSet, samples: np.ndarray, epoch: int, rows: Block, columns: Block) -> np.ndarray:
        """Return a tile of images as this epoch sees them, uint8 (n, h, w, C), and read no more than it shows.

        A tile of a cropped and mirrored image is the mirror image of a window of the same size on the image as it
        lies in the data set.

        Parameters
        ----------
        data : DataSet
            Where they are.
        samples : numpy.ndarray, int64 (n,)
            Their indices.
        rows, columns : Block
            The tile.

        Raises
        ------
        DataError
            If they cannot be read.
        """
        down, right, mirrored = self.draw(samples, epoch)
        left = np.where(mirrored, data.image_shape[1] - columns.stop, columns.start)
        windows = Windows(
            rows.start + down - self.crop_padding, left + right - self.crop_padding, (rows.size, columns.size)
        )
        images, _ = data.read(samples, None if windows.are_whole(data.image_shape) else windows)
        if mirrored.any():
            _mirror(images, mirrored)
        return images

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


def _mirror(images: np.ndarray, mirrored: np.ndarray) -> None:
    """Mirror some images in place."""
    _, h, w, C = images.shape
    backwards = np.arange(w * C).reshape(w, C)[::-1].reshape(-1)
    turned = images[mirrored]
    images[mirrored] = turned.reshape(len(turned), h, w * C).take(backwards, axis=2).reshape(turned.shape)
