// What is asked of the kernels: a product, and a layer's experts. No include guard: see kernels.cpp.

// As stream. For more than a few rows quantised weights are dequantised once, some at a time: the results are the same.
template <class W, class Put>
static void multiply(const typename W::Row* const* x, int64_t rows, const Matrix& w, int64_t from, int64_t to, int64_t k,
                     const Put& put) {
  if constexpr (W::rounds_rows) {
    multiply_lanes<W>(x, rows, w, from, to, k, put);
  } else if (W::dense || rows <= DIRECT_ROWS) {
    stream<W>(x, rows, w, from, to, k, put);
  } else if constexpr (!W::dense) {
    const int64_t step = weights_in_cache(k * sizeof(float));
    const Scratch<float, NUMBERS> scratch(step * k);
    float* const wide = scratch.get();
    for (int64_t n = from; n < to; n += step) {
      const int64_t count = std::min(step, to - n);
      dequantize_each<W>(w, n, n + count, k, [&](int64_t row, int64_t i, const typename W::Numbers& numbers) {
        float* to = wide + (row - n) * k + i;  // in the order of laid out rows
        *reinterpret_cast<vf*>(to) = numbers.first;
        *reinterpret_cast<vf*>(to + 16) = numbers.second;
      });
      stream<Fp32>(x, rows, Matrix{wide, nullptr, nullptr, 0, 0}, 0, count, k,
                   [&](int64_t m, int64_t j, float value) { put(m, n + j, value); });
    }
  }
}

// The kind of dense weights for rows of T.
template <class T>
struct KindOf {
  using W = std::conditional_t<std::is_same_v<T, float>, Fp32, Bf16>;
};

// fn(W{}) for the kind of weights that rows of T meet.
template <class T, class Fn>
static void with_kind(int kind, const Fn& fn) {
  if (kind == INT8) return fn(Int8{});
  if (kind == INT4) return fn(Int4{});
  if (kind == W8A8) return fn(W8{});
  if (kind == W4A8) return fn(W4{});
  return fn(typename KindOf<T>::W{});
}

constexpr int64_t SHARED_OUT = 16 << 10;  // numbers; a few microseconds of work

// Rows of numbers as a kind of weights meets them.
template <class W>
class LaidOut {
 public:
  using Row = typename W::Row;

  // row(r): the r-th of so many, each of k numbers, all laid out for weights like w.
  template <class Source>
  LaidOut(int64_t count, int64_t k, const Matrix& w, Pool& pool, int threads, const Source& row)
      : width_(width(w, k)), memory_(count * width_) {
    const int64_t most = SHARED_OUT / std::max<int64_t>(k, 1) + 1, step = std::min(most, (count + threads - 1) / threads);
    if (!count) return;
    pool.run((count + step - 1) / step, threads, [&](int64_t task) {
      for (int64_t r = task * step; r < std::min((task + 1) * step, count); ++r) lay_out(row(r), k, w, at(r));
    });
  }
  Row* at(int64_t r) const { return memory_.get() + r * width_; }

 private:
  static int64_t width(const Matrix& w, int64_t k) {
    if constexpr (W::rounds_rows) return W::width(w, k);
    else return stride(k);
  }
  template <class T>
  static void lay_out(const T* row, int64_t k, const Matrix& w, Row* to) {
    if constexpr (W::rounds_rows) round_row<W>(row, k, w, to);
    else W::lay_out(row, k, to);
  }

  int64_t width_;
  Scratch<Row> memory_;
};

template <class T>
static void linear(const Linear& call, Pool& pool) {
  with_kind<T>(call.kind, [&](auto kind) {
    using W = decltype(kind);
    const T *x = static_cast<const T*>(call.x), *bias = static_cast<const T*>(call.bias);
    T* out = static_cast<T*>(call.out);
    const auto row = [&](int64_t r) { return x + r * call.x_stride; };
    const LaidOut<W> laid(call.rows, call.k, call.w, pool, call.threads, row);
    std::vector<const typename W::Row*> rows(call.rows);
    for (int64_t r = 0; r < call.rows; ++r) rows[r] = laid.at(r);
    const int64_t step = task_rows(call.n, W::row_bytes(call.k), call.threads);
    pool.run((call.n + step - 1) / step, call.threads, [&](int64_t task) {
      const int64_t from = task * step, to = std::min(from + step, call.n);
      multiply<W>(rows.data(), call.rows, call.w, from, to, call.k, [&](int64_t m, int64_t n, float value) {
        if (bias) value += widen(bias[n]);
        put(value, out + m * call.n + n);
      });
    });
  });
}

// 32 numbers in the columns' order.
template <class W, class T>
static inline void store(const typename W::Numbers& numbers, T* to) {
  const typename W::Numbers in_order = W::in_order(numbers);
  alignas(64) uint32_t bits[32];
  *reinterpret_cast<vu*>(bits) = (vu)round_to<T>(in_order.first);
  *reinterpret_cast<vu*>(bits + 16) = (vu)round_to<T>(in_order.second);
  if constexpr (std::is_same_v<T, float>) std::memcpy(to, bits, sizeof bits);
  else for (int j = 0; j < 32; ++j) to[j] = static_cast<T>(bits[j] >> 16);
}

