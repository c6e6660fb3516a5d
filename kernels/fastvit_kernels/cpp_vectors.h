// Vectors of sixteen lanes, for the kernels beside this file. BFLOAT16 is 1 or, for float32, 0.
//
// A word is what a lane holds of the tensors: a float32, or two bfloat16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

constexpr int LANES = 16;
constexpr int PER_WORD = BFLOAT16 ? 2 : 1;

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Words __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));

template <class Vector, class Scalar>
static inline Vector fill(Scalar x) {
    return Vector{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

static inline Floats fill(float x) { return fill<Floats, float>(x); }

static inline float as_float(int32_t word) {
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
}

// The larger of two numbers; a where a is none.
static inline Floats larger(Floats a, Floats b) { return a <= b ? b : a; }

static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
    return a * b + c;
#endif
}

// sum + x * word, in each lane
static inline Floats multiply_word(Floats sum, Words x, int32_t word) {
#if !BFLOAT16
    return multiply_add((Floats)x, fill(as_float(word)), sum);
#elif defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)_mm512_set1_epi32(word));
#else
    const Floats even = (Floats)(x << 16), odd = (Floats)(x & fill<Words, int32_t>(0xffff0000));
    sum = multiply_add(even, fill(as_float(word << 16)), sum);
    return multiply_add(odd, fill(as_float(word & 0xffff0000)), sum);
#endif
}

// Two rows of numbers as words; of float32 only the first.
static inline Words pack(Floats even, Floats odd) {
#if !BFLOAT16
    return (Words)even;
#elif defined(__AVX512BF16__)
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    return (Words)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
    const auto rounded = [](Floats x) {  // to the nearest, ties to even; what is not a number stays none
        const Bits bits = (Bits)x, up = bits + 0x7fff + ((bits >> 16) & 1);
        return (Bits)(x == x ? (Words)up : (Words)(bits | 0x400000));
    };
    return (Words)((rounded(even) >> 16) | (rounded(odd) & 0xffff0000));
#endif
}

// e^x for x up to 88, e^-87 for anything below -87: to two units in the last place (Cephes' expf), for bfloat16 to a
// hundredth of one.
static inline Floats exponential(Floats x) {
    x = larger(x, fill(-87.0f));
    // 1.5 * 2^23: adding it rounds to a whole number; 127, the exponent's bias, is in the lowest bits then.
    const Floats magic = fill(12582912.0f + 127.0f);
    const Floats shifted = multiply_add(x, fill(1.44269504f), magic);
    const Floats whole = shifted - magic;
#if BFLOAT16
    x = multiply_add(whole, fill(-0.693147181f), x);
    Floats y = fill(4.1665795894e-2f);
#else
    x = multiply_add(whole, fill(-0.693359375f), x);
    x = multiply_add(whole, fill(2.12194440e-4f), x);
    Floats y = fill(1.9875691500e-4f);
    y = multiply_add(y, x, fill(1.3981999507e-3f));
    y = multiply_add(y, x, fill(8.3334519073e-3f));
    y = multiply_add(y, x, fill(4.1665795894e-2f));
#endif
    y = multiply_add(y, x, fill(1.6666665459e-1f));
    y = multiply_add(y, x, fill(5.0000001201e-1f));
    y = multiply_add(y, x, fill(1.0f));
    y = multiply_add(y, x, fill(1.0f));
    return y * (Floats)((Words)shifted << 23);
}
