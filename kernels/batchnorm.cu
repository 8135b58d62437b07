// Batch normalisation of (M positions, C channels). Sums are float64 in a fixed order: each thread adds up positions a
// grid apart, blocks add up their threads, and a last small kernel adds up the blocks.
//
// No mask is stored for a fused activation: backward computes the sign anew from the coefficients of the forward pass,
// with the same operations and so the same bits.
#include "vector.cuh"

// Rows of the coefficients, each (C): y = (x - CENTRE) * SCALE + SHIFT; the gradient is
// GRAD_SCALE * error + (x - CENTRE) * GRAD_SLOPE + GRAD_SHIFT.
enum Forward { CENTRE = 0, SCALE = 1, SHIFT = 2 };
enum Backward { GRAD_CENTRE = 0, GRAD_SCALE = 1, GRAD_SLOPE = 2, GRAD_SHIFT = 3 };

__device__ __forceinline__ float normalised(float x, float centre, float scale, float shift) {
    return fmaf(x - centre, scale, shift);
}

// Write this thread's sums, added up over its block, to row blockIdx.y of (blocks, channels).
template <int V>
__device__ __forceinline__ void write_partial(double (&sum)[V], double* partial, int64 channel, int channels,
                                              double* shared) {
    sum_rows(sum, shared);
    if (threadIdx.y != 0 || channel >= channels) return;
#pragma unroll
    for (int v = 0; v < V; ++v) partial[int64(blockIdx.y) * channels + channel + v] = sum[v];
}

// partial: (2, blocks, channels), sums of x - x[0] and of its square; the shift keeps digits where the mean is large.
template <typename T, int V>
__device__ __forceinline__ void sum_powers(const T* x, double* partial, int64 positions, int channels) {
    __shared__ double shared[256 * V];
    const int64 channel = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    double first[V] = {}, second[V] = {};
    if (channel < channels) {
        float origin[V];
        load(origin, x + channel);
#pragma unroll 4
        for (int64 m = int64(blockIdx.y) * blockDim.y + threadIdx.y; m < positions;
             m += int64(gridDim.y) * blockDim.y) {
            float values[V];
            load(values, x + m * channels + channel);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const double distance = double(values[v]) - double(origin[v]);
                first[v] += distance;
                second[v] += distance * distance;
            }
        }
    }
    write_partial(first, partial, channel, channels, shared);
    write_partial(second, partial + int64(gridDim.y) * channels, channel, channels, shared);
}

// Add up (2, blocks, channels) over the blocks: for channel blockIdx.x * blockDim.x + threadIdx.x, in threadIdx.y == 0.
__device__ __forceinline__ void add_partials(double (&sums)[2], const double* partial, int blocks, int channels) {
    __shared__ double shared[2 * 256];
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    sums[0] = sums[1] = 0.0;
    for (int block = threadIdx.y; block < blocks && channel < channels; block += blockDim.y) {
        sums[0] += partial[int64(block) * channels + channel];
        sums[1] += partial[int64(blocks + block) * channels + channel];
    }
    sum_rows(sums, shared);
}

__device__ __forceinline__ void write_forward(float* coefficients, int channel, int channels, double mean, double var,
                                              const float* gamma, const float* beta, double epsilon) {
    const float centre = float(mean);
    const double scale = gamma[channel] / sqrt(var + epsilon);
    coefficients[CENTRE * channels + channel] = centre;
    coefficients[SCALE * channels + channel] = float(scale);
    // Makes up for the rounding of the mean.
    coefficients[SHIFT * channels + channel] = float(beta[channel] + (double(centre) - mean) * scale);
}

// sums: of the error, and of the error times the normalised input, over the `count` positions of the whole batch.
__device__ __forceinline__ void write_backward(float* coefficients, int channel, int channels, double mean, double var,
                                               const float* gamma, double epsilon, double sum, double product,
                                               double count) {
    const float centre = float(mean);
    const double deviation = sqrt(var + epsilon), scale = gamma[channel] / deviation;
    const double slope = -scale / deviation * product / count;
    coefficients[GRAD_CENTRE * channels + channel] = centre;
    coefficients[GRAD_SCALE * channels + channel] = float(scale);
    coefficients[GRAD_SLOPE * channels + channel] = float(slope);
    coefficients[GRAD_SHIFT * channels + channel] = float((double(centre) - mean) * slope - scale * sum / count);
}

// Mean and biased variance from what sum_powers left, and the coefficients of the forward pass where asked for.
template <typename T>
__device__ __forceinline__ void finish_statistics(const double* partial, const T* x, double* mean, double* var,
                                                  int blocks, int channels, int64 positions, float* coefficients,
                                                  const float* gamma, const float* beta, double epsilon) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    double sums[2];
    add_partials(sums, partial, blocks, channels);
    if (threadIdx.y != 0 || channel >= channels) return;
    const double distance = sums[0] / double(positions);
    const double variance = sums[1] / double(positions) - distance * distance;
    const double average = double(to_float(x[channel])) + distance;
    mean[channel] = average;
    var[channel] = variance < 0.0 ? 0.0 : variance;
    if (coefficients) write_forward(coefficients, channel, channels, average, var[channel], gamma, beta, epsilon);
}

