// Shuffles and votes of a warp.
#pragma once
#include "fibers.h"

namespace emulation {

struct Shuffle {
    unsigned long long value;
    unsigned int source;  // lane to read
};

inline void shuffle(void* const* operands, unsigned int mask) {
    unsigned long long values[WARP];
    std::memset(values, 0xff, sizeof(values));  // lanes that do not take part have nothing to give
    for (unsigned int i = 0; i < WARP; i++)
        if (mask >> i & 1) values[i] = static_cast<Shuffle*>(operands[i])->value;
    for (unsigned int i = 0; i < WARP; i++)
        if (mask >> i & 1) {
            Shuffle& mine = *static_cast<Shuffle*>(operands[i]);
            mine.value = values[mine.source];
        }
}

template <typename T> T shuffle_from(unsigned int mask, T x, unsigned int source, const char* file, int line) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    Shuffle operands = {0, source};
    std::memcpy(&operands.value, &x, sizeof(x));
    wait_for_lanes(mask, shuffle, &operands, file, line);
    std::memcpy(&x, &operands.value, sizeof(x));
    return x;
}

inline void vote(void* const* operands, unsigned int mask) {
    unsigned int votes = 0;
    for (unsigned int i = 0; i < WARP; i++)
        if (mask >> i & 1 && *static_cast<unsigned int*>(operands[i])) votes |= 1u << i;
    for (unsigned int i = 0; i < WARP; i++)
        if (mask >> i & 1) *static_cast<unsigned int*>(operands[i]) = votes;
}

inline void nothing(void* const*, unsigned int) {}

}  // namespace emulation

inline void __syncwarp(unsigned int mask = emulation::FULL_MASK, EMULATION_PLACE) {
    emulation::wait_for_lanes(mask, emulation::nothing, nullptr, file, line);
}

// A lane outside its segment of `width` keeps its own value.
template <typename T>
inline T __shfl_sync(unsigned int mask, T x, int source, int width = 32, EMULATION_PLACE) {
    unsigned int lane = emulation::state.current->lane;
    return emulation::shuffle_from(mask, x, (lane & -width) | (source & (width - 1)), file, line);
}
template <typename T>
inline T __shfl_xor_sync(unsigned int mask, T x, int flip, int width = 32, EMULATION_PLACE) {
    unsigned int lane = emulation::state.current->lane, source = lane ^ flip;
    return emulation::shuffle_from(mask, x, source < (lane & -width) + width ? source : lane, file, line);
}
template <typename T>
inline T __shfl_down_sync(unsigned int mask, T x, unsigned int delta, int width = 32, EMULATION_PLACE) {
    unsigned int lane = emulation::state.current->lane, source = lane + delta;
    return emulation::shuffle_from(mask, x, source < (lane & -width) + width ? source : lane, file, line);
}
template <typename T>
inline T __shfl_up_sync(unsigned int mask, T x, unsigned int delta, int width = 32, EMULATION_PLACE) {
    unsigned int lane = emulation::state.current->lane;
    return emulation::shuffle_from(mask, x, (lane & (width - 1)) >= delta ? lane - delta : lane, file, line);
}

inline unsigned int __ballot_sync(unsigned int mask, int predicate, EMULATION_PLACE) {
    unsigned int votes = predicate != 0;
    emulation::wait_for_lanes(mask, emulation::vote, &votes, file, line);
    return votes;
}
inline int __any_sync(unsigned int mask, int predicate, EMULATION_PLACE) {
    return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned int mask, int predicate, EMULATION_PLACE) {
    return __ballot_sync(mask, !predicate, file, line) == 0;
}
