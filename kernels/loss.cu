// Softmax cross entropy: a block for each row of the logits, in float64 as the NumPy version has it.
#include "vector.cuh"

// The largest number of a block's threads; a power of two.
constexpr int most_threads = 256;

// The largest element so far and its class; a NaN is larger than any number, and of equals the first is.
struct Largest {
    double value;
    int at;
};

__device__ __forceinline__ bool precedes(const Largest& a, const Largest& b) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    if (a_nan != b_nan) return a_nan;
    if (a_nan || a.value == b.value) return a.at < b.at;
    return a.value > b.value;
}

// The largest of all threads, in every thread; threads without elements have `at` beyond the classes.
__device__ __forceinline__ Largest block_largest(Largest mine, int classes) {
    __shared__ double values[most_threads];
    __shared__ int places[most_threads];
    const int i = threadIdx.x;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        values[i] = mine.value;
        places[i] = mine.at;
        __syncthreads();
        if (i < half && places[i + half] < classes) {
            const Largest other = {values[i + half], places[i + half]};
            if (mine.at >= classes || precedes(other, mine)) mine = other;
        }
        __syncthreads();
    }
    if (i == 0) {
        values[0] = mine.value;
        places[0] = mine.at;
    }
    __syncthreads();
    return {values[0], places[0]};
}

// Sums of two numbers over all threads, in a fixed order, in every thread.
__device__ __forceinline__ void block_sum(double& first, double& second) {
    __shared__ double sums[2 * most_threads];
    const int i = threadIdx.x;
    __syncthreads();  // who called before has read
    sums[i] = first;
    sums[most_threads + i] = second;
    for (int half = blockDim.x / 2; half > 0; half /= 2) {
        __syncthreads();
        if (i < half) {
            sums[i] += sums[i + half];
            sums[most_threads + i] += sums[most_threads + i + half];
        }
    }
    __syncthreads();
    first = sums[0];
    second = sums[most_threads];
}

// rows: (2, samples), each row's loss before the division by the batch, and whether its largest logit is the label's.
template <typename T>
__device__ __forceinline__ void softmax_rows(const T* logits, const int* labels, T* grad_logits, double* rows,
                                             int samples, int classes, double smoothing, double batch) {
    for (int n = blockIdx.x; n < samples; n += gridDim.x) {
        const T* row = logits + int64(n) * classes;
        Largest largest = {0.0, classes};
        for (int k = threadIdx.x; k < classes; k += blockDim.x) {
            const Largest here = {double(to_float(row[k])), k};
            if (largest.at == classes || precedes(here, largest)) largest = here;
        }
        largest = block_largest(largest, classes);
        double powers = 0.0, shifted_sum = 0.0;
        for (int k = threadIdx.x; k < classes; k += blockDim.x) {
            const double shifted = double(to_float(row[k])) - largest.value;
            powers += exp(shifted);
            shifted_sum += shifted;
        }
        block_sum(powers, shifted_sum);
        const int label = labels[n];
        const double share = smoothing / classes;
        for (int k = threadIdx.x; k < classes; k += blockDim.x) {
            const double probability = exp(double(to_float(row[k])) - largest.value) / powers;
            const double target = share + (k == label ? 1.0 - smoothing : 0.0);
            grad_logits[int64(n) * classes + k] = from_float<T>(float((probability - target) / batch));
        }
        if (threadIdx.x == 0) {
            const double log_powers = log(powers), own = double(to_float(row[label])) - largest.value - log_powers;
            rows[n] = -((1.0 - smoothing) * own + share * (shifted_sum - classes * log_powers));
            rows[samples + n] = largest.at == label ? 1.0 : 0.0;
        }
    }
}

#define KERNELS(type, T)                                                                                        \
    extern "C" __global__ void softmax_rows_##type(const T* logits, const int* labels, T* grad_logits,          \
                                                   double* rows, int samples, int classes, double smoothing,    \
                                                   double batch) {                                              \
        softmax_rows<T>(logits, labels, grad_logits, rows, samples, classes, smoothing, batch);                 \
    }

KERNELS(f32, float)
KERNELS(bf16, bf16)

// The two sums over the rows, by one block.
extern "C" __global__ void softmax_sums(const double* rows, double* sums, int samples) {
    double loss = 0.0, hits = 0.0;
    for (int n = threadIdx.x; n < samples; n += blockDim.x) {
        loss += rows[n];
        hits += rows[samples + n];
    }
    block_sum(loss, hits);
    if (threadIdx.x == 0) {
        sums[0] = loss;
        sums[1] = hits;
    }
}
