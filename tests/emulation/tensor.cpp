// What the lanes of a warp compute together. Compiled without checks of indices, and for speed: kernels that multiply
// matrices spend most of their time here.
#include "tensor.h"

namespace emulation {

namespace {

inline void all_lanes(unsigned int mask, const char* what) {
    if (mask != FULL_MASK) fail("%s by the lanes %08x of a warp; it takes all 32", what, mask);
}

}  // namespace

void load_rows(void* const* operands, unsigned int mask) {
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

typedef float Row __attribute__((vector_size(32)));

template <int K> void multiply(void* const* operands, const float (&a)[16][K], const Row (&b)[K]) {
    Row d[16];
    auto fragment = [&](int lane) { return static_cast<Fragments*>(operands[lane])->d; };
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = fragment(lane)[i];
    for (int row = 0; row < 16; row++)
        for (int k = 0; k < K; k++) d[row] += a[row][k] * b[k];
    for (int lane = 0; lane < 32; lane++)
        for (int i = 0; i < 4; i++) fragment(lane)[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void multiply_bf16(void* const* operands, unsigned int mask) {
    all_lanes(mask, "mma");
    float a[16][16];
    Row b[16];
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

void multiply_tf32(void* const* operands, unsigned int mask) {
    all_lanes(mask, "mma");
    float a[16][8];
    Row b[8];
    auto value = [](unsigned int bits) { return __uint_as_float(bits & 0xffffe000u); };  // the rest is not read
    for (int lane = 0; lane < 32; lane++) {
        const Fragments& mine = *static_cast<Fragments*>(operands[lane]);
        for (int i = 0; i < 4; i++) a[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = value(mine.a[i]);
        for (int i = 0; i < 2; i++) b[lane % 4 + i * 4][lane / 4] = value(mine.b[i]);
    }
    multiply<8>(operands, a, b);
}

}  // namespace emulation
