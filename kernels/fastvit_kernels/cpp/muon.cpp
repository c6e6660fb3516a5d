// Muon's update of matrices (https://kellerjordan.github.io/posts/muon/). muon.py compiles this file after vectors.h and
// matmul.h, for float32. A task is one matrix, which stays in the cache of its thread through all iterations.
//
// The iterations run on the tall form of a matrix, (length, width) with width <= length. Its rows are padded with zeros
// to whole vectors, and it has room for whole tiles of rows.

struct Step {
    int64_t parameters, merged, iterations;
    float a, b, c;  // of x, x^3 and x^5
    float lr, weight_decay, momentum, grad_scale;
    int nesterov, threads;
};

struct Buffers {
    std::vector<float> ahead;
    std::vector<Words> tall, next, gram, polynomial;
};

// Calls use(index of the vector, sum) for the product of left with right (steps, vectors); an element of left lies at
// row * left_row + step * left_step.
template <int C, class Use>
static inline void product(
    const std::vector<Words>& left, int64_t left_row, int64_t left_step, const std::vector<Words>& right,
    int64_t rows, int64_t steps, int64_t vectors, Use use) {
    constexpr int R = tile_rows(C);
    const int32_t* words = (const int32_t*)left.data();
    for (int64_t v = 0; v < vectors; v += C)
        for (int64_t row = 0; row < rows; row += R) {
            Floats sums[R][C] = {};
            add_products(sums, words + row * left_row, left_row, left_step, right.data() + v, vectors, steps);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
                for (int c = 0; c < C; ++c) use((row + r) * vectors + v + c, sums[r][c]);
        }
}

// With X the tall form: G = X^T X, and X becomes a X + X (b G + c G G).
template <int C>
static void iterate(const Step& step, int64_t length, int64_t width, int64_t vectors, Buffers& to) {
    const int64_t stride = vectors * LANES;
    for (int64_t i = 0; i < step.iterations; ++i) {
        const auto gram = [&](int64_t at, Floats sum) { to.gram[at] = (Words)sum; };
        product<C>(to.tall, 1, stride, to.tall, width, length, vectors, gram);
        const auto polynomial = [&](int64_t at, Floats sum) {
            to.polynomial[at] = (Words)multiply_add(fill(step.b), (Floats)to.gram[at], fill(step.c) * sum);
        };
        product<C>(to.gram, stride, 1, to.gram, width, width, vectors, polynomial);
        const auto next = [&](int64_t at, Floats sum) {
            to.next[at] = (Words)multiply_add(fill(step.a), (Floats)to.tall[at], sum);
        };
        product<C>(to.tall, stride, 1, to.polynomial, length, width, vectors, next);
        std::swap(to.tall, to.next);
    }
}

// Updates the average; writes what is to be orthogonalised to `ahead` and returns its norm.
static float move_average(const Step& step, const float* gradient, float* average, int64_t size, Buffers& to) {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const int64_t count = std::min<int64_t>(LANES, size - i);
        const Floats grad = (Floats)load((const int32_t*)gradient + i, count) / fill(step.grad_scale);
        Floats mean = (Floats)load((const int32_t*)average + i, count);
        mean = multiply_add(grad - mean, fill(1.0f - step.momentum), mean);
        store((int32_t*)average + i, (Words)mean, count);
        const Floats ahead = step.nesterov ? multiply_add(mean - grad, fill(step.momentum), grad) : mean;
        squares = multiply_add(ahead, ahead, squares);
        store_floats(to.ahead.data() + i, ahead);
    }
    return std::max(std::sqrt(lane_sum(squares)), 1e-7f);
}

static void update_matrix(
    const Step& step, int64_t rows, int64_t columns, float* weight, const float* gradient, float* average, Buffers& to) {
    const int64_t length = std::max(rows, columns), width = std::min(rows, columns);
    constexpr int least = tile_columns(1);
    const int64_t vectors = (width + least * LANES - 1) / (least * LANES) * least;
    const auto room = [=](int64_t of_rows) { return padded_rows(of_rows) * vectors + 24; };  // tiles read past the end
    const int64_t tall_row = rows >= columns ? columns : 1, tall_column = rows >= columns ? 1 : columns;
    to.ahead.resize(rows * columns + LANES);
    to.gram.resize(room(width));
    to.polynomial.resize(room(width));
    to.next.resize(room(length));
    to.tall.assign(room(length), Words{});
    const float norm = move_average(step, gradient, average, rows * columns, to);
    float* tall = (float*)to.tall.data();
    for (int64_t i = 0; i < length; ++i)
        for (int64_t j = 0; j < width; ++j)
            tall[i * vectors * LANES + j] = to.ahead[i * tall_row + j * tall_column] / norm;
    switch (tile_columns(vectors)) {
        case 3: iterate<3>(step, length, width, vectors, to); break;
        case 2: iterate<2>(step, length, width, vectors, to); break;
        default: iterate<1>(step, length, width, vectors, to);
    }
    const float kept = 1.0f - step.lr * step.weight_decay, rate = step.lr * 0.2f * std::sqrt(float(length));
    tall = (float*)to.tall.data();
    for (int64_t i = 0; i < length; ++i)
        for (int64_t j = 0; j < width; ++j) {
            float& w = weight[i * tall_row + j * tall_column];
            w = w * kept - rate * tall[i * vectors * LANES + j];
        }
}

// `sides` are (parameters, 2): rows and columns of each of the matrices that are stacked in a parameter.
extern "C" void update(
    const Step* step, const int64_t* sides, float* const* weights, const float* const* gradients,
    float* const* averages) {
#pragma omp parallel num_threads(step->threads)
    {
        Buffers buffers;
#pragma omp for schedule(dynamic)
        for (int64_t n = 0; n < step->parameters * step->merged; ++n) {
            const int64_t p = n / step->merged, rows = sides[2 * p], columns = sides[2 * p + 1];
            const int64_t first = n % step->merged * rows * columns;
            update_matrix(
                *step, rows, columns, weights[p] + first, gradients[p] + first, averages[p] + first, buffers);
        }
    }
}
