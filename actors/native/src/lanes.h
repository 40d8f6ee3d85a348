// Weights side by side, one in each of 16 lanes, for products of integers. No include guard: see kernels.cpp.

using vb = int8_t __attribute__((vector_size(16), aligned(1), may_alias));

static inline __attribute__((always_inline)) vi load_dwords(const void* p) { return (vi)*static_cast<const vu*>(p); }

// Four columns of 16 weights, unsigned bytes, as products of integers want them, and
// dot: sum + the products of each lane's four with the signed ones at x.
#if HAS_VNNI
using Four = vi;
static inline __attribute__((always_inline)) Four four_of(vi bytes) { return bytes; }
static inline __attribute__((always_inline)) vi dot(Four w, const int8_t* x, vi sum) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(four));
}
#else
struct Four {
  vi even, odd;  // two 16-bit integers in each lane
};
static inline __attribute__((always_inline)) Four four_of(vi bytes) {
  return {bytes & 0x00ff00ff, (vi)((vu)bytes >> 8) & 0x00ff00ff};
}
// The sums of the products of two 16-bit integers in each lane.
static inline __attribute__((always_inline)) vi dot_pairs(vi a, vi b) {
#if HAS_AVX512
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif HAS_AVX2
  vi out;
  for (int i = 0; i < 64; i += 32) {
    __m256i x, y;
    std::memcpy(&x, reinterpret_cast<const char*>(&a) + i, 32);
    std::memcpy(&y, reinterpret_cast<const char*>(&b) + i, 32);
    x = _mm256_madd_epi16(x, y);
    std::memcpy(reinterpret_cast<char*>(&out) + i, &x, 32);
  }
  return out;
#else
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
static inline __attribute__((always_inline)) vi dot(Four w, const int8_t* x, vi sum) {
  const auto pair = [](int low, int high) { return vi{} + static_cast<int32_t>((low & 0xffff) | unsigned(high) << 16); };
  return sum + dot_pairs(w.even, pair(x[0], x[2])) + dot_pairs(w.odd, pair(x[1], x[3]));
}
#endif

// 16 rows of 16 numbers become 16 columns.
static inline __attribute__((always_inline)) void transpose(const vi* row, vi* column) {
  constexpr vi LOW{0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
  constexpr vi HIGH{2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
  constexpr vi LOW_TWO{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr vi HIGH_TWO{2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  constexpr vi EVEN{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
  constexpr vi ODD{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
  vi quad[4][4];  // [q][j] has in its part L of 4 lanes column 4 L + j of the rows from 4 q on
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const vi *r = row + 4 * q, a = __builtin_shuffle(r[0], r[1], LOW), b = __builtin_shuffle(r[0], r[1], HIGH);
    const vi c = __builtin_shuffle(r[2], r[3], LOW), d = __builtin_shuffle(r[2], r[3], HIGH);
    quad[q][0] = __builtin_shuffle(a, c, LOW_TWO);
    quad[q][1] = __builtin_shuffle(a, c, HIGH_TWO);
    quad[q][2] = __builtin_shuffle(b, d, LOW_TWO);
    quad[q][3] = __builtin_shuffle(b, d, HIGH_TWO);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const vi a = __builtin_shuffle(quad[0][j], quad[1][j], EVEN), b = __builtin_shuffle(quad[0][j], quad[1][j], ODD);
    const vi c = __builtin_shuffle(quad[2][j], quad[3][j], EVEN), d = __builtin_shuffle(quad[2][j], quad[3][j], ODD);
    column[j] = __builtin_shuffle(a, c, EVEN);
    column[4 + j] = __builtin_shuffle(b, d, EVEN);
    column[8 + j] = __builtin_shuffle(a, c, ODD);
    column[12 + j] = __builtin_shuffle(b, d, ODD);
  }
}

constexpr int64_t LANES = 16;

constexpr int64_t BYTES_AHEAD = 4096;  // so much further on numbers are fetched

// A block of 16 weights, one in each lane: dwords of their numbers, four columns of int8 or eight of int4; and for each
// group the scales, each for one part of a step, and the zero points in such parts.
struct Lanes {
  const uint8_t* numbers;
  const vf* scale;
  const vi* zero;

  // The bits of 16 scales, as fp32.
  static inline __attribute__((always_inline)) vi scales(const uint8_t* p, int64_t kind) {
    using half = uint16_t __attribute__((vector_size(32), aligned(1), may_alias));
    if (kind == FP32) return load_dwords(p);
    const vu bits = __builtin_convertvector(*reinterpret_cast<const half*>(p), vu);
    if (kind == BF16) return (vi)(bits << 16);
    const vf magnitude = (vf)((bits & 0x7fffu) << 13) * 0x1p112f;  // see from_fp16
    return (vi)((vu)magnitude | (bits & 0x8000u) << 16);
  }
};

static int64_t groups_of(const Matrix& w, int64_t k) { return (k + w.group - 1) / w.group; }

// Rows of a matrix in memory, of which each lane gets one: 16, or less at the matrix's end.
struct Block {
  const uint8_t* first;
  int64_t row_bytes, rows;

  Block(const void* data, int64_t n, int64_t count, int64_t bytes)
      : first(static_cast<const uint8_t*>(data) + n * bytes), row_bytes(bytes), rows(count) {}
};

// fn(i, columns i .. i + 16) for all count columns of a block; read(p): 16 numbers from p on, of so many bytes each.
template <class Read, class Fn>
static inline __attribute__((always_inline)) void columns_of(const Block& block, int64_t count, int64_t bytes,
                                                             const Read& read, const Fn& fn) {
  vi rows[16], columns[16];
  for (int64_t i = 0; i < count; i += 16) {
    const uint8_t* p = block.first + i * bytes;
    if (block.rows == LANES && i + 16 <= count) {
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j) {
        rows[j] = read(p + j * block.row_bytes);
        fetch(p + (LANES + j) * block.row_bytes);
      }
    } else {
      uint8_t ends[16][64] = {};
      for (int64_t j = 0; j < block.rows; ++j)
        std::memcpy(ends[j], p + j * block.row_bytes, std::min<int64_t>(16, count - i) * bytes);
      for (int j = 0; j < 16; ++j) rows[j] = read(ends[j]);
    }
    transpose(rows, columns);
    fn(i, columns);
  }
}

// fn(i, the elements i .. i + 16 of 16 lanes) for all count elements of a block's rows; see columns_of.
template <class Read, class Fn>
static inline __attribute__((always_inline)) void lanes_each(const Block& block, bool in_lanes, int64_t count,
                                                             int64_t bytes, const Read& read, const Fn& fn) {
  if (!in_lanes) return columns_of(block, count, bytes, read, [&](int64_t i, const vi* columns) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) fn(i + j, columns[j]);
  });
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t* p = block.first + i * LANES * bytes;
    for (int64_t line = 0; line < LANES * bytes; line += 64) fetch(p + 2 * count * LANES * bytes + line);
    fn(i, read(p));
  }
}

template <class B>
static int64_t lanes_room(const Matrix& w, int64_t k) {
  const int64_t dwords = w.in_lanes ? 0 : rounded_up(B::row_bytes(k) / 4, 16);
  return dwords + 2 * rounded_up(groups_of(w, k), 16);
}

// The count weights of w from n on, no more than 16, with what does not lie as it is needed in room.
template <class B>
static Lanes lanes_of(const Matrix& w, int64_t n, int64_t count, int64_t k, vi* room) {
  const int64_t dwords = B::row_bytes(k) / 4, groups = groups_of(w, k), scale_bytes = w.scale_kind == FP32 ? 4 : 2;
  const Block number(w.data, n, count, 4 * dwords), scale(w.scale, n, count, groups * scale_bytes);
  const Block zero(w.zero, n, count, groups);
  vi *const scales = room, *const zeros = scales + rounded_up(groups, 16), *const numbers = zeros + rounded_up(groups, 16);
  const auto into = [](vi* to, int32_t more) { return [=](int64_t i, vi lanes) { to[i] = lanes + more; }; };
  if (!w.in_lanes) lanes_each(number, false, dwords, 4, load_dwords, into(numbers, 0));
  constexpr float part = 1.0f / B::PARTS;  // see Int8Rows
  const auto read_scale = [&](const uint8_t* p) { return (vi)((vf)Lanes::scales(p, w.scale_kind) * part); };
  lanes_each(scale, w.in_lanes, groups, scale_bytes, read_scale, into(scales, 0));
  const auto read_zero = [](const uint8_t* p) { return widen16(reinterpret_cast<const typename B::Zero*>(p)); };
  if (w.zero) lanes_each(zero, w.in_lanes, groups, 1, read_zero, into(zeros, B::MOVED));
  else std::fill_n(zeros, groups, vi{} + B::MIDDLE);
  return {w.in_lanes ? number.first : reinterpret_cast<const uint8_t*>(numbers), reinterpret_cast<const vf*>(scales), zeros};
}
