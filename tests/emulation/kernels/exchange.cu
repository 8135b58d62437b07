// What threads of a block and lanes of a warp tell each other.
#include "common.cuh"

// y[i] = sum over a block of x, through shared memory.
extern "C" __global__ void __launch_bounds__(256) block_sum_f32(const float* __restrict__ x, float* __restrict__ y, int n) {
    __shared__ float sums[256];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    sums[threadIdx.x] = i < n ? x[i] : 0.0f;
    __syncthreads();
    for (int step = blockDim.x / 2; step > 0; step /= 2) {
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
        __syncthreads();
    }
    y[i] = sums[0];
}

// The same without barriers.
extern "C" __global__ void racing_sum_f32(const float* x, float* y) {
    __shared__ float sums[256];
    sums[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = sums[threadIdx.x ^ 255];
}

// Shuffles of the lane's number into rows of 32: from a lane, xor, down, up, and up in segments of 8; then votes.
extern "C" __global__ void shuffles(int* y, unsigned int* votes) {
    int lane = threadIdx.x;
    y[lane] = __shfl_sync(0xffffffff, lane, lane * 5 % 32);
    y[32 + lane] = __shfl_xor_sync(0xffffffff, lane, 3);
    y[64 + lane] = __shfl_down_sync(0xffffffff, lane, 4);
    y[96 + lane] = __shfl_up_sync(0xffffffff, lane, 4);
    y[128 + lane] = __shfl_up_sync(0xffffffff, lane, 3, 8);
    double wide = __shfl_xor_sync(0xffffffff, 0.5 * lane, 16);
    y[160 + lane] = static_cast<int>(2.0 * wide);
    // The halves of a warp apart, one more often than the other.
    int value = lane;
    if (lane < 16)
        value = __shfl_xor_sync(0x0000ffff, value, 1);
    else
        for (int i = 0; i < 3; i++) value = __shfl_xor_sync(0xffff0000, value, 1 << i);
    y[192 + lane] = value;
    votes[lane] = __ballot_sync(0xffffffff, lane % 3 == 0);
    votes[32 + lane] = __any_sync(0xffffffff, lane == 7) + 2 * __any_sync(0xffffffff, lane == 32);
    votes[64 + lane] = __all_sync(0xffffffff, lane < 32) + 2 * __all_sync(0xffffffff, lane < 31);
}

// Threads beyond `n` leave; the others meet without them.
extern "C" __global__ void early_exit(int* y, int n) {
    __shared__ int last;
    if (threadIdx.x >= n) return;
    if (threadIdx.x == n - 1) last = n;
    __syncthreads();
    y[threadIdx.x] = last + __shfl_xor_sync(0xffffffff, static_cast<int>(threadIdx.x), 1);
}

extern "C" __global__ void votes_of_block(int* y, int limit) {
    int i = threadIdx.x;
    y[i] = __syncthreads_count(i < limit);
    y[i] += 1000 * __syncthreads_or(i == 5) + 10000 * __syncthreads_and(i < limit);
}

// The last block to come adds up what the others left.
extern "C" __global__ void last_block(const float* x, float* partial, unsigned int* arrived, float* y) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = x[blockIdx.x];
        __threadfence();
        last = atomicAdd(arrived, 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x) return;
    float sum = 0.0f;
    for (int i = 0; i < gridDim.x; i++) sum += partial[i];
    *y = sum;
}

// Where every thread is: block and thread, with all six numbers.
extern "C" __global__ void places(int* y) {
    int64 block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int64 thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    y[block * blockDim.x * blockDim.y * blockDim.z + thread] =
        100000 * blockIdx.z + 10000 * blockIdx.y + 1000 * blockIdx.x + 100 * threadIdx.z + 10 * threadIdx.y + threadIdx.x;
}

// One parameter of each kind.
extern "C" __global__ void parameters(Conv2d conv, float a, int b, int64 c, uint8 d, unsigned int e, double* y) {
    y[0] = conv.n + 100.0 * conv.groups;
    y[1] = a;
    y[2] = b;
    y[3] = static_cast<double>(c);
    y[4] = d;
    y[5] = e;
}

extern "C" __global__ void round_bf16(const float* x, bf16* y, float* back, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    y[i] = to_bf16(x[i]);
    back[i] = to_float(y[i]);
}

#ifdef HPCNN_EMULATION
// Warps take turns in descending order; `turns` below the number of warps leaves some of them waiting for ever.
extern "C" __global__ void turns(int* y, int turns) {
    __shared__ volatile int turn;
    if (threadIdx.x == 0) turn = turns - 1;
    __syncthreads();
    int warp = threadIdx.x / 32;
    auto mine = [](void* warp) { return turn == *static_cast<int*>(warp); };
    emulation::wait_until(mine, &warp, __FILE__, __LINE__);
    y[threadIdx.x] = turns - turn;
    __syncwarp();
    if (threadIdx.x % 32 == 0) turn = turn - 1;
}
#endif
