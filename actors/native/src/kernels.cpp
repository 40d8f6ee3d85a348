// Products of few rows with weights that are read once from memory, and the experts' SwiGLU made of them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "attention_layer_call.h"
#include "attention_tasks.h"
#include "dispatch.h"
#include "gate_call.h"
#include "kernels.h"
#include "matrix.h"
#include "pool.h"

namespace expertmesh {

static inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

static inline uint16_t to_bf16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 64);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

static inline float from_fp16(uint16_t x) {  // finite
  const uint32_t magnitude = (x & 0x7fffu) << 13, sign = (x & 0x8000u) << 16;
  float out;
  std::memcpy(&out, &magnitude, 4);
  out *= 0x1p112f;  // the exponents' biases differ by so much
  return sign ? -out : out;
}

static inline int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

static inline int64_t padded(int64_t k) { return rounded_up(k, 32); }

// Numbers from one laid out row to the next: an odd number of cache lines, or all rows would share a few sets of the cache.
static inline int64_t stride(int64_t k) { return rounded_up(k, 64) + 32; }

// Of a weight. Dense: of the rows' own type; W8A8, W4A8: int8 and int4 for rows that become int8 as they come.
enum Kind { DENSE, INT8, INT4, W8A8, W4A8 };
enum ScaleKind { FP32, BF16, FP16 };

struct Linear {
  int kind;
  const void* x;
  const Matrix& w;
  const void* bias;
  void* out;
  int64_t rows, k, n, x_stride;
  int threads;
};

struct Dequantize {
  int kind;
  const Matrix& w;
  void* out;
  int64_t n, k;
  int threads;
};

struct Quantize {
  const void* w;
  uint8_t* data;
  uint16_t* scale;
  uint8_t* zero;
  int64_t n, k, stride;
  int threads;
};

struct Experts {
  int gate_up_kind, down_kind;
  const void* x;
  const int64_t *pair_row, *pair_expert;
  const Matrix* matrices;  // of each expert gate, up and down
  void* out;
  int64_t rows, pairs, d, inter, n_experts;
  int threads;
};

// The pairs in the order of their experts.
struct Grouped {
  std::vector<int64_t> experts, offset{0}, order;
  int64_t wrong = -1;  // see expertmesh_experts

  int64_t count() const { return static_cast<int64_t>(experts.size()); }

  explicit Grouped(const Experts& call) : order(call.pairs) {
    std::vector<int64_t> at(call.n_experts + 1, 0);
    for (int64_t p = 0; p < call.pairs; ++p) {
      const int64_t e = call.pair_expert[p];
      if (e < 0 || e >= call.n_experts || !call.matrices[3 * e].data) wrong = p;
      if (call.pair_row[p] < 0 || call.pair_row[p] >= call.rows) wrong = call.pairs + p;
      if (wrong >= 0) return;
      ++at[e + 1];
    }
    for (int64_t e = 0; e < call.n_experts; ++e) {
      if (at[e + 1]) {
        experts.push_back(e);
        offset.push_back(offset.back() + at[e + 1]);
      }
      at[e + 1] += at[e];
    }
    for (int64_t p = 0; p < call.pairs; ++p) order[at[call.pair_expert[p]]++] = p;
  }
};

constexpr int64_t IN_CACHE = 256 << 10;  // bytes of rows that stay in the second cache while weights stream by
constexpr int64_t DIRECT_ROWS = 8;  // up to so many, quantised weights are dequantised anew for each tile of rows
constexpr int INTER_STEP = 96;  // columns of one task; a multiple of 32 and of every TILE_N

// Weight rows for one task: a few for each thread, so that both end at about the same time, but no tiny ones.
static int64_t task_rows(int64_t n, int64_t row_bytes, int threads) {
  const int64_t fair = (n + threads * 8 - 1) / (threads * 8), least = (64 << 10) / std::max<int64_t>(row_bytes, 1) + 1;
  return rounded_up(std::max(fair, least), 48);
}

// Weights of so many bytes each, for which the second cache has room beside the rows.
static int64_t weights_in_cache(int64_t row_bytes) {
  return std::max<int64_t>(1, IN_CACHE / 2 / std::max<int64_t>(row_bytes, 1) / 24) * 24;
}

constexpr int64_t MOST_KEPT = 2 << 20;  // bytes: what a step of decoding needs; with more a call takes milliseconds

