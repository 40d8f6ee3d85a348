// From unweighted expert outputs to the routed sum, compiled once for each instruction set. No include guard: see
// kernels.cpp. Products are rounded before they are added, and additions go in the order of k, so the bits are those of
// actors/model/combine.py on every instruction set: nothing here may become a fused multiply-add.
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

static inline float widened(float x) { return x; }
static inline float widened(uint16_t x) { return __builtin_bit_cast(float, uint32_t{x} << 16); }

// x rounded to bf16, to the nearest even; NaN stays NaN. Without a branch, so that compilers make vectors of it.
static inline uint32_t bf16_bits(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  return (x != x ? bits | 0x400000u : rounded) >> 16;
}

static inline void narrow(float x, float* out) { *out = x; }
static inline void narrow(float x, uint16_t* out) { *out = static_cast<uint16_t>(bf16_bits(x)); }

// ROUNDED: each product is rounded to bf16.
template <bool ROUNDED>
static inline float weighted(float x, float weight) {
  const float product = x * weight;
  return ROUNDED ? __builtin_bit_cast(float, bf16_bits(product) << 16) : product;
}

template <class Row, class Out, bool ROUNDED>
static void combine_token(const Row* const* rows, const float* weight, int64_t k, int64_t d, Out* out) {
  constexpr int64_t kColumns = 512;  // whose sums stay in the first cache
  float sum[kColumns];
  for (int64_t at = 0; at < d; at += kColumns) {
    const int64_t columns = std::min(kColumns, d - at);
    for (int64_t i = 0; i < k; ++i) {
      const Row* x = rows[i] + at;
      const float w = weight[i];
      if (i == 0)
        for (int64_t j = 0; j < columns; ++j) sum[j] = weighted<ROUNDED>(widened(x[j]), w);
      else
        for (int64_t j = 0; j < columns; ++j) sum[j] += weighted<ROUNDED>(widened(x[j]), w);
    }
    for (int64_t j = 0; j < columns; ++j) narrow(sum[j], out + at + j);
  }
}

template <class Row, class Out, bool ROUNDED>
static void combine_tokens(const Combine& call, const void* const* rows, const float* weight, Pool& pool) {
  const int64_t step = (int64_t{1} << 20) / (call.k * call.d * int64_t{sizeof(Row)}) + 1;  // a worker costs a wake-up
  pool.run((call.tokens + step - 1) / step, call.threads, [&](int64_t task) {
    for (int64_t t = task * step; t < std::min(call.tokens, (task + 1) * step); ++t)
      combine_token<Row, Out, ROUNDED>(reinterpret_cast<const Row* const*>(rows) + t * call.k, weight + t * call.k,
                                       call.k, call.d, static_cast<Out*>(call.out) + t * call.d);
  });
}

template <class Row>
static void combine(const Combine& call, const void* const* rows, const float* weight, Pool& pool) {
  constexpr bool kBf16 = std::is_same_v<Row, uint16_t>;
  const bool rounded = kBf16 && call.weight_kind == 1;
  if (call.out_kind == 0)
    rounded ? combine_tokens<Row, float, kBf16>(call, rows, weight, pool)
            : combine_tokens<Row, float, false>(call, rows, weight, pool);
  else
    rounded ? combine_tokens<Row, uint16_t, kBf16>(call, rows, weight, pool)
            : combine_tokens<Row, uint16_t, false>(call, rows, weight, pool);
}

#pragma GCC pop_options
