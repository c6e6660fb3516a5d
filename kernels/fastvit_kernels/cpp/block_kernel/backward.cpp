// The backward pass of a block. Compiled after common.h.

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

// Writes scale * gradient as rows and as pairs, with zeros after the last row, and adds up the gradient of the bias.
static void put_gradient(
    const Group& group, const float* gradient, const float* scales, BackwardBuffers& to, float* dbias) {
    RowSums<V> bias;
    const int64_t rows = group.rows();
    for (int64_t row = 0; row < padded_rows(rows); row += 2) {
        for (int v = 0; v < V; ++v) {
            const auto scaled = [&](int64_t at) {
                return at < rows ? load_floats(gradient + at * DIM + v * LANES) * group.scale(scales, at) : Floats{};
            };
            const Floats first = scaled(row), second = scaled(row + 1);
            bias.run[v] += first + second;
            put_row(to.dout.data(), row, W, v, first);
            put_row(to.dout.data(), row + 1, W, v, second);
            put_pair<V>(to.paired_dout, row, v, first, second);
        }
        bias.end_row(row);
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
            for (int c = 0; c < C; ++c) {
                const Floats bias_c = load_floats(p.fc1_bias + (v + c) * LANES);
                Floats tile_sum = {};
                for (int r = 0; r < R; r += 2) {
                    Floats active[2], slopes[2];
                    for (int i = 0; i < 2; ++i) {
                        slopes[i] = gelu_gradient(hidden[r + i][c] + bias_c, grads[r + i][c], active[i]);
                        put_row(to.dhidden.data(), row + r + i, HIDDEN_W, v + c, slopes[i]);
                    }
                    tile_sum += slopes[0] + slopes[1];
                    put_pair<HIDDEN_V>(to.paired_active, row + r, v + c, active[0], active[1]);
                    put_pair<HIDDEN_V>(to.paired_dhidden, row + r, v + c, slopes[0], slopes[1]);
                }
                bias.total[v + c] += tile_sum;
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
        add_gradients(work, dq, i, tokens);
    }
    flush(work.dk, dk, tokens);
    flush(work.dv, dv, tokens);
}

// Adds the sums over the rows of a paired gradient to the bias's.
static void add_rows(const std::vector<int32_t>& rows, int64_t count, float* dbias) {
    RowSums<3 * V> bias;
    for (int64_t row = 0; row < count; ++row) {
        for (int v = 0; v < 3 * V; ++v) bias.run[v] += widen(rows.data() + row * 3 * W + v * GROUPS);
        bias.end_row(row);
    }
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
            norm2, to.y.data() + row * DIM, statistics2 + row * STATISTICS, grad, dweight2.run, dbias2.run);
        dweight2.end_row(row);
        dbias2.end_row(row);
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
        norm_gradient(norm1, x + row * DIM, statistics1 + row * STATISTICS, grad, dweight1.run, dbias1.run);
        dweight1.end_row(row);
        dbias1.end_row(row);
        for (int v = 0; v < V * LANES; v += LANES)
            store_floats(dx + row * DIM + v, load_floats(grad + v) + load_floats(to.dy.data() + row * DIM + v));
    }
    dweight1.add_to(gradient(NORM1_WEIGHT));
    dbias1.add_to(gradient(NORM1_BIAS));
}

// Writes the gradients of x and of the parameters.
extern "C" void backward(
    const Call* call, const Parameters* p, const float* x, const float* dout, const Saved* saved, float* dx,
    float* const* gradients) {
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
#pragma omp barrier
        BackwardBuffers buffers(rows_of_group(*call), call->tokens);
        parts[omp_get_thread_num()] = buffers.gradients.data();
        for_each_group(
            *call, [&](const Group& group) { backward_group(group, *p, weights, x, dout, *saved, dx, buffers); });
        for (int parameter = 0; parameter < 12; ++parameter) {
            if (!gradients[parameter]) continue;
            const int64_t start = start_of(parameter);
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < SIZES[parameter]; ++i) {
                float sum = 0.0f;
                for (int t = 0; t < omp_get_num_threads(); ++t) sum += parts[t][start + i];
                gradients[parameter][i] = sum;
            }
        }
#pragma omp barrier  // before a thread's sums cease to exist
    }
}
