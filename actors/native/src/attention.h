// Attention over the paged cache, compiled once for each instruction set. No include guard: see kernels.cpp.
//
// An online softmax (FlashAttention-2, arXiv 2307.08691) in fp32 over blocks of tokens that are cut by absolute
// position. A row's sums run over exactly the tokens that it sees, in their order, so they depend neither on the rows
// beside it nor on how prompt and work are cut.

constexpr int64_t TOKENS = 48;  // of a block: a multiple of 16
constexpr int SCORE_ROWS = TILE_M == 8 ? 6 : 1;  // times four tokens in registers
constexpr int VALUE_ROWS = TILE_M == 8 ? 6 : 2;  // times VALUE_PARTS times 32 columns in registers
constexpr int VALUE_PARTS = TILE_M == 8 ? 2 : 1;

template <class T>
using Value = std::conditional_t<std::is_same_v<T, float>, Fp32, Widened>;

// The slots of a sequence's tokens first .. last.
static inline void find_slots(const int64_t* table, int64_t block_size, int64_t first, int64_t last, int64_t* slots) {
  int64_t block = first / block_size, offset = first % block_size;
  for (int64_t t = first; t < last; ++t) {
    *slots++ = table[block] * block_size + offset;
    if (++offset == block_size) offset = 0, ++block;
  }
}

// What a block of tokens has in one plane for one head: where each token's numbers lie, and those behind the last whole
// 32 copied, as nothing may be read beyond them.
template <class T>
struct Panel {
  const T* head;  // its numbers in slot 0
  int64_t dim, whole, step;
  const T *token[TOKENS], *next[TOKENS];
  alignas(64) T end[TOKENS][32];

  Panel(const void* plane, int64_t width, int64_t groups, int64_t group)
      : head(static_cast<const T*>(plane) + group * width),
        dim(width),
        whole(width & ~int64_t{31}),
        step(groups * width) {}

  void fill(const int64_t* slots, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) token[t] = head + slots[t - from] * step;
    // Scores are computed for four tokens at a time, also where some of them are of no use.
    for (int64_t t = to; t & 3; ++t) token[t] = token[from];
    for (int64_t t = from; t & 3;) token[--t] = token[from];
    if (whole == dim) return;
    for (int64_t t = from & ~int64_t{3}; t < ((to + 3) & ~int64_t{3}); ++t) {
      std::memset(end[t], 0, sizeof(end[t]));
      std::memcpy(end[t], token[t] + whole, (dim - whole) * sizeof(T));
    }
  }

  // Those of the next block, of which there are count.
  void look_ahead(const int64_t* slots, int64_t count) {
    for (int64_t t = 0; t < TOKENS; ++t) next[t] = t < count ? head + slots[t] * step : nullptr;
  }

  // Token t of the next block is on its way to the second cache. A few at a time: the CPU has room for few that are
  // under way, and a burst would make it wait.
  void prefetch(int64_t t) const {
    if (next[t])
      for (int64_t i = 0; i < dim; i += 64 / sizeof(T)) fetch(next[t] + i);
  }

  // The 32 numbers of token t from this column on.
  const T* at(int64_t t, int64_t column) const { return column < whole ? token[t] + column : end[t]; }
};

// What scores<W, MR> has summed up lane by lane.
template <int MR>
static inline __attribute__((always_inline)) void put_scores(const vf* acc, float scale, float* out) {
  constexpr int rows = std::min(MR, 4);
  const vf sum = sums<rows * 4>(acc) * scale;
  for (int m = 0; m < rows; ++m) std::memcpy(out + m * TOKENS, reinterpret_cast<const float*>(&sum) + 4 * m, 16);
  if constexpr (MR > 4) put_scores<MR - 4>(acc + 16, scale, out + 4 * TOKENS);
}

// out[m * TOKENS + j] = scale * query m . key of token first + j, for MR rows and four tokens.
template <class W, int MR>
static inline void scores(const typename W::Row* const* query, const Panel<typename W::Stored>* keys, int64_t first,
                          float scale, float* out) {
  vf acc[MR * 4] = {};
  const typename W::Row* x[MR];
  for (int m = 0; m < MR; ++m) x[m] = query[m];
  for (const auto* key = keys; key != keys + 2; ++key) {
    accumulate<W, MR, 4, false>(x, key->token + first, key->whole, 0, acc);
    for (int m = 0; m < MR; ++m) x[m] += key->whole;
    if (key->whole == key->dim) continue;
    const typename W::Stored* ends[4];
    for (int n = 0; n < 4; ++n) ends[n] = key->end[first + n];
    accumulate<W, MR, 4, false>(x, ends, 32, 0, acc);
    for (int m = 0; m < MR; ++m) x[m] += 32;
  }
  put_scores<MR>(acc, scale, out);
}