// Memory that begins with a cache line: what is loaded a line at a time would else come from two each time.
struct Free {
  void operator()(void* at) const { ::operator delete(at, std::align_val_t{64}); }
};
template <class T>
using Lines = std::unique_ptr<T[], Free>;
template <class T>
static Lines<T> in_lines(int64_t numbers) {
  return Lines<T>(static_cast<T*>(::operator new(numbers * sizeof(T), std::align_val_t{64})));
}

// Memory of this thread, undefined at first. A little of it stays for the next call with the same use.
enum Use { ROWS, HIDDEN, GATES, SCALES, NUMBERS, LAYER };
template <class T, Use use = ROWS>
class Scratch {
 public:
  explicit Scratch(int64_t numbers) {
    thread_local Lines<T> kept;
    thread_local int64_t size = 0;
    const bool much = numbers * static_cast<int64_t>(sizeof(T)) > MOST_KEPT;
    if (much) own_ = in_lines<T>(numbers);
    if (!much && size < numbers) {
      size = 0;
      kept.reset();
      kept = in_lines<T>(numbers);
      size = numbers;
    }
    at_ = much ? own_.get() : kept.get();
  }
  T* get() const { return at_; }

 private:
  Lines<T> own_;
  T* at_;
};

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma")
namespace avx512_bf16 {
constexpr int TILE_M = 8, TILE_N = 3;
#define HAS_AVX512 1
#define HAS_FMA 1
#define HAS_BF16_DOT 1
#define HAS_VNNI 1
#include "products.h"
#include "lanes.h"
#include "int8_rows.h"
#include "layers.h"
#include "attention.h"
#include "combine.h"
#include "elementwise.h"
#include "attention_layer.h"
#include "gate.h"
#include "quantize.h"
#undef HAS_BF16_DOT
#undef HAS_VNNI
}  // namespace avx512_bf16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
namespace avx512 {
constexpr int TILE_M = 8, TILE_N = 3;
#include "products.h"
#include "lanes.h"
#include "int8_rows.h"
#include "layers.h"
#include "attention.h"
#include "combine.h"
#include "elementwise.h"
#include "attention_layer.h"
#include "gate.h"
#include "quantize.h"
#undef HAS_AVX512
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int TILE_M = 2, TILE_N = 3;
#define HAS_AVX2 1
#include "products.h"
#include "lanes.h"
#include "int8_rows.h"
#include "layers.h"
#include "attention.h"
#include "combine.h"
#include "elementwise.h"
#include "attention_layer.h"
#include "gate.h"
#include "quantize.h"
#undef HAS_AVX2
#undef HAS_FMA
}  // namespace avx2
#pragma GCC pop_options
#endif

namespace portable {
constexpr int TILE_M = 2, TILE_N = 3;
#include "products.h"
#include "lanes.h"
#include "int8_rows.h"
#include "layers.h"
#include "attention.h"
#include "combine.h"
#include "elementwise.h"
#include "attention_layer.h"
#include "gate.h"
#include "quantize.h"
}  // namespace portable

struct Kernels {
  const char* isa;
  void (*linear[2])(const Linear&, Pool&);
  void (*dequantize[2])(const Dequantize&, Pool&);
  int64_t (*experts[2])(const Experts&, Pool&);
  void (*attention[2])(const Attention&, Pool&);
  void (*head_products[2])(const HeadProducts&, Pool&);
  void (*combine[2])(const Combine&, const void* const*, const float*, Pool&);
  void (*grouped_layer[2])(const GroupedLayer&, const AttentionStep&, const void*, const void*, int, Pool&);
  void (*latent_layer[2])(const LatentLayer&, const AttentionStep&, const void*, const void*, int, Pool&);
  void (*gate[2])(const Gate&, const void*, int64_t, int64_t*, void*, int, Pool&);
  void (*quantize_int4[2])(const Quantize&, Pool&);
};

#define KERNELS(isa)                                                    \
  {                                                                     \
    #isa, {isa::linear<float>, isa::linear<uint16_t>},                  \
        {isa::dequantize<float>, isa::dequantize<uint16_t>},            \
        {isa::experts<float>, isa::experts<uint16_t>},                  \
        {isa::attention<float>, isa::attention<uint16_t>},              \
        {isa::head_products<float>, isa::head_products<uint16_t>},      \
        {isa::combine<float>, isa::combine<uint16_t>},                  \
        {isa::grouped_layer<float>, isa::grouped_layer<uint16_t>},      \
        {isa::latent_layer<float>, isa::latent_layer<uint16_t>},        \
        {isa::gate<float>, isa::gate<uint16_t>},                        \
        {isa::quantize_int4<float>, isa::quantize_int4<uint16_t>},      \
  }

