// GELU in its tanh form, x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), and its gradient. gelu.py compiles
// this file after vectors.h.

constexpr float LINEAR = 1.59576912f, CUBIC = 0.0713548128f;

// e^-inner; the sigmoid is 1 / (1 + e^-inner)
static inline Floats decay(Floats x) {
    const Floats exponent = x * multiply_add(x * x, fill(-CUBIC), fill(-LINEAR));
    return exponential(exponent <= fill(88.0f) ? exponent : fill(88.0f));
}

static inline Floats value(Floats x) { return x / (fill(1.0f) + decay(x)); }

// Returns the gradient, and GELU's value in `result`.
static inline Floats gradient(Floats x, Floats grad, Floats& result) {
    const Floats e = decay(x), sigmoid = fill(1.0f) / (fill(1.0f) + e);
    const Floats slope = x * multiply_add(x * x, fill(3 * CUBIC), fill(LINEAR));
    result = x * sigmoid;
    return grad * multiply_add(e * sigmoid, sigmoid * slope, sigmoid);  // 1 - sigmoid = e sigmoid, without cancellation
}

// The numbers in a word of bfloat16, as float32.
static inline Floats even(Words words) { return (Floats)(BFLOAT16 ? words << 16 : words); }
static inline Floats odd(Words words) { return (Floats)(words & fill<Words, int32_t>(0xffff0000)); }

// If the number of bfloat16 is odd, the last word includes memory after the tensor, which torch's allocator pads.
extern "C" void forward(int64_t words, int threads, const int32_t* x, int32_t* y) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < words; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, words - i);
        const Words x_words = load(x + i, count);
        const Floats first = value(even(x_words));
        store(y + i, pack(first, PER_WORD == 2 ? value(odd(x_words)) : first), count);
    }
}

extern "C" void backward(int64_t words, int threads, const int32_t* x, const int32_t* dy, int32_t* dx, int32_t* y) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < words; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, words - i);
        const Words x_words = load(x + i, count), dy_words = load(dy + i, count);
        Floats first, second;
        const Floats first_slope = gradient(even(x_words), even(dy_words), first);
        const Floats second_slope = PER_WORD == 2 ? gradient(odd(x_words), odd(dy_words), second) : first_slope;
        store(dx + i, pack(first_slope, second_slope), count);
        store(y + i, pack(first, PER_WORD == 2 ? second : first), count);
    }
}
