"""Weight gradient of a convolution on few channels, such as a network's first, as a product of matrices.

The library's own code keeps a row of the output gradient in the first-level cache, C multiplications per number;
where C is 3 and the row does not fit, it waits for memory. Here a strip of the input is laid out as columns, one for
each place of the filter and one of ones for the bias, and multiplied by the strip's output gradient.
Legend: N samples, H W input rows and columns, C input channels, K filters, R S filter rows and columns, P Q output rows
and columns, L = R S C + 1 columns.
"""

from __future__ import annotations

import numpy as np

from hpcnn.arrays import Padding, Pair, empty
from hpcnn.geometry import Block
from hpcnn.ops.onednn import library as lib
from hpcnn.ops.onednn.primitive import Description, Primitive, address, attributes, cached, matrix

MOST_COLUMNS = 64
SMALLEST_ROW_BYTES = 1 << 15
STRIP_BYTES = 1 << 25


def pays(channels: int, kernel_size: Pair, columns: int, filters: int) -> bool:
    """Return whether the product is faster than the direct code for C channels and an output row of Q x K."""
    places = channels * kernel_size[0] * kernel_size[1]
    return places < MOST_COLUMNS and 4 * columns * filters > SMALLEST_ROW_BYTES


def backward_weight(
    x: np.ndarray, grad_output: np.ndarray, kernel_size: Pair, stride: Pair, padding: Padding, dilation: Pair
) -> np.ndarray | None:
    """Return dW and, in the last row, db as one matrix (L, K); None if the library cannot multiply the strips."""
    (N, P, Q, K), (R, S), C = grad_output.shape, kernel_size, x.shape[3]
    L, rows = R * S * C + 1, max(1, STRIP_BYTES // (4 * Q * (R * S * C + K)))
    strips = [Block(start, min(start + rows, P)) for start in range(0, P, rows)]
    products = {strip.size: _product(strip.size * Q, L, K) for strip in strips}
    padded = np.pad(x, ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, (dilation[0] * (R - 1) + 1, dilation[1] * (S - 1) + 1), axis=(1, 2)
    )[:, :: stride[0], :: stride[1], :, :: dilation[0], :: dilation[1]]
    windows = windows[:, :P, :Q].transpose(0, 1, 2, 4, 5, 3)  # (N, P, Q, R, S, C)

    result, columns = np.zeros((L, K), np.float32), empty((rows * Q, L))
    columns[:, -1] = 1.0
    for sample in range(N):
        for strip in strips:
            product = products[strip.size]
            if product is None:
                return None
            target = columns[: strip.size * Q, :-1].reshape(strip.size, Q, R, S, C)
            target[...] = windows[sample, strip.start : strip.stop]
            product(address(columns), address(grad_output[sample, strip.start]), address(result))
    return result


@cached
def _product(pixels: int, columns: int, filters: int) -> Primitive:
    """Return z = A^T B + z for A (pixels, columns) and B (pixels, filters)."""
    layouts = matrix(columns, pixels, transposed=True), matrix(pixels, filters), None, matrix(columns, filters)
    who = f"conv2d weight gradient by columns, ({columns}, {pixels}) x ({pixels}, {filters})"
    description = Description(who, "matmul", *layouts, attributes((("sum",),)), prefer="gemm")
    return Primitive(description, (lib.SRC, lib.WEIGHTS, lib.DST))
