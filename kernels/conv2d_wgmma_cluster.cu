// architectures: 90a
// The convolutions of conv2d_wgmma.cu by clusters of blocks, which share what they load, and by groups that alternate
// ("a"). The name says rows and columns of a block's tile, then how many blocks a cluster has down and across.
#include "conv2d_wgmma_passes.cuh"

#define FORWARD_BF16(tile, ...) FORWARD(conv2d_forward_wgmma_##tile##_bf16, __VA_ARGS__)
FORWARD_BF16(128x256_2x1, CLUSTER(2), bf16, bf16, 1, 256, 4, 2, 1)
FORWARD_BF16(256x128_2x1, CLUSTER(2), bf16, bf16, 2, 128, 4, 2, 1)
FORWARD_BF16(256x128_1x2, CLUSTER(2), bf16, bf16, 2, 128, 4, 1, 2)
FORWARD_BF16(128x256_2x2, CLUSTER(4), bf16, bf16, 1, 256, 4, 2, 2)
FORWARD_BF16(128x128a, BLOCK, bf16, bf16, 2, 128, 6, 1, 1, true)
FORWARD_BF16(128x128a_2x1, CLUSTER(2), bf16, bf16, 2, 128, 6, 2, 1, true)
FORWARD_BF16(128x128a_4x1, CLUSTER(4), bf16, bf16, 2, 128, 6, 4, 1, true)
FORWARD_BF16(128x128a_2x2, CLUSTER(4), bf16, bf16, 2, 128, 6, 2, 2, true)
FORWARD_BF16(256x64a, BLOCK, bf16, bf16, 4, 64, 4, 1, 1, true)
FORWARD_BF16(256x64a_2x1, CLUSTER(2), bf16, bf16, 4, 64, 4, 2, 1, true)

#define WEIGHT_BF16(tile, ...) WEIGHT(conv2d_weight_wgmma_##tile##_bf16, __VA_ARGS__)
WEIGHT_BF16(128x256_2x1, CLUSTER(2), 1, 256, 4, 2, 1)
WEIGHT_BF16(128x256_1x2, CLUSTER(2), 1, 256, 4, 1, 2)
WEIGHT_BF16(128x192_1x2, CLUSTER(2), 1, 192, 4, 1, 2)
WEIGHT_BF16(256x128_1x2, CLUSTER(2), 2, 128, 4, 1, 2)
WEIGHT_BF16(128x128a_1x2, CLUSTER(2), 2, 128, 6, 1, 2, true)
WEIGHT_BF16(128x128a_2x2, CLUSTER(4), 2, 128, 6, 2, 2, true)
WEIGHT_BF16(64x256a, BLOCK, 1, 256, 4, 1, 1, true)
WEIGHT_BF16(64x192a, BLOCK, 1, 192, 5, 1, 1, true)