template <class T>
static void dequantize(const Dequantize& call, Pool& pool) {
  const auto all = [&](auto kind) {
    using W = decltype(kind);
    const int64_t step = task_rows(call.n, call.k * sizeof(T), call.threads);
    pool.run((call.n + step - 1) / step, call.threads, [&](int64_t task) {
      const int64_t from = task * step, to = std::min(from + step, call.n);
      dequantize_each<W>(call.w, from, to, call.k, [&](int64_t n, int64_t i, const typename W::Numbers& numbers) {
        store<W>(numbers, static_cast<T*>(call.out) + n * call.k + i);
      });
    });
  };
  if (call.kind == INT8) all(Int8{});
  if (call.kind == INT4) all(Int4{});
}

// silu(gate) * up for 32 columns, rounded where storing them as T would.
template <class T>
static inline void activate(const float* gate, const float* up, T* to) {
  for (int i = 0; i < 32; i += 16) {
    const vf g = round_to<T>(load(gate + i)), u = round_to<T>(load(up + i));
    const vf silu = g < vf{} - 88.0f ? g * 0.0f : g / (1.0f + exp16(-g));  // -0 there, and -inf gives NaN as in torch
    const vf out = round_to<T>(silu) * u;
    for (int j = 0; j < 16; ++j) put(out[j], to + i + j);
  }
}

// hidden [pairs, width] = silu(gate x) * (up x) for each pair, in the groups' order.
template <class T, class W>
static void activations(const Experts& call, const Grouped& groups, Pool& pool, T* hidden, int64_t width) {
  const T* x = static_cast<const T*>(call.x);
  const auto row = [&](int64_t r) { return x + r * call.d; };
  const LaidOut<W> laid(call.rows, call.d, call.matrices[3 * groups.experts[0]], pool, call.threads, row);
  std::vector<const typename W::Row*> rows(call.pairs);
  for (int64_t p = 0; p < call.pairs; ++p) rows[p] = laid.at(call.pair_row[groups.order[p]]);
  const int64_t per_expert = (call.inter + INTER_STEP - 1) / INTER_STEP;
  pool.run(groups.count() * per_expert, call.threads, [&](int64_t task) {
    const int64_t e = task / per_expert, from = task % per_expert * INTER_STEP;
    const int64_t first = groups.offset[e], n_pairs = groups.offset[e + 1] - first;
    const int64_t to = std::min<int64_t>(from + INTER_STEP, call.inter);
    const Scratch<float, GATES> both(2 * n_pairs * INTER_STEP);
    float *g = both.get(), *u = g + n_pairs * INTER_STEP;
    std::fill_n(g, 2 * n_pairs * INTER_STEP, 0.0f);
    const Matrix* w = call.matrices + 3 * groups.experts[e];
    const auto into = [from](float* out) {
      return [=](int64_t m, int64_t n, float v) { out[m * INTER_STEP + n - from] = v; };
    };
    multiply<W>(rows.data() + first, n_pairs, w[0], from, to, call.d, into(g));
    multiply<W>(rows.data() + first, n_pairs, w[1], from, to, call.d, into(u));
    for (int64_t m = 0; m < n_pairs; ++m)
      for (int64_t i = 0; i < padded(to - from); i += 32)
        activate(g + m * INTER_STEP + i, u + m * INTER_STEP + i, hidden + (first + m) * width + from + i);
  });
}

template <class T>
static int64_t experts(const Experts& call, Pool& pool) {
  const Grouped groups(call);
  if (groups.wrong >= 0 || call.pairs == 0) return groups.wrong;
  T* out = static_cast<T*>(call.out);
  const int64_t width = padded(call.inter);
  const Scratch<T, HIDDEN> hidden(call.pairs * width);
  with_kind<T>(call.gate_up_kind,
               [&](auto kind) { activations<T, decltype(kind)>(call, groups, pool, hidden.get(), width); });
  with_kind<T>(call.down_kind, [&](auto kind) {
    using W = decltype(kind);
    const auto row = [&](int64_t p) { return hidden.get() + p * width; };
    const LaidOut<W> laid(call.pairs, call.inter, call.matrices[3 * groups.experts[0] + 2], pool, call.threads, row);
    std::vector<const typename W::Row*> rows(call.pairs);
    for (int64_t p = 0; p < call.pairs; ++p) rows[p] = laid.at(p);
    const int64_t step = task_rows(call.d, W::row_bytes(call.inter), call.threads);
    const int64_t per_expert = (call.d + step - 1) / step;
    pool.run(groups.count() * per_expert, call.threads, [&](int64_t task) {
      const int64_t e = task / per_expert, from = task % per_expert * step, to = std::min(from + step, call.d);
      const int64_t first = groups.offset[e], n_pairs = groups.offset[e + 1] - first;
      const Matrix& w = call.matrices[3 * groups.experts[e] + 2];
      multiply<W>(rows.data() + first, n_pairs, w, from, to, call.inter,
                  [&](int64_t m, int64_t n, float v) { put(v, out + groups.order[first + m] * call.d + n); });
    });
  });
  return -1;
}
