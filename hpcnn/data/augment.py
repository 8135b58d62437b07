"""What is done to images on their way in: crop, mirror, normalise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpcnn import arrays, rng


@dataclass(frozen=True)
class Augmentation:
    """Random crop of the image padded by `crop_padding` black pixels on each side, and a mirror image half the time.

    The draws are keyed by (seed, epoch) and the sample's index alone.
    """

    seed: int
    crop_padding: int = 0
    flip: bool = False

    def apply(self, images: np.ndarray, samples: np.ndarray, epoch: int) -> np.ndarray:
        """Return the images, uint8 (n, H, W, C), as this epoch sees them."""
        pad = self.crop_padding
        if not pad and not self.flip:
            return images
        count, rows, columns, channels = images.shape
        draws = rng.bits(rng.key(self.seed, "augment", epoch), samples)
        choices = np.uint64(2 * pad + 1)
        down = (draws & np.uint64(0xFFFF)) % choices
        right = ((draws >> np.uint64(16)) & np.uint64(0xFFFF)) % choices
        mirror = (draws >> np.uint64(63)).astype(bool) & self.flip
        padded = np.zeros((count, rows + 2 * pad, columns + 2 * pad, channels), np.uint8)
        padded[:, pad : pad + rows, pad : pad + columns] = images
        result = np.empty_like(images)
        for index, (i, j, mirrored) in enumerate(zip(down.tolist(), right.tolist(), mirror.tolist(), strict=True)):
            crop = padded[index, i : i + rows, j : j + columns]
            result[index] = crop[:, ::-1] if mirrored else crop
        return result


def normalise(images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return (images / 255 - mean) / std as float32, per channel."""
    result = arrays.empty(images.shape)
    np.multiply(images, (1.0 / (255.0 * std)).astype(np.float32), out=result)
    result -= (mean / std).astype(np.float32)
    return result
