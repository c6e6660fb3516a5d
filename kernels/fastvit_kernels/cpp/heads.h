// Attention of one head of one sample, shared by attention.cpp and block_kernel/, which are compiled after vectors.h and
// this file with HEAD_DIM defined as the number of channels of a head.
//
// A head's data fits into the L1 cache. The lanes of a vector hold queries, so a softmax runs along an array and
// nothing is summed across lanes. For the gradients of keys and values, which are sums over queries, the lanes hold
// channels.

constexpr int WORDS = HEAD_DIM / PER_WORD;
constexpr int VECTORS = (HEAD_DIM + LANES - 1) / LANES;  // vectors for a token's channels, one per lane
constexpr int GROUPS = LANES / PER_WORD;                 // words for a vector of tokens

// The number of accumulators that are kept in registers at a time.
constexpr int tile_of(int channels) {
    for (int size = LANES == 8 ? 12 : 16; size > 1; --size)  // AVX2 has sixteen registers
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

// Loads a vector of tokens, one per lane: lane l of word w is word w of token first + l. Lanes past the end are 0.
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

// Writes the dot products of the lanes' tokens with all tokens of `rows`.
static inline void all_dots(Floats* sums, const Words (&lanes)[WORDS], const Rows& rows, int64_t tokens) {
    const auto some = [&](auto number, int64_t first) __attribute__((always_inline)) {
        constexpr int R = number;  // independent sums, since each is a chain of dependent instructions
        Floats tile[R] = {};
        const int32_t* row = rows[first];
        const int64_t stride = rows.stride;
#pragma GCC unroll 64
        for (int w = 0; w < WORDS; ++w)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) tile[r] = multiply_word(tile[r], lanes[w], row[r * stride + w]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[first + r] = tile[r];
    };
    int64_t token = 0;
    for (; token + 8 <= tokens; token += 8) some(std::integral_constant<int, 8>{}, token);
    for (; token < tokens; ++token) some(std::integral_constant<int, 1>{}, token);
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

// Adds to each token's sums (VECTORS) a vector of other tokens' rows from `paired`, weighted by `weights` (tokens, GROUPS).
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
            narrow(rows[token] + v * GROUPS, sum, std::min(GROUPS, WORDS - v * GROUPS));
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
        Bits x = (lane_numbers() * step + first) * 0x9e3779b1u ^ seed;
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

// Writes dq of the queries from `first` on, and adds their part of dk and dv, from the gradients of their scores (slopes,
// slope_rows) and their weights (weight_rows), with keys, queries and dout paired.
static inline void add_gradients(Workspace& work, const Rows& dq, int64_t first, int64_t tokens) {
    Floats sums[HEAD_DIM];
    const Floats* slopes = work.slopes.data();
    work.slopes[tokens] = Floats{};
    pack_tokens(work.packed, tokens, [=](int64_t j) { return slopes[j]; });
    weighted_sum(sums, work.packed, work.paired, tokens);
    store_lanes(sums, dq, first, tokens);
    const int64_t offset = first / PER_WORD * HEAD_DIM;
    add_weighted(work.dv, work.weight_rows, work.paired_dout.data() + offset, tokens);
    add_weighted(work.dk, work.slope_rows, work.paired_q.data() + offset, tokens);
}

// What a backward pass needs to compute a head's probabilities again, for each query: exp(scale * score - shift) * factor.
struct Softmax {
    float *shift, *factor;  // (tokens); null if not needed
};

static void forward_head(
    const Rows& q, const Rows& k, const Rows& v, const Rows& out, int64_t tokens, float scale, const Dropout& dropout,
    Workspace& work, const Softmax& saved = {}) {
    pair_tokens(work.paired, v, tokens);
    for (int64_t i = 0; i < tokens; i += LANES) {
        Words queries[WORDS];
        load_lanes(queries, q, i, tokens);
        all_dots(work.scores.data(), queries, k, tokens);
        Floats largest, sum, sums[HEAD_DIM];
        softmax(work.scores, tokens, scale, largest, sum);
        pack_tokens(work.packed, tokens, [&](int64_t j) {
            return work.scores[j] * dropout.factor(i * tokens + j, tokens);
        });
        weighted_sum(sums, work.packed, work.paired, tokens);
        const Floats inverse = fill(1.0f) / sum;
        for (Floats& channel : sums) channel *= inverse;
        store_lanes(sums, out, i, tokens);
        if (saved.shift) {
            const int64_t count = std::min<int64_t>(LANES, tokens - i);
            store((int32_t*)saved.shift + i, (Words)(largest * scale), count);
            store((int32_t*)saved.factor + i, (Words)inverse, count);
        }
    }
}
