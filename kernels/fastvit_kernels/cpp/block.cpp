// A pre-norm transformer block for CPUs, forward and backward. block.py compiles this file after vectors.h, heads.h,
// matmul.h and gelu.h, with DIM, HEAD_DIM, HIDDEN, RESIDUAL_NORM and EXACT_GELU defined.
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

// Sums of vectors over the rows of a group, added to a gradient at its end, which reduces rounding errors.
template <int COUNT>
struct RowSums {
    Floats sums[COUNT] = {};

    void add_to(float* gradient) const {
        for (int v = 0; v < COUNT; ++v) store_floats(gradient + v * LANES, load_floats(gradient + v * LANES) + sums[v]);
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

// ---- Forward

struct ForwardWeights {
    Packed<W, 3 * V> qkv;
    Packed<W, V> proj;
    Packed<W, HIDDEN_V> fc1;
    Packed<HIDDEN_W, V> fc2;
};

struct ForwardBuffers {
    std::vector<int32_t> normed, qkv, attended, active;
    std::vector<float> y, statistics;
    Workspace heads;

    ForwardBuffers(int64_t rows, int64_t tokens)
        : normed(rows * W), qkv(rows * 3 * W), attended(rows * W), active(rows * HIDDEN_W), y(rows * DIM),
          statistics(rows * STATISTICS), heads(tokens) {}
};

static void normalise(
    const Norm& norm, float eps, const float* x, int64_t rows, float* statistics, int32_t* normed) {
    for (int64_t row = 0; row < rows; ++row) {
        float* of_row = statistics + row * STATISTICS;
        moments(x + row * DIM, eps, of_row);
        for (int v = 0; v < V; ++v)
            put_row(normed, row, W, v, norm.of(load_floats(x + row * DIM + v * LANES), of_row, v));
    }
}

static void forward_group(
    const Group& group, const Parameters& p, const ForwardWeights& weights, const float* x, float* out,
    const Saved& saved, ForwardBuffers& to) {
    const Call& call = group.call;
    const int64_t rows = group.rows(), first_row = group.first_row();
    x += first_row * DIM;
    out += first_row * DIM;
    normalise({p.norm1_weight, p.norm1_bias}, call.eps1, x, rows, to.statistics.data(), to.normed.data());
    weights.qkv.product(to.normed.data(), rows, [&](int64_t row, int v, auto& sums) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int r = 0; r < weights.qkv.ROWS; ++r)
#pragma GCC unroll 3
            for (int c = 0; c < weights.qkv.COLUMNS; ++c)
                put_row(to.qkv.data(), row + r, 3 * W, v + c, sums[r][c] + bias_of(p.qkv_bias, v + c));
    });
    const float scale = 1.0f / std::sqrt(float(HEAD_DIM));
    for (int64_t s = 0; s < group.samples; ++s)
        for (int head = 0; head < HEADS; ++head) {
            const int64_t row = s * call.tokens, n = (group.sample + s) * HEADS + head;
            const auto part = [&](int i) { return head_rows(to.qkv.data(), row, 3, i, head); };
            float* softmax = saved.softmax ? saved.softmax + n * 2 * call.tokens : nullptr;
            forward_head(
                part(0), part(1), part(2), head_rows(to.attended.data(), row, 1, 0, head), call.tokens, scale,
                dropout_of(call, n), to.heads, {softmax, softmax ? softmax + call.tokens : nullptr});
        }
    add_projection(group, weights.proj, p, to.attended.data(), x, to.y.data());
    const Norm norm2 = {p.norm2_weight, p.norm2_bias};
    float* statistics2 = to.statistics.data() + 2;
    normalise(norm2, call.eps2, to.y.data(), rows, statistics2, to.normed.data());
    weights.fc1.product(to.normed.data(), rows, [&](int64_t row, int v, auto& sums) __attribute__((always_inline)) {
        for (int r = 0; r < weights.fc1.ROWS; ++r)
            for (int c = 0; c < weights.fc1.COLUMNS; ++c)
                put_row(to.active.data(), row + r, HIDDEN_W, v + c, gelu(sums[r][c] + bias_of(p.fc1_bias, v + c)));
    });
    weights.fc2.product(to.active.data(), rows, [&](int64_t row, int v, auto& sums) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int r = 0; r < weights.fc2.ROWS; ++r) {
            if (row + r >= rows) break;
            const Floats scale = group.scale(call.mlp_scale, row + r);
#pragma GCC unroll 3
            for (int c = 0; c < weights.fc2.COLUMNS; ++c) {
                const int64_t at = (row + r) * DIM + (v + c) * LANES;
                Floats residual = load_floats(to.y.data() + at);
                if (RESIDUAL_NORM) residual = norm2.of(residual, statistics2 + (row + r) * STATISTICS, v + c);
                store_floats(out + at, residual + (sums[r][c] + bias_of(p.fc2_bias, v + c)) * scale);
            }
        }
    });
    if (!saved.qkv) return;
    std::memcpy(saved.qkv + first_row * 3 * W, to.qkv.data(), rows * 3 * W * sizeof(int32_t));
    std::memcpy(saved.attended + first_row * W, to.attended.data(), rows * W * sizeof(int32_t));
}

