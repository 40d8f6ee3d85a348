// Which experts see a row, and with what weight, compiled once for each instruction set. No include guard: see
// kernels.cpp. NaN ranks above all numbers; of equal ones the first is chosen.

// Numbers as integers in the same order; TAKEN is below all of them.
constexpr int32_t TAKEN = INT32_MIN;
static inline int32_t key_of(float x) {
  const int32_t bits = __builtin_bit_cast(int32_t, x + 0.0f);  // -0 becomes 0
  const int32_t key = bits < 0 ? bits ^ 0x7fffffff : bits;
  return x != x ? INT32_MAX : key;
}

// The place of the highest key, which is taken.
static inline int64_t take_highest(int32_t* keys, int64_t count) {
  int32_t best = TAKEN;
  for (int64_t i = 0; i < count; ++i) best = std::max(best, keys[i]);
  const int64_t at = std::find(keys, keys + count, best) - keys;
  keys[at] = TAKEN;
  return at;
}

// Softmax or sigmoid of the logits of one row, both padded to 16 numbers.
static inline void score(float* scores, int64_t count, bool softmax) {
  const int64_t padded16 = (count + 15) & ~int64_t{15};
  if (!softmax) {
    for (int64_t i = 0; i < padded16; i += 16)
      *reinterpret_cast<vf*>(scores + i) = 1.0f / (1.0f + exp16(-load(scores + i)));
    return;
  }
  float most = scores[0], sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) most = scores[i] > most || scores[i] != scores[i] ? scores[i] : most;
  for (int64_t i = 0; i < padded16; i += 16)
    *reinterpret_cast<vf*>(scores + i) = exp16(load(scores + i) - most);
  for (int64_t i = 0; i < count; ++i) sum += scores[i];
  for (int64_t i = 0; i < count; ++i) scores[i] /= sum;
}

// Where one row's choice is made: scores and choices of all experts, keys of all experts or groups.
struct Choice {
  float *scores, *choice;
  int32_t *keys, *group_keys;
};

// Who is in none of the best groups gets the choice ``masked``.
static void mask_groups(const Gate& gate, const Choice& room) {
  const int64_t size = gate.weight.n / gate.n_group;
  for (int64_t g = 0; g < gate.n_group; ++g) {
    const float* own = room.choice + g * size;
    for (int64_t i = 0; i < size; ++i) room.keys[i] = key_of(own[i]);
    float rank = own[take_highest(room.keys, size)];
    if (gate.best_two) rank += own[take_highest(room.keys, size)];
    room.group_keys[g] = key_of(rank);
  }
  for (int64_t i = 0; i < gate.topk_group; ++i) take_highest(room.group_keys, gate.n_group);
  for (int64_t g = 0; g < gate.n_group; ++g)
    if (room.group_keys[g] != TAKEN) std::fill_n(room.choice + g * size, size, static_cast<float>(gate.masked));
}

// One row's experts and weights [top_k] from its scores.
static void choose(const Gate& gate, const Choice& room, int64_t* experts, float* weights) {
  const int64_t count = gate.weight.n;
  std::copy_n(room.scores, count, room.choice);
  if (gate.bias && gate.logits_type)
    for (int64_t i = 0; i < count; ++i) room.choice[i] += widen(static_cast<const uint16_t*>(gate.bias)[i]);
  else if (gate.bias)
    for (int64_t i = 0; i < count; ++i) room.choice[i] += static_cast<const float*>(gate.bias)[i];
  if (gate.topk_group < gate.n_group) mask_groups(gate, room);
  for (int64_t i = 0; i < count; ++i) room.keys[i] = key_of(room.choice[i]);
  float sum = 0.0f;
  for (int64_t k = 0; k < gate.top_k; ++k) {
    experts[k] = take_highest(room.keys, count);
    weights[k] = (gate.bias ? room.scores : room.choice)[experts[k]];
    sum += weights[k];
  }
  for (int64_t k = 0; k < gate.top_k; ++k) {
    if (gate.normalise) weights[k] /= sum + static_cast<float>(gate.epsilon);
    weights[k] *= static_cast<float>(gate.scale);
  }
}

template <class T, class Logit>
static void gate_rows(const Gate& gate, const T* x, int64_t rows, int64_t* experts, void* weights, int threads,
                      Pool& pool) {
  constexpr bool kWiden = !std::is_same_v<T, Logit>;
  const int64_t count = gate.weight.n, d = gate.weight.k, width = (count + 15) & ~int64_t{15};
  Room<Logit> room(kWiden ? rows * d : 0, rows * count);
  Logit* const wide = room.take(kWiden ? rows * d : 0);
  Logit* const logits = room.take(rows * count);
  if constexpr (kWiden)
    each_row(rows, d, threads, pool, [&](int64_t r) {
      for (int64_t i = r * d; i < (r + 1) * d; ++i) wide[i] = widen(x[i]);
    });
  const Logit* from;
  if constexpr (kWiden) from = wide;
  else from = x;
  multiply_by(gate.weight, from, d, rows, logits, threads, pool);
  each_row(rows, 16 * count, threads, pool, [&](int64_t r) {
    const Scratch<float, GATES> numbers(2 * width + gate.top_k);
    const Scratch<int32_t, GATES> keys(count + gate.n_group);
    const Choice own{numbers.get(), numbers.get() + width, keys.get(), keys.get() + count};
    float* const chosen = numbers.get() + 2 * width;
    for (int64_t i = 0; i < count; ++i) own.scores[i] = widen(logits[r * count + i]);
    std::fill(own.scores + count, own.scores + width, 0.0f);
    score(own.scores, count, gate.softmax);
    choose(gate, own, experts + r * gate.top_k, chosen);
    for (int64_t k = 0; k < gate.top_k; ++k) {
      const int64_t at = r * gate.top_k + k;
      if (gate.weights_type) put(chosen[k], static_cast<uint16_t*>(weights) + at);
      else static_cast<float*>(weights)[at] = chosen[k];
    }
  });
}

// x [rows, d] of T; the logits are of T as well, or fp32.
template <class T>
static void gate(const Gate& call, const void* x, int64_t rows, int64_t* experts, void* weights, int threads,
                 Pool& pool) {
  const T* from = static_cast<const T*>(x);
  if (call.logits_type == 0) gate_rows<T, float>(call, from, rows, experts, weights, threads, pool);
  else gate_rows<T, uint16_t>(call, from, rows, experts, weights, threads, pool);
}
