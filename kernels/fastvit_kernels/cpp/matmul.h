// Matrix products of small matrices that lie in the cache. Compiled after vectors.h.
//
// A product's right operand is packed: vectors of output channels, one word of the summed dimension each. Its left
// operand is read one word at a time. Buffers of rows have room for a multiple of 24 of them, a whole number of tiles.

// A tile: so many sums fit in the registers.
#ifdef __AVX512F__
constexpr int tile_columns(int vectors) { return vectors % 3 == 0 ? 3 : vectors % 2 == 0 ? 2 : 1; }
constexpr int tile_rows(int columns) { return columns == 3 ? 8 : 12; }
constexpr int gradient_rows(int) { return 8; }
#else
constexpr int tile_columns(int) { return 2; }
constexpr int tile_rows(int) { return 6; }
constexpr int gradient_rows(int channels) { return channels % 6 == 0 ? 6 : 4; }
#endif

static inline int64_t padded_rows(int64_t rows) { return (rows + 23) / 24 * 24; }

// sums[r][c] += sum over s of left[r * left_row + s * left_step] * right[c + s * right_step]
template <int R, int C>
static inline __attribute__((always_inline)) void add_products(
    Floats (&sums)[R][C], const int32_t* left, int64_t left_row, int64_t left_step, const Words* right,
    int64_t right_step, int64_t steps) {
    for (int64_t s = 0; s < steps; ++s) {
        Words column[C];
#pragma GCC unroll 3
        for (int c = 0; c < C; ++c) column[c] = right[s * right_step + c];
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const int32_t word = left[r * left_row + s * left_step];
#pragma GCC unroll 3
            for (int c = 0; c < C; ++c) sums[r][c] = multiply_word(sums[r][c], column[c], word);
        }
    }
}

// A weight as the right operand of products with rows of K words, for V vectors of output channels.
template <int K, int V>
struct Packed {
    static constexpr int COLUMNS = tile_columns(V), ROWS = tile_rows(COLUMNS);
    std::vector<Words> words = std::vector<Words>(K * V);  // (V / COLUMNS, K, COLUMNS)

    Words& at(int k, int v) { return words[(v / COLUMNS * K + k) * COLUMNS + v % COLUMNS]; }

    // From a weight (LANES * V, K * PER_WORD) for products x W^T. All threads of the team call this, and a barrier follows.
    void transposed(const float* weight) {
        constexpr int width = K * PER_WORD;
#pragma omp for schedule(static) nowait
        for (int v = 0; v < V; ++v)
            for (int first = 0; first < width; first += LANES) {
                Words square[LANES];
                for (int l = 0; l < LANES; ++l) square[l] = (Words)load_floats(weight + (v * LANES + l) * width + first);
                transpose(square);
                for (int i = 0; i < LANES; i += PER_WORD)
                    at((first + i) / PER_WORD, v) = pack((Floats)square[i], (Floats)square[i + PER_WORD - 1]);
            }
    }

    // From a weight (K * PER_WORD, LANES * V) for products x W. All threads of the team call this, and a barrier follows.
    void straight(const float* weight) {
        constexpr int width = V * LANES;
#pragma omp for schedule(static) nowait
        for (int k = 0; k < K; ++k)
            for (int v = 0; v < V; ++v) {
                const float* row = weight + k * PER_WORD * width + v * LANES;
                at(k, v) = pack(load_floats(row), load_floats(row + (PER_WORD - 1) * width));
            }
    }

    // Adds to the sums of the tile at this row and vector.
    inline __attribute__((always_inline)) void tile(
        Floats (&sums)[ROWS][COLUMNS], const int32_t* rows, int64_t row, int v) const {
        add_products(sums, rows + row * K, K, 1, words.data() + v * K, COLUMNS, K);
    }

    // Calls use(row, vector, sums) for each tile of the product of `rows` with the weight.
    template <class Use>
    inline void product(const int32_t* rows, int64_t count, Use use) const {
        for (int v = 0; v < V; v += COLUMNS)
            for (int64_t row = 0; row < count; row += ROWS) {
                Floats sums[ROWS][COLUMNS] = {};
                tile(sums, rows, row, v);
                use(row, v, sums);
            }
    }
};

// gradient (O, LANES * V) += left^T right, of rows paired as by `pack`: left (pairs, O) words, right (pairs, V) vectors.
template <int O, int V>
static void add_gradient(float* gradient, const std::vector<Words>& left, const std::vector<Words>& right, int64_t rows) {
    constexpr int C = tile_columns(V), R = gradient_rows(O);
    const int32_t* words = (const int32_t*)left.data();
    for (int v = 0; v < V; v += C)
        for (int o = 0; o < O; o += R) {
            Floats sums[R][C] = {};
            add_products(sums, words + o, 1, O, right.data() + v, V, (rows + PER_WORD - 1) / PER_WORD);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
                for (int c = 0; c < C; ++c) {
                    float* out = gradient + (o + r) * V * LANES + (v + c) * LANES;
                    store_floats(out, load_floats(out) + sums[r][c]);
                }
        }
}
