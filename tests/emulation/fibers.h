// Threads of a block as fibers: who runs, who waits for what.
#pragma once
#include "language.h"

namespace emulation {

constexpr unsigned int MAX_THREADS = 2048, WARP = 32, FULL_MASK = 0xffffffffu;  // threads of a cluster
constexpr unsigned int MAX_CLUSTER = 8;

enum class Wait { NOTHING, BLOCK, LANES, CONDITION, ENDED };

// A copy to shared memory that has not arrived yet.
struct Copy {
    void* shared;
    const void* global;  // null for zeros
    unsigned int bytes, group;
};

struct Fiber {
    void* stack_pointer;  // null before the first run
    unsigned char* stack;
    uint3 index;
    unsigned int lane, warp, rank;  // of its block in the cluster
    Wait wait;
    const char* file;  // where it waits
    int line;
    unsigned int num_copies, group;  // of its list of copies
};

// What 32 lanes do together: the last one to arrive computes for all, on operands that stay on the others' stacks.
typedef void (*Collective)(void* const* operands, unsigned int mask);

struct Warp {
    unsigned int live, waiting;
    unsigned int mask[WARP];
    Collective function[WARP];
    void* operands[WARP];
};

// A block of the cluster that runs.
struct Block {
    unsigned char* dynamic_shared;
    uint3 index;
    int votes, votes_before;  // of the threads that wait at a barrier; the sum of those that waited last
};

struct State {
    unsigned char* dynamic_shared;  // of the current fiber's block
    unsigned int dynamic_bytes;
    unsigned char *static_shared, *static_shared_end;
    Fiber* current;
    Block blocks[MAX_CLUSTER];
    unsigned int cluster, block_threads;  // blocks of a cluster, threads of a block
    unsigned long long turn;              // counts the clusters that have run
};
extern State state;

// End the launch with a message; the thread and the kernel are added to it.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Wait for all threads of the block that have not ended, at one place; return the sum of their votes.
int wait_for_block(int vote, const char* file, int line);

// Wait for the lanes of `mask`, all of which name the same function; it has run when this returns.
void wait_for_lanes(unsigned int mask, Collective function, void* operands, const char* file, int line);

// Wait until condition(argument) is true, which another thread brings about. It is asked again and again, by this thread.
void wait_until(bool (*condition)(void*), void* argument, const char* file, int line);

// The copies of a fiber that have not arrived.
Copy* copies(const Fiber& fiber);
constexpr unsigned int MAX_COPIES = 512;

inline bool is_shared(const void* p, size_t bytes) {
    const unsigned char* first = static_cast<const unsigned char*>(p);
    return (first >= state.dynamic_shared && first + bytes <= state.dynamic_shared + state.dynamic_bytes) ||
           (first >= state.static_shared && first + bytes <= state.static_shared_end);
}

}  // namespace emulation

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// The place of the caller, as the last arguments of a function.
#define EMULATION_PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(EMULATION_PLACE) { emulation::wait_for_block(0, file, line); }
inline int __syncthreads_count(int predicate, EMULATION_PLACE) {
    return emulation::wait_for_block(predicate != 0, file, line);
}
inline int __syncthreads_or(int predicate, EMULATION_PLACE) {
    return emulation::wait_for_block(predicate != 0, file, line) != 0;
}
inline int __syncthreads_and(int predicate, EMULATION_PLACE) {
    return emulation::wait_for_block(predicate == 0, file, line) == 0;
}
