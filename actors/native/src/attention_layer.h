// A decoder layer from its residual rows to the rows that its MLP reads, compiled once for each instruction set. No
// include guard: see kernels.cpp. What is computed row by row is shared out like the products: a batch of decodes is one
// thread's work, a prompt's piece that of all.

// fn(row) for all rows, of which each is about this many numbers of work.
template <class Fn>
static void each_row(int64_t rows, int64_t numbers, int threads, Pool& pool, const Fn& fn) {
  constexpr int64_t kTask = 64 << 10;  // numbers; less is not worth a wake-up
  const int64_t step = kTask / std::max<int64_t>(numbers, 1) + 1;
  pool.run((rows + step - 1) / step, threads, [&](int64_t task) {
    for (int64_t r = task * step; r < std::min((task + 1) * step, rows); ++r) fn(r);
  });
}

// Room for what a layer computes on the way, cut into parts.
template <class T>
class Room {
 public:
  template <class... Sizes>
  explicit Room(Sizes... sizes) : memory_((whole(sizes) + ...)), next_(memory_.get()) {}
  T* take(int64_t numbers) {
    T* const part = next_;
    next_ += whole(numbers);
    return part;
  }

 private:
  static int64_t whole(int64_t numbers) { return (numbers + 31) & ~int64_t{31}; }
  Scratch<T, LAYER> memory_;
  T* next_;
};

template <class T>
static void multiply_by(const Product& product, const T* x, int64_t x_stride, int64_t rows, T* out, int threads,
                        Pool& pool) {
  linear<T>(Linear{static_cast<int>(product.kind), x, product.w, product.bias, out, rows, product.k, product.n, x_stride,
                   threads},
            pool);
}

// The residual rows grow by a and b, both or b null, and are normed.
template <class T>
static void add_and_norm(const AttentionLayer& layer, const AttentionStep& step, const void* a, const void* b,
                         const void* norm, int threads, Pool& pool) {
  each_row(step.rows, layer.d, threads, pool, [&](int64_t r) {
    const int64_t at = r * layer.d;
    T* const x = static_cast<T*>(step.x) + at;
    if (a) add(x, static_cast<const T*>(a) + at, b ? static_cast<const T*>(b) + at : nullptr, layer.d);
    rms_norm(x, static_cast<const T*>(norm), layer.d, layer.eps, static_cast<T*>(step.normed) + at);
  });
}

// The heads [rows, ..] leave through the output projection.
template <class T>
static void finish(const AttentionLayer& layer, const AttentionStep& step, const T* heads, T* out, int threads,
                   Pool& pool) {
  multiply_by(layer.out, heads, layer.out.k, step.rows, out, threads, pool);
  add_and_norm<T>(layer, step, out, nullptr, layer.post_norm, threads, pool);
}

