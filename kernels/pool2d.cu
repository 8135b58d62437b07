// Pooling over (N, H, W, C). A thread has V neighbouring channels of one column, and rows a grid apart.
#include "vector.cuh"

// Images (n, h, w, c), outputs (n, p, q, c), windows (r, s); hpcnn.ops.cuda.pool2d.POOL2D is the same in NumPy.
struct Pool2d {
    int n, h, w, c, p, q, r, s, stride_h, stride_w, pad_top, pad_left;
};

// Where, along one axis, a window has pixels or a pixel has windows.
struct Range {
    int first, stop;
};

// Places of the window of output `p` that are pixels of an image of `extent`.
__device__ __forceinline__ Range places_of_pixels(int p, int extent, int window, int stride, int before) {
    const int origin = p * stride - before;
    return {max(0, -origin), min(window, extent - origin)};
}

// Call body(sample, row, column, first channel) for this thread's part of images of (samples, rows, columns, channels).
// 32-bit divisions: whoever launches sees to it that samples * rows and columns * channels fit.
template <int V, typename Body>
__device__ __forceinline__ void for_pixels(int samples, int rows, int columns, int channels, Body body) {
    const int vectors = channels / V, across = columns * vectors, lines = samples * rows;
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < across; i += int64(gridDim.x) * blockDim.x) {
        const int column = int(i) / vectors, channel = (int(i) - column * vectors) * V;
        for (int64 line = int64(blockIdx.y) * blockDim.y + threadIdx.y; line < lines;
             line += int64(gridDim.y) * blockDim.y) {
            const int sample = int(line) / rows;
            body(sample, int(line) - sample * rows, column, channel);
        }
    }
}

__device__ __forceinline__ int64 offset(int sample, int row, int column, int channel, int rows, int columns,
                                        int channels) {
    return ((int64(sample) * rows + row) * columns + column) * channels + channel;
}

// As the NumPy version has it: the first of equals wins, and a NaN goes through without winning.
template <typename T, typename Place, int V>
__device__ __forceinline__ void maxpool2d_forward(const T* x, T* y, Place* argmax, const Pool2d& d) {
    for_pixels<V>(d.n, d.p, d.q, d.c, [&](int n, int p, int q, int c) {
        const Range rows = places_of_pixels(p, d.h, d.r, d.stride_h, d.pad_top);
        const Range columns = places_of_pixels(q, d.w, d.s, d.stride_w, d.pad_left);
        float best[V];
        int where[V];
        const int top = p * d.stride_h - d.pad_top, left = q * d.stride_w - d.pad_left;
        load(best, x + offset(n, top + rows.first, left + columns.first, c, d.h, d.w, d.c));
#pragma unroll
        for (int v = 0; v < V; ++v) where[v] = rows.first * d.s + columns.first;
        for (int r = rows.first; r < rows.stop; ++r) {
            const T* line = x + offset(n, top + r, left, c, d.h, d.w, d.c);
            for (int s = columns.first; s < columns.stop; ++s) {
                float pixel[V];
                load(pixel, line + int64(s) * d.c);
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    if (pixel[v] > best[v]) where[v] = r * d.s + s;
                    if (pixel[v] > best[v] || pixel[v] != pixel[v]) best[v] = pixel[v];
                }
            }
        }
        const int64 target = offset(n, p, q, c, d.p, d.q, d.c);
        store(y + target, best);
        Vector<Place, V> places;
#pragma unroll
        for (int v = 0; v < V; ++v) places.at[v] = Place(where[v]);
        *reinterpret_cast<Vector<Place, V>*>(argmax + target) = places;
    });
}

// Outputs whose window has a pixel in it, along one axis.
__device__ __forceinline__ Range outputs_of_pixel(int pixel, int outputs, int window, int stride, int before) {
    const int last = pixel + before, first = last - window + 1;
    return {first <= 0 ? 0 : (first + stride - 1) / stride, min(outputs, last / stride + 1)};
}

// Call term(offset, place) for each output whose window has pixel (h, w), by growing place of the pixel in the window.
template <typename Term>
__device__ __forceinline__ void for_outputs(int n, int h, int w, int c, const Pool2d& d, Term term) {
    const Range rows = outputs_of_pixel(h, d.p, d.r, d.stride_h, d.pad_top);
    const Range columns = outputs_of_pixel(w, d.q, d.s, d.stride_w, d.pad_left);
    for (int p = rows.stop - 1; p >= rows.first; --p) {
        for (int q = columns.stop - 1; q >= columns.first; --q) {
            const int place = (h + d.pad_top - p * d.stride_h) * d.s + w + d.pad_left - q * d.stride_w;
            term(offset(n, p, q, c, d.p, d.q, d.c), place);
        }
    }
}

template <typename T, typename Place, int V>
__device__ __forceinline__ void maxpool2d_backward(const T* grad_output, const Place* argmax, T* grad_input,
                                                   const Pool2d& d) {
    for_pixels<V>(d.n, d.h, d.w, d.c, [&](int n, int h, int w, int c) {
        float sum[V] = {};
        for_outputs(n, h, w, c, d, [&](int64 source, int place) {
            float grad[V];
            load(grad, grad_output + source);
            const Vector<Place, V> places = *reinterpret_cast<const Vector<Place, V>*>(argmax + source);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += places.at[v] == place ? grad[v] : 0.0f;
        });
        store(grad_input + offset(n, h, w, c, d.h, d.w, d.c), sum);
    });
}

