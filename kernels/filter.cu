// Filters rounded to what tensor cores multiply, padded with zeros, and turned round for input gradients.
#include "tensor_core.cuh"

// Rounding to each kind of factor.
struct Exact {
    typedef float type;
    static __device__ __forceinline__ float round(float x) { return x; }
};
struct Tf32 {
    typedef float type;
    static __device__ __forceinline__ float round(float x) {
        union {
            uint32 bits;
            float number;
        } rounded;
        rounded.bits = to_tf32(x);
        return rounded.number;
    }
};
struct Bf16 {
    typedef bf16 type;
    static __device__ __forceinline__ bf16 round(float x) { return to_bf16(x); }
};

// out (rows, padded) = w (rows, depth), zeros behind.
template <typename Rounding>
__device__ __forceinline__ void plain(const float* w, typename Rounding::type* out, int64 rows, int depth, int padded) {
    int64 element = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= rows * padded) return;
    int64 row = element / padded;
    int column = static_cast<int>(element - row * padded);
    out[element] = Rounding::round(column < depth ? w[row * depth + column] : 0.0f);
}

// out (groups, depth, taps reversed, padded) = w (groups, filters, taps, depth), by tiles of 32 x 32 through shared
// memory, so that both sides are read and written along their last axis. A block has 32 x 8 threads.
template <typename Rounding>
__device__ __forceinline__ void transposed(const float* w, typename Rounding::type* out, int filters, int taps,
                                           int depth, int padded) {
    __shared__ float tile[32][33];
    int group = blockIdx.z / taps, tap = blockIdx.z % taps;
    int channel = blockIdx.x * 32 + threadIdx.x;
    for (int i = threadIdx.y; i < 32; i += 8) {
        int filter = blockIdx.y * 32 + i;
        bool inside = filter < filters && channel < depth;
        int64 row = static_cast<int64>(group) * filters + filter;
        tile[i][threadIdx.x] = inside ? w[(row * taps + tap) * depth + channel] : 0.0f;
    }
    __syncthreads();
    int filter = blockIdx.y * 32 + threadIdx.x;
    for (int i = threadIdx.y; i < 32; i += 8) {
        int row = blockIdx.x * 32 + i;
        if (row >= depth || filter >= padded) continue;
        int64 to = (static_cast<int64>(group) * depth + row) * taps + (taps - 1 - tap);
        out[to * padded + filter] = Rounding::round(tile[threadIdx.x][i]);
    }
}

#define KERNELS(Rounding, suffix)                                                                                 \
    extern "C" __global__ void filter_plain_##suffix(const float* w, Rounding::type* out, int64 rows, int depth,  \
                                                     int padded) {                                                \
        plain<Rounding>(w, out, rows, depth, padded);                                                             \
    }                                                                                                             \
    extern "C" __global__ void filter_transposed_##suffix(const float* w, Rounding::type* out, int filters,       \
                                                          int taps, int depth, int padded) {                      \
        transposed<Rounding>(w, out, filters, taps, depth, padded);                                               \
    }

KERNELS(Exact, f32)
KERNELS(Tf32, tf32)
KERNELS(Bf16, bf16)