extern "C" void forward(const Call* call, const Parameters* p, const float* x, float* out, const Saved* saved) {
    ForwardWeights weights;
#pragma omp parallel num_threads(call->threads)
    {
        weights.qkv.transposed(p->qkv_weight);
        weights.proj.transposed(p->proj_weight);
        weights.fc1.transposed(p->fc1_weight);
        weights.fc2.transposed(p->fc2_weight);
        ForwardBuffers buffers(rows_of_group(*call), call->tokens);
        for_each_group(*call, [&](const Group& group) { forward_group(group, *p, weights, x, out, *saved, buffers); });
    }
}

// ---- Backward

struct BackwardWeights {
    Packed<W, V> proj;          // x W^T, to compute y again
    Packed<W, HIDDEN_V> fc1;    // x W^T, to compute the hidden units again
    Packed<W, HIDDEN_V> fc2;    // x W, for the gradients of their inputs
    Packed<HIDDEN_W, V> fc1_back;
    Packed<W, V> proj_back;
    Packed<3 * W, V> qkv;
};

struct BackwardBuffers {
    std::vector<int32_t> attended, normed, dout, dattended, dqkv, dhidden;
    std::vector<Words> paired_normed, paired_dout, paired_active, paired_dhidden, paired_dqkv;
    std::vector<float> y, dnormed, dy, statistics;
    std::vector<float> gradients = std::vector<float>(TOTAL);
    Workspace heads;

    BackwardBuffers(int64_t rows, int64_t tokens)
        : attended(rows * W), normed(rows * W), dout(rows * W), dattended(rows * W), dqkv(rows * 3 * W),
          dhidden(rows * HIDDEN_W), paired_normed(rows * W / LANES), paired_dout(rows * W / LANES),
          paired_active(rows * HIDDEN_W / LANES), paired_dhidden(rows * HIDDEN_W / LANES),
          paired_dqkv(rows * 3 * W / LANES), y(rows * DIM), dnormed(rows * DIM), dy(rows * DIM),
          statistics(rows * STATISTICS), heads(tokens) {}
};

// The number of rows to the end of the last tile.
static inline int64_t tiled(int64_t rows, int64_t tile) { return (rows + tile - 1) / tile * tile; }

// Writes scale * gradient as rows and as pairs, with zeros after the last row, and adds up the gradient of the bias.
static void put_gradient(
    const Group& group, const float* gradient, const float* scales, BackwardBuffers& to, float* dbias) {
    RowSums<V> bias;
    const int64_t rows = group.rows();
    for (int64_t row = 0; row < padded_rows(rows); row += 2)
        for (int v = 0; v < V; ++v) {
            const auto scaled = [&](int64_t at) {
                return at < rows ? load_floats(gradient + at * DIM + v * LANES) * group.scale(scales, at) : Floats{};
            };
            const Floats first = scaled(row), second = scaled(row + 1);
            bias.sums[v] += first + second;
            put_row(to.dout.data(), row, W, v, first);
            put_row(to.dout.data(), row + 1, W, v, second);
            put_pair<V>(to.paired_dout, row, v, first, second);
        }
    bias.add_to(dbias);
}

