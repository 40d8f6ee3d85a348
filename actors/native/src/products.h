// The kernels' code, compiled once for each instruction set. No include guard: see kernels.cpp.
//
// Every output is a dot product along contiguous memory: 16 partial sums, lane by lane over K, then one fixed tree. So a
// row's result depends neither on how many other rows there are nor on how the work is cut. In fp32 it is the same on all
// instruction sets with fused multiply-add; bf16 products have an instruction of their own, which rounds otherwise.

using vf = float __attribute__((vector_size(64), aligned(4), may_alias));
using vu = uint32_t __attribute__((vector_size(64), aligned(1), may_alias));
using vi = int32_t __attribute__((vector_size(64)));

// What will be read once is fetched into the second cache: the first can wait for a few lines at a time alone, 24 on Zen 4,
// which is half of what a core can read.
static inline __attribute__((always_inline)) void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }

static inline __attribute__((always_inline)) vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }

static inline __attribute__((always_inline)) vf low_first(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
         __builtin_shuffle(a, b, vi{8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
}
static inline __attribute__((always_inline)) vf fours(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) +
         __builtin_shuffle(a, b, vi{4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31});
}
static inline __attribute__((always_inline)) vf twos(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}) +
         __builtin_shuffle(a, b, vi{2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31});
}
static inline __attribute__((always_inline)) vf ones(vf a, vf b) {
  return __builtin_shuffle(a, b, vi{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +
         __builtin_shuffle(a, b, vi{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31});
}

// Sums of the lanes of N vectors, N <= 16, in order: the first N lanes.
template <int N>
static inline __attribute__((always_inline)) vf sums(const vf* acc) {
  constexpr int A = (N + 1) / 2, B = (A + 1) / 2, C = (B + 1) / 2, D = (C + 1) / 2;
  vf a[A], b[B], c[C], d[D];
  for (int i = 0; i < A; ++i) a[i] = low_first(acc[2 * i], acc[2 * i + 1 < N ? 2 * i + 1 : 2 * i]);
  for (int i = 0; i < B; ++i) b[i] = fours(a[2 * i], a[2 * i + 1 < A ? 2 * i + 1 : 2 * i]);
  for (int i = 0; i < C; ++i) c[i] = twos(b[2 * i], b[2 * i + 1 < B ? 2 * i + 1 : 2 * i]);
  for (int i = 0; i < D; ++i) d[i] = ones(c[2 * i], c[2 * i + 1 < C ? 2 * i + 1 : 2 * i]);
  static_assert(D == 1, "at most 16");
  return d[0];
}

template <int N>
static inline __attribute__((always_inline)) void sums(const vf* acc, float* out) {
  const vf all = sums<N>(acc);
  std::memcpy(out, &all, N * sizeof(float));
}

static inline float widen(float x) { return x; }
static inline float widen(uint16_t x) { return from_bf16(x); }

// Kinds of weights: how 32 numbers of one meet 32 of a row, both as loaded, and the multiply-add of their lanes. A Line
// is a weight's row in memory; a Group what its numbers have in common until the next one, nothing for dense weights.
template <class S>
struct Dense {
  using Stored = S;
  using Line = const S*;
  struct Group {};
  static constexpr bool dense = true, rounds_rows = false;
  static int64_t row_bytes(int64_t k) { return k * sizeof(S); }
  static int64_t room(const Matrix&, int64_t) { return 0; }
  static Line line(const Matrix& w, int64_t row, int64_t k, float*) { return static_cast<const S*>(w.data) + row * k; }
  static inline __attribute__((always_inline)) int64_t group_size(Line, int64_t k) { return k; }
  static inline __attribute__((always_inline)) Group group(Line, int64_t) { return {}; }
  static inline __attribute__((always_inline)) void prefetch(Line line, int64_t i) {
    for (size_t j = 0; j < 32; j += 64 / sizeof(S)) fetch(line + i + j);
  }
};

struct Fp32 : Dense<float> {
  using Row = float;
  struct Numbers {
    vf first, second;
  };
  static inline __attribute__((always_inline)) Numbers weight(Line line, Group, int64_t i) { return row(line + i); }
  static inline __attribute__((always_inline)) Numbers row(const float* p) { return {load(p), load(p + 16)}; }
  static inline __attribute__((always_inline)) vf add(Numbers x, Numbers w, vf sum) {
    return x.second * w.second + (x.first * w.first + sum);
  }
  static void lay_out(const float* from, int64_t k, float* to) {
    std::memcpy(to, from, k * sizeof(float));
    std::memset(to + k, 0, (padded(k) - k) * sizeof(float));
  }
};

// Numbers of bf16 become fp32, the even ones and the odd ones apart; rows are laid out in fp32 in that order.
struct Widened : Dense<uint16_t> {
  using Row = float;
  using Numbers = Fp32::Numbers;
  static inline __attribute__((always_inline)) Numbers weight(Line line, Group, int64_t i) {
    const vu both = *reinterpret_cast<const vu*>(line + i);
    return {(vf)(both << 16), (vf)(both & 0xffff0000u)};
  }
  static inline __attribute__((always_inline)) Numbers row(const float* p) { return Fp32::row(p); }
  static inline __attribute__((always_inline)) vf add(Numbers x, Numbers w, vf sum) { return Fp32::add(x, w, sum); }
  template <class T>
  static void lay_out(const T* from, int64_t k, float* to) {
    for (int64_t i = 0; i < padded(k); i += 32)
      for (int64_t j = 0; j < 32; ++j) to[i + (j & 1) * 16 + j / 2] = i + j < k ? widen(from[i + j]) : 0.0f;
  }
};

#if HAS_BF16_DOT
struct Dotted : Dense<uint16_t> {
  using Row = uint16_t;
  using Numbers = __m512bh;
  static inline __attribute__((always_inline)) Numbers weight(Line line, Group, int64_t i) { return row(line + i); }
  static inline __attribute__((always_inline)) Numbers row(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline __attribute__((always_inline)) vf add(Numbers x, Numbers w, vf sum) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, x, w);
  }
  static void lay_out(const uint16_t* from, int64_t k, uint16_t* to) {
    std::memcpy(to, from, k * sizeof(uint16_t));
    std::memset(to + k, 0, (padded(k) - k) * sizeof(uint16_t));
  }
};
using Bf16 = Dotted;
#else
using Bf16 = Widened;
#endif

// 16 bytes, signed or not, as 32-bit integers.
template <class B>
static inline __attribute__((always_inline)) vi widen16(const B* p) {
#if HAS_AVX512
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vi)(std::is_signed_v<B> ? _mm512_maskz_cvtepi8_epi32(0xffff, bytes) : _mm512_maskz_cvtepu8_epi32(0xffff, bytes));
#elif HAS_AVX2
  using half = int32_t __attribute__((vector_size(32)));
  const auto eight = [](const B* q) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(q));
    return (half)(std::is_signed_v<B> ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  };
  return __builtin_shufflevector(eight(p), eight(p + 8), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#else
  vi out;
  for (int i = 0; i < 16; ++i) out[i] = p[i];
  return out;
#endif
}

