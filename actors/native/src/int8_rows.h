// Products with rows that are quantised to int8 as they come. No include guard: see kernels.cpp.
//
// In a group of columns numbers meet as integers, exactly, in any order. The rest is fp32, by fused multiply-adds:
// the groups that share a scale of the row are added in their order, times their scales, and then those sums, times the
// row's scales. So results have the same bits on every instruction set and for any number of rows and of threads. See
// actors/model/quant/int8_product.py, which is the same in torch.

// a * b + c, rounded once.
static inline __attribute__((always_inline)) vf fused(vf a, vf b, vf c) {
#if HAS_FMA
  return a * b + c;
#else
  for (int i = 0; i < 16; ++i) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
#endif
}

template <class Op>
static inline __attribute__((always_inline)) int32_t reduced(vi v, const Op& op) {
  v = op(v, __builtin_shuffle(v, vi{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = op(v, __builtin_shuffle(v, vi{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  v = op(v, __builtin_shuffle(v, vi{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  v = op(v, __builtin_shuffle(v, vi{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  return v[0];
}

static inline __attribute__((always_inline)) vf widen_16(const float* p) { return load(p); }
static inline __attribute__((always_inline)) vf widen_16(const uint16_t* p) {
  return (vf)Lanes::scales(reinterpret_cast<const uint8_t*>(p), BF16);
}

// 16 integers that int8 holds.
static inline __attribute__((always_inline)) vb narrowed(vi numbers) {
#if HAS_AVX512
  return (vb)_mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)numbers);
#else
  return __builtin_convertvector(numbers, vb);
#endif
}

// The scale of the numbers x .. x + count, a multiple of 32: their largest magnitude / 127.5, not 0; NaN or infinite where
// one of them is.
template <class T>
static float row_scale(const T* x, int64_t count) {
  vi largest{};  // magnitudes are in the order of their bits, NaN the last
  for (int64_t i = 0; i < count; i += 16) {
    const vi bits = (vi)widen_16(x + i) & 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  const int32_t top = reduced(largest, [](vi a, vi b) { return a > b ? a : b; });
  float scale;
  std::memcpy(&scale, &top, 4);
  scale /= 127.5f;
  return scale == 0 ? 0x1p-23f : scale;
}

// to = from[0 .. count] / scale, rounded to even and no more than int8 holds; returns the numbers' sum.
template <class W, class T>
static int32_t round_numbers(const T* from, int64_t count, float scale, int8_t* to) {
  const vf magic = vf{} + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const vf lowest = vf{} - 128.0f, highest = vf{} + 127.0f;
  vi sum{};
  for (int64_t i = 0; i < count; i += 16) {
    vf steps = widen_16(from + i) / scale;
    steps = steps > highest ? highest : steps;
    steps = steps < lowest ? lowest : steps;
    const vi number = (vi)(steps + magic) - (vi)magic;
    sum += number << 24 >> 24;  // as it is stored, NaN too
    *reinterpret_cast<vb*>(to + i) = narrowed(W::in_order(number));
  }
  return reduced(sum, [](vi a, vi b) { return a + b; });
}

// A kind of weights for rows of int8. Zero points are in PARTS of a step, so in a group integers are that many times what
// they stand for, and its scale so much less, by a power of two: of up to 65,536 columns, as Python lets in, they are at
// most 255 * 128 * 65,536, which int32 just holds. A row has k numbers; then its scales; then, for each group of the weights' columns,
// the sum of its numbers: weights are unsigned in products, and that many times their zero point is too much.
struct Int8Rows {
  using Row = int8_t;
  static constexpr bool dense = false, rounds_rows = true;

  static int64_t row_groups(const Matrix& w, int64_t k) { return (k + w.row_group - 1) / w.row_group; }
  static int64_t sums_at(const Matrix& w, int64_t k) { return k + 4 * row_groups(w, k); }
  static int64_t width(const Matrix& w, int64_t k) { return rounded_up(sums_at(w, k) + 4 * groups_of(w, k), 128) + 64; }
  static const float* scales(const int8_t* row, int64_t k) { return reinterpret_cast<const float*>(row + k); }
};

struct W8 : Int8Rows {
  using Zero = int8_t;
  static constexpr int COLUMNS = 4, FOURS = 1;  // in a dword of each lane
  static constexpr int32_t MOVED = 128, MIDDLE = 128, PARTS = 1;
  static int64_t row_bytes(int64_t k) { return k; }
  static inline __attribute__((always_inline)) vi in_order(vi columns) { return columns; }
  static inline __attribute__((always_inline)) void fours(vi dwords, Four* out) {
    *out = four_of(dwords ^ static_cast<int32_t>(0x80808080u));  // + 128
  }
};

// Two numbers in a byte, the first in its low half: of each 8 columns a row has the even ones before the odd ones.
struct W4 : Int8Rows {
  using Zero = uint8_t;
  static constexpr int COLUMNS = 8, FOURS = 2;
  static constexpr int32_t MOVED = 0, MIDDLE = 8 * 8, PARTS = 8;
  static int64_t row_bytes(int64_t k) { return k / 2; }
  static inline __attribute__((always_inline)) vi in_order(vi columns) {
    return __builtin_shuffle(columns, vi{0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15});
  }
  static inline __attribute__((always_inline)) void fours(vi dwords, Four* out) {
    out[0] = four_of(dwords & 0x0f0f0f0f);
    out[1] = four_of((vi)((vu)dwords >> 4) & 0x0f0f0f0f);
  }
};

template <class W, class T>
static void round_row(const T* from, int64_t k, const Matrix& w, int8_t* to) {
  float* scale = reinterpret_cast<float*>(to + k);
  int32_t* sum = reinterpret_cast<int32_t*>(scale + W::row_groups(w, k));
  for (int64_t start = 0; start < k; start += w.row_group, ++scale) {
    const int64_t end = std::min(start + w.row_group, k);
    *scale = row_scale(from + start, end - start);
    for (int64_t i = start; i < end; i += w.group)
      *sum++ = round_numbers<W>(from + i, std::min(w.group, end - i), *scale, to + i);
  }
}

// out[m][b] = the integer products of MR rows with the columns i .. end of a group of each block.
template <class W, int MR, int BLOCKS>
static inline __attribute__((always_inline)) void group_product(
    const int8_t* const* x, const Lanes* lanes, int64_t i, int64_t end, vi (*out)[BLOCKS]) {
  constexpr int SUMS = MR * BLOCKS, CHAINS = SUMS <= 4 ? 2 : 1;  // sums that do not wait for each other
  vi sum[CHAINS * SUMS] = {};
  for (; i < end; i += CHAINS * W::COLUMNS)
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const int64_t column = i + c * W::COLUMNS;
      Four w[BLOCKS][W::FOURS];
#pragma GCC unroll 2
      for (int b = 0; b < BLOCKS; ++b) {
        const uint8_t* at = lanes[b].numbers + column * (64 / W::COLUMNS);
        fetch(at + BYTES_AHEAD);
        W::fours(load_dwords(at), w[b]);
      }
#pragma GCC unroll 2
      for (int f = 0; f < W::FOURS; ++f)
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
          for (int b = 0; b < BLOCKS; ++b) {
            vi& one = sum[c * SUMS + m * BLOCKS + b];
            one = dot(w[b][f], x[m] + column + 4 * f, one);
          }
    }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; ++b) {
      out[m][b] = sum[m * BLOCKS + b];
#pragma GCC unroll 4
      for (int c = 1; c < CHAINS; ++c) out[m][b] += sum[c * SUMS + m * BLOCKS + b];
    }
}

// total[m][b] += the products of MR rows, from column start on to end, all of the r-th of their groups, with the weights of
// each block, which lie as in w; g: the first of their groups. No part of its caller, whose sums would take the registers.
template <class W, int MR, int BLOCKS>
static __attribute__((noinline)) void add_row_group(const int8_t* const* x, const Lanes* lanes, const Matrix& w, int64_t k,
                                                    int64_t start, int64_t end, int64_t r, int64_t g, vf (*total)[BLOCKS]) {
  vf part[MR][BLOCKS] = {};
  const int64_t sums = W::sums_at(w, k);
  for (int64_t i = start; i < end; i += w.group, ++g) {
    vi whole[MR][BLOCKS];
    group_product<W, MR, BLOCKS>(x, lanes, i, std::min(i + w.group, end), whole);
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; ++b) {
      const vf scale = lanes[b].scale[g];
      const vi zero = lanes[b].zero[g];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        whole[m][b] = whole[m][b] * W::PARTS - zero * reinterpret_cast<const int32_t*>(x[m] + sums)[g];
        part[m][b] = fused(__builtin_convertvector(whole[m][b], vf), scale, part[m][b]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int b = 0; b < BLOCKS; ++b) total[m][b] = fused(part[m][b], W::scales(x[m], k)[r] - vf{}, total[m][b]);
}

// out[m][b] = the products of MR rows with the weights of each block.
template <class W, int MR, int BLOCKS>
static void lanes_product(const int8_t* const* x, const Lanes* lanes, const Matrix& w, int64_t k, vf (*out)[BLOCKS]) {
  const int64_t step = (w.row_group + w.group - 1) / w.group;
  for (int m = 0; m < MR; ++m)
    for (int b = 0; b < BLOCKS; ++b) out[m][b] = vf{};
  for (int64_t start = 0, r = 0; start < k; start += w.row_group, ++r)
    add_row_group<W, MR, BLOCKS>(x, lanes, w, k, start, std::min(start + w.row_group, k), r, r * step, out);
}

// Blocks of weights whose products with so many rows stay in registers.
constexpr int64_t MOST_BLOCKS = 2, ROWS_OF_TWO = std::min(TILE_M, 6);
static constexpr int blocks_for(int rows) { return rows <= ROWS_OF_TWO ? MOST_BLOCKS : 1; }

// put(m, n + j, value) for all rows m of x and the count weights of all lanes, which begin with n, in tiles of about
// the same size.
template <class W, class Put>
static void multiply_blocks(const int8_t* const* x, int64_t rows, const Lanes* lanes, const Matrix& w, int64_t n,
                            int64_t count, int64_t k, const Put& put) {
  const int64_t most = rows <= TILE_M ? TILE_M : ROWS_OF_TWO, tiles = (rows + most - 1) / most;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
    with_rows(static_cast<int>(last - first), [&](auto mr) {
      constexpr int MR = decltype(mr)::value, BLOCKS = blocks_for(MR);
      for (int64_t b = 0; b * LANES < count; b += BLOCKS) {
        vf out[MR][BLOCKS];
        lanes_product<W, MR, BLOCKS>(x + first, lanes + b, w, k, out);
        for (int m = 0; m < MR; ++m)
          for (int64_t c = b; c < b + BLOCKS && c * LANES < count; ++c) {
            float value[LANES];
            std::memcpy(value, &out[m][c - b], sizeof value);
            if (count - c * LANES >= LANES) for (int j = 0; j < LANES; ++j) put(first + m, n + c * LANES + j, value[j]);
            else for (int j = 0; j < count - c * LANES; ++j) put(first + m, n + c * LANES + j, value[j]);
          }
      }
    });
  }
}

// put(m, n, value) for all rows m of x and the weights n = from .. to of w [.., k].
template <class W, class Put>
static void multiply_lanes(const int8_t* const* x, int64_t rows, const Matrix& w, int64_t from, int64_t to, int64_t k,
                           const Put& put) {
  const int64_t block_room = lanes_room<W>(w, k);
  const Scratch<vi, NUMBERS> room(MOST_BLOCKS * block_room);
  for (int64_t n = from; n < to; n += MOST_BLOCKS * LANES) {
    Lanes lanes[MOST_BLOCKS];
    for (int64_t b = 0; b < MOST_BLOCKS; ++b) {
      const int64_t start = n + b * LANES, count = std::min(LANES, to - start);
      lanes[b] = count > 0 ? lanes_of<W>(w, start, count, k, room.get() + b * block_room) : lanes[0];
    }
    multiply_blocks<W>(x, rows, lanes, w, n, std::min(MOST_BLOCKS * LANES, to - n), k, put);
  }
}
