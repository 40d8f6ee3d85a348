// Python's side of express: the router's and the expert shard's common way of a frame. See actors/express/__init__.py.
#include "router.h"
#include "shard.h"

#include <structmember.h>

using namespace expertmesh;

namespace {

PyObject* ring_type = nullptr;

// The ring's type is checked: what is not one would be read as one.
bool is_ring(PyObject* object) {
  const int well = PyObject_IsInstance(object, ring_type);
  if (!well) PyErr_SetString(PyExc_TypeError, "a compiled Ring is needed");
  return well == 1;
}

template <class Actor>
struct Object {
  PyObject_HEAD
  Actor* actor;
};

template <class Actor>
Actor& of(PyObject* self) {
  return *reinterpret_cast<Object<Actor>*>(self)->actor;
}

template <class Actor>
void dealloc(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<Object<Actor>*>(self)->actor;
  type->tp_free(self);
  Py_DECREF(type);
}

template <class Function>
Function* function_at(unsigned long long address) {
  return reinterpret_cast<Function*>(address);
}

template <class T>
const T* at(unsigned long long address) {
  return reinterpret_cast<const T*>(address);
}

template <class Actor>
PyObject* wait(PyObject* self, PyObject* args) {
  int epoll;
  double deadline;
  if (!PyArg_ParseTuple(args, "id", &epoll, &deadline)) return nullptr;
  return of<Actor>(self).wires.wait(epoll, deadline);
}

template <class Actor>
PyObject* forget(PyObject* self, PyObject* args) {
  int fd;
  if (!PyArg_ParseTuple(args, "i", &fd)) return nullptr;
  of<Actor>(self).wires.ends.erase(fd);
  Py_RETURN_NONE;
}

template <class Actor>
PyObject* watch(PyObject* self, PyObject* args) {
  int fd;
  PyObject *in, *out;
  if (!PyArg_ParseTuple(args, "iOO", &fd, &in, &out) || !is_ring(in) || !is_ring(out)) return nullptr;
  auto& ends = of<Actor>(self).wires.ends;
  ends.erase(fd);
  [[maybe_unused]] const auto placed = ends.try_emplace(fd, in, out).first;
  if constexpr (std::is_same_v<Actor, Router>) of<Router>(self).place(placed->second);
  Py_RETURN_NONE;
}

// -- router -----------------------------------------------------------------------------------------------------------

int router_init(PyObject* self, PyObject* args, PyObject*) {
  Call call;
  unsigned long long gate, combine;
  long long columns, row_bytes;
  unsigned int last_layer;
  double timeout_s, spin_s;
  if (!PyArg_ParseTuple(args, "(iii)KKLLIdd", &call.isa, &call.type, &call.threads, &gate, &combine, &columns, &row_bytes,
                        &last_layer, &timeout_s, &spin_s))
    return -1;
  delete reinterpret_cast<Object<Router>*>(self)->actor;
  reinterpret_cast<Object<Router>*>(self)->actor =
      new Router(call, function_at<decltype(expertmesh_gate)>(gate), function_at<decltype(expertmesh_combine)>(combine),
                 columns, row_bytes, last_layer, timeout_s, spin_s);
  return 0;
}

bool add_shard(Router& router, PyObject* one) {
  PyObject *in, *out;
  const char* name;
  if (!PyArg_ParseTuple(one, "OOs", &in, &out, &name)) return false;
  Shard shard{nullptr, nullptr, {}, &router.rows_sent[name]};
  if (in != Py_None) {
    if (!is_ring(in) || !is_ring(out)) return false;
    shard.in = reinterpret_cast<Ring*>(in), shard.out = reinterpret_cast<Ring*>(out);
    shard.keeps.emplace_back(in), shard.keeps.emplace_back(out);
  }
  router.shards.push_back(std::move(shard));
  return true;
}

bool add_layer(Router& router, PyObject* one) {
  unsigned int number;
  unsigned long long gate, shards, live, load;
  RouterLayer layer;
  long long most_rows, top_k, weight_type, width, n_experts;
  if (!PyArg_ParseTuple(one, "IKLLLKKLLK", &number, &gate, &most_rows, &top_k, &weight_type, &shards, &live, &width,
                        &n_experts, &load))
    return false;
  layer = {at<void>(gate), most_rows, top_k, weight_type, at<int64_t>(shards), at<int64_t>(live), width, n_experts,
           reinterpret_cast<int64_t*>(load)};
  router.layers[number] = layer;
  return true;
}

template <class Each>
bool each_of(PyObject* sequence, const Each& each) {
  PyObject* fast = PySequence_Fast(sequence, "a sequence is needed");
  bool well = fast != nullptr;
  for (Py_ssize_t i = 0; well && i < PySequence_Fast_GET_SIZE(fast); ++i) well = each(PySequence_Fast_GET_ITEM(fast, i));
  Py_XDECREF(fast);
  return well;
}

// install(epoch, shards, layers): works by this map from now on. shards: (in, out, name) in the order of their numbers, in
// and out None for one that is lost; layers: see RouterLayer, their addresses stay the caller's.
PyObject* router_install(PyObject* self, PyObject* args) {
  Router& router = of<Router>(self);
  unsigned int epoch;
  PyObject *shards, *layers;
  if (!PyArg_ParseTuple(args, "IOO", &epoch, &shards, &layers)) return nullptr;
  router.shards.clear();
  router.layers.clear();
  const bool well = each_of(shards, [&](PyObject* one) { return add_shard(router, one); }) &&
                    each_of(layers, [&](PyObject* one) { return add_layer(router, one); });
  router.epoch = epoch;
  for (auto& [fd, end] : router.wires.ends) router.place(end);
  if (!well) return nullptr;
  Py_RETURN_NONE;
}

PyObject* bytes_of(const void* from, int64_t count) {
  return PyBytes_FromStringAndSize(static_cast<const char*>(from), count);
}

PyObject* copied(const void* from, int64_t count) {
  return PyByteArray_FromStringAndSize(static_cast<const char*>(from), count);
}

bool append(PyObject* list, PyObject* one) {
  const bool well = one && PyList_Append(list, one) == 0;
  Py_XDECREF(one);
  return well;
}

PyObject* described(const Share& share, int64_t row_bytes) {
  PyObject* results = share.came ? copied(share.results.get(), share.pairs * row_bytes) : Py_NewRef(Py_None);
  return Py_BuildValue("LINNNNN", static_cast<long long>(share.shard), share.attempt, bytes_of(share.row, 8 * share.rows),
                       bytes_of(share.pair_row, 4 * share.pairs), bytes_of(share.pair_expert, 4 * share.pairs),
                       bytes_of(share.slot, 8 * share.pairs), results);
}

PyObject* described(const Batch& batch, int64_t row_bytes) {
  PyObject* shares = PyList_New(0);
  for (int64_t i = 0; shares && i < batch.n_shares; ++i)
    if (!append(shares, described(batch.shares[i], row_bytes))) Py_CLEAR(shares);
  if (!shares) return nullptr;
  const int64_t weight_bytes = batch.weight_type ? 2 : 4;
  return Py_BuildValue("Ki(IKIII)NNNdddN", static_cast<unsigned long long>(batch.number), batch.source, batch.tag.epoch,
                       static_cast<unsigned long long>(batch.tag.step), batch.tag.micro_batch, batch.tag.layer,
                       batch.tag.attempt, copied(batch.rows.get(), batch.tokens * row_bytes),
                       copied(batch.chosen.data(), 8 * batch.tokens * batch.top_k),
                       copied(batch.weight.get(), weight_bytes * batch.tokens * batch.top_k), batch.began, batch.deadline,
                       batch.experts_s, shares);
}

// hand_over() -> (batches, sources): all that is under way, which is Python's from now on, and of the sources that sent
// something since the last call (descriptor, inside a step?, until when to believe it).
PyObject* router_hand_over(PyObject* self, PyObject*) {
  Router& router = of<Router>(self);
  PyObject* batches = PyList_New(0);
  PyObject* sources = PyList_New(0);
  bool well = batches && sources;
  for (const auto& batch : router.pending) well = well && append(batches, described(*batch, router.row_bytes()));
  for (auto& [fd, end] : router.wires.ends) {
    if (!end.touched) continue;
    well = well && append(sources, Py_BuildValue("iNd", fd, PyBool_FromLong(end.mid_step), end.until));
    end.touched = false;
  }
  router.pending.clear();
  if (well) return Py_BuildValue("NN", batches, sources);
  Py_XDECREF(batches);
  Py_XDECREF(sources);
  return nullptr;
}

// completed() -> (batches, seconds of dispatch, seconds of combining, the longest wait), since the start.
PyObject* router_completed(PyObject* self, PyObject*) {
  const Router& router = of<Router>(self);
  return Py_BuildValue("Lddd", router.batches, router.dispatch_s, router.combine_s, router.longest_wait_s);
}

// rows_sent() -> {shard: rows}, since the start.
PyObject* router_rows_sent(PyObject* self, PyObject*) {
  PyObject* result = PyDict_New();
  for (const auto& [name, rows] : of<Router>(self).rows_sent) {
    PyObject* number = result ? PyLong_FromLongLong(rows) : nullptr;
    if (!number || PyDict_SetItemString(result, name.c_str(), number)) Py_CLEAR(result);
    Py_XDECREF(number);
    if (!result) break;
  }
  return result;
}

PyObject* router_number(PyObject* self, void*) { return PyLong_FromLongLong(of<Router>(self).number); }

int router_set_number(PyObject* self, PyObject* value, void*) {
  const long long number = value ? PyLong_AsLongLong(value) : -1;
  if (number < 0) return PyErr_Occurred() ? -1 : (PyErr_SetString(PyExc_ValueError, "number"), -1);
  of<Router>(self).number = number;
  return 0;
}

// -- expert shard -----------------------------------------------------------------------------------------------------

int shard_init(PyObject* self, PyObject* args, PyObject*) {
  Call call;
  unsigned long long experts;
  long long columns, row_bytes;
  double spin_s;
  if (!PyArg_ParseTuple(args, "(iii)KLLd", &call.isa, &call.type, &call.threads, &experts, &columns, &row_bytes, &spin_s))
    return -1;
  delete reinterpret_cast<Object<ExpertShard>*>(self)->actor;
  reinterpret_cast<Object<ExpertShard>*>(self)->actor =
      new ExpertShard(call, function_at<decltype(expertmesh_experts)>(experts), columns, row_bytes, spin_s);
  return 0;
}

// install(layers, keep): computes these experts from now on; layers: see ShardLayer. keep lives as long as they are used.
PyObject* shard_install(PyObject* self, PyObject* args) {
  PyObject *layers, *keep;
  if (!PyArg_ParseTuple(args, "OO", &layers, &keep)) return nullptr;
  auto bank = std::make_shared<Bank>(keep);
  const auto add = [&](PyObject* one) {
    unsigned int number;
    ShardLayer layer;
    unsigned long long matrices;
    long long inter, n_experts;
    if (!PyArg_ParseTuple(one, "IiiKLLd", &number, &layer.gate_up_kind, &layer.down_kind, &matrices, &inter, &n_experts,
                          &layer.most_pairs))
      return false;
    layer.matrices = at<void>(matrices), layer.inter = inter, layer.n_experts = n_experts;
    bank->layers[number] = layer;
    return true;
  };
  if (!each_of(layers, add)) return nullptr;
  of<ExpertShard>(self).bank = std::move(bank);
  Py_RETURN_NONE;
}

// done() -> (rows, pairs, seconds, batches), since the start.
PyObject* shard_done(PyObject* self, PyObject*) {
  const ExpertShard& shard = of<ExpertShard>(self);
  return Py_BuildValue("LLdL", shard.rows, shard.pairs, shard.seconds, shard.batches);
}

// -- module -----------------------------------------------------------------------------------------------------------

PyMethodDef router_methods[] = {
    {"watch", watch<Router>, METH_VARARGS, nullptr},
    {"forget", forget<Router>, METH_VARARGS, nullptr},
    {"wait", wait<Router>, METH_VARARGS, nullptr},
    {"install", router_install, METH_VARARGS, nullptr},
    {"hand_over", router_hand_over, METH_NOARGS, nullptr},
    {"completed", router_completed, METH_NOARGS, nullptr},
    {"rows_sent", router_rows_sent, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyGetSetDef router_members[] = {
    {"number", router_number, router_set_number, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef shard_methods[] = {
    {"watch", watch<ExpertShard>, METH_VARARGS, nullptr},
    {"forget", forget<ExpertShard>, METH_VARARGS, nullptr},
    {"wait", wait<ExpertShard>, METH_VARARGS, nullptr},
    {"install", shard_install, METH_VARARGS, nullptr},
    {"done", shard_done, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot router_slots[] = {
    {Py_tp_init, reinterpret_cast<void*>(router_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc<Router>)},
    {Py_tp_methods, router_methods},
    {Py_tp_getset, router_members},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {0, nullptr},
};
PyType_Slot shard_slots[] = {
    {Py_tp_init, reinterpret_cast<void*>(shard_init)},
    {Py_tp_dealloc, reinterpret_cast<void*>(dealloc<ExpertShard>)},
    {Py_tp_methods, shard_methods},
    {Py_tp_new, reinterpret_cast<void*>(PyType_GenericNew)},
    {0, nullptr},
};
PyType_Spec router_spec = {"actors.express._express.Router", sizeof(Object<Router>), 0, Py_TPFLAGS_DEFAULT, router_slots};
PyType_Spec shard_spec = {"actors.express._express.ExpertShard", sizeof(Object<ExpertShard>), 0, Py_TPFLAGS_DEFAULT,
                          shard_slots};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_express", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

bool add_type(PyObject* module, const char* name, PyType_Spec* spec) {
  PyObject* type = PyType_FromSpec(spec);
  const bool well = type && PyModule_AddObjectRef(module, name, type) == 0;
  Py_XDECREF(type);
  return well;
}

}  // namespace

PyMODINIT_FUNC PyInit__express() {
  PyObject* rings = PyImport_ImportModule("actors.transport._ring");
  if (!rings) return nullptr;
  ring_type = PyObject_GetAttrString(rings, "Ring");
  Py_DECREF(rings);
  // One of an older build would be written past its end.
  const bool ours = ring_type && PyType_Check(ring_type) &&
                    reinterpret_cast<PyTypeObject*>(ring_type)->tp_basicsize == sizeof(Ring);
  if (!ours) {
    PyErr_SetString(PyExc_ImportError, "actors.transport._ring is of another build");
    return nullptr;
  }
  PyObject* made = PyModule_Create(&module);
  if (!made || !add_type(made, "Router", &router_spec) || !add_type(made, "ExpertShard", &shard_spec)) {
    Py_XDECREF(made);
    return nullptr;
  }
  return made;
}
