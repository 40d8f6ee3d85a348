// One direction of a shared-memory wire as one end sees it, and the form of the frames in it. Who uses it holds the GIL, but
// for copies. The bells' system calls order the copies before and after them, as in actors/transport/shm.py.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace expertmesh {

constexpr int64_t kAlignment = 64, kMaxParts = 8, kMaxFrame = int64_t{256} << 20, kPiece = 256 << 10;
constexpr int64_t kUnlocked = 64 << 10;  // copies from here on leave the GIL

// The form of actors/transport/frame.py; both ends are on one machine, whose order of bytes is little-endian.
struct Header {
  char magic[3];
  uint8_t version;
  uint16_t kind, count;
  uint64_t step;
  uint32_t epoch, micro_batch, layer, attempt, lengths[kMaxParts];
};
static_assert(sizeof(Header) == kAlignment && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
constexpr char kMagic[3] = {'E', 'X', 'M'};
constexpr uint8_t kVersion = 2;

struct Ring {
  PyObject_HEAD
  PyObject* memory;  // a writable memoryview; null once closed
  int data_bell, space_bell;
  long long known, position, unannounced;
  long long frames, bytes;  // that express has moved, see actors/express; the wire counts its own
  char partial;             // part of a frame went the general way, and the wire waits for the rest

  char* at() const { return static_cast<char*>(PyMemoryView_GET_BUFFER(memory)->buf); }
  int64_t size() const { return PyMemoryView_GET_BUFFER(memory)->len; }
};

inline int64_t padded(int64_t length) { return (length + kAlignment - 1) / kAlignment * kAlignment; }

// How many bytes the peer has handled since the last look becomes known. False, and nothing raised, if there are none.
inline bool answer(Ring* ring, int bell) {
  uint64_t count;
  if (read(bell, &count, sizeof count) != sizeof count) return false;
  ring->known += static_cast<long long>(std::min<uint64_t>(count, INT64_MAX / 2));  // too many is for the wire to tell
  return true;
}

inline void write_at(Ring* ring, int64_t position, const void* from, int64_t count) {
  const int64_t fits = std::min(count, ring->size() - position);
  memcpy(ring->at() + position, from, fits);
  memcpy(ring->at(), static_cast<const char*>(from) + fits, count - fits);
}

inline bool has_room(Ring* ring, int64_t need) {
  if (ring->known < need) answer(ring, ring->space_bell);
  return need <= ring->known && ring->known <= ring->size();
}

// The footprint of what follows the header, less than 0 if it is none of ours.
inline int64_t footprint(const Header& header) {
  if (memcmp(header.magic, kMagic, sizeof kMagic) || header.version != kVersion || header.count > kMaxParts) return -1;
  int64_t sum = 0, bytes = 0;
  for (int i = 0; i < kMaxParts; ++i) {
    if (i >= header.count && header.lengths[i]) return -1;
    bytes += header.lengths[i];
    sum += padded(header.lengths[i]);
  }
  return bytes > kMaxFrame ? -1 : sum;
}

inline void copy_out(Ring* ring, char* into, int64_t count) {
  const int64_t from = ring->position + kAlignment, fits = std::min(count, ring->size() - from);
  memcpy(into, ring->at() + from, fits);
  memcpy(into + fits, ring->at(), count - fits);
}

}  // namespace expertmesh
