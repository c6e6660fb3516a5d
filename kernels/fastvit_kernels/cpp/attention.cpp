// Attention on packed projections for CPUs, forward and backward. attention.py compiles this file after vectors.h and
// heads.h. A task is one head of one sample. The backward pass recomputes the scores.

// dscore = p (dp - delta), with delta = sum over keys of p dp (Dao et al. 2022, appendix B.2)
static void backward_head(
    const Rows& q, const Rows& k, const Rows& v, const Rows& dout, const Rows& dq, const Rows& dk, const Rows& dv,
    int64_t tokens, float scale, const Dropout& dropout, Workspace& work) {
    pair_tokens(work.paired, k, tokens);
    pair_tokens(work.paired_q, q, tokens);
    pair_tokens(work.paired_dout, dout, tokens);
    for (int64_t i = 0; i < tokens; i += LANES) {
        Words queries[WORDS], grads[WORDS];
        load_lanes(queries, q, i, tokens);
        load_lanes(grads, dout, i, tokens);
        all_dots(work.scores.data(), queries, k, tokens);
        all_dots(work.slopes.data(), grads, v, tokens);
        Floats largest, sum, delta = {};
        softmax(work.scores, tokens, scale, largest, sum);
        const Floats inverse = fill(1.0f) / sum;
        for (int64_t start = 0; start < tokens; start += CHUNK) {
            Floats part = {};
            for (int64_t j = start; j < std::min(tokens, start + CHUNK); ++j) {
                const Floats factor = dropout.factor(i * tokens + j, tokens);
                work.scores[j] *= inverse;
                work.slopes[j] *= factor;
                part = multiply_add(work.scores[j], work.slopes[j], part);
                narrow(&work.weight_rows[j * GROUPS], work.scores[j] * factor);
            }
            delta += part;
        }
        for (int64_t j = 0; j < tokens; ++j) {
            work.slopes[j] = work.scores[j] * (work.slopes[j] - delta) * scale;
            narrow(&work.slope_rows[j * GROUPS], work.slopes[j]);
        }
        add_gradients(work, dq, i, tokens);
    }
    flush(work.dk, dk, tokens);
    flush(work.dv, dv, tokens);
}

// The sizes and settings of a call.
struct Call {
    int64_t batch, tokens, heads;
    float dropout_p;
    uint32_t seed;
    int threads;
};

template <class Task>
static void for_each_head(const Call& call, Task task) {
    const Dropout dropout = {uint32_t(call.dropout_p * 16777216.0f), 1.0f / (1.0f - call.dropout_p), call.seed};
    const float scale = 1.0f / std::sqrt(float(HEAD_DIM));
#pragma omp parallel num_threads(call.threads)
    {
        Workspace work(call.tokens);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < call.batch * call.heads; ++n)
            task(n / call.heads, n % call.heads, scale, dropout.of_head(n), work);
    }
}

// Operand `part` of the `parts` in each token's row of a tensor (batch, tokens, parts * dim).
static Rows rows_of(void* data, const Call& call, int parts, int64_t sample, int part, int64_t head) {
    const int64_t dim = call.heads * WORDS, stride = parts * dim;
    return {static_cast<int32_t*>(data) + sample * call.tokens * stride + part * dim + head * WORDS, stride};
}

extern "C" void forward(const Call* call, void* qkv, void* out) {
    for_each_head(*call, [=](int64_t sample, int64_t head, float scale, const Dropout& dropout, Workspace& work) {
        const auto packed = [=](int part) { return rows_of(qkv, *call, 3, sample, part, head); };
        const Rows result = rows_of(out, *call, 1, sample, 0, head);
        forward_head(packed(0), packed(1), packed(2), result, call->tokens, scale, dropout, work);
    });
}

extern "C" void backward(const Call* call, void* qkv, void* dout, void* dqkv) {
    for_each_head(*call, [=](int64_t sample, int64_t head, float scale, const Dropout& dropout, Workspace& work) {
        const auto packed = [=](void* data, int part) { return rows_of(data, *call, 3, sample, part, head); };
        const Rows grads = rows_of(dout, *call, 1, sample, 0, head);
        backward_head(
            packed(qkv, 0), packed(qkv, 1), packed(qkv, 2), grads, packed(dqkv, 0), packed(dqkv, 1), packed(dqkv, 2),
            call->tokens, scale, dropout, work);
    });
}
