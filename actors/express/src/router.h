// The router's way of a batch that goes as it should: see actors/dispatcher.py for all others, and for what a batch is.
#pragma once

#include "../../native/src/dispatch.h"
#include "../../native/src/kernels.h"
#include "wires.h"

#include <map>
#include <memory>
#include <string>

namespace expertmesh {

constexpr int64_t kWeightBytes = 4, kTimesBytes = 16, kSecondsBytes = 8;

// How the kernels are called: the instruction set, the type of rows and threads.
struct Call {
  int isa, type, threads;
};

// One layer of the map in force. What it points at is kept by whoever installed it.
struct RouterLayer {
  const void* gate;
  int64_t most_rows, top_k, weight_type;
  const int64_t *shards, *live;
  int64_t width, n_experts;
  int64_t* load;
};

struct Shard {
  Ring *in, *out;  // null: it is lost
  std::vector<Owned> keeps;
  int64_t* rows;  // sent to it so far
};

// What one shard got of a batch.
struct Share {
  int64_t shard, rows, pairs;
  const int64_t *row, *slot;
  const int32_t *pair_row, *pair_expert;
  uint32_t attempt;
  bool came;
  Memory results;
};

struct Batch {
  uint64_t number;
  int source;
  Header tag;
  int64_t tokens, top_k, weight_type;
  Memory rows, weight;
  std::vector<int64_t> chosen, split;  // split: see expertmesh_dispatch
  std::vector<Share> shares;           // the first n_shares of them
  int64_t n_shares, owed;
  double began, deadline, experts_s;
};

class Router {
 public:
  Router(Call call, decltype(&expertmesh_gate) gate, decltype(&expertmesh_combine) combine, int64_t columns,
         int64_t row_bytes, uint32_t last_layer, double timeout_s, double spin_s)
      : wires(*this, spin_s), call_(call), gate_(gate), combine_(combine), columns_(columns), row_bytes_(row_bytes),
        last_layer_(last_layer), timeout_s_(timeout_s) {
    spare_.reserve(KEPT + 1);  // what is released has its place
  }

  Wires<Router> wires;
  uint32_t epoch = 0;
  std::unordered_map<uint32_t, RouterLayer> layers;
  std::vector<Shard> shards;
  std::map<std::string, int64_t> rows_sent;
  std::vector<std::unique_ptr<Batch>> pending;
  long long number = 0;
  long long batches = 0;
  double dispatch_s = 0.0, combine_s = 0.0, longest_wait_s = 0.0;

  int64_t row_bytes() const { return row_bytes_; }

  // An end's place among the shards of the map in force.
  void place(End& end) const {
    end.shard = -1;
    for (size_t i = 0; i < shards.size(); ++i)
      if (shards[i].in == end.in) end.shard = static_cast<int64_t>(i);
  }

  Served take(End& end, const Arrived& frame) {
    if (frame.header.kind == ROWS && frame.header.count == 1 && end.shard < 0) return rows(end, frame);
    if (frame.header.kind == RESULTS && frame.header.count == 2 && end.shard >= 0) return results(end, frame);
    return Served::LEFT;
  }

 private:
  Served rows(End& source, const Arrived& frame) {
    const auto found = layers.find(frame.header.layer);
    const int64_t bytes = frame.header.lengths[0], tokens = bytes / row_bytes_;
    if (found == layers.end() || !tokens || bytes % row_bytes_ || tokens > found->second.most_rows) return Served::LEFT;
    const RouterLayer& layer = found->second;
    if (!room_for(tokens, layer.top_k)) return Served::LEFT;
    std::unique_ptr<Batch> batch = blank();
    prepare(*batch, layer, tokens);
    frame.first_to(batch->rows.get());
    if (!choose(*batch, layer) || !owned(*batch, layer) || !source.in->memory || !room_for(tokens, layer.top_k)) {
      spare_.push_back(std::move(batch));
      return Served::LEFT;
    }
    share_out(*batch, layer);
    pending.reserve(pending.size() + 1);  // from here on nothing may fail: the frame is gone
    begin(*batch, source, frame.header);
    frame.consume();
    for (int64_t i = 0; i < batch->n_shares; ++i) ask(*batch, batch->shares[i]);
    pending.push_back(std::move(batch));
    return Served::TAKEN;
  }

