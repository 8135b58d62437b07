// How Python finds and starts the kernels of a library; the file that emulator.py writes for each library includes it.
#pragma once
#include <string>
#include <type_traits>
#include <utility>

#include "fibers.h"

namespace emulation {

struct Kernel {
    const char* name;
    unsigned int max_threads;  // of __launch_bounds__, or 1024
    void (*call)(void* const* arguments);
    std::string (*parameters)();
    unsigned int cluster;  // blocks, of __cluster_dims__, or 1
};

// One word for each parameter: kind (f float, b bfloat16, i signed, u unsigned, s structure) and bytes, for instance
// "i4"; with a leading p, what a pointer points to; "pv0" is a pointer to void.
template <typename T> std::string describe() {
    if constexpr (std::is_pointer_v<T>)
        return "p" + describe<std::remove_cv_t<std::remove_pointer_t<T>>>();
    else if constexpr (std::is_void_v<T>)
        return "v0";
    else {
        const char* kind = std::is_same_v<T, bf16> ? "b" : std::is_floating_point_v<T> ? "f" : "s";
        if (std::is_enum_v<T> || std::is_integral_v<T>) kind = std::is_unsigned_v<T> ? "u" : "i";
        return kind + std::to_string(sizeof(T));
    }
}

template <auto F> struct Launch;
template <typename... P, void (*F)(P...)> struct Launch<F> {
    template <size_t... I> static void unpack([[maybe_unused]] void* const* arguments, std::index_sequence<I...>) {
        F(*static_cast<std::remove_cv_t<P>*>(arguments[I])...);
    }
    static void call(void* const* arguments) { unpack(arguments, std::index_sequence_for<P...>()); }
    static std::string parameters() { return (std::string() + ... + (" " + describe<std::remove_cv_t<P>>())); }
};

template <auto F, unsigned int x = 1, unsigned int y = 1, unsigned int z = 1>
constexpr Kernel kernel(const char* name, unsigned int max_threads, unsigned int = 0, unsigned int = 0) {
    static_assert(y == 1 && z == 1, "clusters go along x");
    return {name, max_threads, Launch<F>::call, Launch<F>::parameters, x};
}

extern const Kernel kernels[];
extern const unsigned int num_kernels;

}  // namespace emulation