// Quantised weights: (number - zero) * scale in fp32, as actors/model/quant/qtensor.py has it; rows are fp32 as well. Z:
// of zero points, in so many PARTS of a step; MIDDLE: the zero point, in steps, where none is kept.
template <class Z, int BITS, int MIDDLE, int PARTS>
struct Quantised {
  using Row = float;
  using Numbers = Fp32::Numbers;
  struct Line {
    const uint8_t* data;
    const float *scale, *zero;
    int64_t group;
  };
  static constexpr bool dense = false, rounds_rows = false;
  static int64_t row_bytes(int64_t k) { return k * BITS / 8; }
  static int64_t groups(const Matrix& w, int64_t k) { return (k + w.group - 1) / w.group; }
  static int64_t room(const Matrix& w, int64_t k) { return 2 * groups(w, k); }
  static Line line(const Matrix& w, int64_t row, int64_t k, float* room) {
    const int64_t count = groups(w, k), first = row * count;
    float* zero = room + count;
    if (w.scale_kind == FP32) widen_all(static_cast<const float*>(w.scale) + first, count, room);
    if (w.scale_kind == BF16) widen_all(static_cast<const uint16_t*>(w.scale) + first, count, room);
    if (w.scale_kind == FP16)
      for (int64_t g = 0; g < count; ++g) room[g] = from_fp16(static_cast<const uint16_t*>(w.scale)[first + g]);
    for (int64_t g = 0; g < count; ++g) zero[g] = w.zero ? static_cast<const Z*>(w.zero)[first + g] / float{PARTS} : MIDDLE;
    return {static_cast<const uint8_t*>(w.data) + row * row_bytes(k), room, zero, w.group};
  }
  template <class S>
  static void widen_all(const S* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  }
  static inline __attribute__((always_inline)) int64_t group_size(const Line& line, int64_t) { return line.group; }
  static inline __attribute__((always_inline)) void prefetch(const Line& line, int64_t i) {
    fetch(line.data + (i * BITS >> 3));
  }
  static inline __attribute__((always_inline)) Numbers row(const float* p) { return Fp32::row(p); }
  static inline __attribute__((always_inline)) vf add(Numbers x, Numbers w, vf sum) { return Fp32::add(x, w, sum); }
};