// Normalises rows again, as rows (unless null) and pairs.
static void normalise_again(
    const Norm& norm, const float* x, const float* statistics, int64_t rows, int32_t* normed,
    std::vector<Words>& paired) {
    for (int64_t row = 0; row < padded_rows(rows); row += 2)
        for (int v = 0; v < V; ++v) {
            const auto value = [&](int64_t at) {
                if (at >= rows) return Floats{};
                return norm.of(load_floats(x + at * DIM + v * LANES), statistics + at * STATISTICS, v);
            };
            const Floats first = value(row), second = value(row + 1);
            if (normed) {
                put_row(normed, row, W, v, first);
                put_row(normed, row + 1, W, v, second);
            }
            put_pair<V>(paired, row, v, first, second);
        }
}

// From `normed` and `dout`: GELU's value again and the gradient of its argument.
static void backward_hidden(
    const Parameters& p, const BackwardWeights& weights, int64_t rows, BackwardBuffers& to, float* dbias) {
    constexpr int R = weights.fc1.ROWS, C = weights.fc1.COLUMNS;
    RowSums<HIDDEN_V> bias;
    for (int v = 0; v < HIDDEN_V; v += C)
        for (int64_t row = 0; row < rows; row += R) {
            Floats hidden[R][C] = {}, grads[R][C] = {};
            weights.fc1.tile(hidden, to.normed.data(), row, v);
            weights.fc2.tile(grads, to.dout.data(), row, v);
            for (int r = 0; r < R; r += 2)
                for (int c = 0; c < C; ++c) {
                    const Floats bias_c = load_floats(p.fc1_bias + (v + c) * LANES);
                    Floats active[2], slopes[2];
                    for (int i = 0; i < 2; ++i) {
                        slopes[i] = gelu_gradient(hidden[r + i][c] + bias_c, grads[r + i][c], active[i]);
                        put_row(to.dhidden.data(), row + r + i, HIDDEN_W, v + c, slopes[i]);
                    }
                    bias.sums[v + c] += slopes[0] + slopes[1];
                    put_pair<HIDDEN_V>(to.paired_active, row + r, v + c, active[0], active[1]);
                    put_pair<HIDDEN_V>(to.paired_dhidden, row + r, v + c, slopes[0], slopes[1]);
                }
        }
    bias.add_to(dbias);
}

template <int K>
static void product_to(const Packed<K, V>& weight, const int32_t* rows, int64_t count, float* out) {
    weight.product(rows, count, [&](int64_t row, int v, auto& sums) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int r = 0; r < weight.ROWS; ++r)
#pragma GCC unroll 3
            for (int c = 0; c < weight.COLUMNS; ++c)
                store_floats(out + (row + r) * DIM + (v + c) * LANES, sums[r][c]);
    });
}

// dscore = p (dp - delta), with delta = sum over channels of dout out (Dao et al. 2022, appendix B.4)
static void backward_attended(
    const Rows& q, const Rows& k, const Rows& v, const Rows& out, const Rows& dout, const Rows& dq, const Rows& dk,
    const Rows& dv, int64_t tokens, float scale, const Dropout& dropout, const Softmax& saved, Workspace& work) {
    pair_tokens(work.paired, k, tokens);
    pair_tokens(work.paired_q, q, tokens);
    pair_tokens(work.paired_dout, dout, tokens);
    for (int64_t i = 0; i < tokens; i += LANES) {
        Words queries[WORDS], grads[WORDS], results[WORDS];
        load_lanes(queries, q, i, tokens);
        load_lanes(grads, dout, i, tokens);
        load_lanes(results, out, i, tokens);
        const int64_t count = std::min<int64_t>(LANES, tokens - i);
        const Floats shift = (Floats)load((const int32_t*)saved.shift + i, count);
        const Floats factor = (Floats)load((const int32_t*)saved.factor + i, count);
        Floats delta = {};
#pragma GCC unroll 32
        for (int w = 0; w < WORDS; ++w) delta = multiply_words(delta, grads[w], results[w]);
        // Local copies, since the compiler must assume that a store of words changes any other memory.
        Floats *scores = work.scores.data(), *slopes = work.slopes.data();
        int32_t *weight_rows = work.weight_rows.data(), *slope_rows = work.slope_rows.data();
        all_dots(scores, queries, k, tokens);
        all_dots(slopes, grads, v, tokens);
        const auto differentiate = [=](int64_t j, Floats kept) __attribute__((always_inline)) {
            const Floats p = exponential(multiply_add(scores[j], fill(scale), -shift)) * factor;
            const Floats slope = p * multiply_add(slopes[j], kept, -delta) * fill(scale);
            slopes[j] = slope;
            narrow(weight_rows + j * GROUPS, p * kept);
            narrow(slope_rows + j * GROUPS, slope);
        };
        if (dropout.threshold)
            for (int64_t j = 0; j < tokens; ++j) differentiate(j, dropout.factor(i * tokens + j, tokens));
        else
            for (int64_t j = 0; j < tokens; ++j) differentiate(j, fill(1.0f));
        slopes[tokens] = Floats{};
        pack_tokens(work.packed, tokens, [=](int64_t j) { return slopes[j]; });
        Floats sums[HEAD_DIM];
        weighted_sum(sums, work.packed, work.paired, tokens);
        store_lanes(sums, dq, i, tokens);
        const int64_t offset = i / PER_WORD * HEAD_DIM;
        add_weighted(work.dv, work.weight_rows, work.paired_dout.data() + offset, tokens);
        add_weighted(work.dk, work.slope_rows, work.paired_q.data() + offset, tokens);
    }
    flush(work.dk, dk, tokens);
    flush(work.dv, dv, tokens);
}

