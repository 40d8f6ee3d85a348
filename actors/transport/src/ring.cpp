// One direction of a shared-memory wire, with whole frames in and out in one call each. See actors/transport/ring.py for
// what it is, and for the same without a compiler. A frame for which these calls are not made (too large, in pieces,
// garbled, or for which there is no room) is left as it was to the wire's general way.
#include "ring.h"

#include <errno.h>
#include <structmember.h>

using namespace expertmesh;

namespace {

// A frame's parts, released when this ends.
struct Parts {
  Py_buffer views[kMaxParts];
  int count = 0;
  int64_t footprint = 0, bytes = 0;

  ~Parts() {
    while (count) PyBuffer_Release(&views[--count]);
  }

  // False for what the general way has to judge.
  bool add(PyObject* part) {
    if (!PyMemoryView_Check(part) && !PyBytes_Check(part) && !PyByteArray_Check(part)) return false;
    if (count == kMaxParts || PyObject_GetBuffer(part, &views[count], PyBUF_SIMPLE)) return false;
    bytes += views[count].len;
    footprint += padded(views[count++].len);
    return true;
  }
};

// False, with or without an error set, for what does not fit.
bool number(PyObject* from, uint64_t most, uint64_t* into) {
  if (!PyLong_Check(from)) return false;
  *into = PyLong_AsUnsignedLongLong(from);
  return *into <= most && !(*into == UINT64_MAX && PyErr_Occurred());
}

bool fill(Header* header, PyObject* kind, PyObject* tag, const Parts& parts) {
  if (!PyTuple_Check(tag) || PyTuple_GET_SIZE(tag) != 5) return false;
  uint64_t number_of_kind, fields[5];
  if (!number(kind, UINT16_MAX, &number_of_kind)) return false;
  for (int i = 0; i < 5; ++i)
    if (!number(PyTuple_GET_ITEM(tag, i), i == 1 ? UINT64_MAX : UINT32_MAX, &fields[i])) return false;
  *header = Header{};
  memcpy(header->magic, kMagic, sizeof kMagic);
  header->version = kVersion;
  header->kind = static_cast<uint16_t>(number_of_kind);
  header->count = static_cast<uint16_t>(parts.count);
  header->epoch = static_cast<uint32_t>(fields[0]);
  header->step = fields[1];
  header->micro_batch = static_cast<uint32_t>(fields[2]);
  header->layer = static_cast<uint32_t>(fields[3]);
  header->attempt = static_cast<uint32_t>(fields[4]);
  for (int i = 0; i < parts.count; ++i) header->lengths[i] = static_cast<uint32_t>(parts.views[i].len);
  return true;
}

void copy_in(Ring* ring, const Header& header, const Parts& parts) {
  int64_t position = ring->position;
  const auto put = [&](const void* from, int64_t count) {
    write_at(ring, position, from, count);
    position = (position + padded(count)) % ring->size();
  };
  put(&header, sizeof header);
  for (int i = 0; i < parts.count; ++i) put(parts.views[i].buf, parts.views[i].len);
}

// put(kind, tag, parts) -> bytes of header and parts, all written and announced; 0: nothing was done.
PyObject* ring_put(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  Ring* ring = reinterpret_cast<Ring*>(self);
  if (count != 3) return PyErr_Format(PyExc_TypeError, "put takes kind, tag and parts, not %zd arguments", count);
  if (!ring->memory) return PyLong_FromLong(0);
  PyObject* sequence = PySequence_Fast(args[2], "parts are a sequence");
  if (!sequence) return nullptr;
  int64_t written = 0;
  {
    Parts parts;
    Header header;
    bool fits = true;
    for (Py_ssize_t i = 0; fits && i < PySequence_Fast_GET_SIZE(sequence); ++i)
      fits = parts.add(PySequence_Fast_GET_ITEM(sequence, i));
    const int64_t need = kAlignment + parts.footprint;
    if (fits && need <= kPiece && fill(&header, args[0], args[1], parts) && has_room(ring, need)) {
      if (need >= kUnlocked) {
        Py_BEGIN_ALLOW_THREADS;
        copy_in(ring, header, parts);
        Py_END_ALLOW_THREADS;
      } else {
        copy_in(ring, header, parts);
      }
      ring->position = (ring->position + need) % ring->size();
      ring->known -= need;
      const uint64_t bell = need;
      if (write(ring->data_bell, &bell, sizeof bell) != sizeof bell) PyErr_SetFromErrno(PyExc_OSError);
      written = kAlignment + parts.bytes;
    } else {
      PyErr_Clear();  // the general way finds the fault again, and names it
    }
  }
  Py_DECREF(sequence);
  return PyErr_Occurred() ? nullptr : PyLong_FromLongLong(written);
}

PyObject* split(PyObject* view, const Header& header) {
  PyObject* parts = PyTuple_New(header.count);
  int64_t at = 0;
  for (int i = 0; parts && i < header.count; ++i) {
    PyObject* part = PySequence_GetSlice(view, at, at + header.lengths[i]);
    if (part)
      PyTuple_SET_ITEM(parts, i, part);
    else
      Py_CLEAR(parts);
    at += padded(header.lengths[i]);
  }
  return parts;
}

// True if the view has room for so many bytes, else an error is set.
bool roomy(PyObject* view, int64_t count) {
  if (!view) return false;
  if (PyMemoryView_Check(view) && PyMemoryView_GET_BUFFER(view)->len >= count) return true;
  PyErr_Format(PyExc_TypeError, "take: a block's view has to be a memoryview of %lld bytes", (long long)count);
  return false;
}

// The frame behind this header, which is here whole, into the block.
PyObject* taken(Ring* ring, const Header& header, int64_t behind, PyObject* block) {
  PyObject* view = PyObject_GetAttrString(block, "view");
  PyObject* parts = roomy(view, behind) ? split(view, header) : nullptr;
  if (parts) {
    char* into = static_cast<char*>(PyMemoryView_GET_BUFFER(view)->buf);
    if (behind >= kUnlocked) {
      Py_BEGIN_ALLOW_THREADS;
      copy_out(ring, into, behind);
      Py_END_ALLOW_THREADS;
    } else {
      copy_out(ring, into, behind);
    }
    const int64_t need = kAlignment + behind;
    ring->position = (ring->position + need) % ring->size();
    ring->known -= need;
    ring->unannounced += need;
  }
  Py_XDECREF(view);
  if (!parts) return nullptr;
  int64_t bytes = kAlignment;
  for (const uint32_t length : header.lengths) bytes += length;
  return Py_BuildValue("H(IKIII)NOL", header.kind, header.epoch, static_cast<unsigned long long>(header.step),
                       header.micro_batch, header.layer, header.attempt, parts, block, static_cast<long long>(bytes));
}

// take(allocate) -> (kind, tag, parts, block, bytes) of the next frame, which was copied into block = allocate(size). None,
// and nothing was taken: it is not here whole, or not one of ours.
PyObject* ring_take(PyObject* self, PyObject* allocate) {
  Ring* ring = reinterpret_cast<Ring*>(self);
  if (!ring->memory) Py_RETURN_NONE;
  const bool asked = ring->known < kAlignment;
  if (asked && !answer(ring, ring->data_bell)) Py_RETURN_NONE;
  if (ring->known < kAlignment || ring->position % kAlignment) Py_RETURN_NONE;
  Header header;
  memcpy(&header, ring->at() + ring->position, sizeof header);  // a copy: what was checked cannot change
  const int64_t behind = footprint(header), need = kAlignment + behind;
  if (behind < 0) Py_RETURN_NONE;
  if (ring->known < need && !asked) answer(ring, ring->data_bell);
  if (ring->known < need || ring->known > ring->size()) Py_RETURN_NONE;
  PyObject* block = PyObject_CallFunction(allocate, "L", static_cast<long long>(behind));
  PyObject* found = block ? taken(ring, header, behind, block) : nullptr;
  Py_XDECREF(block);
  return found;
}

PyObject* ring_close(PyObject* self, PyObject*) {
  Py_CLEAR(reinterpret_cast<Ring*>(self)->memory);
  Py_RETURN_NONE;
}

int ring_init(PyObject* self, PyObject* args, PyObject* named) {
  Ring* ring = reinterpret_cast<Ring*>(self);
  const char* const names[] = {"memory", "data_bell", "space_bell", "known", nullptr};
  PyObject* memory;
  if (!PyArg_ParseTupleAndKeywords(args, named, "O!iiL", const_cast<char**>(names), &PyMemoryView_Type, &memory,
                                   &ring->data_bell, &ring->space_bell, &ring->known))
    return -1;
  const Py_buffer* view = PyMemoryView_GET_BUFFER(memory);
  if (view->readonly || view->ndim != 1 || view->itemsize != 1 || view->len < kAlignment || view->len % kAlignment ||
      !PyBuffer_IsContiguous(view, 'C')) {
    PyErr_SetString(PyExc_ValueError, "memory: a writable view of bytes is needed, of a multiple of 64");
    return -1;
  }
  Py_XSETREF(ring->memory, Py_NewRef(memory));
  return 0;
}

void ring_dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  Py_CLEAR(reinterpret_cast<Ring*>(self)->memory);
  type->tp_free(self);
  Py_DECREF(type);
}

