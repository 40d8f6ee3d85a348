// Which rows go to which expert shard, and the call that combines what comes back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace expertmesh {

// Results that lie together: a row for each of slots [count]; slots null: for 0, 1, ...
struct Piece {
  const int64_t* slots;
  const void* rows;
  int64_t count;
};

struct Combine {
  const void* weight;
  const Piece* pieces;
  void* out;
  int64_t n_pieces, tokens, k, d;
  int weight_kind, out_kind, threads;
};

// The addresses of the tokens x k rows that are combined; see expertmesh_combine.
static inline void addresses(const Combine& call, int64_t row_bytes, const void** at) {
  for (const Piece* piece = call.pieces; piece < call.pieces + call.n_pieces; ++piece)
    for (int64_t i = 0; i < piece->count; ++i)
      at[piece->slots ? piece->slots[i] : i] = static_cast<const char*>(piece->rows) + i * row_bytes;
}

// Who computes an expert of a layer: shards [n_experts, width], less than 0 for nobody, of which the first live [n_experts]
// take turns; see actors/dispatch.py.
struct Owners {
  const int64_t *shards, *live;
  int64_t width, n_experts, turn;

  int64_t of(int64_t expert) const {
    return shards[expert * width + (turn + expert) % std::max<int64_t>(live[expert], 1)];
  }
};

// Every pair to its shard's place in the results, in the order of the slots; see expertmesh_dispatch.
static inline int64_t dispatch(const int64_t* chosen, int64_t count, int64_t k, const Owners& owners, int64_t* load,
                               int64_t* out) {
  for (int64_t i = 0; i < count; ++i)
    if (chosen[i] < 0 || chosen[i] >= owners.n_experts) return -1;
  std::vector<int64_t> owner(count);
  int64_t shards = 0;
  for (int64_t i = 0; i < count; ++i) {
    ++load[chosen[i]];
    owner[i] = owners.of(chosen[i]);
    shards = std::max(shards, owner[i] + 1);
  }
  std::vector<int64_t> pairs(shards + 1, 0), rows(shards + 1, 0), last(shards, -1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t shard = owner[i], row = i / k;
    if (shard < 0) continue;
    ++pairs[shard + 1];
    rows[shard + 1] += last[shard] != row;
    last[shard] = row;
  }
  int64_t* const row_out = out;
  int64_t* const slot_out = out + count;
  int64_t* table = out + 2 * count;
  int32_t* const pair_row = reinterpret_cast<int32_t*>(out + 5 * count);
  int32_t* const pair_expert = pair_row + count;
  int64_t shares = 0;
  for (int64_t shard = 0; shard < shards; ++shard) {
    if (pairs[shard + 1]) {
      *table++ = shard;
      *table++ = rows[shard + 1];
      *table++ = pairs[shard + 1];
      ++shares;
    }
    pairs[shard + 1] += pairs[shard];
    rows[shard + 1] += rows[shard];
  }
  const std::vector<int64_t> first = rows;  // of each shard's rows
  std::fill(last.begin(), last.end(), -1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t shard = owner[i], row = i / k;
    if (shard < 0) continue;
    if (last[shard] != row) row_out[rows[shard]++] = row;
    last[shard] = row;
    const int64_t to = pairs[shard]++;
    slot_out[to] = i;
    pair_row[to] = static_cast<int32_t>(rows[shard] - 1 - first[shard]);
    pair_expert[to] = static_cast<int32_t>(chosen[i]);
  }
  return shares;
}

}  // namespace expertmesh
