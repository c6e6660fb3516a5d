// Attention on packed projections for CPUs, forward and backward. attention.py compiles this file after vectors.h, with
// HEAD_DIM defined as the number of channels of a head.
//
// A task is one head of one sample; its data fits into the L1 cache. The lanes of a vector hold sixteen queries, so a
// softmax runs along an array and nothing is summed across lanes. For the gradients of keys and values, which are sums
// over queries, the lanes hold channels. The backward pass recomputes the scores.

constexpr int WORDS = HEAD_DIM / PER_WORD;
constexpr int VECTORS = (HEAD_DIM + LANES - 1) / LANES;  // vectors for a token's channels, one per lane
constexpr int GROUPS = LANES / PER_WORD;                 // words for sixteen tokens

// The number of accumulators that are kept in registers at a time.
constexpr int tile_of(int channels) {
    for (int size = 16; size > 1; --size)
        if (channels % size == 0) return size;
    return 1;
}
constexpr int TILE = tile_of(HEAD_DIM);

// Sums are computed in chunks of this many terms, which reduces rounding errors.
constexpr int64_t CHUNK = 32;

// One operand of a head: a row per token.
struct Rows {
    int32_t* words;
    int64_t stride;  // from token to token, in words

    int32_t* operator[](int64_t token) const { return words + token * stride; }
};

// Loads up to sixteen tokens, one per lane: lane l of word w is word w of token first + l. Lanes past the end are 0.
static inline void load_lanes(Words (&lanes)[WORDS], const Rows& rows, int64_t first, int64_t tokens) {
#pragma GCC unroll 8
    for (int start = 0; start < WORDS; start += LANES) {
        const int count = std::min(LANES, WORDS - start);
        Words square[LANES];
        for (int64_t l = 0; l < LANES; ++l)
            square[l] = first + l < tokens ? load(rows[first + l] + start, count) : Words{};
        transpose(square);
        for (int w = 0; w < count; ++w) lanes[start + w] = square[w];
    }
}

static inline void store_lanes(const Floats (&channels)[HEAD_DIM], const Rows& rows, int64_t first, int64_t tokens) {
#pragma GCC unroll 8
    for (int start = 0; start < WORDS; start += LANES) {
        const int count = std::min(LANES, WORDS - start);
        Words square[LANES] = {};
        for (int w = 0; w < count; ++w) {
            const Floats* pair = channels + (start + w) * PER_WORD;
            square[w] = pack(pair[0], pair[PER_WORD - 1]);
        }
        transpose(square);
        for (int64_t l = 0; l < LANES && first + l < tokens; ++l) store(rows[first + l] + start, square[l], count);
    }
}

// Dot products of the lanes' tokens with one token's row.
static inline Floats dot(const Words (&lanes)[WORDS], const int32_t* row) {
    Floats sum = {};
#pragma GCC unroll 32
    for (int w = 0; w < WORDS; ++w) sum = multiply_word(sum, lanes[w], row[w]);
    return sum;
}

// Packs rows into words of consecutive tokens, (tokens / PER_WORD, HEAD_DIM), padded with zeros.
static void pair_tokens(std::vector<int32_t>& paired, const Rows& rows, int64_t tokens) {
    paired.resize((tokens / LANES + 1) * GROUPS * HEAD_DIM + 2 * LANES);  // room for whole vectors
    for (int64_t token = 0; token < tokens; token += PER_WORD)
        for (int start = 0; start < WORDS; start += LANES) {
            const int count = std::min(LANES, WORDS - start);
            int32_t* out = paired.data() + token / PER_WORD * HEAD_DIM + start * PER_WORD;
            const Words first = load(rows[token] + start, count);
#if BFLOAT16
            Words words[2];
            pair(first, token + 1 < tokens ? load(rows[token + 1] + start, count) : Words{}, words);
            std::memcpy(out, words, sizeof words);
#else
            std::memcpy(out, &first, sizeof first);
#endif
        }
}

