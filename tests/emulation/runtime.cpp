// The scheduler of fibers, and what ends a launch early. Linked into every library of kernels.
#include <link.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstddef>
#include <cstdlib>
#include <numeric>

#include "checks.h"
#include "entry.h"
#include "switch.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulation {

State state;

namespace {

// Tops of stacks are set off against each other: at one offset they would all share one set of the caches.
constexpr size_t OFFSETS = 16 << 10, OFFSET = 704, STACK_BYTES = (64 << 10) + OFFSETS, PAGE = 4096, GUARD = 1 << 20;
constexpr size_t SHARED_PITCH = (256 << 10) + GUARD;  // from one block of a cluster to the next
constexpr unsigned int ASCENDING = 0, DESCENDING = 1;  // orders; any other number is the seed of a random one

Fiber fibers[MAX_THREADS];
Warp warps[MAX_THREADS / WARP];
unsigned int warp_order[MAX_THREADS / WARP], lane_order[WARP];
unsigned int num_threads, num_warps, live;
unsigned long long conditions_met;  // by fibers that had to wait

unsigned char *stacks, *shared_region;
Copy* copy_lists;
unsigned char* free_stacks[MAX_THREADS];
unsigned int num_free_stacks, num_used_stacks;

const Kernel* running;
void* const* kernel_arguments;
void* scheduler_stack_pointer;
bool failed;
char* message;
size_t message_bytes;

}  // namespace

