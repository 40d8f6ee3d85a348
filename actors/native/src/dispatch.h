// Which rows go to which expert shard, and the call that combines what comes back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace expertmesh {

struct Combine {
  const void *weight, *rows, *last;
  const int64_t* last_slots;
  void* out;
  int64_t tokens, k, d, last_count;
  int weight_kind, out_kind, threads;
};

// The addresses of the tokens x k rows that are combined; see expertmesh_combine.
static inline void addresses(const Combine& call, int64_t row_bytes, const void** at) {
  for (int64_t slot = 0; slot < call.tokens * call.k; ++slot)
    at[slot] = static_cast<const char*>(call.rows) + slot * row_bytes;
  for (int64_t i = 0; i < call.last_count; ++i)
    at[call.last_slots[i]] = static_cast<const char*>(call.last) + i * row_bytes;
}

// Every pair to its shard's place in the results, in the order of the slots; see expertmesh_split.
static inline int64_t split(const int64_t* chosen, const int64_t* slots, const int64_t* owner, int64_t count, int64_t k,
                            int64_t* out) {
  int64_t shards = 0;
  for (int64_t i = 0; i < count; ++i) shards = std::max(shards, owner[i] + 1);
  std::vector<int64_t> pairs(shards + 1, 0), rows(shards + 1, 0), last(shards, -1);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t shard = owner[i], row = slots[i] / k;
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
    const int64_t shard = owner[i], row = slots[i] / k;
    if (shard < 0) continue;
    if (last[shard] != row) row_out[rows[shard]++] = row;
    last[shard] = row;
    const int64_t to = pairs[shard]++;
    slot_out[to] = slots[i];
    pair_row[to] = static_cast<int32_t>(rows[shard] - 1 - first[shard]);
    pair_expert[to] = static_cast<int32_t>(chosen[slots[i]]);
  }
  return shares;
}

}  // namespace expertmesh
