// The expert shard's way of a batch that goes as it should: see actors/expert.py for all others.
#pragma once

#include "../../native/src/kernels.h"
#include "router.h"
#include "wires.h"

#include <memory>

namespace expertmesh {

// The experts of one layer, as expertmesh_experts takes them.
struct ShardLayer {
  int gate_up_kind, down_kind;
  const void* matrices;
  int64_t inter, n_experts;
  double most_pairs;
};

// All layers, and what they point at. Made and ended with the GIL.
struct Bank {
  Owned keeps;
  std::unordered_map<uint32_t, ShardLayer> layers;

  explicit Bank(PyObject* kept) : keeps(kept) {}
};

class ExpertShard {
 public:
  ExpertShard(Call call, decltype(&expertmesh_experts) experts, int64_t columns, int64_t row_bytes, double spin_s)
      : wires(*this, spin_s), call_(call), experts_(experts), columns_(columns), row_bytes_(row_bytes) {}

  Wires<ExpertShard> wires;
  std::shared_ptr<const Bank> bank;  // read and replaced with the GIL
  long long rows = 0, pairs = 0, batches = 0;
  double seconds = 0.0;

  Served take(End& end, const Arrived& frame) {
    const Header& tag = frame.header;
    if (tag.kind != DISPATCH || tag.count != 3 || tag.lengths[1] != tag.lengths[2]) return Served::LEFT;
    const int64_t n_rows = tag.lengths[0] / row_bytes_, n_pairs = tag.lengths[1] / 4;
    if (!n_rows || !n_pairs || tag.lengths[0] % row_bytes_ || tag.lengths[1] % 4) return Served::LEFT;
    const std::shared_ptr<const Bank> held = bank;  // stays while it is used, whatever is installed meanwhile
    if (!held) return Served::LEFT;
    const auto layer = held->layers.find(tag.layer);
    if (layer == held->layers.end() || static_cast<double>(n_pairs) > layer->second.most_pairs) return Served::LEFT;
    const int64_t bytes = n_pairs * row_bytes_;
    if (!takes(end.out, kAlignment + padded(bytes) + padded(kSecondsBytes))) return Served::LEFT;
    char* const in = in_.room(frame.behind());
    char* const out = out_.room(bytes);
    frame.copy(in);
    widen(in + padded(tag.lengths[0]), 2 * n_pairs, n_pairs, padded(tag.lengths[1]));
    const double began = monotonic();
    int64_t wrong;
    Py_BEGIN_ALLOW_THREADS;  // nothing of the wire is touched meanwhile: it may be closed
    wrong = experts_(call_.isa, call_.type, layer->second.gate_up_kind, layer->second.down_kind, in, indices_.data(),
                     indices_.data() + n_pairs, layer->second.matrices, out, n_rows, n_pairs, columns_, layer->second.inter,
                     layer->second.n_experts, call_.threads);
    Py_END_ALLOW_THREADS;
    if (wrong != -1 || !end.in->memory || !end.out->memory) return Served::LEFT;
    const double took = monotonic() - began;
    Writer answer(end.out, header_of(RESULTS, tag));
    answer.put(out, bytes);
    answer.end_part();
    answer.put(&took, sizeof took);
    answer.end_part();
    answer.ring();
    frame.consume();
    rows += n_rows, pairs += n_pairs, ++batches;
    seconds += took;
    return Served::TAKEN;
  }

 private:
  // pair_row and, ``apart`` bytes behind it, pair_expert, as the kernels take them.
  void widen(const char* from, int64_t count, int64_t each, int64_t apart) {
    indices_.resize(count);
    const auto* row = reinterpret_cast<const int32_t*>(from);
    const auto* expert = reinterpret_cast<const int32_t*>(from + apart);
    std::copy_n(row, each, indices_.begin());
    std::copy_n(expert, each, indices_.begin() + each);
  }

  Call call_;
  decltype(&expertmesh_experts) experts_;
  int64_t columns_, row_bytes_;
  Memory in_, out_;
  std::vector<int64_t> indices_;
};

}  // namespace expertmesh
