// The wires that express serves: whole small frames out of their rings and into them, where they lie.
#pragma once

#include "../../transport/src/ring.h"
#include "waiter.h"

#include <algorithm>
#include <new>
#include <unordered_map>
#include <vector>

namespace expertmesh {

enum Kind : uint16_t { ROWS = 1, ROWS_DONE = 2, DISPATCH = 3, RESULTS = 4 };  // actors/frames.py

// A reference that is counted; made and ended with the GIL.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(Py_NewRef(object)) {}
  Owned(const Owned& other) : object_(Py_NewRef(other.object_)) {}
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_DECREF(object_); }

 private:
  PyObject* object_;
};

// Aligned memory that grows and is used again. What it held is lost when it grows.
class Memory {
 public:
  Memory() = default;
  Memory(Memory&& other) noexcept : at_(other.at_), size_(other.size_) { other.at_ = nullptr, other.size_ = 0; }
  Memory& operator=(Memory&&) = delete;
  ~Memory() { free(at_); }

  char* room(int64_t size) {
    if (size_ < size) {
      free(at_);
      at_ = nullptr, size_ = 0;
      const int64_t whole = padded(size + size / 8);
      at_ = static_cast<char*>(aligned_alloc(kAlignment, whole));
      if (!at_) throw std::bad_alloc();
      size_ = whole;
    }
    return at_;
  }
  char* get() const { return at_; }

 private:
  char* at_ = nullptr;
  int64_t size_ = 0;
};

// The largest frame that comes and goes whole. Larger ones gain more by the wire's pieces, of which one is read while the
// next is written, than the interpreter costs; and half a ring is free sooner or later, whatever part of the handled bytes
// is unannounced.
constexpr int64_t kWhole = 1 << 20;
inline int64_t limit(const Ring* ring) { return std::min(kWhole, ring->size() / 2); }

inline bool takes(Ring* ring, int64_t need) { return ring->memory && need <= limit(ring) && has_room(ring, need); }

// One frame, written where it is read: its parts in order, each ended by end_part. The ring has room for it.
class Writer {
 public:
  Writer(Ring* ring, const Header& header) : ring_(ring), position_(ring->position), header_(header) {
    skip(kAlignment);
  }

  void put(const void* from, int64_t count) {
    write_at(ring_, position_, from, count);
    skip(count);
  }

  // Where the next so many bytes go if they lie together, else null; the caller fills them in and skips them.
  char* here(int64_t count) const { return position_ + count <= ring_->size() ? ring_->at() + position_ : nullptr; }

  void skip(int64_t count) {
    position_ = (position_ + count) % ring_->size();
    written_ += count;
  }

  void end_part() {
    const int64_t length = written_ - part_;
    skip(padded(length) - length);
    part_ = written_;
    bytes_ += length;
    header_.lengths[header_.count++] = static_cast<uint32_t>(length);
  }

  // All parts are there: the peer may take it.
  void ring() {
    memcpy(ring_->at() + ring_->position, &header_, sizeof header_);
    ring_->position = position_;
    ring_->known -= written_;
    ++ring_->frames;
    ring_->bytes += bytes_;
    const uint64_t count = written_;
    if (write(ring_->data_bell, &count, sizeof count) != sizeof count) return;  // a peer that is gone, or fills its own bell
  }

 private:
  Ring* ring_;
  int64_t position_, written_ = 0, part_ = kAlignment, bytes_ = kAlignment;
  Header header_;
};

inline Header header_of(uint16_t kind, const Header& tag) {
  Header header{};
  memcpy(header.magic, kMagic, sizeof kMagic);
  header.version = kVersion;
  header.kind = kind;
  header.step = tag.step;
  header.epoch = tag.epoch, header.micro_batch = tag.micro_batch, header.layer = tag.layer, header.attempt = tag.attempt;
  return header;
}

// One end of a wire. ``shard``: its number in the map in force, less than 0 for none of its shards.
struct End {
  Ring* in;
  Ring* out;
  Owned keeps_in, keeps_out;
  int64_t shard = -1;
  bool due = false;  // there is or may be something to serve
  bool mid_step = false, touched = false;  // a source: inside a step, and something came since Python was told
  double until = 0.0;

  End(PyObject* in, PyObject* out)
      : in(reinterpret_cast<Ring*>(in)), out(reinterpret_cast<Ring*>(out)), keeps_in(in), keeps_out(out) {}
};

// The frame at the front of an end's ring, which is here whole.
class Arrived {
 public:
  Arrived(Ring* ring, const Header& header) : header(header), ring_(ring) {}

  const Header header;

  int64_t behind() const { return footprint(header); }
  void copy(char* into) const { copy_out(ring_, into, behind()); }

  // Where the first part lies, copied into ``room`` if it goes over the ring's end.
  const char* first(Memory& room) const {
    const int64_t from = ring_->position + kAlignment, length = header.lengths[0];
    if (from + length <= ring_->size()) return ring_->at() + from;
    char* const into = room.room(length);
    first_to(into);
    return into;
  }
  void first_to(char* into) const { part_to(into, 0, header.lengths[0]); }