// sum[m] += share[m][t] * value[t] for MR rows, the tokens from .. to one after the other, PARTS times 32 columns.
// ahead: the next block's values are fetched meanwhile.
template <class V, int MR, int PARTS>
static inline void add_values(const float* share, const Panel<typename V::Stored>& value, int64_t from, int64_t to,
                              int64_t column, float* sum, int64_t width, bool ahead) {
  vf acc[MR][2 * PARTS];
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < 2 * PARTS; ++i) acc[m][i] = load(sum + m * width + column + 16 * i);
  for (int64_t t = from; t < to; ++t) {
    if (ahead) value.prefetch(t);
    typename V::Numbers v[PARTS];
    for (int i = 0; i < PARTS; ++i) v[i] = V::weight(value.at(t, column + 32 * i), {}, 0);
    for (int m = 0; m < MR; ++m) {
      const float p = share[m * TOKENS + t];
      for (int i = 0; i < PARTS; ++i) {
        acc[m][2 * i] = v[i].first * p + acc[m][2 * i];
        acc[m][2 * i + 1] = v[i].second * p + acc[m][2 * i + 1];
      }
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int i = 0; i < 2 * PARTS; ++i) *reinterpret_cast<vf*>(sum + m * width + column + 16 * i) = acc[m][i];
}

static inline __attribute__((always_inline)) vi between(int64_t first, int from, int to) {
  const vi lane = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + static_cast<int>(first);
  return (lane >= from) & (lane < to);
}

static inline __attribute__((always_inline)) vf greater(vf a, vf b) { return a > b ? a : b; }

