// The three passes of a convolution as products of matrices that are never laid out (implicit GEMM), in float32 on the
// ordinary cores. All of them are
//
//     out[row, column] = sum over depth of left[row, depth] * right[depth, column]
//
//             row                column         depth              left           right
//     forward output pixel       filter         tap, channel       x              filters
//     input   input pixel        channel        tap, filter        grad_output    filters
//     weight  filter             tap, channel   output pixel       grad_output    x
//
// A block computes a tile of `out`: it brings eight steps of depth of both factors to shared memory, the next eight to
// registers meanwhile, and each thread multiplies 8 x 8 numbers. The method is that of V. Volkov and J. Demmel,
// Benchmarking GPUs to tune dense linear algebra, SC 2008.
//
// The gradient of the input of a strided convolution is computed by classes of pixels: those that are a multiple of the
// stride apart read the same taps, and for them the pass is a convolution without strides.
#include "conv2d_factors.cuh"

// sum (8 x 8) += a column of one tile times a row of the other, for each step of the depth.
template <int M, int N>
__device__ __forceinline__ void multiply(float (&sum)[8][8], const float* left, const float* right) {
    typedef Vector<float, 4> Four;
#pragma unroll
    for (int k = 0; k < DEPTH; ++k) {
        Four a[2], b[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            a[half] = *reinterpret_cast<const Four*>(left + k * (M + PADDING) + half * 16);
            b[half] = *reinterpret_cast<const Four*>(right + k * (N + PADDING) + half * 32);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) sum[i][j] += a[i / 4].at[i % 4] * b[j / 4].at[j % 4];
        }
    }
}

template <typename T> __device__ __forceinline__ void write(T* to, const float* v, int64 count, bool whole) {
    Vector<T, 4> four;
#pragma unroll
    for (int j = 0; j < 4; ++j) four.at[j] = from_float<T>(v[j]);
    if (whole && count >= 4) {
        *reinterpret_cast<Vector<T, 4>*>(to) = four;
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (j < count) to[j] = four.at[j];
    }
}

// The tile M x N of this block, by M * N / 64 threads: a warp has 32 x 64 of it, a thread four rows and four columns of
// each quarter of that. With several splits sums go to `partials`, split by split; bias and activation have to wait.
template <int M, int N, typename Out, typename Rounded, typename Left, typename Right, typename T>
__device__ __forceinline__ void product(Left left, Right right, int steps, const Product& g, int64 first_row,
                                        int64 first_column, const float* bias, T* out, float* partials,
                                        int activation) {
    typedef Vector<float, 4> Four;
    constexpr int left_size = DEPTH * (M + PADDING), right_size = DEPTH * (N + PADDING);
    __shared__ Four left_tiles[2 * left_size / 4];
    __shared__ Four right_tiles[2 * right_size / 4];
    float* left_tile = reinterpret_cast<float*>(left_tiles);
    float* right_tile = reinterpret_cast<float*>(right_tiles);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int row = warp / (N / 64) * 32 + lane / 8 * 4, column = warp % (N / 64) * 64 + lane % 8 * 4;
    float sum[8][8] = {};
    for (int step = -1; step < steps; ++step) {
        bool more = step + 1 < steps;
        if (more) {
            left.load(g);
            right.load(g);
        }
        int now = step & 1, next = now ^ 1;
        if (step >= 0) multiply<M, N>(sum, left_tile + now * left_size + row, right_tile + now * right_size + column);
        if (more) {
            left.template store<Rounded>(left_tile + next * left_size);
            right.template store<Rounded>(right_tile + next * right_size);
            __syncthreads();
        }
    }
    int group = blockIdx.z / g.splits, split = blockIdx.z % g.splits;
    int64 columns = Out::columns(g);
    bool even = columns % 4 == 0 && g.other_channels % 4 == 0;
    bool whole = g.splits > 1 ? even && Out::size(g) % 4 == 0 : even && aligned<T, 4>(out);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int64 at = first_row + row + i / 4 * 16 + i % 4;
        if (at >= Out::rows(g)) continue;
        int64 offset = Out::offset(g, group, at);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int64 from = first_column + column + half * 32;
            float v[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                v[j] = sum[i][half * 4 + j];
                if (g.splits == 1) {
                    if (bias && from + j < columns) v[j] += bias[group * columns + from + j];
                    v[j] = activate(v[j], activation);
                }
            }
            if (g.splits > 1) {
                write(partials + split * Out::size(g) + offset + from, v, columns - from, whole);
            } else {
                write(out + offset + from, v, columns - from, whole);
            }
        }
    }
}

