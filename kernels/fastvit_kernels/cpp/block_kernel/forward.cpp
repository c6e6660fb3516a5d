// The forward pass of a block. Compiled after common.h.

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
#pragma omp barrier
        ForwardBuffers buffers(rows_of_group(*call), call->tokens);
        for_each_group(*call, [&](const Group& group) { forward_group(group, *p, weights, x, out, *saved, buffers); });
    }
}
