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

inline void all_lanes(unsigned int mask, const char* what) {
    if (mask != FULL_MASK) fail("%s by the lanes %08x of a warp; it takes all 32", what, mask);
}

struct Rows {
    const unsigned char* row;
    unsigned int result[4];
    bool transposed;
};

inline void load_rows(void* const* operands, unsigned int mask) {
    all_lanes(mask, "ldmatrix");
    for (int i = 0; i < 32; i++) {
        const unsigned char* row = static_cast<Rows*>(operands[i])->row;
        if (!is_shared(row, 16)) fail("ldmatrix of lane %d from %p, which is not in shared memory", i, row);
        if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix of lane %d from %p, not 16-byte aligned", i, row);
    }
    for (int i = 0; i < 32; i++) {
        Rows& mine = *static_cast<Rows*>(operands[i]);
        for (int matrix = 0; matrix < 4; matrix++) {
            unsigned short pair[2];
            for (int half = 0; half < 2; half++) {
                int row = mine.transposed ? i % 4 * 2 + half : i / 4, column = mine.transposed ? i / 4 : i % 4 * 2 + half;
                const Rows& owner = *static_cast<Rows*>(operands[matrix * 8 + row]);
                std::memcpy(&pair[half], owner.row + 2 * column, 2);
            }
            mine.result[matrix] = static_cast<unsigned int>(pair[1]) << 16 | pair[0];
        }
    }
}

inline void load(unsigned int (&d)[4], const void* row, bool transposed, const char* file, int line) {
    Rows operands = {static_cast<const unsigned char*>(row), {}, transposed};
    wait_for_lanes(FULL_MASK, load_rows, &operands, file, line);
    for (int i = 0; i < 4; i++) d[i] = operands.result[i];
}

struct Fragments {
    float* d;
    const unsigned int *a, *b;
};

template <int K> inline void multiply(void* const* operands, const float (&a)[16][K], const float (&b)[K][8]) {
    float d[16][8];
    auto fragment = [&](int lane) { return static_cast<Fragments*>(operands[lane])->d; };
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = fragment(lane)[i];
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < K; k++)
            for (int column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) fragment(lane)[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

inline void multiply_bf16(void* const* operands, unsigned int mask) {
    all_lanes(mask, "mma");
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; lane++) {
        const Fragments& mine = *static_cast<Fragments*>(operands[lane]);
        for (int half = 0; half < 2; half++) {
            auto value = [half](unsigned int pair) { return __uint_as_float(half ? pair & 0xffff0000u : pair << 16); };
            int inner = lane % 4 * 2 + half;
            for (int i = 0; i < 4; i++) a[lane / 4 + i % 2 * 8][inner + i / 2 * 8] = value(mine.a[i]);
            for (int i = 0; i < 2; i++) b[inner + i * 8][lane / 4] = value(mine.b[i]);
        }
    }
    multiply<16>(operands, a, b);
}

inline void multiply_tf32(void* const* operands, unsigned int mask) {
    all_lanes(mask, "mma");
    float a[16][8], b[8][8];
    auto value = [](unsigned int bits) { return __uint_as_float(bits & 0xffffe000u); };  // the rest is not read
    for (int lane = 0; lane < 32; lane++) {
        const Fragments& mine = *static_cast<Fragments*>(operands[lane]);
        for (int i = 0; i < 4; i++) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = value(mine.a[i]);
        for (int i = 0; i < 2; i++) b[lane % 4 + i * 4][lane / 4] = value(mine.b[i]);
    }
    multiply<8>(operands, a, b);
}

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