  // The gate's choice; of many rows without the GIL, and a wire may be closed meanwhile.
  bool choose(Batch& batch, const RouterLayer& layer) const {
    const auto call = [&] {
      return gate_(call_.isa, call_.type, layer.gate, batch.rows.get(), batch.chosen.data(), batch.weight.get(),
                   batch.tokens, call_.threads) == 0;
    };
    if (batch.tokens * row_bytes_ < kUnlocked) return call();
    bool well;
    Py_BEGIN_ALLOW_THREADS;
    well = call();
    Py_END_ALLOW_THREADS;
    return well;
  }

  // Whether every shard could take all rows with all pairs.
  bool room_for(int64_t tokens, int64_t top_k) const {
    const int64_t need = kAlignment + padded(tokens * row_bytes_) + 2 * padded(tokens * top_k * 4);
    for (const Shard& shard : shards)
      if (shard.out && !takes(shard.out, need)) return false;
    return true;
  }

  std::unique_ptr<Batch> blank() {
    if (spare_.empty()) return std::make_unique<Batch>();
    std::unique_ptr<Batch> batch = std::move(spare_.back());
    spare_.pop_back();
    return batch;
  }

  void prepare(Batch& batch, const RouterLayer& layer, int64_t tokens) {
    batch.tokens = tokens;
    batch.top_k = layer.top_k;
    batch.weight_type = layer.weight_type;
    batch.rows.room(tokens * row_bytes_);
    batch.weight.room(tokens * layer.top_k * kWeightBytes);
    batch.chosen.resize(tokens * layer.top_k);
    batch.split.resize(6 * batch.chosen.size());
    if (batch.shares.size() < shards.size()) batch.shares.resize(shards.size());
  }

  // Whether a shard that lives computes each of the batch's experts.
  bool owned(const Batch& batch, const RouterLayer& layer) const {
    const Owners owners = owners_of(layer, number + 1);
    for (const int64_t expert : batch.chosen) {
      if (expert < 0 || expert >= layer.n_experts) return false;
      const int64_t shard = owners.of(expert);
      if (shard < 0 || shard >= static_cast<int64_t>(shards.size()) || !shards[shard].out) return false;
    }
    return true;
  }

  static Owners owners_of(const RouterLayer& layer, int64_t turn) {
    return {layer.shards, layer.live, layer.width, layer.n_experts, turn};
  }

  void begin(Batch& batch, End& source, const Header& tag) {
    forget_before(source, tag.step);
    batch.number = ++number;
    batch.source = fd_of(source);
    batch.tag = tag;
    batch.began = monotonic();
    batch.deadline = batch.began + timeout_s_;
    batch.experts_s = 0.0;
    source.touched = true;
    source.mid_step = tag.layer != last_layer_ || tag.micro_batch != 0;
    source.until = batch.deadline;
  }

  int fd_of(const End& source) const {
    for (const auto& [fd, end] : wires.ends)
      if (&end == &source) return fd;
    return -1;
  }

  // A source that is in a new step has given up what it asked for in earlier ones.
  void forget_before(const End& source, uint64_t step) {
    const int fd = fd_of(source);
    for (size_t i = pending.size(); i-- > 0;)
      if (pending[i]->source == fd && pending[i]->tag.step < step) release(i);
  }

  // What each shard gets.
  void share_out(Batch& batch, const RouterLayer& layer) const {
    const int64_t count = static_cast<int64_t>(batch.chosen.size());
    int64_t* const out = batch.split.data();
    batch.n_shares = batch.owed =
        dispatch(batch.chosen.data(), count, batch.top_k, owners_of(layer, number + 1), layer.load, out);
    const int64_t* table = out + 2 * count;
    const int32_t* small = reinterpret_cast<const int32_t*>(out + 5 * count);
    int64_t row = 0, pair = 0;
    for (int64_t i = 0; i < batch.n_shares; ++i, table += 3) {
      Share& share = batch.shares[i];
      share.shard = table[0], share.rows = table[1], share.pairs = table[2];
      share.row = out + row, share.slot = out + count + pair;
      share.pair_row = small + pair, share.pair_expert = small + count + pair;
      share.attempt = static_cast<uint32_t>(i + 1);
      share.came = false;
      row += share.rows, pair += share.pairs;
    }
  }

