"""The emulation of CUDA does what a GPU does, and refuses what a GPU would get wrong."""

from __future__ import annotations

import numpy as np


def test_barriers_order_what_threads_write(device, random) -> None:
    x = random.standard_normal(1024).astype(np.float32)
    y = device.empty((1024,), np.float32)
    device.launch("exchange", "block_sum_f32", (4,), (256,), device.upload(x), y, np.int32(1000))
    sums = np.pad(x[:1000], (0, 24)).reshape(4, 256).sum(axis=1, dtype=np.float64)
    np.testing.assert_allclose(device.download(y).reshape(4, 256), np.repeat(sums[:, None], 256, axis=1), rtol=1e-4)