namespace {

// Give up the processor; returns when the scheduler picks this fiber again.
void park(Wait wait, const char* file, int line) {
    Fiber& fiber = *state.current;
    fiber.wait = wait;
    fiber.file = file;
    fiber.line = line;
    emulation_switch(&fiber.stack_pointer, scheduler_stack_pointer);
}

[[noreturn]] void abandon() {
    failed = true;
    void* unused;
    emulation_switch(&unused, scheduler_stack_pointer);
    abort();
}

// Let the lanes of `mask` go if all that still live have arrived.
bool meet(Warp& warp, unsigned int mask) {
    unsigned int lanes = mask & warp.live;
    if ((warp.waiting & lanes) != lanes) return false;
    Fiber* first = &fibers[(&warp - warps) * WARP];
    unsigned int leader = __builtin_ctz(lanes);
    for (unsigned int lane = 0; lane < WARP; lane++) {
        if (!(lanes >> lane & 1)) continue;
        if (warp.mask[lane] != mask)
            fail("lane %u waits for lanes %08x at %s:%d, lane %u for %08x at %s:%d", leader, warp.mask[leader],
                 first[leader].file, first[leader].line, lane, warp.mask[lane], first[lane].file, first[lane].line);
        if (warp.function[lane] != warp.function[leader])
            fail("lanes of a warp do different things: lane %u at %s:%d, lane %u at %s:%d", leader, first[leader].file,
                 first[leader].line, lane, first[lane].file, first[lane].line);
    }
    warp.function[leader](warp.operands, lanes);
    warp.waiting &= ~lanes;
    for (unsigned int lane = 0; lane < WARP; lane++)
        if (lanes >> lane & 1) first[lane].wait = Wait::NOTHING;
    return true;
}

void end_fiber() {
    Fiber& fiber = *state.current;
    Warp& warp = warps[fiber.warp];
    warp.live &= ~(1u << fiber.lane);
    fiber.wait = Wait::ENDED;
    live--;
    for (unsigned int lane = 0; lane < WARP && warp.waiting; lane++)  // those that waited for this one too
        if (warp.waiting >> lane & 1 && warp.mask[lane] >> fiber.lane & 1) meet(warp, warp.mask[lane]);
    free_stacks[num_free_stacks++] = fiber.stack;
    void* unused;
    emulation_switch(&unused, scheduler_stack_pointer);
}

void fiber_main() {
    running->call(kernel_arguments);
    end_fiber();
}

void prepare(Fiber& fiber) {
    if (num_free_stacks)
        fiber.stack = free_stacks[--num_free_stacks];
    else {
        fiber.stack = stacks + STACK_BYTES * num_used_stacks++;
        mprotect(fiber.stack, PAGE, PROT_NONE);  // a stack that grows too large faults here
    }
    // As if emulation_switch had been called from the first instruction of fiber_main: six registers and an address.
    size_t offset = (fiber.stack - stacks) / STACK_BYTES * OFFSET % OFFSETS;
    void** top = reinterpret_cast<void**>(fiber.stack + STACK_BYTES - offset) - 8;
    top[6] = reinterpret_cast<void*>(fiber_main);
    fiber.stack_pointer = top;
}

void resume(Fiber& fiber) {
    if (!fiber.stack_pointer) prepare(fiber);
    fiber.wait = Wait::NOTHING;
    state.current = &fiber;
    state.dynamic_shared = state.blocks[fiber.rank].dynamic_shared;
    blockIdx = state.blocks[fiber.rank].index;
    threadIdx = fiber.index;
    emulation_switch(&scheduler_stack_pointer, fiber.stack_pointer);
    state.current = nullptr;
}

// Run a warp until all of its fibers wait for others; return whether any moved.
bool run_warp(unsigned int warp) {
    unsigned int first = warp * WARP, count = num_threads - first < WARP ? num_threads - first : WARP;
    for (bool moved_before = false;; moved_before = true) {
        bool moved = false;
        for (unsigned int i = 0; i < WARP && !failed; i++) {
            if (lane_order[i] >= count) continue;
            Fiber& fiber = fibers[first + lane_order[i]];
            if (fiber.wait != Wait::NOTHING && fiber.wait != Wait::CONDITION) continue;
            unsigned long long before = conditions_met;
            bool ready = fiber.wait == Wait::NOTHING;
            resume(fiber);
            moved |= ready || conditions_met != before;
        }
        if (!moved || failed) return moved_before;
    }
}

void report_deadlock() {
    const char* names[] = {"is ready", "waits for the block", "waits for other lanes", "waits for a condition"};
    size_t used = snprintf(message, message_bytes, "threads wait for ever:");
    bool seen[5] = {};
    for (unsigned int i = 0; i < num_threads; i++) {
        const Fiber& fiber = fibers[i];
        if (fiber.wait == Wait::ENDED || seen[static_cast<int>(fiber.wait)] || used >= message_bytes) continue;
        seen[static_cast<int>(fiber.wait)] = true;
        used += snprintf(message + used, message_bytes - used, " thread (%u, %u, %u) %s at %s:%d;", fiber.index.x,
                         fiber.index.y, fiber.index.z, names[static_cast<int>(fiber.wait)], fiber.file, fiber.line);
    }
    failed = true;
}

// Whether all live fibers of a block wait for it; they may go then, if they are at one place.
bool release_block(unsigned int rank) {
    const Fiber* first = nullptr;
    Fiber* const block = fibers + rank * state.block_threads;
    for (unsigned int i = 0; i < state.block_threads; i++) {
        Fiber& fiber = block[i];
        if (fiber.wait == Wait::ENDED) continue;
        if (fiber.wait != Wait::BLOCK) return false;
        if (!first) first = &fiber;
        if (fiber.line != first->line || (fiber.file != first->file && strcmp(fiber.file, first->file))) {
            snprintf(message, message_bytes,
                     "divergent barrier: thread (%u, %u, %u) waits for the block at %s:%d, thread (%u, %u, %u) at %s:%d",
                     first->index.x, first->index.y, first->index.z, first->file, first->line, fiber.index.x,
                     fiber.index.y, fiber.index.z, fiber.file, fiber.line);
            failed = true;
            return false;
        }
    }
    for (unsigned int i = 0; i < state.block_threads; i++)
        if (block[i].wait == Wait::BLOCK) block[i].wait = Wait::NOTHING;
    state.blocks[rank].votes_before = state.blocks[rank].votes;
    state.blocks[rank].votes = 0;
    return first != nullptr;
}

// What lies behind the shared memory that was asked for, up to the page that faults.
size_t slack() { return -state.dynamic_bytes % 1024; }

// Run the blocks of a cluster, mostly one, together.
void run_cluster() {
    memset(state.static_shared, 0xff, state.static_shared_end - state.static_shared);
    for (unsigned int rank = 0; rank < state.cluster; rank++) {
        memset(state.blocks[rank].dynamic_shared, 0xff, state.dynamic_bytes + slack());
        state.blocks[rank].votes = 0;
    }
    state.turn++;
    live = num_threads;
    for (unsigned int i = 0; i < num_threads; i++) {
        Fiber& fiber = fibers[i];
        fiber.stack_pointer = nullptr;
        fiber.wait = Wait::NOTHING;
        fiber.num_copies = fiber.group = 0;
    }
    for (unsigned int i = 0; i < num_warps; i++) {
        unsigned int count = num_threads - i * WARP;
        warps[i].live = count < WARP ? (1u << count) - 1 : FULL_MASK;
        warps[i].waiting = 0;
    }
    while (live && !failed) {
        bool moved = false;
        for (unsigned int i = 0; i < num_warps && !failed; i++) moved |= run_warp(warp_order[i]);
        for (unsigned int rank = 0; rank < state.cluster && !failed; rank++) moved |= release_block(rank);
        if (live && !moved && !failed) report_deadlock();
    }
    for (size_t i = 0; i < slack() * state.cluster && !failed; i++)
        if (state.blocks[i / slack()].dynamic_shared[state.dynamic_bytes + i % slack()] != 0xff) {
            snprintf(message, message_bytes, "wrote behind dynamic shared memory, at byte %zu of %u",
                     state.dynamic_bytes + i % slack(), state.dynamic_bytes);
            failed = true;
        }
}

unsigned int random_number(uint64_t& seed) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return seed >> 33;
}