struct Int8 : Quantised<int8_t, 8, 0, 1> {
  struct Group {
    vf scale, zero;
  };
  static inline __attribute__((always_inline)) Group group(const Line& line, int64_t g) {
    return {line.scale[g] - vf{}, line.zero[g] - vf{}};
  }
  static inline __attribute__((always_inline)) Numbers weight(const Line& line, const Group& group, int64_t i) {
    const auto* p = reinterpret_cast<const int8_t*>(line.data + i);
    return {(__builtin_convertvector(widen16(p), vf) - group.zero) * group.scale,
            (__builtin_convertvector(widen16(p + 16), vf) - group.zero) * group.scale};
  }
  template <class T>
  static void lay_out(const T* from, int64_t k, float* to) {
    widen_all(from, k, to);
  }
  static inline __attribute__((always_inline)) Numbers in_order(Numbers n) { return n; }
};

// Two numbers in a byte, the first in its low half: rows have even and odd columns apart, as for Widened.
struct Int4 : Quantised<uint8_t, 4, 8, 8> {
#if HAS_AVX512
  // All 16 numbers of the group: one instruction looks up 16 of them, by the lowest 4 bits.
  struct Group {
    vf table;
  };
  static inline __attribute__((always_inline)) Group group(const Line& line, int64_t g) {
    return {(vf{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} - line.zero[g]) * line.scale[g]};
  }
  static inline __attribute__((always_inline)) Numbers weight(const Line& line, const Group& group, int64_t i) {
    const vi both = widen16(line.data + (i >> 1));
    return {__builtin_shuffle(group.table, both), __builtin_shuffle(group.table, both >> 4)};
  }
#else
  using Group = Int8::Group;
  static inline __attribute__((always_inline)) Group group(const Line& line, int64_t g) {
    return {line.scale[g] - vf{}, line.zero[g] - vf{}};
  }
  static inline __attribute__((always_inline)) Numbers weight(const Line& line, const Group& group, int64_t i) {
    const vi both = widen16(line.data + (i >> 1));
    return {(__builtin_convertvector(both & 15, vf) - group.zero) * group.scale,
            (__builtin_convertvector(both >> 4, vf) - group.zero) * group.scale};
  }
#endif
  template <class T>
  static void lay_out(const T* from, int64_t k, float* to) {
    Widened::lay_out(from, k, to);
  }
  static inline __attribute__((always_inline)) Numbers in_order(Numbers n) {
    return {__builtin_shuffle(n.first, n.second, vi{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}),
            __builtin_shuffle(n.first, n.second, vi{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31})};
  }
};

// Tiles of many rows. All numbers of a weight's 64 bytes are in one register for a dot product of bf16 alone, which leaves
// room for more weights.
template <class W>
struct Many {
  static constexpr int rows = TILE_M, weights = TILE_N;
};
#if HAS_BF16_DOT
template <>
struct Many<Dotted> {
  static constexpr int rows = 4, weights = 6;
};
#endif

