// The CUDA language for a C++ compiler: qualifiers, vector types, bfloat16, and the functions of one thread.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#ifndef HPCNN_EMULATION_NAMES  // the preprocessor alone runs with it, to find the kernels of a file
#define __global__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#endif
#define __device__
#define __host__
#define __constant__
#define __restrict__ __restrict
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __grid_constant__
// All shared arrays of a library make up its thread-local segment, whose extent the loader knows.
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) unsigned char* const name = emulation::state.dynamic_shared

#define EMULATION_VECTOR(type, name, bytes1, bytes2, bytes4)                                                 \
    struct name##1 { type x; };                                                                              \
    struct alignas(bytes2) name##2 { type x, y; };                                                           \
    struct name##3 { type x, y, z; };                                                                        \
    struct alignas(bytes4) name##4 { type x, y, z, w; };                                                     \
    inline name##1 make_##name##1(type x) { return {x}; }                                                    \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                         \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                              \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATION_VECTOR(signed char, char, 1, 2, 4)
EMULATION_VECTOR(unsigned char, uchar, 1, 2, 4)
EMULATION_VECTOR(short, short, 2, 4, 8)
EMULATION_VECTOR(unsigned short, ushort, 2, 4, 8)
EMULATION_VECTOR(int, int, 4, 8, 16)
EMULATION_VECTOR(unsigned int, uint, 4, 8, 16)
EMULATION_VECTOR(long long, longlong, 8, 16, 16)
EMULATION_VECTOR(unsigned long long, ulonglong, 8, 16, 16)
EMULATION_VECTOR(float, float, 4, 8, 16)
EMULATION_VECTOR(double, double, 8, 16, 16)
#undef EMULATION_VECTOR

struct dim3 {
    unsigned int x, y, z;
    constexpr dim3(unsigned int x = 1, unsigned int y = 1, unsigned int z = 1) : x(x), y(y), z(z) {}
};

// The same bits as another type.
template <typename To, typename From> inline To emulation_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "types of different sizes");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}
inline unsigned int __float_as_uint(float x) { return emulation_bits<unsigned int>(x); }
inline int __float_as_int(float x) { return emulation_bits<int>(x); }
inline float __uint_as_float(unsigned int x) { return emulation_bits<float>(x); }
inline float __int_as_float(int x) { return emulation_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulation_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation_bits<double>(x); }

struct __nv_bfloat16 {
    unsigned short bits;
};
typedef __nv_bfloat16 bf16;
struct alignas(4) __nv_bfloat162 {
    bf16 x, y;
};
inline float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned int>(x.bits) << 16); }
inline bf16 to_bf16(float x) {  // to the nearest, ties to even
    unsigned int bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(bf16 x) { return to_float(x); }
inline bf16 __float2bfloat16(float x) { return to_bf16(x); }
inline bf16 __float2bfloat16_rn(float x) { return to_bf16(x); }
inline unsigned short __bfloat16_as_ushort(bf16 x) { return x.bits; }
inline bf16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {to_float(x.x), to_float(x.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {to_bf16(x), to_bf16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {to_bf16(x.x), to_bf16(x.y)}; }
inline __nv_bfloat162 __halves2bfloat162(bf16 x, bf16 y) { return {x, y}; }

#define EMULATION_MIN_MAX(type)                                  \
    inline type min(type a, type b) { return b < a ? b : a; }    \
    inline type max(type a, type b) { return a < b ? b : a; }
EMULATION_MIN_MAX(int)
EMULATION_MIN_MAX(unsigned int)
EMULATION_MIN_MAX(long)
EMULATION_MIN_MAX(unsigned long)
EMULATION_MIN_MAX(long long)
EMULATION_MIN_MAX(unsigned long long)
#undef EMULATION_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// The approximate functions are as good here as the others. Macros: the C library has some of the names already.
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
// One rounding each: an empty assembly line keeps the compiler from fusing them with a neighbour.
inline float __fmul_rn(float x, float y) { float z = x * y; asm("" : "+x"(z)); return z; }
inline double __dmul_rn(double x, double y) { double z = x * y; asm("" : "+x"(z)); return z; }
inline double __dadd_rn(double x, double y) { double z = x + y; asm("" : "+x"(z)); return z; }
inline float __fadd_rn(float x, float y) { float z = x + y; asm("" : "+x"(z)); return z; }
inline float __fsub_rn(float x, float y) { float z = x - y; asm("" : "+x"(z)); return z; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned int x) { return static_cast<float>(x); }

inline int __popc(unsigned int x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned int __umulhi(unsigned int a, unsigned int b) { return static_cast<uint64_t>(a) * b >> 32; }
inline int __mulhi(int a, int b) { return static_cast<int64_t>(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned __int128>(a) * b >> 64;
}
inline unsigned int __byte_perm(unsigned int x, unsigned int y, unsigned int selector) {
    uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned int result = 0;
    for (int i = 0; i < 4; i++) result |= static_cast<unsigned int>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

template <typename T> inline T __ldg(const T* p) { return *p; }
template <typename T> inline T __ldcs(const T* p) { return *p; }
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline void __stcs(T* p, T x) { *p = x; }
template <typename T> inline void __stcg(T* p, T x) { *p = x; }

inline void __threadfence() {}
inline void __threadfence_block() {}

// Atomic operations, on integers only: sums of floats in no fixed order are not wanted here. No fiber interrupts another.
template <typename T> inline T emulation_replace(T* p, T x) {
    static_assert(T(0.5f) == T(0), "atomic operations are for integers");
    T before = *p;
    *p = x;
    return before;
}
template <typename T> struct emulation_same { typedef T type; };
template <typename T> using emulation_same_t = typename emulation_same<T>::type;
template <typename T> inline T atomicAdd(T* p, emulation_same_t<T> x) { return emulation_replace(p, T(*p + x)); }
template <typename T> inline T atomicSub(T* p, emulation_same_t<T> x) { return emulation_replace(p, T(*p - x)); }
template <typename T> inline T atomicMin(T* p, emulation_same_t<T> x) { return emulation_replace(p, x < *p ? x : *p); }
template <typename T> inline T atomicMax(T* p, emulation_same_t<T> x) { return emulation_replace(p, *p < x ? x : *p); }
template <typename T> inline T atomicAnd(T* p, emulation_same_t<T> x) { return emulation_replace(p, T(*p & x)); }
template <typename T> inline T atomicOr(T* p, emulation_same_t<T> x) { return emulation_replace(p, T(*p | x)); }
template <typename T> inline T atomicExch(T* p, emulation_same_t<T> x) { return emulation_replace(p, x); }
template <typename T> inline T atomicCAS(T* p, emulation_same_t<T> compare, emulation_same_t<T> x) {
    return emulation_replace(p, *p == compare ? x : *p);
}
inline unsigned int atomicInc(unsigned int* p, unsigned int limit) {
    return emulation_replace(p, *p >= limit ? 0u : *p + 1);
}