void arrange(unsigned int* order, unsigned int count, unsigned int kind, uint64_t& seed) {
    for (unsigned int i = 0; i < count; i++) order[i] = kind == DESCENDING ? count - 1 - i : i;
    if (kind > DESCENDING)
        for (unsigned int i = count; i > 1; i--) std::swap(order[i - 1], order[random_number(seed) % i]);
}

void run_grid(unsigned int order) {
    const unsigned int across = gridDim.x / state.cluster;
    uint64_t seed = order, count = static_cast<uint64_t>(across) * gridDim.y * gridDim.z, step = 1, next = 0;
    arrange(warp_order, num_warps, order, seed);
    arrange(lane_order, WARP, order, seed);
    if (order == DESCENDING) next = count - 1, step = count - 1;
    if (order > DESCENDING) {
        next = random_number(seed) % count;
        do step = 1 + random_number(seed) % count;
        while (std::gcd(step, count) != 1);
    }
    for (uint64_t i = 0; i < count && !failed; i++, next = (next + step) % count) {
        for (unsigned int rank = 0; rank < state.cluster; rank++)
            state.blocks[rank].index = {static_cast<unsigned int>(next % across) * state.cluster + rank,
                                        static_cast<unsigned int>(next / across % gridDim.y),
                                        static_cast<unsigned int>(next / across / gridDim.y)};
        run_cluster();
    }
}

// Where the thread-local segment of this library is, in this thread of the host.
thread_local char segment_anchor;
int find_segment(dl_phdr_info* info, size_t, void*) {
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const auto& header = info->dlpi_phdr[i];
        unsigned char* data = static_cast<unsigned char*>(info->dlpi_tls_data);
        unsigned char* anchor = reinterpret_cast<unsigned char*>(&segment_anchor);
        if (header.p_type != PT_TLS || !data || anchor < data || anchor >= data + header.p_memsz) continue;
        state.static_shared = data;
        state.static_shared_end = data + header.p_memsz;
        return 1;
    }
    return 0;
}

void* reserve(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    return memory;
}

void open_runtime(unsigned int shared_bytes) {
    if (!stacks) {
        stacks = static_cast<unsigned char*>(reserve(STACK_BYTES * MAX_THREADS));
        copy_lists = static_cast<Copy*>(reserve(sizeof(Copy) * MAX_COPIES * MAX_THREADS));
        shared_region = static_cast<unsigned char*>(reserve(SHARED_PITCH * MAX_CLUSTER + GUARD));
        for (unsigned int rank = 0; rank <= MAX_CLUSTER; rank++) mprotect(shared_region + SHARED_PITCH * rank, GUARD, PROT_NONE);
    }
    num_free_stacks = 0;
    for (unsigned int i = 0; i < num_used_stacks; i++) free_stacks[num_free_stacks++] = stacks + STACK_BYTES * i;
    state.dynamic_bytes = shared_bytes;
    for (unsigned int rank = 0; rank < MAX_CLUSTER; rank++)  // each ends where the next guard begins
        state.blocks[rank].dynamic_shared = shared_region + SHARED_PITCH * (rank + 1) - shared_bytes - slack();
    static unsigned char* known = nullptr;
    segment_anchor = 0;
    if (known != reinterpret_cast<unsigned char*>(&segment_anchor)) dl_iterate_phdr(find_segment, nullptr);
    known = reinterpret_cast<unsigned char*>(&segment_anchor);
}

const int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};