// Adds the sums over the rows of a paired gradient to the bias's.
static void add_rows(const std::vector<int32_t>& rows, int64_t count, float* dbias) {
    RowSums<3 * V> bias;
    for (int64_t row = 0; row < count; ++row)
        for (int v = 0; v < 3 * V; ++v) bias.sums[v] += widen(rows.data() + row * 3 * W + v * GROUPS);
    bias.add_to(dbias);
}

static void backward_group(
    const Group& group, const Parameters& p, const BackwardWeights& weights, const float* x, const float* dout,
    const Saved& saved, float* dx, BackwardBuffers& to) {
    const Call& call = group.call;
    const int64_t rows = group.rows(), first_row = group.first_row();
    const auto gradient = [&](int parameter) { return to.gradients.data() + start_of(parameter); };
    x += first_row * DIM;
    dout += first_row * DIM;
    dx += first_row * DIM;
    int32_t* qkv = saved.qkv + first_row * 3 * W;
    float *statistics1 = to.statistics.data(), *statistics2 = statistics1 + 2;
    std::memcpy(to.attended.data(), saved.attended + first_row * W, rows * W * sizeof(int32_t));
    std::fill(to.attended.begin() + rows * W, to.attended.end(), 0);
    add_projection(group, weights.proj, p, to.attended.data(), x, to.y.data());
    for (int64_t row = 0; row < rows; ++row) {
        moments(x + row * DIM, call.eps1, statistics1 + row * STATISTICS);
        moments(to.y.data() + row * DIM, call.eps2, statistics2 + row * STATISTICS);
    }

    const Norm norm2 = {p.norm2_weight, p.norm2_bias};
    normalise_again(norm2, to.y.data(), statistics2, rows, to.normed.data(), to.paired_normed);
    put_gradient(group, dout, call.mlp_scale, to, gradient(FC2_BIAS));
    backward_hidden(p, weights, rows, to, gradient(FC1_BIAS));
    add_gradient<DIM, HIDDEN_V>(gradient(FC2_WEIGHT), to.paired_dout, to.paired_active, rows);
    add_gradient<HIDDEN, V>(gradient(FC1_WEIGHT), to.paired_dhidden, to.paired_normed, rows);
    product_to(weights.fc1_back, to.dhidden.data(), rows, to.dnormed.data());
    RowSums<V> dweight2, dbias2;
    for (int64_t row = 0; row < rows; ++row) {
        float* grad = to.dnormed.data() + row * DIM;
        const auto add_residual = [&](const float* from, float* onto) {
            for (int v = 0; v < V * LANES; v += LANES) store_floats(onto + v, load_floats(from + v) + load_floats(onto + v));
        };
        if (RESIDUAL_NORM) add_residual(dout + row * DIM, grad);
        norm_gradient(
            norm2, to.y.data() + row * DIM, statistics2 + row * STATISTICS, grad, dweight2.sums, dbias2.sums);
        if (!RESIDUAL_NORM) add_residual(dout + row * DIM, grad);
    }
    dweight2.add_to(gradient(NORM2_WEIGHT));
    dbias2.add_to(gradient(NORM2_BIAS));
    std::swap(to.dy, to.dnormed);

    put_gradient(group, to.dy.data(), call.attention_scale, to, gradient(PROJ_BIAS));
    pair_rows<V>(to.paired_normed, to.attended.data(), padded_rows(rows));
    add_gradient<DIM, V>(gradient(PROJ_WEIGHT), to.paired_dout, to.paired_normed, rows);
    weights.proj_back.product(to.dout.data(), rows, [&](int64_t row, int v, auto& sums) __attribute__((always_inline)) {
#pragma GCC unroll 12
        for (int r = 0; r < weights.proj_back.ROWS; ++r)
#pragma GCC unroll 3
            for (int c = 0; c < weights.proj_back.COLUMNS; ++c)
                put_row(to.dattended.data(), row + r, W, v + c, sums[r][c]);
    });
    const float scale = 1.0f / std::sqrt(float(HEAD_DIM));
    std::fill(to.dqkv.begin() + rows * 3 * W, to.dqkv.end(), 0);
    for (int64_t s = 0; s < group.samples; ++s)
        for (int head = 0; head < HEADS; ++head) {
            const int64_t row = s * call.tokens, n = (group.sample + s) * HEADS + head;
            const auto part = [&](int i) { return head_rows(qkv, row, 3, i, head); };
            const auto dpart = [&](int i) { return head_rows(to.dqkv.data(), row, 3, i, head); };
            float* softmax = saved.softmax + n * 2 * call.tokens;
            backward_attended(
                part(0), part(1), part(2), head_rows(to.attended.data(), row, 1, 0, head),
                head_rows(to.dattended.data(), row, 1, 0, head), dpart(0), dpart(1), dpart(2), call.tokens, scale,
                dropout_of(call, n), {softmax, softmax + call.tokens}, to.heads);
        }
    const Norm norm1 = {p.norm1_weight, p.norm1_bias};
    pair_rows<3 * V>(to.paired_dqkv, to.dqkv.data(), padded_rows(rows));
    if (p.qkv_bias) add_rows(to.dqkv, rows, gradient(QKV_BIAS));
    normalise_again(norm1, x, statistics1, rows, nullptr, to.paired_normed);
    add_gradient<3 * DIM, V>(gradient(QKV_WEIGHT), to.paired_dqkv, to.paired_normed, rows);
    product_to(weights.qkv, to.dqkv.data(), rows, to.dnormed.data());
    RowSums<V> dweight1, dbias1;
    for (int64_t row = 0; row < rows; ++row) {
        float* grad = to.dnormed.data() + row * DIM;
        norm_gradient(norm1, x + row * DIM, statistics1 + row * STATISTICS, grad, dweight1.sums, dbias1.sums);
        for (int v = 0; v < V * LANES; v += LANES)
            store_floats(dx + row * DIM + v, load_floats(grad + v) + load_floats(to.dy.data() + row * DIM + v));
    }
    dweight1.add_to(gradient(NORM1_WEIGHT));
    dbias1.add_to(gradient(NORM1_BIAS));
}

// Writes the gradients of x, and of all parameters one after the other, (TOTAL).
extern "C" void backward(
    const Call* call, const Parameters* p, const float* x, const float* dout, const Saved* saved, float* dx,
    float* gradients) {
    BackwardWeights weights;
    std::vector<const float*> parts(call->threads);
#pragma omp parallel num_threads(call->threads)
    {
        weights.proj.transposed(p->proj_weight);
        weights.fc1.transposed(p->fc1_weight);
        weights.fc2.straight(p->fc2_weight);
        weights.fc1_back.straight(p->fc1_weight);
        weights.proj_back.straight(p->proj_weight);
        weights.qkv.straight(p->qkv_weight);
        BackwardBuffers buffers(rows_of_group(*call), call->tokens);
        parts[omp_get_thread_num()] = buffers.gradients.data();
        for_each_group(
            *call, [&](const Group& group) { backward_group(group, *p, weights, x, dout, *saved, dx, buffers); });
#pragma omp for schedule(static)
        for (int64_t i = 0; i < TOTAL; ++i) {
            float sum = 0.0f;
            for (int t = 0; t < omp_get_num_threads(); ++t) sum += parts[t][i];
            gradients[i] = sum;
        }
    }
}
