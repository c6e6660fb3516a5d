// A pre-norm transformer block for CPUs: what its forward and its backward pass share. block.py compiles this file after
// vectors.h, heads.h, matmul.h and gelu.h, with DIM, HEAD_DIM, HIDDEN, RESIDUAL_NORM and EXACT_GELU defined.
//
// A task is a group of samples, small enough that all it computes stays in the second-level cache. Tokens are rows. Left
// operands of products are rows of words; for the gradients of weights, which are sums over rows, two rows are paired.
// Rows past the last one of a group are zero or finite, and their gradients are zero.

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

constexpr int HEADS = DIM / HEAD_DIM;
constexpr int V = DIM / LANES, HIDDEN_V = HIDDEN / LANES;              // vectors per row
constexpr int W = DIM / PER_WORD, HIDDEN_W = HIDDEN / PER_WORD;        // words per row
constexpr int STATISTICS = 4;                                           // per row: mean and 1/std of both norms
constexpr int64_t GROUP_ROWS = 64;

struct Parameters {
    const float *norm1_weight, *norm1_bias, *qkv_weight, *qkv_bias, *proj_weight, *proj_bias;
    const float *norm2_weight, *norm2_bias, *fc1_weight, *fc1_bias, *fc2_weight, *fc2_bias;
};

// Where the gradients of the parameters begin in one array; the order is that of `Parameters`.
constexpr int64_t SIZES[] = {DIM, DIM, 3 * DIM * DIM, 3 * DIM, DIM * DIM, DIM,
                             DIM, DIM, HIDDEN * DIM,  HIDDEN,  DIM * HIDDEN, DIM};
constexpr int64_t start_of(int parameter) { return parameter ? start_of(parameter - 1) + SIZES[parameter - 1] : 0; }
constexpr int64_t TOTAL = start_of(12);
enum { NORM1_WEIGHT, NORM1_BIAS, QKV_WEIGHT, QKV_BIAS, PROJ_WEIGHT, PROJ_BIAS,
       NORM2_WEIGHT, NORM2_BIAS, FC1_WEIGHT, FC1_BIAS, FC2_WEIGHT, FC2_BIAS };

struct Call {
    int64_t batch, tokens;
    float eps1, eps2, dropout_p;
    uint32_t seed;
    int threads;
    const float *attention_scale, *mlp_scale;  // of each sample's branches (stochastic depth), or null
};

// What the forward pass keeps for the backward pass; null in inference.
struct Saved {
    int32_t *qkv, *attended;  // (rows, 3 * W), (rows, W)
    float *softmax;           // (batch, HEADS, 2, tokens): shift and factor
};

// The samples of a task.
struct Group {
    const Call& call;
    int64_t sample, samples;

    int64_t rows() const { return samples * call.tokens; }
    int64_t first_row() const { return sample * call.tokens; }

    // The factor of a row's branch.
    Floats scale(const float* scales, int64_t row) const {
        return fill(scales && row < rows() ? scales[sample + row / call.tokens] : 1.0f);
    }
};

template <class Task>
static void for_each_group(const Call& call, Task task) {
    const int64_t per_group = std::max<int64_t>(1, GROUP_ROWS / call.tokens);
    const int64_t groups = (call.batch + per_group - 1) / per_group;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = g * per_group;
        task(Group{call, first, std::min(per_group, call.batch - first)});
    }
}

static int64_t rows_of_group(const Call& call) {
    return padded_rows(std::max<int64_t>(1, GROUP_ROWS / call.tokens) * call.tokens);
}

// ---- LayerNorm

struct Norm {
    const float *weight, *bias;

    Floats of(Floats x, const float* statistics, int v) const {
        return multiply_add(standard(x, statistics), load_floats(weight + v * LANES), load_floats(bias + v * LANES));
    }

    static Floats standard(Floats x, const float* statistics) { return (x - fill(statistics[0])) * fill(statistics[1]); }
};

static inline void moments(const float* x, float eps, float* statistics) {
    Floats sum = {}, squares = {};
    for (int v = 0; v < V; ++v) sum += load_floats(x + v * LANES);
    const float mean = lane_sum(sum) / DIM;
    for (int v = 0; v < V; ++v) {
        const Floats centred = load_floats(x + v * LANES) - fill(mean);
        squares = multiply_add(centred, centred, squares);
    }
    statistics[0] = mean;
    statistics[1] = 1.0f / std::sqrt(lane_sum(squares) / DIM + eps);
}