// Sums weight * row over all tokens, for each lane; weights (tokens / PER_WORD) come from `pack`.
static inline void weighted_sum(
    Floats (&sums)[HEAD_DIM], const std::vector<Words>& weights, const std::vector<int32_t>& paired, int64_t tokens) {
    const int64_t groups = (tokens + PER_WORD - 1) / PER_WORD;
    for (int first = 0; first < HEAD_DIM; first += TILE) {
        Floats total[TILE] = {};
        for (int64_t start = 0; start < groups; start += CHUNK) {
            Floats tile[TILE] = {};
            for (int64_t g = start; g < std::min(groups, start + CHUNK); ++g) {
                const Words weight = weights[g];
                const int32_t* row = paired.data() + g * HEAD_DIM + first;
#pragma GCC unroll 16
                for (int c = 0; c < TILE; ++c) tile[c] = multiply_word(tile[c], weight, row[c]);
            }
            for (int c = 0; c < TILE; ++c) total[c] += tile[c];
        }
        std::memcpy(sums + first, total, sizeof total);
    }
}

// Adds to each token's sums (VECTORS) sixteen other tokens' rows from `paired`, weighted by `weights` (tokens, GROUPS).
static inline void add_weighted(
    std::vector<Floats>& sums, const std::vector<int32_t>& weights, const int32_t* paired, int64_t tokens) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
        Words rows[GROUPS];
        for (int g = 0; g < GROUPS; ++g) std::memcpy(&rows[g], paired + g * HEAD_DIM + v * LANES, sizeof rows[g]);
        for (int64_t token = 0; token < tokens; ++token) {
            Floats sum = {};
#pragma GCC unroll 16
            for (int g = 0; g < GROUPS; ++g) sum = multiply_word(sum, rows[g], weights[token * GROUPS + g]);
            sums[token * VECTORS + v] += sum;
        }
    }
}

// Writes sums (tokens, VECTORS) to rows and sets them to zero.
static inline void flush(std::vector<Floats>& sums, const Rows& rows, int64_t tokens) {
    for (int64_t token = 0; token < tokens; ++token)
        for (int v = 0; v < VECTORS; ++v) {
            Floats& sum = sums[token * VECTORS + v];
            Words words = {};
            narrow((int32_t*)&words, sum);
            store(rows[token] + v * GROUPS, words, std::min(GROUPS, WORDS - v * GROUPS));
            sum = Floats{};
        }
}

// Selects the attention weights that dropout keeps, by a hash of seed, head, query and key.
struct Dropout {
    uint32_t threshold;  // of 2^24
    float kept_scale;
    uint32_t seed;

    static uint32_t mix(uint32_t x) {
        x = (x ^ (x >> 16)) * 0x85ebca6bu;
        x = (x ^ (x >> 13)) * 0xc2b2ae35u;
        return x ^ (x >> 16);
    }

    Dropout of_head(int64_t head) const { return {threshold, kept_scale, mix(seed + 0x9e3779b9u * uint32_t(head))}; }

    // The factor of each lane's weight, whose index within the head is first + lane * step.
    Floats factor(uint32_t first, uint32_t step) const {
        if (!threshold) return fill(1.0f);
        const Bits count = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        Bits x = (count * step + first) * 0x9e3779b1u ^ seed;
        x = (x ^ (x >> 16)) * 0x85ebca6bu;
        x = (x ^ (x >> 13)) * 0xc2b2ae35u;
        x = (x ^ (x >> 16)) >> 8;
        return x >= fill<Bits, uint32_t>(threshold) ? fill(kept_scale) : fill(0.0f);
    }
};

// The buffers of a thread, reused for all its heads.
struct Workspace {
    std::vector<Floats> scores, slopes;
    std::vector<Words> packed;
    std::vector<int32_t> weight_rows, slope_rows, paired, paired_q, paired_dout;
    std::vector<Floats> dk, dv;

