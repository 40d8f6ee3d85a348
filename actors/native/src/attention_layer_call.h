// What a decoder layer's attention is called with: the structs of actors/native/attention_layer.py, in the same order.
#pragma once

#include <cstdint>

#include "matrix.h"

namespace expertmesh {

// Tables of cos and sin [positions, dim / 2]: fp32 if wide, else of the rows' type.
struct Rope {
  const void *cos, *sin;
  int64_t positions, dim, wide, interleaved;
};

// The rows of one batch: residual rows x [rows, d], which are changed, and room for them normed.
struct AttentionStep {
  void *x, *normed;
  const int64_t *token_positions, *token_slots, *spans, *tables;  // see Attention
  int64_t rows, n_spans, block_size;
};

// What all kinds of attention have.
struct AttentionLayer {
  const void *input_norm, *post_norm;
  Product out;
  Rope rope;
  int64_t d, heads, slots, window;  // slots: of the cache
  double eps, scale;
};

// Grouped-query attention. q_norm, k_norm: of q_run and k_run numbers, or null. clip: infinity for none.
struct GroupedLayer {
  AttentionLayer common;
  Product qkv;
  const void *q_norm, *k_norm;
  int64_t q_run, k_run;
  void *key, *value;  // planes [slots, groups, head_dim]
  int64_t groups, head_dim;
  double clip;
};

// Multi-head latent attention. q_norm, q_up.w: null without a low-rank query, which down then gives itself.
struct LatentLayer {
  AttentionLayer common;
  Product down, q_up;
  const void *q_norm, *latent_norm, *key_up, *value_up;
  void *latent, *key_rope;  // planes [slots, rank] and [slots, rope.dim]
  int64_t rank, nope_dim, value_dim;
  double latent_eps;
};

// The first row whose position or slot does not exist, or -1.
static inline int64_t row_outside(const AttentionLayer& layer, const AttentionStep& step) {
  for (int64_t r = 0; r < step.rows; ++r) {
    const int64_t position = step.token_positions[r], slot = step.token_slots[r];
    if (position < 0 || position >= layer.rope.positions || slot < 0 || slot >= layer.slots) return r;
  }
  return -1;
}

}  // namespace expertmesh
