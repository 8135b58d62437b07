// The three passes of a convolution, one thread an output element: what the faster kernels are tested against.
// Factors are rounded to the element type of the images, sums are float32.
#include "common.cuh"

// The product's column of a group that a flat output element belongs to, and all that is left of its index.
struct Place {
    int column, across, down;
    int64 sample;
};

__device__ __forceinline__ Place place(int64 element, int columns, int width, int height) {
    Place at;
    at.column = static_cast<int>(element % columns);
    element /= columns;
    at.across = static_cast<int>(element % width);
    element /= width;
    at.down = static_cast<int>(element % height);
    at.sample = element / height;
    return at;
}

// Images (N, H, W, C) as if padded: the element's offset, or -1 in the padding.
__device__ __forceinline__ int64 pixel(const Conv2d& g, int64 sample, int p, int q, int r, int s) {
    int h = p * g.stride_h - g.pad_top + r * g.dilation_h;
    int w = q * g.stride_w - g.pad_left + s * g.dilation_w;
    bool inside = h >= 0 && h < g.h && w >= 0 && w < g.w;
    return inside ? ((sample * g.h + h) * g.w + w) * g.c : -1;
}

__device__ __forceinline__ int64 thread_index() { return static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; }

template <typename T> __device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

// y[n, p, q, k] = activation(bias[k] + sum over r, s, c of x[n, h, w, c] w[k, r, s, c]).
template <typename T>
__device__ __forceinline__ void forward(const T* x, const float* w, const float* bias, T* y, int activation,
                                        const Conv2d& g) {
    int64 element = thread_index();
    if (element >= static_cast<int64>(g.n) * g.p * g.q * g.k) return;
    Place at = place(element, g.k, g.q, g.p);
    int depth = g.c / g.groups, first = at.column / (g.k / g.groups) * depth;
    float sum = 0.0f;
    for (int r = 0; r < g.r; ++r) {
        for (int s = 0; s < g.s; ++s) {
            int64 from = pixel(g, at.sample, at.down, at.across, r, s);
            if (from < 0) continue;
            const T* image = x + from + first;
            const float* filter = w + ((static_cast<int64>(at.column) * g.r + r) * g.s + s) * depth;
            for (int c = 0; c < depth; ++c) sum += to_float(image[c]) * rounded<T>(filter[c]);
        }
    }
    if (bias) sum += bias[at.column];
    y[element] = from_float<T>(activate(sum, activation));
}

// dx[n, h, w, c] = activation(bias[c] + sum over k, and the (p, q, r, s) that read (h, w), of dy[n, p, q, k]
// w[k, r, s, c]).
template <typename T>
__device__ __forceinline__ void input(const T* grad_output, const float* w, const float* bias, T* grad_input,
                                      int activation, const Conv2d& g) {
    int64 element = thread_index();
    if (element >= static_cast<int64>(g.n) * g.h * g.w * g.c) return;
    Place at = place(element, g.c, g.w, g.h);
    int depth = g.c / g.groups, filters = g.k / g.groups;
    int first = at.column / depth * filters, channel = at.column % depth;
    int64 stride = static_cast<int64>(g.r) * g.s * depth;  // between filters
    float sum = 0.0f;
    for (int r = 0; r < g.r; ++r) {
        int down = at.down + g.pad_top - r * g.dilation_h;
        if (down < 0 || down % g.stride_h || down / g.stride_h >= g.p) continue;
        for (int s = 0; s < g.s; ++s) {
            int across = at.across + g.pad_left - s * g.dilation_w;
            if (across < 0 || across % g.stride_w || across / g.stride_w >= g.q) continue;
            int64 output = (at.sample * g.p + down / g.stride_h) * g.q + across / g.stride_w;
            const T* grad = grad_output + output * g.k + first;
            const float* filter = w + first * stride + (static_cast<int64>(r) * g.s + s) * depth + channel;
            for (int k = 0; k < filters; ++k) sum += to_float(grad[k]) * rounded<T>(filter[k * stride]);
        }
    }
    if (bias) sum += bias[at.column];
    grad_input[element] = from_float<T>(activate(sum, activation));
}

// dw[k, r, s, c] = sum over n, p, q of dy[n, p, q, k] x[n, h, w, c], rows of pixels first: long sums lose digits.
template <typename T>
__device__ __forceinline__ void weight(const T* x, const T* grad_output, float* grad_weight, const Conv2d& g) {
    int depth = g.c / g.groups;
    int64 element = thread_index();
    if (element >= static_cast<int64>(g.k) * g.r * g.s * depth) return;
    Place at = place(element, depth, g.s, g.r);  // its "sample" is the filter
    int channel = static_cast<int>(at.sample) / (g.k / g.groups) * depth + at.column;
    float sum = 0.0f;
    for (int n = 0; n < g.n; ++n) {
        float image = 0.0f;
        for (int p = 0; p < g.p; ++p) {
            float row = 0.0f;
            for (int q = 0; q < g.q; ++q) {
                int64 from = pixel(g, n, p, q, at.down, at.across);
                if (from < 0) continue;
                int64 grad = ((static_cast<int64>(n) * g.p + p) * g.q + q) * g.k + at.sample;
                row += to_float(grad_output[grad]) * to_float(x[from + channel]);
            }
            image += row;
        }
        sum += image;
    }
    grad_weight[element] = sum;
}

#define KERNELS(T, suffix)                                                                                          \
    extern "C" __global__ void conv2d_forward_naive_##suffix(const T* x, const float* w, const float* bias, T* y,   \
                                                             int activation, Conv2d g) {                            \
        forward<T>(x, w, bias, y, activation, g);                                                                   \
    }                                                                                                               \
    extern "C" __global__ void conv2d_input_naive_##suffix(const T* grad_output, const float* w, const float* bias, \
                                                           T* grad_input, int activation, Conv2d g) {               \
        input<T>(grad_output, w, bias, grad_input, activation, g);                                                  \
    }                                                                                                               \
    extern "C" __global__ void conv2d_weight_naive_##suffix(const T* x, const T* grad_output, float* grad_weight,   \
                                                            Conv2d g) {                                             \
        weight<T>(x, grad_output, grad_weight, g);                                                                  \
    }

KERNELS(float, f32)
KERNELS(bf16, bf16)