// acc[m][n] += x[m] . w[n], lane by lane, for MR rows and NR weights over k numbers, a multiple of 32. With FETCH what stands
// ahead numbers behind each weight is fetched meanwhile.
template <class W, int MR, int NR, bool FETCH>
static inline __attribute__((always_inline)) void accumulate(
    const typename W::Row* const* x, const typename W::Line* w, int64_t k, int64_t ahead, vf* sum) {
  vf acc[MR * NR];  // a copy, which stays in registers; the copying is unrolled, or GCC makes two slow calls of it
#pragma GCC unroll 32
  for (int i = 0; i < MR * NR; ++i) acc[i] = sum[i];
  const int64_t size = W::group_size(w[0], k);
  for (int64_t start = 0, g = 0; start < k; start += size, ++g) {
    typename W::Group group[NR];
#pragma GCC unroll 32
    for (int n = 0; n < NR; ++n) group[n] = W::group(w[n], g);
    const int64_t end = std::min(start + size, k);
    for (int64_t i = start; i < end; i += 32) {
      typename W::Numbers weight[NR];
#pragma GCC unroll 32
      for (int n = 0; n < NR; ++n) {
        weight[n] = W::weight(w[n], group[n], i);
        if constexpr (FETCH) W::prefetch(w[n], i + ahead);
      }
#pragma GCC unroll 32
      for (int m = 0; m < MR; ++m) {
        const typename W::Numbers row = W::row(x[m] + i);
#pragma GCC unroll 32
        for (int n = 0; n < NR; ++n) acc[m * NR + n] = W::add(row, weight[n], acc[m * NR + n]);
      }
    }
  }
#pragma GCC unroll 32
  for (int i = 0; i < MR * NR; ++i) sum[i] = acc[i];
}

template <int N>
static inline __attribute__((always_inline)) void finish(const vf* acc, float* out) {
  if constexpr (N > 16) {
    sums<16>(acc, out);
    sums<N - 16>(acc + 16, out + 16);
  } else {
    sums<N>(acc, out);
  }
}

static inline void put(float x, float* to) { *to = x; }
static inline void put(float x, uint16_t* to) { *to = to_bf16(x); }