    explicit Workspace(int64_t tokens)
        : scores(tokens + 1), slopes(tokens + 1), packed(tokens + 1), weight_rows(tokens * GROUPS),
          slope_rows(tokens * GROUPS), dk(tokens * VECTORS), dv(tokens * VECTORS) {}
};

// Replaces the unscaled scores by unnormalised probabilities; returns the lanes' maxima and sums. Appends a 0, which
// pairs with the last score if their number is odd.
static inline void softmax(std::vector<Floats>& scores, int64_t tokens, float scale, Floats& largest, Floats& sum) {
    largest = scores[0];
    for (int64_t j = 1; j < tokens; ++j) largest = larger(largest, scores[j]);
    scores[tokens] = Floats{};
    sum = Floats{};
    for (int64_t start = 0; start < tokens; start += CHUNK) {
        Floats part = {};
        for (int64_t j = start; j < std::min(tokens, start + CHUNK); ++j) {
            scores[j] = exponential((scores[j] - largest) * scale);
            part += scores[j];
        }
        sum += part;
    }
}

// Packs function(token) for all tokens; if their number is odd, function is also called for the token after the last.
template <class Function>
static inline void pack_tokens(std::vector<Words>& packed, int64_t tokens, Function function) {
    for (int64_t token = 0; token < tokens; token += PER_WORD) {
        const Floats first = function(token);
        packed[token / PER_WORD] = pack(first, PER_WORD == 2 ? function(token + 1) : first);
    }
}

static void forward_head(
    const Rows& q, const Rows& k, const Rows& v, const Rows& out, int64_t tokens, float scale, const Dropout& dropout,
    Workspace& work) {
    pair_tokens(work.paired, v, tokens);
    for (int64_t i = 0; i < tokens; i += LANES) {
        Words queries[WORDS];
        load_lanes(queries, q, i, tokens);
        for (int64_t j = 0; j < tokens; ++j) work.scores[j] = dot(queries, k[j]);
        Floats largest, sum, sums[HEAD_DIM];
        softmax(work.scores, tokens, scale, largest, sum);
        pack_tokens(work.packed, tokens, [&](int64_t j) {
            return work.scores[j] * dropout.factor(i * tokens + j, tokens);
        });
        weighted_sum(sums, work.packed, work.paired, tokens);
        const Floats inverse = fill(1.0f) / sum;
        for (Floats& channel : sums) channel *= inverse;
        store_lanes(sums, out, i, tokens);
    }
}

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
        for (int64_t j = 0; j < tokens; ++j) work.scores[j] = dot(queries, k[j]);
        Floats largest, sum, sums[HEAD_DIM], delta = {};
        softmax(work.scores, tokens, scale, largest, sum);
        const Floats inverse = fill(1.0f) / sum;
        for (int64_t start = 0; start < tokens; start += CHUNK) {
            Floats part = {};
            for (int64_t j = start; j < std::min(tokens, start + CHUNK); ++j) {
                const Floats factor = dropout.factor(i * tokens + j, tokens);
                work.scores[j] *= inverse;
                work.slopes[j] = dot(grads, v[j]) * factor;
                part = multiply_add(work.scores[j], work.slopes[j], part);
                narrow(&work.weight_rows[j * GROUPS], work.scores[j] * factor);
            }
            delta += part;
        }
        for (int64_t j = 0; j < tokens; ++j) {
            work.slopes[j] = work.scores[j] * (work.slopes[j] - delta) * scale;
            narrow(&work.slope_rows[j * GROUPS], work.slopes[j]);
        }
        work.slopes[tokens] = Floats{};
        pack_tokens(work.packed, tokens, [&](int64_t j) { return work.slopes[j]; });
        weighted_sum(sums, work.packed, work.paired, tokens);
        store_lanes(sums, dq, i, tokens);
        const int64_t offset = i / PER_WORD * HEAD_DIM;
        add_weighted(work.dv, work.weight_rows, work.paired_dout.data() + offset, tokens);
        add_weighted(work.dk, work.slope_rows, work.paired_q.data() + offset, tokens);
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