template <typename T, int V>
__device__ __forceinline__ void apply_forward(const T* x, T* y, const float* coefficients, int64 positions,
                                              int channels, int activation) {
    const int64 channel = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (channel >= channels) return;
    float centre[V], scale[V], shift[V];
    load_coefficients(centre, coefficients + CENTRE * channels + channel);
    load_coefficients(scale, coefficients + SCALE * channels + channel);
    load_coefficients(shift, coefficients + SHIFT * channels + channel);
#pragma unroll 2
    for (int64 m = int64(blockIdx.y) * blockDim.y + threadIdx.y; m < positions; m += int64(gridDim.y) * blockDim.y) {
        float values[V];
        load(values, x + m * channels + channel);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            values[v] = activate(normalised(values[v], centre[v], scale[v], shift[v]), activation);
        }
        store(y + m * channels + channel, values);
    }
}

// The coefficients of V channels with which backward undoes the activation; unused without one.
template <int V> struct Gate {
    float centre[V], scale[V], shift[V];
    int activation;

    __device__ __forceinline__ Gate(const float* forward, int64 channel, int channels, int kind) : activation(kind) {
        if (kind == IDENTITY) return;
        load_coefficients(centre, forward + CENTRE * channels + channel);
        load_coefficients(scale, forward + SCALE * channels + channel);
        load_coefficients(shift, forward + SHIFT * channels + channel);
    }

    __device__ __forceinline__ float error(float grad, float x, int v) const {
        return activation == IDENTITY ? grad : grad * slope(normalised(x, centre[v], scale[v], shift[v]), activation);
    }
};

// partial: (2, blocks, channels), sums of the error and of the error times x; products are exact in float64.
template <typename T, int V>
__device__ __forceinline__ void sum_errors(const T* grad_output, const T* x, const float* forward, double* partial,
                                           int64 positions, int channels, int activation) {
    __shared__ double shared[256 * V];
    const int64 channel = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    double sum[V] = {}, product[V] = {};
    if (channel < channels) {
        const Gate<V> gate(forward, channel, channels, activation);
#pragma unroll 2
        for (int64 m = int64(blockIdx.y) * blockDim.y + threadIdx.y; m < positions;
             m += int64(gridDim.y) * blockDim.y) {
            float grad[V], values[V];
            load(grad, grad_output + m * channels + channel);
            load(values, x + m * channels + channel);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const double error = gate.error(grad[v], values[v], v);
                sum[v] += error;
                product[v] += error * values[v];
            }
        }
    }
    write_partial(sum, partial, channel, channels, shared);
    write_partial(product, partial + int64(gridDim.y) * channels, channel, channels, shared);
}

// sums (2, channels), where asked for, and the parameters' gradients from what sum_errors left, and the coefficients where asked for.
template <typename S>
__device__ __forceinline__ void finish_sums(const double* partial, const S* mean, const S* var, double* sums,
                                            float* grad_gamma, float* grad_beta, int blocks, int channels,
                                            float* coefficients, const float* gamma, double epsilon, double count) {
    const int channel = blockIdx.x * blockDim.x + threadIdx.x;
    double both[2];
    add_partials(both, partial, blocks, channels);
    if (threadIdx.y != 0 || channel >= channels) return;
    const double product = (both[1] - double(mean[channel]) * both[0]) / sqrt(double(var[channel]) + epsilon);
    if (sums) {
        sums[channel] = both[0];
        sums[channels + channel] = product;
    }
    grad_beta[channel] = float(both[0]);
    grad_gamma[channel] = float(product);
    if (coefficients) {
        write_backward(coefficients, channel, channels, mean[channel], var[channel], gamma, epsilon, both[0], product,
                       count);
    }
}

template <typename T, int V>
__device__ __forceinline__ void apply_backward(const T* grad_output, const T* x, T* grad_input, const float* forward,
                                               const float* coefficients, int64 positions, int channels,
                                               int activation) {
    const int64 channel = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * V;
    if (channel >= channels) return;
    const Gate<V> gate(forward, channel, channels, activation);
    float centre[V], scale[V], slopes[V], shift[V];
    load_coefficients(centre, coefficients + GRAD_CENTRE * channels + channel);
    load_coefficients(scale, coefficients + GRAD_SCALE * channels + channel);
    load_coefficients(slopes, coefficients + GRAD_SLOPE * channels + channel);
    load_coefficients(shift, coefficients + GRAD_SHIFT * channels + channel);
#pragma unroll 2
    for (int64 m = int64(blockIdx.y) * blockDim.y + threadIdx.y; m < positions; m += int64(gridDim.y) * blockDim.y) {
        float grad[V], values[V];
        load(grad, grad_output + m * channels + channel);
        load(values, x + m * channels + channel);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const float error = gate.error(grad[v], values[v], v);
            grad[v] = fmaf(error, scale[v], fmaf(values[v] - centre[v], slopes[v], shift[v]));
        }
        store(grad_input + m * channels + channel, grad);
    }
}

