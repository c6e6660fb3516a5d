// GELU of each element, and its gradient. gelu.py compiles this file after vectors.h and gelu.h.

// The numbers in a word of bfloat16, as float32.
static inline Floats even(Words words) { return (Floats)(BFLOAT16 ? words << 16 : words); }
static inline Floats odd(Words words) { return (Floats)(words & fill<Words, int32_t>(0xffff0000)); }

// If the number of bfloat16 is odd, the last word includes memory after the tensor, which torch's allocator pads.
extern "C" void forward(int64_t words, int threads, const int32_t* x, int32_t* y) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < words; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, words - i);
        const Words x_words = load(x + i, count);
        const Floats first = gelu(even(x_words));
        store(y + i, pack(first, PER_WORD == 2 ? gelu(odd(x_words)) : first), count);
    }
}

extern "C" void backward(int64_t words, int threads, const int32_t* x, const int32_t* dy, int32_t* dx, int32_t* y) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < words; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, words - i);
        const Words x_words = load(x + i, count), dy_words = load(dy + i, count);
        Floats first, second;
        const Floats first_slope = gelu_gradient(even(x_words), even(dy_words), first);
        const Floats second_slope = PER_WORD == 2 ? gelu_gradient(odd(x_words), odd(dy_words), second) : first_slope;
        store(dx + i, pack(first_slope, second_slope), count);
        store(y + i, pack(first, PER_WORD == 2 ? second : first), count);
    }
}
