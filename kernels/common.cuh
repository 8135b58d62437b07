// What every kernel may use: element types, conversions, and small helpers.
//
// Kernels are compiled three ways: by NVRTC when a GPU needs them, by nvcc in tests (to cubin, without a GPU), and by
// a C++ compiler for the emulation of tests/emulation, which defines HPCNN_EMULATION and supplies the CUDA language
// itself. A kernel therefore uses of CUDA only what this file and its neighbours wrap or what the emulation knows:
// threadIdx, blockIdx, blockDim, gridDim, __syncthreads, __shfl_xor_sync, __shfl_down_sync, __shared__ arrays.
//
// Kernels are `extern "C" __global__` functions named <operator>_<pass>_<variant>_<type>, types being f32, tf32, bf16.
#pragma once

#ifdef HPCNN_EMULATION
#include "emulation.h"
#else
#include <cuda_bf16.h>
typedef __nv_bfloat16 bf16;
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ bf16 to_bf16(float x) { return __float2bfloat16_rn(x); }

// Dynamic shared memory, 1024-byte aligned as the tensor copy engine wants it.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

__device__ __forceinline__ float to_float(float x) { return x; }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return to_bf16(x); }

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

// Activations, as hpcnn.ops.cuda.types numbers them.
enum Activation { IDENTITY = 0, RELU = 1, LEAKY_RELU = 2 };

__device__ __forceinline__ float activate(float x, int activation) {
    if (activation == IDENTITY || x > 0.0f) return x;
    return activation == RELU ? (x == x ? 0.0f : x) : 0.1f * x;  // NaN stays NaN
}

// Slope of an activation from its output; at zero the lower one counts.
__device__ __forceinline__ float slope(float y, int activation) {
    if (activation == IDENTITY || y > 0.0f) return 1.0f;
    return activation == RELU ? 0.0f : 0.1f;
}

__host__ __device__ __forceinline__ int64 ceil_div(int64 a, int64 b) { return (a + b - 1) / b; }

// A convolution in integers; hpcnn.ops.cuda.types.CONV2D is the same in NumPy. Layouts: x (N, H, W, C),
// w (K, R, S, C / groups), y (N, P, Q, K).
struct Conv2d {
    int n, h, w, c, k, r, s, p, q;
    int stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
};
