// Sums down the rows of a matrix, always in the same order: no atomics.
#include "common.cuh"

// partials (gridDim.y, columns): sums of x (rows, columns) over the rows of each split. A block of 32 x 8 threads takes
// 32 columns; its eight rows of threads take every eighth row of the split.
template <typename T>
__device__ __forceinline__ void column_sum(const T* x, float* partials, int64 rows, int columns) {
    __shared__ float sums[8][33];
    int column = blockIdx.x * 32 + threadIdx.x;
    int64 share = ceil_div(rows, gridDim.y);
    int64 first = blockIdx.y * share;
    int64 end = first + share < rows ? first + share : rows;
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (column < columns) {
        int64 row = first + threadIdx.y;
        for (; row + 24 < end; row += 32) {  // four loads in flight
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += to_float(x[(row + 8 * i) * columns + column]);
        }
        for (; row < end; row += 8) sum[0] += to_float(x[row * columns + column]);
    }
    sums[threadIdx.y][threadIdx.x] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    __syncthreads();
    if (threadIdx.y != 0 || column >= columns) return;
    float total = 0.0f;
    for (int i = 0; i < 8; ++i) total += sums[i][threadIdx.x];
    partials[static_cast<int64>(blockIdx.y) * columns + column] = total;
}

// out[i] = activation(bias[i % columns] + sum over splits of partials[split][i]).
template <typename T>
__device__ __forceinline__ void reduce(const float* partials, const float* bias, T* out, int64 count, int splits,
                                       int columns, int activation) {
    int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float sum = 0.0f;
#pragma unroll 8
    for (int split = 0; split < splits; ++split) sum += partials[split * count + i];
    if (bias) sum += bias[i % columns];
    out[i] = from_float<T>(activate(sum, activation));
}

#define KERNELS(T, suffix)                                                                                           \
    extern "C" __global__ void column_sum_##suffix(const T* x, float* partials, int64 rows, int columns) {           \
        column_sum<T>(x, partials, rows, columns);                                                                   \
    }                                                                                                                \
    extern "C" __global__ void reduce_partials_##suffix(const float* partials, const float* bias, T* out,            \
                                                        int64 count, int splits, int columns, int activation) {      \
        reduce<T>(partials, bias, out, count, splits, columns, activation);                                          \
    }

KERNELS(float, f32)
KERNELS(bf16, bf16)