static inline float greatest(vf x) {
  x = greater(x, __builtin_shuffle(x, vi{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  x = greater(x, __builtin_shuffle(x, vi{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  x = greater(x, __builtin_shuffle(x, vi{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  return std::max(x[0], x[1]);
}

// The state of one row's softmax, and which tokens of the block under way it sees.
struct Softmax {
  float highest = -INFINITY, total = 0.0f;
  int from = 0, to = 0;

  // Turns the scores into shares, relative to the highest score so far; returns what earlier sums are to be scaled by.
  float add(float* score) {
    vf best = vf{} - INFINITY;
    for (int64_t i = 0; i < TOKENS; i += 16)
      best = greater(between(i, from, to) ? load(score + i) : vf{} - INFINITY, best);
    const float before = highest;
    highest = std::max(before, greatest(best));
    const float base = highest == -INFINITY ? 0.0f : highest;  // shares of -inf are 0: scores that are more may follow
    vf sum{};
    for (int64_t i = 0; i < TOKENS; i += 16) {
      const vf share = between(i, from, to) ? exp16(load(score + i) - base) : vf{};
      *reinterpret_cast<vf*>(score + i) = share;
      sum += share;
    }
    float added;
    sums<1>(&sum, &added);
    const float scale = highest > before ? exp16(vf{} + (before - highest))[0] : 1.0f;
    total = total * scale + added;
    return scale;
  }
};

// Calls fn(first, MR) for rows in tiles of about the same size, at most MOST.
template <int MOST, class Fn>
static inline void in_tiles(int64_t rows, const Fn& fn) {
  const int64_t tiles = (rows + MOST - 1) / MOST;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
    with_rows<MOST>(static_cast<int>(last - first), [&](auto mr) { fn(first, mr); });
  }
}

// What a task needs for its rows; a thread keeps it for its next one.
template <class T>
struct Workspace {
  std::vector<typename KindOf<T>::W::Row> laid;
  std::vector<const typename KindOf<T>::W::Row*> query;
  std::vector<Softmax> softmax;
  std::vector<float> score, sum;
};

// One task's rows for one group: their queries laid out, their sums, and the block of tokens under way.
template <class T>
class Attended {
  using W = typename KindOf<T>::W;
  using V = Value<T>;
  using Row = typename W::Row;

 public:
  Attended(const Attention& call, const AttentionTask& task, int64_t group, Workspace<T>& own)
      : call_(call),
        task_(task),
        rows_(task.last - task.first),
        shared_(call.heads / call.groups),
        width_(stride(call.value_dim)),
        keys_{{call.key[0], call.key_dim[0], call.groups, group},
              {call.key[1], call.key_dim[1], call.groups, group}},
        value_(call.value, call.value_dim, call.groups, group),
        group_(group) {
    const int64_t first_plane = padded(call.key_dim[0]), row_width = stride(first_plane + padded(call.key_dim[1]));
    own.laid.resize(rows_ * row_width);
    own.query.resize(rows_);
    own.softmax.assign(rows_, {});
    own.score.resize(rows_ * TOKENS);
    own.sum.assign(rows_ * width_, 0.0f);
    query_ = own.query.data();
    softmax_ = own.softmax.data();
    score_ = own.score.data();
    sum_ = own.sum.data();
    for (int64_t r = 0; r < rows_; ++r) {
      Row* to = own.laid.data() + r * row_width;
      const T* from = static_cast<const T*>(call.query) + at(r) * (call.key_dim[0] + call.key_dim[1]);
      W::lay_out(from, call.key_dim[0], to);
      W::lay_out(from + call.key_dim[0], call.key_dim[1], to + first_plane);
      query_[r] = to;
    }
  }

  // The first block of tokens that any row sees, and the end of the last.
  int64_t begin() const {
    const int64_t from = first_seen(position(0), call_.window);
    return from - from % TOKENS;
  }
  int64_t end() const { return position(rows_ - 1) + 1; }

  // Goes on by the block of tokens that begins there.
  void add(int64_t base) {
    begin(base, std::max(first_seen(position(0), call_.window), base) - base, std::min(end() - base, TOKENS), end());
    score();
    for (int64_t r = 0; r < rows_; ++r) weigh(r);
    in_tiles<VALUE_ROWS>(rows_, [&](int64_t first, auto mr) { mix<decltype(mr)::value>(first); });
  }

  void finish() {
    for (int64_t r = 0; r < rows_; ++r) store(r);
  }

 private:
  int64_t position(int64_t r) const { return task_.span->context + (task_.first + r) / shared_; }

  // Of all rows times heads, which one this is.
  int64_t at(int64_t r) const {
    const int64_t row = task_.first + r;
    return (task_.span->start + row / shared_) * call_.heads + group_ * shared_ + row % shared_;
  }

  // The tokens base + from .. base + to are at hand, every row knows which of them it sees, and it is known where the
  // next ones are, up to end: in a paged cache the CPU cannot tell.
  void begin(int64_t base, int64_t from, int64_t to, int64_t end) {
    from_ = from;
    to_ = to;
    const int64_t next = std::min(base + 2 * TOKENS, end), count = to - from;
    int64_t slots[2 * TOKENS];
    find_slots(call_.tables + task_.span->table, call_.block_size, base + from, next, slots);
    for (Panel<T>* panel : {&keys_[0], &keys_[1], &value_}) {
      if (!panel->dim) continue;
      panel->fill(slots, from, to);
      panel->look_ahead(slots + count, next - base - to);
    }
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t last = position(r);
      softmax_[r].from = static_cast<int>(std::clamp<int64_t>(first_seen(last, call_.window) - base, 0, TOKENS));
      softmax_[r].to = static_cast<int>(std::clamp<int64_t>(last + 1 - base, 0, TOKENS));
    }
  }

  void score() {
    for (int64_t t = from_ & ~int64_t{3}; t < to_; t += 4) {
      for (int64_t i = t; i < t + 4; ++i)
        for (const auto& key : keys_)
          if (key.dim) key.prefetch(i);
      in_tiles<SCORE_ROWS>(rows_, [&](int64_t first, auto mr) {
        scores<W, decltype(mr)::value>(query_ + first, keys_, t, call_.scale, score_ + first * TOKENS + t);
      });
    }
  }

  void weigh(int64_t r) {
    if (softmax_[r].from >= softmax_[r].to) return;
    const float scale = softmax_[r].add(score_ + r * TOKENS);
    if (scale == 1.0f) return;
    float* sum = sum_ + r * width_;
    for (int64_t i = 0; i < padded(call_.value_dim); i += 16) *reinterpret_cast<vf*>(sum + i) = load(sum + i) * scale;
  }

  // Adds the values: the tokens that all MR rows see for all of them at once, what is before and behind row by row.
  template <int MR>
  void mix(int64_t first) {
    int from = 0, to = TOKENS;
    for (int m = 0; m < MR; ++m) {
      from = std::max(from, softmax_[first + m].from);
      to = std::min(to, softmax_[first + m].to);
    }
    if (from >= to) from = to = TOKENS;
    const Softmax* rows = softmax_ + first;
    for (int m = 0; m < MR; ++m) mix_rows<1>(first + m, rows[m].from, std::min(from, rows[m].to));
    mix_rows<MR>(first, from, to);
    for (int m = 0; m < MR; ++m) mix_rows<1>(first + m, std::max(to, rows[m].from), rows[m].to);
  }

  template <int MR>
  void mix_rows(int64_t first, int64_t from, int64_t to) {
    if (from >= to) return;
    const float* share = score_ + first * TOKENS;
    float* sum = sum_ + first * width_;
    bool ahead = first == 0 && value_.head != keys_[0].head;  // the latent is both
    int64_t column = 0;
    for (; column + 32 * VALUE_PARTS <= call_.value_dim; column += 32 * VALUE_PARTS, ahead = false)
      add_values<V, MR, VALUE_PARTS>(share, value_, from, to, column, sum, width_, ahead);
    for (; column < call_.value_dim; column += 32, ahead = false)
      add_values<V, MR, 1>(share, value_, from, to, column, sum, width_, ahead);
  }

  void store(int64_t r) const {
    const float* sum = sum_ + r * width_;
    T* out = static_cast<T*>(call_.out) + at(r) * call_.value_dim;
    for (int64_t i = 0; i < call_.value_dim; ++i) {
      const int64_t odd_last = (i & ~int64_t{31}) + (i & 1) * 16 + (i & 31) / 2;  // the order of Widened
      put(sum[std::is_same_v<T, float> ? i : odd_last] / softmax_[r].total, out + i);
    }
  }

  const Attention& call_;
  const AttentionTask& task_;
  const int64_t rows_, shared_, width_;
  int64_t from_ = 0, to_ = 0;
  Panel<T> keys_[2], value_;
  int64_t group_;
  const Row** query_;
  Softmax* softmax_;
  float *score_, *sum_;
};

template <class T>
static void attention(const Attention& call, Pool& pool) {
  const std::vector<AttentionTask> tasks = attention_tasks(call);
  pool.run(static_cast<int64_t>(tasks.size()), call.threads, [&](int64_t task) {
    thread_local std::vector<Workspace<T>> own;
    const AttentionTask& wanted = tasks[task];
    const int64_t count = wanted.last_group - wanted.group;
    if (static_cast<int64_t>(own.size()) < count) own.resize(count);
    std::vector<Attended<T>> groups;
    groups.reserve(count);
    for (int64_t g = 0; g < count; ++g) groups.emplace_back(call, wanted, wanted.group + g, own[g]);
    for (int64_t base = groups[0].begin(), end = groups[0].end(); base < end; base += TOKENS)
      for (auto& group : groups) group.add(base);
    for (auto& group : groups) group.finish();
  });
}

template <class T>
static void head_products(const HeadProducts& call, Pool& pool) {
  using W = typename KindOf<T>::W;
  const int64_t width = stride(call.k), step = std::max<int64_t>(TILE_N, call.n * call.heads / (4 * call.threads));
  const int64_t parts = (call.n + step - 1) / step;
  pool.run(call.heads * parts, call.threads, [&](int64_t task) {
    const int64_t head = task / parts, from = task % parts * step, count = std::min(step, call.n - from);
    const Scratch<typename W::Row> scratch(call.rows * width);
    auto* const laid = scratch.get();
    std::vector<const typename W::Row*> rows(call.rows);
    for (int64_t r = 0; r < call.rows; ++r) {
      W::lay_out(static_cast<const T*>(call.x) + r * call.x_row + head * call.x_head, call.k, laid + r * width);
      rows[r] = laid + r * width;
    }
    T* out = static_cast<T*>(call.out) + head * call.out_head;
    const Matrix w{static_cast<const T*>(call.w) + head * call.n * call.k, nullptr, nullptr, 0, 0};
    multiply<W>(rows.data(), call.rows, w, from, from + count, call.k,
                [&](int64_t m, int64_t n, float value) { put(value, out + m * call.out_row + n); });
  });
}