template <class T>
static void latent_layer(const LatentLayer& layer, const AttentionStep& step, const void* a, const void* b, int threads,
                         Pool& pool) {
  const AttentionLayer& common = layer.common;
  const Rope& rope = common.rope;
  const int64_t rows = step.rows, heads = common.heads, rank = layer.rank, width = rank + rope.dim;
  const int64_t head_dim = layer.nope_dim + rope.dim, low = layer.down.n - width;  // low: the query's part of down
  Room<T> room(rows * layer.down.n, rows * low, rows * heads * head_dim, rows * heads * width, rows * heads * rank,
               rows * heads * layer.value_dim, rows * common.d);
  T* const down = room.take(rows * layer.down.n);
  T* const low_rank = room.take(rows * low);
  T* query = room.take(rows * heads * head_dim);
  T* const absorbed = room.take(rows * heads * width);
  T* const mixed = room.take(rows * heads * rank);
  T* const out = room.take(rows * heads * layer.value_dim);
  int64_t query_stride = heads * head_dim;

  add_and_norm<T>(common, step, a, b, common.input_norm, threads, pool);
  multiply_by(layer.down, static_cast<const T*>(step.normed), common.d, rows, down, threads, pool);
  if (layer.q_norm) {
    each_row(rows, low, threads, pool, [&](int64_t r) {
      rms_norm(down + r * layer.down.n, static_cast<const T*>(layer.q_norm), low, layer.latent_eps, low_rank + r * low);
    });
    multiply_by(layer.q_up, low_rank, low, rows, query, threads, pool);
  } else {
    query = down;
    query_stride = layer.down.n;
  }
  each_row(rows, heads * rope.dim + width, threads, pool, [&](int64_t r) {
    const int64_t position = step.token_positions[r], slot = step.token_slots[r];
    for (int64_t h = 0; h < heads; ++h)
      rotate(rope, position, query + r * query_stride + h * head_dim + layer.nope_dim, rope.dim,
             absorbed + (r * heads + h) * width + rank);
    const T* const kept = down + r * layer.down.n + low;
    rms_norm(kept, static_cast<const T*>(layer.latent_norm), rank, layer.latent_eps,
             static_cast<T*>(layer.latent) + slot * rank);
    rotate(rope, position, kept + rank, rope.dim, static_cast<T*>(layer.key_rope) + slot * rope.dim);
  });
  head_products<T>(HeadProducts{query, layer.key_up, absorbed, rows, heads, layer.nope_dim, rank, query_stride, head_dim,
                                heads * width, width, threads},
                   pool);
  attention<T>(Attention{absorbed, {layer.latent, layer.key_rope}, layer.latent, mixed, step.spans, step.tables,
                         step.n_spans, heads, 1, {rank, rope.dim}, rank, step.block_size, common.window,
                         static_cast<float>(common.scale), threads},
               pool);
  head_products<T>(HeadProducts{mixed, layer.value_up, out, rows, heads, rank, layer.value_dim, heads * rank, rank,
                                heads * layer.value_dim, layer.value_dim, threads},
                   pool);
  finish(common, step, out, room.take(rows * common.d), threads, pool);
}

// Heads of x, as many side by side as lie in one run of the norm.
template <class T>
static void norm_runs(T* x, int64_t n, const void* norm, int64_t run, double eps) {
  if (!norm) return;
  for (int64_t i = 0; i < n; i += run) rms_norm(x + i, static_cast<const T*>(norm), run, eps, x + i);
}

template <class T>
static void grouped_layer(const GroupedLayer& layer, const AttentionStep& step, const void* a, const void* b, int threads,
                          Pool& pool) {
  const AttentionLayer& common = layer.common;
  const int64_t rows = step.rows, dim = layer.head_dim, width = common.heads * dim, kept = layer.groups * dim;
  Room<T> room(rows * layer.qkv.n, rows * width, rows * width, rows * common.d);
  T* const qkv = room.take(rows * layer.qkv.n);
  T* const query = room.take(rows * width);
  T* const out = room.take(rows * width);

  add_and_norm<T>(common, step, a, b, common.input_norm, threads, pool);
  multiply_by(layer.qkv, static_cast<const T*>(step.normed), common.d, rows, qkv, threads, pool);
  each_row(rows, layer.qkv.n, threads, pool, [&](int64_t r) {
    const int64_t position = step.token_positions[r], slot = step.token_slots[r];
    T* const own = qkv + r * layer.qkv.n;
    norm_runs(own, width, layer.q_norm, layer.q_run, common.eps);
    norm_runs(own + width, kept, layer.k_norm, layer.k_run, common.eps);
    if (std::isfinite(layer.clip)) clamp(own, layer.qkv.n, static_cast<float>(layer.clip));
    for (int64_t i = 0; i < width; i += dim) rotate(common.rope, position, own + i, dim, query + r * width + i);
    T* const key = static_cast<T*>(layer.key) + slot * kept;
    for (int64_t i = 0; i < kept; i += dim) rotate(common.rope, position, own + width + i, dim, key + i);
    std::copy_n(own + width + kept, kept, static_cast<T*>(layer.value) + slot * kept);
  });
  attention<T>(Attention{query, {layer.key, nullptr}, layer.value, out, step.spans, step.tables, step.n_spans,
                         common.heads, layer.groups, {dim, 0}, dim, step.block_size, common.window,
                         static_cast<float>(common.scale), threads},
               pool);
  finish(common, step, out, room.take(rows * common.d), threads, pool);
}