static std::vector<Kernels> supported() {
  std::vector<Kernels> all;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (wide && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    all.push_back(KERNELS(avx512_bf16));
  if (wide) all.push_back(KERNELS(avx512));
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) all.push_back(KERNELS(avx2));
#endif
  all.push_back(KERNELS(portable));
  return all;
}

static const std::vector<Kernels>& all() {
  static const auto* one = new std::vector<Kernels>(supported());
  return *one;
}

static Pool& pool() {
  static Pool* one = new Pool;  // never freed: its threads may outlive static objects
  return *one;
}

// What a function returns that has found no memory; nothing else is ever thrown.
constexpr int64_t NO_MEMORY = -2;

template <class Fn>
static int64_t guarded(const Fn& fn) noexcept {
  try {
    return fn();
  } catch (...) {
    return NO_MEMORY;
  }
}

}  // namespace expertmesh

using namespace expertmesh;

extern "C" {

// All but the first return NO_MEMORY where they have found none, and 0 where nothing else is said.

// The name of the i-th instruction set that this CPU has, the best first; null behind the last.
const char* expertmesh_isa(int i) { return i < static_cast<int>(all().size()) ? all()[i].isa : nullptr; }

// type: 0 fp32, 1 bf16, of all operands that are not quantised. x [rows, k], rows x_stride apart; w [n, k], quantised with
// k a multiple of 32; bias [n] or null; out [rows, n].
int64_t expertmesh_linear(int isa, int type, int kind, const void* x, const void* w, const void* bias, void* out,
                          int64_t rows, int64_t k, int64_t n, int64_t x_stride, int threads) {
  const Linear call{kind, x, *static_cast<const Matrix*>(w), bias, out, rows, k, n, x_stride, threads};
  return guarded([&] { return all()[isa].linear[type](call, pool()), 0; });
}

// out [n, k], fp32 or bf16 by its type: the numbers of w, INT8 or INT4, rounded once; k a multiple of 32.
int64_t expertmesh_dequantize(int isa, int type, int kind, const void* w, void* out, int64_t n, int64_t k,
                              int threads) {
  const Dequantize call{kind, *static_cast<const Matrix*>(w), out, n, k, threads};
  return guarded([&] { return all()[isa].dequantize[type](call, pool()), 0; });
}

// x [rows, d]; pair p sends row pair_row[p] to expert pair_expert[p] < n_experts; matrices: the gate and up [inter, d] and
// down [d, inter] of each expert, addresses null if it is not held; out [pairs, d], unweighted. Returns, before
// computing, p for a pair whose expert is not held, pairs + p for one whose row is not there, else -1.
int64_t expertmesh_experts(int isa, int type, int gate_up_kind, int down_kind, const void* x, const int64_t* pair_row,
                           const int64_t* pair_expert, const void* matrices, void* out, int64_t rows, int64_t pairs,
                           int64_t d, int64_t inter, int64_t n_experts, int threads) {
  const auto* w = static_cast<const Matrix*>(matrices);
  const Experts call{gate_up_kind, down_kind, x, pair_row, pair_expert, w, out, rows, pairs, d, inter, n_experts, threads};
  return guarded([&] { return all()[isa].experts[type](call, pool()); });
}

// query [rows, heads, key_dim + rest_dim], out [rows, heads, value_dim]; spans [n_spans, 4] (see Span), whose tables list
// blocks of block_size slots; key [slots, groups, key_dim], rest likewise or null, value [slots, groups, value_dim]. Row i
// of a span sees the tokens up to context + i, the last window ones of them; window 0: all.
int64_t expertmesh_attention(int isa, int kind, const void* query, const void* key, const void* rest, const void* value,
                             void* out, const int64_t* spans, const int64_t* tables, int64_t n_spans, int64_t heads,
                             int64_t groups, int64_t key_dim, int64_t rest_dim, int64_t value_dim, int64_t block_size,
                             int64_t window, float scale, int threads) {
  const Attention call{query, {key, rest}, value, out, spans, tables, n_spans, heads, groups, {key_dim, rest_dim},
                       value_dim, block_size, window, scale, threads};
  return guarded([&] { return all()[isa].attention[kind](call, pool()), 0; });
}

// x [rows, heads, k], w [heads, n, k], out [rows, heads, n]; rows and heads of x and out lie so many numbers apart.
int64_t expertmesh_head_products(int isa, int kind, const void* x, const void* w, void* out, int64_t rows, int64_t heads,
                                 int64_t k, int64_t n, int64_t x_row, int64_t x_head, int64_t out_row,
                                 int64_t out_head, int threads) {
  const HeadProducts call{x, w, out, rows, heads, k, n, x_row, x_head, out_row, out_head, threads};
  return guarded([&] { return all()[isa].head_products[kind](call, pool()), 0; });
}

// Weighted sums of unweighted rows, see actors/model/combine.py. kind: of the rows; weight_kind, out_kind: 0 fp32, 1 bf16.
// pieces [n_pieces] (see Piece) hold each of the tokens * k rows of d once; weight [tokens, k]; out [tokens, d].
int64_t expertmesh_combine(int isa, int kind, int weight_kind, int out_kind, const void* pieces, const void* weight,
                           void* out, int64_t n_pieces, int64_t tokens, int64_t k, int64_t d, int threads) {
  const Combine call{weight, static_cast<const Piece*>(pieces), out, n_pieces, tokens, k, d, weight_kind, out_kind, threads};
  return guarded([&] {
    const Scratch<const void*> at(tokens * k);
    addresses(call, d * (kind == 0 ? 4 : 2), at.get());
    const Scratch<float> widened(tokens * k);
    for (int64_t i = 0; i < tokens * k; ++i)
      widened.get()[i] = weight_kind == 0 ? static_cast<const float*>(weight)[i]
                                          : from_bf16(static_cast<const uint16_t*>(weight)[i]);
    return all()[isa].combine[kind](call, at.get(), widened.get(), pool()), 0;
  });
}

// A decoder layer's attention: step.x grows by a and b [rows, d], b or both null, then by what the layer's attention makes
// of it, and is left normed for the MLP in step.normed; see attention_layer_call.h. Returns, before anything is changed,
// 1 + the row whose position or slot does not exist, else 0.
int64_t expertmesh_grouped_layer(int isa, int type, const void* layer, const void* step, const void* a, const void* b,
                                 int threads) {
  const auto& call = *static_cast<const GroupedLayer*>(layer);
  const auto& rows = *static_cast<const AttentionStep*>(step);
  if (const int64_t outside = row_outside(call.common, rows); outside >= 0) return outside + 1;
  return guarded([&] { return all()[isa].grouped_layer[type](call, rows, a, b, threads, pool()), 0; });
}

int64_t expertmesh_latent_layer(int isa, int type, const void* layer, const void* step, const void* a, const void* b,
                                int threads) {
  const auto& call = *static_cast<const LatentLayer*>(layer);
  const auto& rows = *static_cast<const AttentionStep*>(step);
  if (const int64_t outside = row_outside(call.common, rows); outside >= 0) return outside + 1;
  return guarded([&] { return all()[isa].latent_layer[type](call, rows, a, b, threads, pool()), 0; });
}

// w [n, k], fp32 or bf16 by its type, rows stride apart, k even; data [n, k / 2], scale (bf16) and zero (in eighths of a step)
// [n, ceil(k / 32)].
int64_t expertmesh_quantize_int4(int isa, int type, const void* w, void* data, void* scale, void* zero, int64_t n,
                                 int64_t k, int64_t stride, int threads) {
  const Quantize call{w, static_cast<uint8_t*>(data), static_cast<uint16_t*>(scale), static_cast<uint8_t*>(zero), n, k, stride,
                      threads};
  return guarded([&] { return all()[isa].quantize_int4[type](call, pool()), 0; });
}

// x [rows, d]; experts and weights [rows, top_k], best first; see gate_call.h. bf16 logits only for bf16 rows.
int64_t expertmesh_gate(int isa, int type, const void* gate, const void* x, int64_t* experts, void* weights, int64_t rows,
                        int threads) {
  const auto& call = *static_cast<const Gate*>(gate);
  return guarded([&] { return all()[isa].gate[type](call, x, rows, experts, weights, threads, pool()), 0; });
}

// Splits all pairs of a batch among the shards that compute them (see Owners), and counts them in load [n_experts]. chosen
// [T, k]: the expert of each slot, count of them. out [6 count] has, count numbers each but for the table's 3 count, and
// shard by shard: the rows, the slots, the table (shard, its rows, its pairs) whose length is returned, and two of int32:
// pair_row and pair_expert. Slots of nobody are in none. Returns -1, and nothing was done, for an expert that is none.
int64_t expertmesh_dispatch(const int64_t* chosen, const int64_t* shards, const int64_t* live, int64_t* load, int64_t* out,
                            int64_t count, int64_t k, int64_t width, int64_t n_experts, int64_t turn) {
  const Owners owners{shards, live, width, n_experts, turn};
  return guarded([&] { return dispatch(chosen, count, k, owners, load, out); });
}

}  // extern "C"