  // A part behind the first, of a few bytes.
  template <class T>
  T number(int part) const {
    int64_t offset = 0;
    for (int i = 0; i < part; ++i) offset += padded(header.lengths[i]);
    T value;
    part_to(reinterpret_cast<char*>(&value), offset, sizeof value);
    return value;
  }

  void consume() const {
    const int64_t need = kAlignment + behind();
    ring_->position = (ring_->position + need) % ring_->size();
    ring_->known -= need;
    ring_->unannounced += need;
    ++ring_->frames;
    for (const uint32_t length : header.lengths) ring_->bytes += length;
    ring_->bytes += kAlignment;
    if (ring_->unannounced < ring_->size() / 4) return;  // as in actors/transport/shm.py
    const uint64_t count = ring_->unannounced;
    if (write(ring_->space_bell, &count, sizeof count) == sizeof count) ring_->unannounced = 0;
  }

 private:
  void part_to(char* into, int64_t offset, int64_t count) const {
    const int64_t size = ring_->size(), from = (ring_->position + kAlignment + offset) % size;
    const int64_t fits = std::min(count, size - from);
    memcpy(into, ring_->at() + from, fits);
    memcpy(into + fits, ring_->at(), count - fits);
  }

  Ring* ring_;
};

enum class Served { TAKEN, LATER, LEFT };  // the frame was served; is not here whole; is Python's

// Waits on an epoll, serves what it can and tells Python of the rest. ``Actor::take(End&, const Arrived&)`` serves a frame
// all of which is here, or leaves it, and everything, as it was.
template <class Actor>
class Wires {
 public:
  Wires(Actor& actor, double spin_s) : actor_(actor), waiter_(spin_s) {}

  std::unordered_map<int, End> ends;

  // A list of (descriptor, events) that are Python's; null with an error set. Each end has one frame served in a turn, so
  // that none that always has another one keeps the others, or Python, from theirs.
  PyObject* wait(int epoll, double deadline) {
    PyObject* left = PyList_New(0);
    if (!left) return nullptr;
    epoll_event events[MOST];
    while (true) {
      const bool more = std::any_of(ends.begin(), ends.end(), [](const auto& one) { return one.second.due; });
      int count;
      Py_BEGIN_ALLOW_THREADS;
      count = more ? waiter_.look(epoll, events, MOST) : waiter_.wait(epoll, events, MOST, deadline);
      Py_END_ALLOW_THREADS;
      bool well = count >= 0;
      if (!well) PyErr_SetFromErrno(PyExc_OSError);
      for (int i = 0; well && i < count; ++i) {
        const auto end = ends.find(events[i].data.fd);
        if (end == ends.end()) well = tell(left, events[i].data.fd);
        else end->second.due = true;
      }
      for (auto& [fd, end] : ends) {
        if (!well || !end.due) continue;
        const Served served = serve(end);
        end.due = served == Served::TAKEN && end.in->memory && end.in->known;
        if (served == Served::LEFT) well = tell(left, fd);
      }
      if (!well) break;
      if (PyList_GET_SIZE(left) || (!count && !more) || monotonic() >= deadline) return tell_in_hand(left);
    }
    Py_DECREF(left);
    return nullptr;
  }

 private:
  static constexpr int MOST = 64;

  Served serve(End& end) {
    try {
      return next(end);
    } catch (const std::bad_alloc&) {
      return Served::LEFT;
    }
  }

  Served next(End& end) {
    Ring* const in = end.in;
    if (!in->memory || in->partial) return Served::LEFT;
    const bool asked = in->known < kAlignment;
    if (asked) answer(in, in->data_bell);
    if (in->known < kAlignment) return Served::LATER;
    if (in->known > in->size() || in->position % kAlignment) return Served::LEFT;
    Header header;
    memcpy(&header, in->at() + in->position, sizeof header);  // a copy: what was checked cannot change
    const int64_t behind = footprint(header), need = kAlignment + behind;
    if (behind < 0 || need > limit(in)) return Served::LEFT;
    if (in->known < need && !asked) answer(in, in->data_bell);
    if (in->known > in->size()) return Served::LEFT;
    if (in->known < need) return Served::LATER;
    return actor_.take(end, Arrived(in, header));
  }

  static bool tell(PyObject* left, int fd) {
    PyObject* one = Py_BuildValue("iI", fd, EPOLLIN);
    const bool well = one && PyList_Append(left, one) == 0;
    Py_XDECREF(one);
    return well;
  }

  // What a bell has told already it does not tell again.
  PyObject* tell_in_hand(PyObject* left) {
    for (auto& [fd, end] : ends) {
      end.due = false;
      if (!end.in->memory || !end.in->known || tell(left, fd)) continue;
      Py_DECREF(left);
      return nullptr;
    }
    return left;
  }

  Actor& actor_;
  Waiter waiter_;
};

}  // namespace expertmesh
