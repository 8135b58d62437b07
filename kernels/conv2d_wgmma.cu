// architectures: 90a
// Convolutions and their gradients as implicit matrix products on Hopper, by blocks on their own;
// conv2d_wgmma_cluster.cu has others.
#include "conv2d_wgmma_passes.cuh"

// y[i] = activation(sum over s of partial[s][i] + bias[i % columns]), in the order of s.
template <typename Out>
__device__ __forceinline__ void sum_splits(const float* partial, const float* bias, Out* y, int64 size, int splits,
                                           int columns, int activation) {
    for (int64 i = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
         i += static_cast<int64>(gridDim.x) * blockDim.x) {
        float sum = 0.0f;
#pragma unroll 4
        for (int split = 0; split < splits; ++split) sum += partial[split * size + i];
        y[i] = from_float<Out>(activate(bias == nullptr ? sum : sum + bias[i % columns], activation));
    }
}

#define FORWARD_TYPES(tile, ...)                                                  \
    FORWARD(conv2d_forward_wgmma_##tile##_bf16, BLOCK, bf16, bf16, __VA_ARGS__)   \
    FORWARD(conv2d_partial_wgmma_##tile##_bf16, BLOCK, bf16, float, __VA_ARGS__)  \
    FORWARD(conv2d_forward_wgmma_##tile##_tf32, BLOCK, float, float, __VA_ARGS__)
FORWARD_TYPES(128x256, 1, 256, 4)
FORWARD_TYPES(128x128, 1, 128, 6)
FORWARD_TYPES(128x64, 1, 64, 8)
FORWARD_TYPES(256x128, 2, 128, 4)

WEIGHT(conv2d_weight_wgmma_128x256_bf16, BLOCK, 1, 256, 4)
WEIGHT(conv2d_weight_wgmma_128x192_bf16, BLOCK, 1, 192, 4)
WEIGHT(conv2d_weight_wgmma_128x128_bf16, BLOCK, 1, 128, 6)
WEIGHT(conv2d_weight_wgmma_256x128_bf16, BLOCK, 2, 128, 4)

#define SUM(type, out)                                                                                          \
    extern "C" __global__ void conv2d_sum_wgmma_##type(const float* partial, const float* bias, out* y, int64 size, \
                                                       int splits, int columns, int activation) {               \
        sum_splits(partial, bias, y, size, splits, columns, activation);                                        \
    }
SUM(f32, float)
SUM(bf16, bf16)