// The running value moves by `momentum` towards that of the batch; rounded step by step, as NumPy rounds it.
__device__ __forceinline__ void track(float* running, double batch, double momentum) {
    *running = float(__dadd_rn(*running, __dmul_rn(momentum, __dadd_rn(batch, -double(*running)))));
}

#define PASSES(variant, type, T, V)                                                                                   \
    extern "C" __global__ void __launch_bounds__(256) batchnorm_powers_##variant##_##type(                            \
        const T* x, double* partial, int64 positions, int channels) {                                                 \
        sum_powers<T, V>(x, partial, positions, channels);                                                            \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) batchnorm_forward_##variant##_##type(                           \
        const T* x, T* y, const float* coefficients, int64 positions, int channels, int activation) {                 \
        apply_forward<T, V>(x, y, coefficients, positions, channels, activation);                                     \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) batchnorm_errors_##variant##_##type(                            \
        const T* grad_output, const T* x, const float* forward, double* partial, int64 positions, int channels,       \
        int activation) {                                                                                             \
        sum_errors<T, V>(grad_output, x, forward, partial, positions, channels, activation);                          \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256) batchnorm_backward_##variant##_##type(                          \
        const T* grad_output, const T* x, T* grad_input, const float* forward, const float* coefficients,             \
        int64 positions, int channels, int activation) {                                                              \
        apply_backward<T, V>(grad_output, x, grad_input, forward, coefficients, positions, channels, activation);     \
    }

#define STATISTICS(type, T)                                                                                           \
    extern "C" __global__ void batchnorm_statistics_##type(                                                           \
        const double* partial, const T* x, double* mean, double* var, int blocks, int channels, int64 positions,      \
        float* coefficients, const float* gamma, const float* beta, double epsilon) {                                 \
        finish_statistics(partial, x, mean, var, blocks, channels, positions, coefficients, gamma, beta, epsilon);    \
    }

// One thread a channel; S is the type of the statistics.
#define CHANNELS(type, S)                                                                                             \
    extern "C" __global__ void batchnorm_forward_coefficients_##type(const S* mean, const S* var, const float* gamma, \
                                                                     const float* beta, float* coefficients,          \
                                                                     int channels, double epsilon) {                  \
        const int c = blockIdx.x * blockDim.x + threadIdx.x;                                                          \
        if (c < channels) write_forward(coefficients, c, channels, mean[c], var[c], gamma, beta, epsilon);            \
    }                                                                                                                 \
    extern "C" __global__ void batchnorm_track_##type(const S* mean, const S* var, float* running_mean,               \
                                                      float* running_var, int channels, double momentum,              \
                                                      double unbiased) {                                              \
        const int c = blockIdx.x * blockDim.x + threadIdx.x;                                                          \
        if (c >= channels) return;                                                                                    \
        track(running_mean + c, mean[c], momentum);                                                                   \
        track(running_var + c, __dmul_rn(var[c], unbiased), momentum);                                                \
    }                                                                                                                 \
    extern "C" __global__ void batchnorm_sums_##type(                                                                 \
        const double* partial, const S* mean, const S* var, double* sums, float* grad_gamma, float* grad_beta,        \
        int blocks, int channels, float* coefficients, const float* gamma, double epsilon, double count) {            \
        finish_sums(partial, mean, var, sums, grad_gamma, grad_beta, blocks, channels, coefficients, gamma, epsilon,  \
                    count);                                                                                           \
    }                                                                                                                 \
    extern "C" __global__ void batchnorm_backward_coefficients_##type(                                                \
        const double* sums, const S* mean, const S* var, const float* gamma, float* coefficients, int channels,       \
        double epsilon, double count) {                                                                               \
        const int c = blockIdx.x * blockDim.x + threadIdx.x;                                                          \
        if (c < channels) {                                                                                           \
            write_backward(coefficients, c, channels, mean[c], var[c], gamma, epsilon, sums[c], sums[channels + c],   \
                           count);                                                                                    \
        }                                                                                                             \
    }

PASSES(vector, f32, float, 4)
PASSES(scalar, f32, float, 1)
PASSES(vector, bf16, bf16, 8)
PASSES(scalar, bf16, bf16, 1)
STATISTICS(f32, float)
STATISTICS(bf16, bf16)
CHANNELS(f32, float)
CHANNELS(f64, double)
