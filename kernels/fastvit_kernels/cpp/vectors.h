// Vectors of sixteen lanes, for the kernels in this folder. BFLOAT16 is 1, or 0 for float32.
//
// A lane holds one word of a tensor: one float32 or two bfloat16.

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

// Loads the first `count` of sixteen words; the others are 0.
static inline Words load(const int32_t* data, int64_t count) {
#ifdef __AVX512F__
    return (Words)_mm512_maskz_loadu_epi32((1u << count) - 1, data);
#else
    Words words = {};
    std::memcpy(&words, data, count * sizeof(int32_t));
    return words;
#endif
}

static inline void store(int32_t* data, Words words, int64_t count) {
#ifdef __AVX512F__
    _mm512_mask_storeu_epi32(data, (1u << count) - 1, (__m512i)words);
#else
    std::memcpy(data, &words, count * sizeof(int32_t));
#endif
}

// Transposes a square of sixteen vectors.
static inline void transpose(Words (&rows)[LANES]) {
#ifdef __AVX512F__
    __m512i a[LANES], b[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 4) {  // b[i + c]: column c, c + 4, c + 8 and c + 12 of rows i to i + 3
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c) {
        const __m512i even_top = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88);  // columns c and c + 8 of rows 0 to 7
        const __m512i even_bottom = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
        const __m512i odd_top = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);  // columns c + 4 and c + 12
        const __m512i odd_bottom = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
        rows[c] = (Words)_mm512_shuffle_i32x4(even_top, even_bottom, 0x88);
        rows[c + 4] = (Words)_mm512_shuffle_i32x4(odd_top, odd_bottom, 0x88);
        rows[c + 8] = (Words)_mm512_shuffle_i32x4(even_top, even_bottom, 0xdd);
        rows[c + 12] = (Words)_mm512_shuffle_i32x4(odd_top, odd_bottom, 0xdd);
    }
#else
    for (int i = 0; i < LANES; ++i)
        for (int j = 0; j < i; ++j) {
            const int32_t word = rows[i][j];
            rows[i][j] = rows[j][i];
            rows[j][i] = word;
        }
#endif
}

#if BFLOAT16
// Interleaves two rows of bfloat16 into 32 words, each with one number of either row.
static inline void pair(Words first, Words second, Words (&paired)[2]) {
    const Words low = (Words)((Bits)first & 0xffff) | second << 16;
    const Words high = (Words)((Bits)first >> 16) | (Words)((Bits)second & 0xffff0000);
#ifdef __AVX512F__
    const __m512i order = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i upper = _mm512_add_epi32(order, _mm512_set1_epi32(8));
    paired[0] = (Words)_mm512_permutex2var_epi32((__m512i)low, order, (__m512i)high);
    paired[1] = (Words)_mm512_permutex2var_epi32((__m512i)low, upper, (__m512i)high);
#else
    for (int i = 0; i < LANES; ++i) {
        paired[i / 8][i % 8 * 2] = low[i];
        paired[i / 8][i % 8 * 2 + 1] = high[i];
    }
#endif
}
#endif

// The larger of two numbers; a if a is NaN.
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

// Packs two vectors of numbers into words; for float32 only the first is used.
static inline Words pack(Floats even, Floats odd) {
#if !BFLOAT16
    return (Words)even;
#elif defined(__AVX512BF16__)
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)odd));
    return (Words)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
#else
    const auto rounded = [](Floats x) {  // to nearest, ties to even; NaN stays NaN
        const Bits bits = (Bits)x, up = bits + 0x7fff + ((bits >> 16) & 1);
        return (Bits)(x == x ? (Words)up : (Words)(bits | 0x400000));
    };
    return (Words)((rounded(even) >> 16) | (rounded(odd) & 0xffff0000));
#endif
}

// Packs sixteen numbers into LANES / PER_WORD words in the order of the tensor.
static inline void narrow(int32_t* words, Floats x) {
    const Words packed = pack(x, Floats{});
#if !BFLOAT16
    std::memcpy(words, &packed, sizeof packed);
#elif defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)words, _mm512_cvtepi32_epi16((__m512i)packed));
#else
    for (int i = 0; i < LANES / 2; ++i) words[i] = packed[2 * i] | packed[2 * i + 1] << 16;
#endif
}

// e^x for x up to 88, and e^-87 for x below -87. The error is at most two units in the last place (Cephes' expf); for
// bfloat16 a hundredth of one.
static inline Floats exponential(Floats x) {
    x = larger(x, fill(-87.0f));
    // Adding 1.5 * 2^23 rounds to an integer; the lowest bits then also contain 127, the exponent's bias.
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