template <typename T, int V>
__device__ __forceinline__ void avgpool2d_forward(const T* x, T* y, const Pool2d& d, float share) {
    for_pixels<V>(d.n, d.p, d.q, d.c, [&](int n, int p, int q, int c) {
        const Range rows = places_of_pixels(p, d.h, d.r, d.stride_h, d.pad_top);
        const Range columns = places_of_pixels(q, d.w, d.s, d.stride_w, d.pad_left);
        const int top = p * d.stride_h - d.pad_top, left = q * d.stride_w - d.pad_left;
        float sum[V] = {};
        for (int r = rows.first; r < rows.stop; ++r) {
            const T* line = x + offset(n, top + r, left, c, d.h, d.w, d.c);
            for (int s = columns.first; s < columns.stop; ++s) {
                float pixel[V];
                load(pixel, line + int64(s) * d.c);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] += pixel[v];
            }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] *= share;
        store(y + offset(n, p, q, c, d.p, d.q, d.c), sum);
    });
}

template <typename T, int V>
__device__ __forceinline__ void avgpool2d_backward(const T* grad_output, T* grad_input, const Pool2d& d, float share) {
    for_pixels<V>(d.n, d.h, d.w, d.c, [&](int n, int h, int w, int c) {
        float sum[V] = {};
        for_outputs(n, h, w, c, d, [&](int64 source, int) {
            float grad[V];
            load(grad, grad_output + source);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += grad[v] * share;
        });
        store(grad_input + offset(n, h, w, c, d.h, d.w, d.c), sum);
    });
}

// Mean over the `pixels` of each sample, in float64. Blocks: (channels / V, several pixels).
template <typename T, int V>
__device__ __forceinline__ void global_avgpool_forward(const T* x, T* y, int samples, int64 pixels, int channels) {
    __shared__ double shared[256 * V];
    const int64 channel = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    for (int n = blockIdx.y; n < samples; n += gridDim.y) {
        double sum[V] = {};
        for (int64 pixel = threadIdx.y; pixel < pixels && channel < channels; pixel += blockDim.y) {
            float values[V];
            load(values, x + (n * pixels + pixel) * channels + channel);
#pragma unroll
            for (int v = 0; v < V; ++v) sum[v] += values[v];
        }
        sum_rows(sum, shared);
        if (threadIdx.y == 0 && channel < channels) {
            float mean[V];
#pragma unroll
            for (int v = 0; v < V; ++v) mean[v] = float(sum[v] / double(pixels));
            store(y + int64(n) * channels + channel, mean);
        }
    }
}

// Every pixel gets its sample's gradient times `share`.
template <typename T, int V>
__device__ __forceinline__ void global_avgpool_backward(const T* grad_output, T* grad_input, int samples, int rows,
                                                        int columns, int channels, float share) {
    for_pixels<V>(samples, rows, columns, channels, [&](int n, int h, int w, int c) {
        float grad[V];
        load(grad, grad_output + int64(n) * channels + c);
#pragma unroll
        for (int v = 0; v < V; ++v) grad[v] *= share;
        store(grad_input + offset(n, h, w, c, rows, columns, channels), grad);
    });
}

#define MAXIMUM(variant, type, T, Place, V)                                                                        \
    extern "C" __global__ void maxpool2d_forward_##variant##_##type(const T* x, T* y, Place* argmax, Pool2d d) {   \
        maxpool2d_forward<T, Place, V>(x, y, argmax, d);                                                           \
    }                                                                                                              \
    extern "C" __global__ void maxpool2d_backward_##variant##_##type(const T* grad_output, const Place* argmax,    \
                                                                     T* grad_input, Pool2d d) {                    \
        maxpool2d_backward<T, Place, V>(grad_output, argmax, grad_input, d);                                       \
    }

#define AVERAGE(variant, type, T, V)                                                                               \
    extern "C" __global__ void avgpool2d_forward_##variant##_##type(const T* x, T* y, Pool2d d, float share) {     \
        avgpool2d_forward<T, V>(x, y, d, share);                                                                   \
    }                                                                                                              \
    extern "C" __global__ void avgpool2d_backward_##variant##_##type(const T* grad_output, T* grad_input,          \
                                                                     Pool2d d, float share) {                      \
        avgpool2d_backward<T, V>(grad_output, grad_input, d, share);                                               \
    }                                                                                                              \
    extern "C" __global__ void global_avgpool_forward_##variant##_##type(const T* x, T* y, int samples,            \
                                                                         int64 pixels, int channels) {             \
        global_avgpool_forward<T, V>(x, y, samples, pixels, channels);                                             \
    }                                                                                                              \
    extern "C" __global__ void global_avgpool_backward_##variant##_##type(                                         \
        const T* grad_output, T* grad_input, int samples, int rows, int columns, int channels, float share) {      \
        global_avgpool_backward<T, V>(grad_output, grad_input, samples, rows, columns, channels, share);           \
    }

MAXIMUM(vector, f32, float, uint8, 4)
MAXIMUM(scalar, f32, float, uint8, 1)
MAXIMUM(wide, f32, float, int, 1)  // windows of more places than a byte can count
MAXIMUM(vector, bf16, bf16, uint8, 8)
MAXIMUM(scalar, bf16, bf16, uint8, 1)
MAXIMUM(wide, bf16, bf16, int, 1)
AVERAGE(vector, f32, float, 4)
AVERAGE(scalar, f32, float, 1)
AVERAGE(vector, bf16, bf16, 8)
AVERAGE(scalar, bf16, bf16, 1)