  void ask(const Batch& batch, const Share& share) {
    Header header = header_of(DISPATCH, batch.tag);
    header.epoch = epoch, header.step = batch.number, header.attempt = share.attempt;
    Writer frame(shards[share.shard].out, header);
    if (share.rows == batch.tokens)
      frame.put(batch.rows.get(), batch.tokens * row_bytes_);
    else
      for (int64_t i = 0; i < share.rows; ++i) frame.put(batch.rows.get() + share.row[i] * row_bytes_, row_bytes_);
    frame.end_part();
    frame.put(share.pair_row, 4 * share.pairs);
    frame.end_part();
    frame.put(share.pair_expert, 4 * share.pairs);
    frame.end_part();
    frame.ring();
    *shards[share.shard].rows += share.rows;
  }

  Served results(const End& shard, const Arrived& frame) {
    const Header& tag = frame.header;
    size_t at = 0;
    while (at < pending.size() && pending[at]->number != tag.step) ++at;
    if (at == pending.size()) return Served::LEFT;
    Batch& batch = *pending[at];
    if (tag.epoch != epoch || tag.attempt < 1 || tag.attempt > batch.n_shares) return Served::LEFT;
    Share& share = batch.shares[tag.attempt - 1];
    const bool asked = share.shard == shard.shard && !share.came && tag.lengths[0] == share.pairs * row_bytes_;
    if (!asked || tag.lengths[1] != kSecondsBytes) return Served::LEFT;
    const auto source = wires.ends.find(batch.source);
    if (source == wires.ends.end()) return Served::LEFT;
    const double experts_s = std::max(batch.experts_s, frame.number<double>(1));
    if (batch.owed == 1) {
      if (!finish(batch, share, frame, source->second, experts_s)) return Served::LEFT;
      frame.consume();
      release(at);
      return Served::TAKEN;
    }
    frame.first_to(share.results.room(tag.lengths[0]));
    batch.experts_s = experts_s;
    share.came = true;
    --batch.owed;
    frame.consume();
    return Served::TAKEN;
  }

  // The last results are here: the answer. False, and nothing was done, where it cannot be given.
  bool finish(Batch& batch, const Share& last, const Arrived& frame, const End& source, double experts_s) {
    const int64_t bytes = batch.tokens * row_bytes_;
    if (!takes(source.out, kAlignment + padded(bytes) + padded(kTimesBytes))) return false;
    const double gathered = monotonic();
    pieces_.clear();
    for (int64_t i = 0; i < batch.n_shares; ++i) {
      const Share& share = batch.shares[i];
      pieces_.push_back({share.slot, &share == &last ? frame.first(last_) : share.results.get(), share.pairs});
    }
    Writer answer(source.out, header_of(ROWS_DONE, batch.tag));
    char* const place = answer.here(bytes);
    char* const into = place ? place : combined_.room(bytes);
    if (combine_(call_.isa, call_.type, static_cast<int>(batch.weight_type), call_.type, pieces_.data(), batch.weight.get(),
                 into, static_cast<int64_t>(pieces_.size()), batch.tokens, batch.top_k, columns_, call_.threads))
      return false;
    if (place) answer.skip(bytes);
    else answer.put(into, bytes);
    answer.end_part();
    const double over = monotonic(), times[] = {experts_s, over - batch.began};
    answer.put(times, sizeof times);
    answer.end_part();
    answer.ring();
    ++batches;
    dispatch_s += gathered - batch.began;
    combine_s += over - gathered;
    longest_wait_s = std::max(longest_wait_s, gathered - batch.began);
    return true;
  }

  void release(size_t at) {
    if (spare_.size() < KEPT) spare_.push_back(std::move(pending[at]));
    pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(at));
  }

  static constexpr size_t KEPT = 16;

  Call call_;
  decltype(&expertmesh_gate) gate_;
  decltype(&expertmesh_combine) combine_;
  int64_t columns_, row_bytes_;
  uint32_t last_layer_;
  double timeout_s_;
  std::vector<std::unique_ptr<Batch>> spare_;
  std::vector<Piece> pieces_;
  Memory last_, combined_;
};

}  // namespace expertmesh
