// GELU in its tanh form, x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), and its gradient: see cpp_gelu.py, which compiles
// this behind cpp_vectors.h.

constexpr float LINEAR = 1.59576912f, CUBIC = 0.0713548128f;

// e^-inner, of which the sigmoid is 1 / (1 + e^-inner)
static inline Floats decay(Floats x) {
    const Floats exponent = x * multiply_add(x * x, fill(-CUBIC), fill(-LINEAR));
    return exponential(exponent <= fill(88.0f) ? exponent : fill(88.0f));
}

static inline Floats value(Floats x, Floats) { return x / (fill(1.0f) + decay(x)); }

static inline Floats gradient(Floats x, Floats upstream) {
    const Floats e = decay(x), sigmoid = fill(1.0f) / (fill(1.0f) + e);
    const Floats slope = x * multiply_add(x * x, fill(3 * CUBIC), fill(LINEAR));
    return upstream * multiply_add(e * sigmoid, sigmoid * slope, sigmoid);  // 1 - sigmoid = e sigmoid, not rounded off
}

static inline Words load(const int32_t* data, int64_t count) {
    Words words = {};
    std::memcpy(&words, data, count * sizeof(int32_t));
    return words;
}

// out = function(x, y) word by word; an odd last bfloat16 shares its word with memory that torch allocated too.
template <class Function>
static void for_each_word(int64_t words, int threads, const int32_t* x, const int32_t* y, int32_t* out, Function function) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < words; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, words - i);
        const Words a = load(x + i, count), b = load(y + i, count);
#if BFLOAT16
        const Words high = fill<Words, int32_t>(0xffff0000);
        const Words result = pack(function((Floats)(a << 16), (Floats)(b << 16)),
                                  function((Floats)(a & high), (Floats)(b & high)));
#else
        const Words result = (Words)function((Floats)a, (Floats)b);
#endif
        std::memcpy(out + i, &result, count * sizeof(int32_t));
    }
}

extern "C" void forward(int64_t words, int threads, const int32_t* x, int32_t* out) {
    for_each_word(words, threads, x, x, out, value);
}

extern "C" void backward(int64_t words, int threads, const int32_t* x, const int32_t* dout, int32_t* dx) {
    for_each_word(words, threads, x, dout, dx, gradient);
}
