// Vectors of the processor's width, for the kernels in this folder. BFLOAT16 is 1, or 0 for float32.
//
// A lane holds one word of a tensor: one float32 or two bfloat16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__) && defined(__FMA__)
#define AVX2 1
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int PER_WORD = BFLOAT16 ? 2 : 1;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

template <class Vector, class Scalar>
static inline Vector fill(Scalar x) {
    return x - Vector{};
}

static inline Floats fill(float x) { return fill<Floats, float>(x); }

static inline Bits lane_numbers() {
    Bits numbers;
    for (int i = 0; i < LANES; ++i) numbers[i] = i;
    return numbers;
}

static inline float as_float(int32_t word) {
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
}

// Loads the first `count` words of a vector; the others are 0.
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

static inline Floats load_floats(const float* data) {
    Floats x;
    std::memcpy(&x, data, sizeof x);
    return x;
}

static inline void store_floats(float* data, Floats x) { std::memcpy(data, &x, sizeof x); }

// The sum of all lanes.
static inline float lane_sum(Floats x) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)x);
#elif AVX2
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
    return (x[0] + x[1]) + (x[2] + x[3]);
#endif
}

// 1 / x; for bfloat16 to 14 bits, which are enough where the result is rounded to 8.
static inline Floats reciprocal(Floats x) {
#if BFLOAT16 && defined(__AVX512F__)
    return (Floats)_mm512_rcp14_ps((__m512)x);
#else
    return fill(1.0f) / x;
#endif
}

// Transposes a square of as many vectors as each has lanes.
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
#elif AVX2
    __m256 a[LANES], b[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 4) {  // b[i + c]: columns c and c + 4 of rows i to i + 3
        b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
        b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
        b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
        b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
    }
#pragma GCC unroll 8
    for (int c = 0; c < 4; ++c) {
        rows[c] = (Words)_mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        rows[c + 4] = (Words)_mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
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
// Interleaves two rows of bfloat16 into two vectors of words, each with one number of either row.
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
        paired[2 * i / LANES][2 * i % LANES] = low[i];
        paired[2 * i / LANES][2 * i % LANES + 1] = high[i];
    }
#endif
}
#endif

// The larger of two numbers; a if a is NaN.
static inline Floats larger(Floats a, Floats b) {
#ifdef __AVX512F__
    return (Floats)_mm512_max_ps((__m512)b, (__m512)a);
#elif AVX2
    return (Floats)_mm256_max_ps((__m256)b, (__m256)a);
#else
    return a <= b ? b : a;
#endif
}

static inline Floats multiply_add(Floats a, Floats b, Floats c) {
#ifdef __AVX512F__
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif AVX2
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
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

// sum + the products of the numbers in x and y, in each lane
static inline Floats multiply_words(Floats sum, Words x, Words y) {
#if !BFLOAT16
    return multiply_add((Floats)x, (Floats)y, sum);
#elif defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
    const Words odd = fill<Words, int32_t>(0xffff0000);
    sum = multiply_add((Floats)(x << 16), (Floats)(y << 16), sum);
    return multiply_add((Floats)(x & odd), (Floats)(y & odd), sum);
#endif
}

// Packs two vectors of numbers into words; for float32 only the first is used.
static inline Words pack(Floats even, Floats odd) {
#if !BFLOAT16
    return (Words)even;
#elif defined(__AVX512BF16__)
    const __m512i order = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Words)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
    const auto rounded = [](Floats x) {  // to nearest, ties to even; NaN stays NaN
        const Bits bits = (Bits)x, up = bits + 0x7fff + ((bits >> 16) & 1);
        return (Bits)(x == x ? (Words)up : (Words)(bits | 0x400000));
    };
    return (Words)((rounded(even) >> 16) | (rounded(odd) & 0xffff0000));
#endif
}

// Packs the first numbers of a vector into `count` of LANES / PER_WORD words in the order of the tensor.
static inline void narrow(int32_t* words, Floats x, int count = LANES / PER_WORD) {
#if !BFLOAT16
    store(words, (Words)x, count);
#elif defined(__AVX512BF16__)
    _mm256_mask_storeu_epi32(words, (1u << count) - 1, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    const Words packed = pack(x, Floats{});
    for (int i = 0; i < count; ++i) words[i] = packed[2 * i] | packed[2 * i + 1] << 16;
#endif
}

// The inverse of `narrow`: the numbers in the order of the tensor.
static inline Floats widen(const int32_t* words) {
#if !BFLOAT16
    return load_floats((const float*)words);
#elif defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)words)), 16);
#else
    Floats x;
    for (int i = 0; i < LANES; ++i) x[i] = as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
    return x;
#endif
}

// e^x for x up to 88. Where x is below -87, the result is at most e^-87. The error is at most two units in the last place
// (Cephes' expf); for bfloat16 a hundredth of one.
static inline Floats exponential(Floats x) {
#if BFLOAT16 && defined(__AVX512DQ__)
    // 2^whole * 2^rest, with 0 <= rest < 1, for which a polynomial of least relative error (2^-18) is enough.
    const __m512 power = (__m512)(x * fill(1.44269504f));
    const Floats rest = (Floats)_mm512_reduce_ps(power, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Floats y = fill(1.353416778e-2f);
    y = multiply_add(y, rest, fill(5.201146007e-2f));
    y = multiply_add(y, rest, fill(2.414427549e-1f));
    y = multiply_add(y, rest, fill(6.930038333e-1f));
    y = multiply_add(y, rest, fill(1.000002623f));
    return (Floats)_mm512_scalef_ps((__m512)y, power);  // rounds power down
#else
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
#endif
}