void on_signal(int number, siginfo_t* info, void*) {
    if (!state.current) signal(number, SIG_DFL), raise(number);  // not a kernel's fault
    unsigned char* at = static_cast<unsigned char*>(info->si_addr);
    const char* what = number == SIGFPE ? "division by zero" : number == SIGILL ? "illegal instruction" : nullptr;
    if (what) fail("%s", what);
    if (at >= stacks && at < stacks + STACK_BYTES * MAX_THREADS)
        fail("more than %zu bytes of local memory", STACK_BYTES - OFFSETS - PAGE);
    if (at >= shared_region && at < shared_region + SHARED_PITCH * MAX_CLUSTER + GUARD)
        fail("access to byte %td of %u bytes of dynamic shared memory", at - state.dynamic_shared, state.dynamic_bytes);
    fail("illegal address %p", info->si_addr);
}

}  // namespace

void fail(const char* format, ...) {
    const uint3 &b = blockIdx, &t = threadIdx;
    size_t used = snprintf(message, message_bytes, "block (%u, %u, %u), thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + used, message_bytes - used, format, arguments);
    va_end(arguments);
    abandon();
}

Copy* copies(const Fiber& fiber) { return copy_lists + (&fiber - fibers) * MAX_COPIES; }

int wait_for_block(int vote, const char* file, int line) {
    Block& block = state.blocks[state.current->rank];
    block.votes += vote;
    park(Wait::BLOCK, file, line);
    return block.votes_before;
}

void wait_for_lanes(unsigned int mask, Collective function, void* operands, const char* file, int line) {
    Fiber& fiber = *state.current;
    Warp& warp = warps[fiber.warp];
    if (!(mask >> fiber.lane & 1)) fail("lane %u is not one of %08x at %s:%d", fiber.lane, mask, file, line);
    warp.mask[fiber.lane] = mask;
    warp.function[fiber.lane] = function;
    warp.operands[fiber.lane] = operands;
    warp.waiting |= 1u << fiber.lane;
    fiber.file = file;
    fiber.line = line;
    if (!meet(warp, mask)) park(Wait::LANES, file, line);
}

void wait_until(bool (*condition)(void*), void* argument, const char* file, int line) {
    if (condition(argument)) return;
    do park(Wait::CONDITION, file, line);
    while (!condition(argument));
    conditions_met++;
}

}  // namespace emulation

using namespace emulation;

// Run a kernel; returns 0, or 1 with a message.
extern "C" __attribute__((visibility("default"))) int emulation_launch(
    unsigned int kernel, const unsigned int* grid, const unsigned int* block, unsigned int shared_bytes,
    unsigned int order, void* const* arguments, char* text, size_t text_bytes) {
    running = &kernels[kernel];
    kernel_arguments = arguments;
    message = text;
    message_bytes = text_bytes;
    failed = false;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    state.cluster = running->cluster;
    state.block_threads = block[0] * block[1] * block[2];
    num_threads = state.block_threads * state.cluster;
    if (grid[0] % state.cluster || (state.cluster > 1 && state.block_threads % WARP) || num_threads > MAX_THREADS) {
        snprintf(text, text_bytes, "clusters of %u blocks of %u threads do not fit a grid of %u", state.cluster,
                 state.block_threads, grid[0]);
        return 1;
    }
    num_warps = (num_threads + WARP - 1) / WARP;
    for (unsigned int i = 0; i < num_threads; i++) {
        unsigned int thread = i % state.block_threads;
        fibers[i].index = {thread % block[0], thread / block[0] % block[1], thread / block[0] / block[1]};
        fibers[i].rank = i / state.block_threads;
        fibers[i].lane = i % WARP;
        fibers[i].warp = i / WARP;
    }
    open_runtime(shared_bytes);

    static char signal_stack[64 << 10];
    stack_t ours = {signal_stack, 0, sizeof(signal_stack)}, theirs;
    sigaltstack(&ours, &theirs);
    struct sigaction action = {}, before[4];
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &action, &before[i]);
    run_grid(order);
    for (int i = 0; i < 4; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    sigaltstack(&theirs, nullptr);
    return failed;
}

// All kernels, one a line: name, largest block, parameters.
extern "C" __attribute__((visibility("default"))) const char* emulation_describe() {
    static std::string text;
    text.clear();
    for (unsigned int i = 0; i < num_kernels; i++)
        text += std::string(kernels[i].name) + " " + std::to_string(kernels[i].max_threads) + kernels[i].parameters() + "\n";
    return text.c_str();
}
