// What a reduction does with two numbers, and with the sum at the end; as mpitrain.memory.reduction on the host.

#ifndef MPITRAIN_REDUCTIONS
#define MPITRAIN_REDUCTIONS

// Integers wrap, which only unsigned arithmetic defines.
template <class Wide>
__device__ inline Wide add(Wide left, Wide right) {
    return left + right;
}
__device__ inline int32 add(int32 left, int32 right) {
    return static_cast<int32>(static_cast<uint32>(left) + static_cast<uint32>(right));
}
__device__ inline int64 add(int64 left, int64 right) {
    return static_cast<int64>(static_cast<uint64>(left) + static_cast<uint64>(right));
}
__device__ inline boolean add(boolean left, boolean right) {
    boolean either;
    either.byte = left.byte || right.byte;
    return either;
}
template <class Real>
__device__ inline Complex<Real> add(Complex<Real> left, Complex<Real> right) {
    Complex<Real> sum = {left.real + right.real, left.imaginary + right.imaginary};
    return sum;
}

template <class Wide>
__device__ inline Wide multiply(Wide left, Wide right) {
    return left * right;
}
__device__ inline int32 multiply(int32 left, int32 right) {
    return static_cast<int32>(static_cast<uint32>(left) * static_cast<uint32>(right));
}
__device__ inline int64 multiply(int64 left, int64 right) {
    return static_cast<int64>(static_cast<uint64>(left) * static_cast<uint64>(right));
}
__device__ inline boolean multiply(boolean left, boolean right) {
    boolean both;
    both.byte = left.byte && right.byte;
    return both;
}
template <class Real>
__device__ inline Complex<Real> multiply(Complex<Real> left, Complex<Real> right) {
    Complex<Real> product = {left.real * right.real - left.imaginary * right.imaginary,
                             left.real * right.imaginary + left.imaginary * right.real};
    return product;
}

__device__ inline bool is_negative(float32 value) { return __float_as_uint(value) >> 31; }
__device__ inline bool is_negative(float64 value) { return __double_as_longlong(value) < 0; }

// NaN if one is NaN, and -0 is less than +0, so that the order of the peers does not matter.
template <class Real>
__device__ inline Real smaller_real(Real left, Real right) {
    if (left != left || right != right) return left + right;
    if (left == right) return is_negative(left) ? left : right;
    return left < right ? left : right;
}
template <class Real>
__device__ inline Real larger_real(Real left, Real right) {
    if (left != left || right != right) return left + right;
    if (left == right) return is_negative(left) ? right : left;
    return left < right ? right : left;
}

template <class Wide>
__device__ inline Wide smaller(Wide left, Wide right) {
    return right < left ? right : left;
}
__device__ inline float32 smaller(float32 left, float32 right) { return smaller_real(left, right); }
__device__ inline float64 smaller(float64 left, float64 right) { return smaller_real(left, right); }
__device__ inline boolean smaller(boolean left, boolean right) { return multiply(left, right); }

template <class Wide>
__device__ inline Wide larger(Wide left, Wide right) {
    return left < right ? right : left;
}
__device__ inline float32 larger(float32 left, float32 right) { return larger_real(left, right); }
__device__ inline float64 larger(float64 left, float64 right) { return larger_real(left, right); }
__device__ inline boolean larger(boolean left, boolean right) { return add(left, right); }

// Floats are divided before they are narrowed; integers after they have wrapped, and truncated toward zero.
template <class Element>
__device__ inline Element narrow_quotient(typename WideOf<Element>::type wide, int64 divisor, As<Element> as) {
    const Element element = narrow(wide, as);
    return divisor == 1 ? element : static_cast<Element>(static_cast<int64>(element) / divisor);
}
__device__ inline uint64 narrow_quotient(uint64 wide, int64 divisor, As<uint64>) {
    return divisor == 1 ? wide : wide / static_cast<uint64>(divisor);
}
__device__ inline float16 narrow_quotient(float32 wide, int64 divisor, As<float16> as) {
    return narrow(divisor == 1 ? wide : wide / static_cast<float32>(divisor), as);
}
__device__ inline bfloat16 narrow_quotient(float32 wide, int64 divisor, As<bfloat16> as) {
    return narrow(divisor == 1 ? wide : wide / static_cast<float32>(divisor), as);
}
__device__ inline float32 narrow_quotient(float32 wide, int64 divisor, As<float32>) {
    return divisor == 1 ? wide : wide / static_cast<float32>(divisor);
}
__device__ inline float64 narrow_quotient(float64 wide, int64 divisor, As<float64>) {
    return divisor == 1 ? wide : wide / static_cast<float64>(divisor);
}
__device__ inline boolean narrow_quotient(boolean wide, int64, As<boolean>) { return wide; }
template <class Real>
__device__ inline Complex<Real> narrow_quotient(Complex<Real> wide, int64 divisor, As<Complex<Real> >) {
    const Real real_divisor = static_cast<Real>(divisor);
    Complex<Real> quotient = {wide.real / real_divisor, wide.imaginary / real_divisor};
    return divisor == 1 ? wide : quotient;
}

#endif
