// Element types under the names that mpitrain gives them, and the arithmetic of the kernels.
//
// Nothing is included, not even cuda_fp16.h: NVRTC then needs no CUDA toolkit beside it. An element is widened to
// the type it is computed in, its Wide, and narrowed again, to nearest even, when it is stored.

#ifndef MPITRAIN_ELEMENTS
#define MPITRAIN_ELEMENTS

typedef signed char int8;
typedef short int16;
typedef int int32;
typedef long long int64;
typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef float float32;
typedef double float64;

struct boolean {
    uint8 byte;
};

struct float16 {
    uint16 bits;
};

// The upper half of a float32.
struct bfloat16 {
    uint16 bits;
};

template <class Real>
struct Complex {
    Real real, imaginary;
};
typedef Complex<float32> complex64;
typedef Complex<float64> complex128;

// Small integers are computed in 32 bits, 16-bit floats in float32.
template <class Element>
struct WideOf {
    typedef Element type;
};
template <>
struct WideOf<int8> {
    typedef int32 type;
};
template <>
struct WideOf<int16> {
    typedef int32 type;
};
template <>
struct WideOf<uint8> {
    typedef uint32 type;
};
template <>
struct WideOf<uint16> {
    typedef uint32 type;
};
template <>
struct WideOf<float16> {
    typedef float32 type;
};
template <>
struct WideOf<bfloat16> {
    typedef float32 type;
};

// What two elements of different types are computed in: float64 if one of them is.
template <class First, class Second>
struct CommonOf {
    typedef float32 type;
};
template <class Second>
struct CommonOf<float64, Second> {
    typedef float64 type;
};
template <class First>
struct CommonOf<First, float64> {
    typedef float64 type;
};
template <>
struct CommonOf<float64, float64> {
    typedef float64 type;
};

template <class Element>
__device__ inline typename WideOf<Element>::type widen(Element element) {
    return element;
}

__device__ inline float32 widen(bfloat16 element) { return __uint_as_float(static_cast<uint32>(element.bits) << 16); }

__device__ inline float32 widen(float16 element) {
#ifdef __CUDACC__
    // What __half2float is made of.
    float32 wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(element.bits));
    return wide;
#else
    return float_of_half(element.bits);
#endif
}

// Narrowing is chosen by the type that is wanted, which an argument without a value names.
template <class Element>
struct As {};

template <class Element, class Wide>
__device__ inline Element narrow(Wide wide, As<Element>) {
    return static_cast<Element>(wide);
}

__device__ inline boolean narrow(boolean wide, As<boolean>) { return wide; }

template <class Real>
__device__ inline Complex<Real> narrow(Complex<Real> wide, As<Complex<Real> >) {
    return wide;
}

__device__ inline float16 narrow(float32 wide, As<float16>) {
    float16 element;
#ifdef __CUDACC__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(element.bits) : "f"(wide));
#else
    element.bits = half_of_float(wide);
#endif
    return element;
}

__device__ inline bfloat16 narrow(float32 wide, As<bfloat16>) {
    uint32 bits = __float_as_uint(wide);
    if (wide != wide) {
        // A NaN whose payload is in the lower half only must not become an infinity.
        bits |= 0x400000u;
    } else {
        // Half a unit, less one bit if the upper half is even, carries exactly when the value rounds up.
        bits += 0x7FFFu + ((bits >> 16) & 1u);
    }
    bfloat16 element;
    element.bits = static_cast<uint16>(bits >> 16);
    return element;
}

// By way of float32, as torch does it.
__device__ inline float16 narrow(float64 wide, As<float16> as) { return narrow(static_cast<float32>(wide), as); }
__device__ inline bfloat16 narrow(float64 wide, As<bfloat16> as) { return narrow(static_cast<float32>(wide), as); }

// A number for which this is false is infinite or NaN.
template <class Real>
__device__ inline bool is_finite(Real value) {
    return value - value == 0;
}

template <class Real>
__device__ inline Real magnitude(Real value) {
    return value < 0 ? -value : value;
}

#endif
