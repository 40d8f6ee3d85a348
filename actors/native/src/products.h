// The kernels' code, compiled once for each instruction set. No include guard: see kernels.cpp.
//
// Every output is a dot product along contiguous memory: 16 partial sums, lane by lane over K, then one fixed tree. So a
// row's result depends neither on how many other rows there are nor on how the work is cut, and is the same on all
// instruction sets with fused multiply-add.

using vf = float __attribute__((vector_size(64), aligned(4), may_alias));
using vu = uint32_t __attribute__((vector_size(64), aligned(1), may_alias));
using vi = int32_t __attribute__((vector_size(64)));

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

// How 32 numbers of a weight meet 32 of a row: both as loaded, and the multiply-add of their lanes.
struct Fp32 {
  using Stored = float;
  using Row = float;
  struct Numbers {
    vf first, second;
  };
  static inline __attribute__((always_inline)) Numbers weight(const float* p) { return {load(p), load(p + 16)}; }
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
struct Widened {
  using Stored = uint16_t;
  using Row = float;
  using Numbers = Fp32::Numbers;
  static inline __attribute__((always_inline)) Numbers weight(const uint16_t* p) {
    const vu both = *reinterpret_cast<const vu*>(p);
    return {(vf)(both << 16), (vf)(both & 0xffff0000u)};
  }
  static inline __attribute__((always_inline)) Numbers row(const float* p) { return Fp32::row(p); }
  static inline __attribute__((always_inline)) vf add(Numbers x, Numbers w, vf sum) { return Fp32::add(x, w, sum); }
  static void lay_out(const uint16_t* from, int64_t k, float* to) {
    for (int64_t i = 0; i < padded(k); i += 32)
      for (int64_t j = 0; j < 32; ++j) to[i + (j & 1) * 16 + j / 2] = i + j < k ? from_bf16(from[i + j]) : 0.0f;
  }
};

#if HAS_BF16_DOT
struct Dotted {
  using Stored = uint16_t;
  using Row = uint16_t;
  using Numbers = __m512bh;
  static inline __attribute__((always_inline)) Numbers weight(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline __attribute__((always_inline)) Numbers row(const uint16_t* p) { return weight(p); }
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

// acc[m][n] += x[m] . w[n], lane by lane, for MR rows and NR weights over k numbers, a multiple of 32.
template <class W, int MR, int NR>
static inline __attribute__((always_inline)) void accumulate(
    const typename W::Row* const* x, const typename W::Stored* const* w, int64_t k, int64_t ahead, vf* sum) {
  constexpr int kLine = 64 / sizeof(typename W::Stored);
  vf acc[MR * NR];  // a copy, which stays in registers; the copying is unrolled, or GCC makes two slow calls of it
#pragma GCC unroll 32
  for (int i = 0; i < MR * NR; ++i) acc[i] = sum[i];
  for (int64_t i = 0; i < k; i += 32) {
    typename W::Numbers weight[NR];
    for (int n = 0; n < NR; ++n) {
      weight[n] = W::weight(w[n] + i);
      for (int j = 0; j < 32; j += kLine) __builtin_prefetch(w[n] + i + ahead + j);
    }
    for (int m = 0; m < MR; ++m) {
      const typename W::Numbers row = W::row(x[m] + i);
      for (int n = 0; n < NR; ++n) acc[m * NR + n] = W::add(row, weight[n], acc[m * NR + n]);
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
static inline float widen(float x) { return x; }
static inline float widen(uint16_t x) { return from_bf16(x); }

// Rounded as storing it as T and reading it again would.
template <class T>
static inline __attribute__((always_inline)) vf round_to(vf x) {
  if constexpr (std::is_same_v<T, float>) return x;
  const vu bits = (vu)x;
  return (vf)((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

// e^x for 16 lanes, to about 1 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf).
static inline __attribute__((always_inline)) vf exp16(vf x) {
  const vf highest = vf{} + 88.0f, lowest = vf{} - 87.0f;
  x = x > highest ? highest : x;
  x = x < lowest ? lowest : x;
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
  return p * (vf)power;
}

// NR weight rows, [NR, k] at w, times MR rows: out[m * NR + n].
template <class W, int MR, int NR>
static void product(const typename W::Row* const* x, const typename W::Stored* w, int64_t k, float* out) {
  using T = typename W::Stored;
  const int64_t whole = k & ~int64_t{31};
  const T* rows[NR];
  for (int n = 0; n < NR; ++n) rows[n] = w + n * k;
  vf acc[MR * NR] = {};
  accumulate<W, MR, NR>(x, rows, whole, NR * k, acc);
  if (whole != k) {
    T ends[NR][32] = {};
    const typename W::Row* x_end[MR];
    for (int m = 0; m < MR; ++m) x_end[m] = x[m] + whole;
    for (int n = 0; n < NR; ++n) {
      std::memcpy(ends[n], rows[n] + whole, (k - whole) * sizeof(T));
      rows[n] = ends[n];
    }
    accumulate<W, MR, NR>(x_end, rows, 32, 0, acc);
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

// put(m, n + j, value) for the rows from .. to of x and the NR weights from n on.
template <class W, int NR, class Put>
static inline void multiply_rows(const typename W::Row* const* x, int64_t from, int64_t to, const typename W::Stored* w,
                                 int64_t k, int64_t n, const Put& put) {
  for (int64_t first = from; first < to; first += TILE_M) {
    with_rows(static_cast<int>(std::min<int64_t>(TILE_M, to - first)), [&](auto mr) {
      constexpr int MR = decltype(mr)::value;
      float out[MR * NR];
      product<W, MR, NR>(x + first, w + n * k, k, out);
      for (int m = 0; m < MR; ++m)
        for (int j = 0; j < NR; ++j) put(first + m, n + j, out[m * NR + j]);
    });
  }
}

// put(m, n, value) for all rows m of x and the weights n of [count, k] at w.
//
// What is larger than the second cache streams by once: the weights past a few rows, or many rows past some weights.
template <class W, class Put>
static void multiply(const typename W::Row* const* x, int64_t rows, const typename W::Stored* w, int64_t k, int64_t count, const Put& put) {
  const int64_t in_tiles = count - count % TILE_N;
  const bool few = rows * k * static_cast<int64_t>(sizeof(typename W::Row)) <= IN_CACHE;
  const int64_t n_step = few ? TILE_N : std::max<int64_t>(1, IN_CACHE / 2 / (k * sizeof(typename W::Stored)) / TILE_N) * TILE_N;
  const int64_t m_step = few ? std::max<int64_t>(rows, 1) : TILE_M;
  for (int64_t block = 0; block < in_tiles; block += n_step)
    for (int64_t first = 0; first < rows; first += m_step)
      for (int64_t n = block; n < std::min(block + n_step, in_tiles); n += TILE_N)
        multiply_rows<W, TILE_N>(x, first, std::min(first + m_step, rows), w, k, n, put);
  for (int64_t n = in_tiles; n < count; ++n) multiply_rows<W, 1>(x, 0, rows, w, k, n, put);
}

template <class T>
struct KindOf;
template <>
struct KindOf<float> {
  using W = Fp32;
};
template <>
struct KindOf<uint16_t> {
  using W = Bf16;
};

template <class T>
static void linear(const Linear& call, Pool& pool) {
  using W = typename KindOf<T>::W;
  const T* x = static_cast<const T*>(call.x);
  const T* w = static_cast<const T*>(call.w);
  const T* bias = static_cast<const T*>(call.bias);
  T* out = static_cast<T*>(call.out);
  const int64_t width = stride(call.k);
  auto* laid = scratch<typename W::Row>(call.rows * width);
  std::vector<const typename W::Row*> rows(call.rows);
  for (int64_t r = 0; r < call.rows; ++r) {
    W::lay_out(x + r * call.x_stride, call.k, laid + r * width);
    rows[r] = laid + r * width;
  }
  const int64_t step = task_rows(call.n, call.k * sizeof(T), call.threads);
  pool.run((call.n + step - 1) / step, call.threads, [&](int64_t task) {
    const int64_t from = task * step, count = std::min(step, call.n - from);
    multiply<W>(rows.data(), call.rows, w + from * call.k, call.k, count, [&](int64_t m, int64_t n, float value) {
      if (bias) value += widen(bias[from + n]);
      put(value, out + m * call.n + from + n);
    });
  });
}

// silu(gate) * up for 32 columns, rounded where storing would, and laid out for the next product.
template <class W>
static inline void activate(const float* gate, const float* up, typename W::Row* to) {
  using T = typename W::Stored;
  alignas(64) T h[32];
  for (int i = 0; i < 32; i += 16) {
    const vf g = round_to<T>(load(gate + i)), u = round_to<T>(load(up + i));
    const vf out = round_to<T>(g / (1.0f + exp16(-g))) * u;
    for (int j = 0; j < 16; ++j) put(out[j], h + i + j);
  }
  W::lay_out(h, 32, to);
}

template <class T>
static int64_t experts(const Experts& call, Pool& pool) {
  using W = typename KindOf<T>::W;
  using Row = typename W::Row;
  const Grouped groups(call);
  if (groups.wrong >= 0) return groups.wrong;
  const T* x = static_cast<const T*>(call.x);
  T* out = static_cast<T*>(call.out);
  const int64_t d_width = stride(call.d), i_width = stride(call.inter);
  Row* laid = scratch<Row>(call.rows * d_width + call.pairs * i_width);
  Row* hidden = laid + call.rows * d_width;
  std::vector<const Row*> rows(call.pairs), mid(call.pairs);
  for (int64_t r = 0; r < call.rows; ++r) W::lay_out(x + r * call.d, call.d, laid + r * d_width);
  for (int64_t p = 0; p < call.pairs; ++p) {
    rows[p] = laid + call.pair_row[groups.order[p]] * d_width;
    mid[p] = hidden + p * i_width;
  }
  const int64_t hit = static_cast<int64_t>(groups.experts.size()), per_expert = (call.inter + INTER_STEP - 1) / INTER_STEP;
  pool.run(hit * per_expert, call.threads, [&](int64_t task) {
    const int64_t e = task / per_expert, from = task % per_expert * INTER_STEP;
    const int64_t first = groups.offset[e], n_pairs = groups.offset[e + 1] - first;
    const int64_t count = std::min<int64_t>(INTER_STEP, call.inter - from);
    const T* gate = static_cast<const T*>(call.gate_up[groups.experts[e]]) + from * call.d;
    const T* up = gate + call.inter * call.d;
    thread_local std::vector<float> both;
    both.assign(2 * n_pairs * INTER_STEP, 0.0f);
    float *g = both.data(), *u = g + n_pairs * INTER_STEP;
    const Row* const* own = rows.data() + first;
    multiply<W>(own, n_pairs, gate, call.d, count, [&](int64_t m, int64_t n, float v) { g[m * INTER_STEP + n] = v; });
    multiply<W>(own, n_pairs, up, call.d, count, [&](int64_t m, int64_t n, float v) { u[m * INTER_STEP + n] = v; });
    for (int64_t m = 0; m < n_pairs; ++m)
      for (int64_t i = 0; i < padded(count); i += 32)
        activate<W>(g + m * INTER_STEP + i, u + m * INTER_STEP + i, hidden + (first + m) * i_width + from + i);
  });
  const int64_t step = task_rows(call.d, call.inter * sizeof(T), call.threads), per_down = (call.d + step - 1) / step;
  pool.run(hit * per_down, call.threads, [&](int64_t task) {
    const int64_t e = task / per_down, from = task % per_down * step, count = std::min(step, call.d - from);
    const int64_t first = groups.offset[e];
    const T* down = static_cast<const T*>(call.down[groups.experts[e]]) + from * call.inter;
    multiply<W>(mid.data() + first, groups.offset[e + 1] - first, down, call.inter, count,
                [&](int64_t m, int64_t n, float v) { put(v, out + groups.order[first + m] * call.d + from + n); });
  });
  return -1;
}