// Gradient of a row, written over dnormed; adds to the gradients of weight and bias.
static inline void norm_gradient(
    const Norm& norm, const float* x, const float* statistics, float* dnormed, Floats* dweight, Floats* dbias) {
    Floats sum = {}, products = {};
    for (int v = 0; v < V; ++v) {
        const Floats standard = Norm::standard(load_floats(x + v * LANES), statistics);
        const Floats grad = load_floats(dnormed + v * LANES);
        dweight[v] = multiply_add(grad, standard, dweight[v]);
        dbias[v] += grad;
        const Floats scaled = grad * load_floats(norm.weight + v * LANES);
        sum += scaled;
        products = multiply_add(scaled, standard, products);
    }
    const Floats mean = fill(lane_sum(sum) / DIM), slope = fill(lane_sum(products) / DIM);
    for (int v = 0; v < V; ++v) {
        const Floats standard = Norm::standard(load_floats(x + v * LANES), statistics);
        const Floats scaled = load_floats(dnormed + v * LANES) * load_floats(norm.weight + v * LANES);
        store_floats(dnormed + v * LANES, (scaled - mean - standard * slope) * fill(statistics[1]));
    }
}

// ---- Rows and pairs

// Writes vector v of rows `row` and `row + 1` as a pair.
template <int VECTORS_PER_ROW>
static inline void put_pair(std::vector<Words>& paired, int64_t row, int v, Floats first, Floats second) {
#if BFLOAT16
    paired[row / 2 * VECTORS_PER_ROW + v] = pack(first, second);
#else
    paired[row * VECTORS_PER_ROW + v] = (Words)first;
    paired[(row + 1) * VECTORS_PER_ROW + v] = (Words)second;
#endif
}

// Pairs rows of words.
template <int VECTORS_PER_ROW>
static void pair_rows(std::vector<Words>& paired, const int32_t* rows, int64_t count) {
    constexpr int words = VECTORS_PER_ROW * GROUPS;
#if BFLOAT16
    for (int64_t row = 0; row < count; row += 2)
        for (int w = 0; w < words; w += LANES) {
            const int valid = std::min(LANES, words - w);
            Words both[2];
            pair(load(rows + row * words + w, valid), load(rows + (row + 1) * words + w, valid), both);
            for (int half = 0; half < (valid > GROUPS ? 2 : 1); ++half)
                paired[row / 2 * VECTORS_PER_ROW + w / GROUPS + half] = both[half];
        }
#else
    std::memcpy(paired.data(), rows, count * words * sizeof(int32_t));
#endif
}

static inline void put_row(int32_t* rows, int64_t row, int words, int v, Floats x) {
    narrow(rows + row * words + v * GROUPS, x);
}

static inline Floats bias_of(const float* bias, int v) { return bias ? load_floats(bias + v * LANES) : Floats{}; }

// Sums of vectors over the rows of a group: of runs of rows first, then of the runs, then added to a gradient. Each step
// adds few numbers, since the rounding error of a sum grows with the count of what it adds.
template <int COUNT>
struct RowSums {
    static constexpr int RUN = 16;
    Floats run[COUNT] = {}, total[COUNT] = {};

    void end_row(int64_t row) {
        if (row % RUN == 0) add_run();
    }

    void add_to(float* gradient) {
        add_run();
        for (int v = 0; v < COUNT; ++v) store_floats(gradient + v * LANES, load_floats(gradient + v * LANES) + total[v]);
    }

   private:
    void add_run() {
        for (int v = 0; v < COUNT; ++v) {
            total[v] += run[v];
            run[v] = Floats{};
        }
    }
};

// ---- The steps that both passes take

static Dropout dropout_of(const Call& call, int64_t head) {
    return Dropout{uint32_t(call.dropout_p * 16777216.0f), 1.0f / (1.0f - call.dropout_p), call.seed}.of_head(head);
}

static Rows head_rows(int32_t* rows, int64_t row, int parts, int part, int head) {
    return {rows + row * parts * W + part * W + head * WORDS, parts * W};
}

// Attention's branch, added to the residual stream: y = x + scale (attended proj + bias)
static void add_projection(
    const Group& group, const Packed<W, V>& proj, const Parameters& p, const int32_t* attended, const float* x,
    float* y) {
    proj.product(attended, group.rows(), [&](int64_t row, int v, auto& sums) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int r = 0; r < proj.ROWS; ++r) {
            if (row + r >= group.rows()) break;
            const Floats scale = group.scale(group.call.attention_scale, row + r);
#pragma GCC unroll 3
            for (int c = 0; c < proj.COLUMNS; ++c) {
                const int64_t at = (row + r) * DIM + (v + c) * LANES;
                const Floats branch = (sums[r][c] + bias_of(p.proj_bias, v + c)) * scale;
                store_floats(y + at, load_floats(x + at) + branch);
            }
        }
    });
}
