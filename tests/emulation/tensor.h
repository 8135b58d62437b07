// The functions of kernels/tensor_core.cuh: asynchronous copies, and matrices in fragments of 32 lanes.
#pragma once
#include "fibers.h"

namespace emulation {

// Data arrive as late as they may: at the wait for their group. Until then the place holds NaNs.
inline void copy_async(void* shared, const void* global, unsigned int bytes, bool valid) {
    Fiber& fiber = *state.current;
    if (!is_shared(shared, bytes)) fail("asynchronous copy to %p, which is not in shared memory", shared);
    if (reinterpret_cast<uintptr_t>(shared) % bytes) fail("asynchronous copy to %p, not %u-byte aligned", shared, bytes);
    if (reinterpret_cast<uintptr_t>(global) % bytes)
        fail("asynchronous copy from %p, not %u-byte aligned", global, bytes);
    if (fiber.num_copies == MAX_COPIES) fail("more than %u asynchronous copies at once", MAX_COPIES);
    std::memset(shared, 0xff, bytes);
    copies(fiber)[fiber.num_copies++] = {shared, valid ? global : nullptr, bytes, fiber.group};
}

inline void copy_arrive(unsigned int newest) {
    Fiber& fiber = *state.current;
    Copy* pending = copies(fiber);
    unsigned int kept = 0;
    for (unsigned int i = 0; i < fiber.num_copies; i++) {
        const Copy copy = pending[i];
        if (copy.group + newest >= fiber.group)  // also those of no group yet
            pending[kept++] = copy;
        else if (copy.global)
            std::memcpy(copy.shared, copy.global, copy.bytes);
        else
            std::memset(copy.shared, 0, copy.bytes);
    }
    fiber.num_copies = kept;
}

struct Rows {
    const unsigned char* row;
    unsigned int result[4];
    bool transposed;
};

// Collective functions.
void load_rows(void* const* operands, unsigned int mask);
void multiply_bf16(void* const* operands, unsigned int mask);
void multiply_tf32(void* const* operands, unsigned int mask);

inline void load(unsigned int (&d)[4], const void* row, bool transposed, const char* file, int line) {
    Rows operands = {static_cast<const unsigned char*>(row), {}, transposed};
    wait_for_lanes(FULL_MASK, load_rows, &operands, file, line);
    for (int i = 0; i < 4; i++) d[i] = operands.result[i];
}

struct Fragments {
    float* d;
    const unsigned int *a, *b;
};

}  // namespace emulation

inline void copy_async_16(void* shared, const void* global, bool valid) {
    emulation::copy_async(shared, global, 16, valid);
}
inline void copy_async_4(void* shared, const void* global, bool valid) {
    emulation::copy_async(shared, global, 4, valid);
}
inline void copy_commit() { emulation::state.current->group++; }
template <int newest> inline void copy_wait() { emulation::copy_arrive(newest); }

inline void load_matrices(unsigned int (&d)[4], const void* row, EMULATION_PLACE) {
    emulation::load(d, row, false, file, line);
}
inline void load_matrices_transposed(unsigned int (&d)[4], const void* row, EMULATION_PLACE) {
    emulation::load(d, row, true, file, line);
}

inline void mma_bf16(float (&d)[4], const unsigned int (&a)[4], const unsigned int (&b)[2], EMULATION_PLACE) {
    emulation::Fragments operands = {d, a, b};
    emulation::wait_for_lanes(emulation::FULL_MASK, emulation::multiply_bf16, &operands, file, line);
}
inline void mma_tf32(float (&d)[4], const unsigned int (&a)[4], const unsigned int (&b)[2], EMULATION_PLACE) {
    emulation::Fragments operands = {d, a, b};
    emulation::wait_for_lanes(emulation::FULL_MASK, emulation::multiply_tf32, &operands, file, line);
}

// To the nearest, ties away from zero.
inline unsigned int to_tf32(float x) {
    return x != x ? 0x7fffffffu : (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
}
