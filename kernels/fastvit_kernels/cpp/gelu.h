// GELU and its gradient. Compiled after vectors.h with EXACT_GELU defined as 1, or as 0 for the form with tanh,
// x * sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).

#if EXACT_GELU
// Returns Phi(x), and the density phi(x) in `density`. The error is at most 7.5e-8 (Abramowitz & Stegun 7.1.26).
static inline Floats normal_cdf(Floats x, Floats& density) {
    const Floats e = exponential(x * x * fill(-0.5f));
    const Floats size = x < fill(0.0f) ? -x : x;
    const Floats t = fill(1.0f) / multiply_add(size, fill(0.3275911f * 0.707106781f), fill(1.0f));
    Floats y = fill(1.061405429f);
    y = multiply_add(y, t, fill(-1.453152027f));
    y = multiply_add(y, t, fill(1.421413741f));
    y = multiply_add(y, t, fill(-0.284496736f));
    y = multiply_add(y, t, fill(0.254829592f));
    const Floats tail = fill(0.5f) * y * t * e;
    density = fill(0.398942280f) * e;
    return x < fill(0.0f) ? tail : fill(1.0f) - tail;
}

static inline Floats gelu(Floats x) {
    Floats density;
    return x * normal_cdf(x, density);
}

// Returns the gradient, and GELU's value in `result`.
static inline Floats gelu_gradient(Floats x, Floats grad, Floats& result) {
    Floats density;
    const Floats cdf = normal_cdf(x, density);
    result = x * cdf;
    return grad * multiply_add(x, density, cdf);
}
#else
constexpr float LINEAR = 1.59576912f, CUBIC = 0.0713548128f;

// e^-inner; the sigmoid is 1 / (1 + e^-inner)
static inline Floats decay(Floats x) {
    const Floats exponent = x * multiply_add(x * x, fill(-CUBIC), fill(-LINEAR));
    return exponential(exponent <= fill(88.0f) ? exponent : fill(88.0f));
}

static inline Floats gelu(Floats x) { return x * reciprocal(fill(1.0f) + decay(x)); }

// Returns the gradient, and GELU's value in `result`.
static inline Floats gelu_gradient(Floats x, Floats grad, Floats& result) {
    const Floats e = decay(x), sigmoid = reciprocal(fill(1.0f) + e);
    const Floats slope = x * multiply_add(x * x, fill(3 * CUBIC), fill(LINEAR));
    result = x * sigmoid;
    return grad * multiply_add(e * sigmoid, sigmoid * slope, sigmoid);  // 1 - sigmoid = e sigmoid, without cancellation
}
#endif
