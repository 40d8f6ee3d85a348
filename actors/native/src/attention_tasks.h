// What attention over a paged cache is called with, and how its rows are shared out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace expertmesh {

struct Attention {
  const void* query;
  const void* key[2];  // planes [slots, groups, key_dim[i]], joined along their last axis; the second may be of width 0
  const void* value;
  void* out;
  const int64_t *spans, *tables;
  int64_t n_spans, heads, groups, key_dim[2], value_dim, block_size, window;
  float scale;
  int threads;
};

// Rows of the query tokens of one sequence, as Python hands them over.
struct Span {
  int64_t start, length, context;
  int64_t table;  // where its block table begins
};

// The first token that a query at this position sees. window: 0 for none.
static inline int64_t first_seen(int64_t position, int64_t window) {
  return window ? std::max<int64_t>(0, position + 1 - window) : 0;
}

// Those of the rows (query token, head of the group), query tokens first, of one span that are done together, for the
// groups from group to last_group.
struct AttentionTask {
  const Span* span;
  int64_t group, last_group, first, last, cost;
};

constexpr int64_t MOST_ROWS = 32;  // whose sums stay in the second cache; keys and values are read once for them
constexpr int64_t FULL_ROWS = 8;   // fewer do not pay for reading keys and values, unless a thread would have nothing

// The dearest first, so that all threads end at about the same time. Decodes, of which there are many, are done for all
// groups together: a token's keys lie side by side.
static std::vector<AttentionTask> attention_tasks(const Attention& call) {
  const Span* spans = reinterpret_cast<const Span*>(call.spans);
  const int64_t shared = call.heads / call.groups;
  int64_t rows = 0;
  for (int64_t s = 0; s < call.n_spans; ++s) rows += spans[s].length * call.heads;
  const int64_t fair = rows / (4 * call.threads), least = std::min(FULL_ROWS, rows / call.threads + 1);
  const int64_t step = std::clamp(fair, least, MOST_ROWS);
  std::vector<AttentionTask> tasks;
  for (const Span* span = spans; span != spans + call.n_spans; ++span) {
    const int64_t count = span->length * shared, parts = (count + step - 1) / step;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = count * part / parts, last = count * (part + 1) / parts;
      const int64_t from = span->context + first / shared, to = span->context + (last - 1) / shared;
      const int64_t cost = (last - first) * (to + 1 - first_seen(from, call.window));
      const bool many = span->length == 1 && parts == 1 && call.n_spans >= 2 * call.threads;
      const int64_t together = many ? call.groups : 1;
      for (int64_t group = 0; group < call.groups; group += together)
        tasks.push_back({span, group, group + together, first, last, cost * together});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const auto& a, const auto& b) { return a.cost > b.cost; });
  return tasks;
}

// x [rows, heads, k] and w [heads, n, k] to out [rows, heads, n]; rows and heads of x and out lie these strides apart.
struct HeadProducts {
  const void *x, *w;
  void* out;
  int64_t rows, heads, k, n, x_row, x_head, out_row, out_head;
  int threads;
};

}  // namespace expertmesh