// Rounded as storing it as T and reading it again would.
template <class T>
static inline __attribute__((always_inline)) vf round_to(vf x) {
  if constexpr (std::is_same_v<T, float>) return x;
  const vu bits = (vu)x;
  return (vf)((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// e^x for 16 lanes, to about 1 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf). 0 below -87, where
// normal numbers end, e^88 above 88; NaN stays NaN.
static inline __attribute__((always_inline)) vf exp16(vf x) {
  const vf highest = vf{} + 88.0f, lowest = vf{} - 87.0f;
  const vi below = x < lowest;
  x = x > highest ? highest : x;
  x = below ? lowest : x;
  const vf shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
  const vf n = shifted - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = vf{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
  return below ? vf{} : p * (vf)power;
}

// Scratch where none is needed: finding a thread's own takes as long as some of a tile's products.
struct NoScratch {
  explicit NoScratch(int64_t) {}
  float* get() const { return nullptr; }
};

// The NR weights from n on of w [.., k] times MR rows: out[m * NR + n].
template <class W, int MR, int NR, bool FETCH>
static void product(const typename W::Row* const* x, const Matrix& w, int64_t n, int64_t k, float* out) {
  const int64_t whole = k & ~int64_t{31};
  typename W::Line rows[NR];
  const int64_t room = W::room(w, k);
  const std::conditional_t<W::dense, NoScratch, Scratch<float, SCALES>> rooms(NR * room);
  for (int j = 0; j < NR; ++j) rows[j] = W::line(w, n + j, k, rooms.get() + j * room);
  vf acc[MR * NR] = {};
  accumulate<W, MR, NR, FETCH>(x, rows, whole, NR * k, acc);
  if constexpr (W::dense) {
    if (whole != k) {
      typename W::Stored ends[NR][32] = {};
      const typename W::Row* x_end[MR];
      for (int m = 0; m < MR; ++m) x_end[m] = x[m] + whole;
      for (int j = 0; j < NR; ++j) {
        std::memcpy(ends[j], rows[j] + whole, W::row_bytes(k - whole));
        rows[j] = ends[j];
      }
      accumulate<W, MR, NR, false>(x_end, rows, 32, 0, acc);
    }
  }
  finish<MR * NR>(acc, out);
}

// Calls fn.template operator()<MR>() for MR = rows, 1 .. TILE_M.
template <int MR = TILE_M, class Fn>
static inline void with_rows(int rows, const Fn& fn) {
  if constexpr (MR == 1) {
    fn(std::integral_constant<int, 1>{});
  } else if (rows == MR) {
    fn(std::integral_constant<int, MR>{});
  } else {
    with_rows<MR - 1>(rows, fn);
  }
}

// put(m, n + j, value) for the rows from .. to of x and the NR weights from n on, in tiles of about the same size.
template <class W, int MOST, int NR, class Put>
static inline void multiply_rows(const typename W::Row* const* x, int64_t from, int64_t to, const Matrix& w, int64_t n,
                                 int64_t k, const Put& put) {
  const int64_t tiles = (to - from + MOST - 1) / MOST;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = from + (to - from) * tile / tiles, last = from + (to - from) * (tile + 1) / tiles;
    with_rows<MOST>(static_cast<int>(last - first), [&](auto mr) {
      constexpr int MR = decltype(mr)::value;
      float out[MR * NR];
      if (MOST == TILE_M || tile == 0) product<W, MR, NR, true>(x + first, w, n, k, out);
      else product<W, MR, NR, false>(x + first, w, n, k, out);
      for (int m = 0; m < MR; ++m)
        for (int j = 0; j < NR; ++j) put(first + m, n + j, out[m * NR + j]);
    });
  }
}

// put(m, n, value) for all rows m of x and the weights n = from .. to of w [.., k], in tiles of MOST rows and NR weights.
// block weights at a time pass by step rows, tile by tile.
template <class W, int MOST, int NR, class Put>
static void stream_tiles(const typename W::Row* const* x, int64_t rows, const Matrix& w, int64_t from, int64_t to,
                         int64_t k, int64_t step, int64_t block, const Put& put) {
  const int64_t in_tiles = to - (to - from) % NR;
  for (int64_t start = from; start < in_tiles; start += block)
    for (int64_t first = 0; first < rows; first += step)
      for (int64_t n = start; n < std::min(start + block, in_tiles); n += NR)
        multiply_rows<W, MOST, NR>(x, first, std::min(first + step, rows), w, n, k, put);
  for (int64_t n = in_tiles; n < to; ++n) multiply_rows<W, MOST, 1>(x, 0, rows, w, n, k, put);
}

// The same in the order in which what is larger than the second cache is seldom read: few rows stay there while each
// weight passes once. Many dot products of bf16 have more weights in a tile, which pass by as many rows as fit, again and
// again; others have a tile of rows that stays in the first cache while weights that fit the second pass by.
template <class W, class Put>
static void stream(const typename W::Row* const* x, int64_t rows, const Matrix& w, int64_t from, int64_t to, int64_t k,
                   const Put& put) {
  const int64_t fitting = IN_CACHE / (padded(k) * static_cast<int64_t>(sizeof(typename W::Row)) + 1);
  if constexpr (Many<W>::rows != TILE_M) {
    if (rows > TILE_M) {
      const int64_t step = std::max<int64_t>(2 * fitting, TILE_M);
      for (int64_t first = 0; first < rows; first += step)
        stream_tiles<W, Many<W>::rows, Many<W>::weights>(x + first, std::min(step, rows - first), w, from, to, k, rows,
                                                         to - from, [&](int64_t m, int64_t n, float value) {
                                                           put(first + m, n, value);
                                                         });
      return;
    }
  }
  const bool few = rows <= fitting;
  stream_tiles<W, TILE_M, TILE_N>(x, rows, w, from, to, k, few ? rows : TILE_M,
                                  few ? to - from : weights_in_cache(W::row_bytes(k)), put);
}

// put(n, i, numbers) for each 32 dequantised numbers, from column i on, of the weights n = from .. to of w [.., k].
template <class W, class Put>
static inline void dequantize_each(const Matrix& w, int64_t from, int64_t to, int64_t k, const Put& put) {
  const Scratch<float, SCALES> room(W::room(w, k));
  for (int64_t n = from; n < to; ++n) {
    const typename W::Line line = W::line(w, n, k, room.get());
    const int64_t size = W::group_size(line, k);
    for (int64_t start = 0, g = 0; start < k; start += size, ++g) {
      const typename W::Group group = W::group(line, g);
      for (int64_t i = start; i < std::min(start + size, k); i += 32) put(n, i, W::weight(line, group, i));
    }
  }
}