// The rows, columns and steps of depth of this block.
template <typename Out, int M, int N> struct Block {
    int group, steps;
    int64 row, column, begin;

    __device__ __forceinline__ explicit Block(const Product& g) {
        int64 across = ceil_div(Out::columns(g), N);
        row = blockIdx.x / across * M;
        column = blockIdx.x % across * N;
        group = blockIdx.z / g.splits;
        int64 depth = Out::depth(g), share = ceil_div(ceil_div(depth, g.splits), DEPTH) * DEPTH;
        begin = blockIdx.z % g.splits * share;
        int64 end = begin + share < depth ? begin + share : depth;
        steps = begin < end ? static_cast<int>(ceil_div(end - begin, DEPTH)) : 0;
    }
};

#define FORWARD(M, N, V, T, type, blocks)                                                                           \
    extern "C" __global__ void __launch_bounds__(M * N / 64, blocks)                                                \
        conv2d_forward_simt_##M##x##N##_v##V##_##type(const T* x, const float* w, const float* bias, T* y,          \
                                                      float* partials, int activation, Product g) {                 \
        Block<OutPixels, M, N> block(g);                                                                            \
        Pixels<T, M, M * N / 64, V> left(x, g, block.group, block.row, block.begin);                                \
        Filters<N, M * N / 64, V> right(w, g, block.group, block.column, block.begin);                              \
        product<M, N, OutPixels, T>(left, right, block.steps, g, block.row, block.column, bias, y, partials,        \
                                    activation);                                                                    \
    }

#define INPUT(M, N, V, T, type, blocks)                                                                             \
    extern "C" __global__ void __launch_bounds__(M * N / 64, blocks)                                                \
        conv2d_input_simt_##M##x##N##_v##V##_##type(const T* grad_output, const float* w, const float* bias,        \
                                                    T* grad_input, float* partials, int activation, Product g) {    \
        Block<OutPixels, M, N> block(g);                                                                            \
        Pixels<T, M, M * N / 64, V> left(grad_output, g, block.group, block.row, block.begin);                      \
        FiltersTransposed<N, M * N / 64, V> right(w, g, block.group, block.column, block.begin);                    \
        product<M, N, OutPixels, T>(left, right, block.steps, g, block.row, block.column, bias, grad_input,         \
                                    partials, activation);                                                          \
    }

#define WEIGHT(M, N, V, T, type, blocks)                                                                            \
    extern "C" __global__ void __launch_bounds__(M * N / 64, blocks)                                                \
        conv2d_weight_simt_##M##x##N##_v##V##_##type(const T* x, const T* grad_output, float* grad_weight,          \
                                                     float* partials, Product g) {                                  \
        Block<OutFilters, M, N> block(g);                                                                           \
        Gradients<T, M, M * N / 64, V> left(grad_output, g, block.group, block.row, block.begin);                   \
        PixelsTransposed<T, N, M * N / 64, V> right(x, g, block.group, block.column, block.begin);                  \
        const float* no_bias = nullptr;                                                                             \
        product<M, N, OutFilters, T>(left, right, block.steps, g, block.row, block.column, no_bias, grad_weight,    \
                                     partials, IDENTITY);                                                           \
    }

#define PASSES(M, N, V, T, type, blocks) \
    FORWARD(M, N, V, T, type, blocks)    \
    INPUT(M, N, V, T, type, blocks)      \
    WEIGHT(M, N, V, T, type, blocks)

// Blocks to have on a multiprocessor: 512 threads of 128 registers. Single elements have more addresses to keep.
PASSES(128, 128, 4, float, f32, 2)
PASSES(128, 64, 4, float, f32, 4)
PASSES(64, 64, 4, float, f32, 8)
PASSES(64, 64, 1, float, f32, 6)
PASSES(64, 64, 4, bf16, bf16, 8)
PASSES(64, 64, 1, bf16, bf16, 6)