PyMethodDef methods[] = {
    {"put", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(ring_put)), METH_FASTCALL, nullptr},
    {"take", ring_take, METH_O, nullptr},
    {"close", ring_close, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

#define MEMBER(name, type, flags) {#name, type, offsetof(Ring, name), flags, nullptr}
PyMemberDef members[] = {
    MEMBER(memory, T_OBJECT_EX, READONLY), MEMBER(data_bell, T_INT, READONLY), MEMBER(space_bell, T_INT, READONLY),
    MEMBER(known, T_LONGLONG, 0),          MEMBER(position, T_LONGLONG, 0),    MEMBER(unannounced, T_LONGLONG, 0),
    MEMBER(frames, T_LONGLONG, 0),         MEMBER(bytes, T_LONGLONG, 0),    MEMBER(partial, T_BOOL, 0),
    {nullptr, 0, 0, 0, nullptr},
};
#undef MEMBER

PyType_Slot slots[] = {
    {Py_tp_init, reinterpret_cast<void*>(ring_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(ring_dealloc)},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {0, nullptr},
};
PyType_Spec spec = {"actors.transport._ring.Ring", sizeof(Ring), 0, Py_TPFLAGS_DEFAULT, slots};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_ring", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__ring() {
  PyObject* made = PyModule_Create(&module);
  PyObject* type = made ? PyType_FromSpec(&spec) : nullptr;
  if (!type || PyModule_AddObject(made, "Ring", type)) {
    Py_XDECREF(type);
    Py_XDECREF(made);
    return nullptr;
  }
  return made;
}
