// What -fsanitize=bounds,alignment,integer-divide-by-zero calls; the structures are the compiler's.
#pragma once
#include <cstddef>

#include "fibers.h"

namespace emulation {

struct Place {
    const char* file;
    unsigned int line, column;
};

}  // namespace emulation

#define EMULATION_HANDLER extern "C" __attribute__((noreturn)) void
EMULATION_HANDLER __ubsan_handle_out_of_bounds_abort(const emulation::Place* place, uintptr_t index) {
    emulation::fail("index %td outside its array at %s:%u", static_cast<ptrdiff_t>(index), place->file, place->line);
}
EMULATION_HANDLER __ubsan_handle_type_mismatch_v1_abort(const emulation::Place* place, uintptr_t address) {
    emulation::fail("misaligned address 0x%zx at %s:%u", static_cast<size_t>(address), place->file, place->line);
}
EMULATION_HANDLER __ubsan_handle_divrem_overflow_abort(const emulation::Place* place, uintptr_t, uintptr_t) {
    emulation::fail("division by zero at %s:%u", place->file, place->line);
}
