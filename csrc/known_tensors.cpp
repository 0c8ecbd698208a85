// What a step reads of its tensors, in one pass without the interpreter: to ask each of them from
// Python for its gradient, addresses and layouts takes 0.4 us a parameter, here 0.05 us.
//
// torch's stable ABI has no way from a Python object to a tensor. So this module is built for one
// version of torch and of Python, which its name states; without it the optimizers ask from Python.
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <structmember.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace {

// What an update depends on beside the values: what a tensor is, and where its elements lie.
struct Entry {
  const void *object, *here, *impl, *storage, *data;  // here: of a DTensor what this rank has
  int64_t numel, type;  // type: dtype, device, whether contiguous; or the stride of an axis
  uint64_t shape;
  bool operator==(const Entry&) const = default;
};

// Neither sparse nor in another layout, no view that is computed, and no subclass with operators of
// its own.
constexpr c10::DispatchKeySet not_plain =
    c10::sparse_ks | c10::sparse_csr_ks | c10::mkldnn_ks | c10::python_ks |
    c10::DispatchKeySet(
        {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::NestedTensor});

// All cache lines of an object, which may begin inside one. Inlined: g++ drops calls of functions
// that do nothing but prefetch.
template <size_t size>
[[gnu::always_inline]] inline void prefetch(const void* object) {
  const char* const bytes = static_cast<const char*>(object);
  for (size_t offset = 0; offset < size; offset += 64) __builtin_prefetch(bytes + offset);
  __builtin_prefetch(bytes + size - 1);
}

// Takes entries and keeps them.
struct Record {
  std::vector<Entry> entries;
  bool take(const Entry& entry) {
    entries.push_back(entry);
    return true;
  }
};

// Takes entries while they are those of a record. Thousands of tensors do not stay in the caches
// near a core, so it fetches ahead what the next entries, if nothing moved, will be read from.
// Those of gradients, which move, name no place.
struct Comparison {
  static constexpr Py_ssize_t ahead = 16;
  static constexpr size_t slots = 2 * sizeof(PyObject*);  // what follows in a DTensor
  const Entry *next, *end;
  bool take(const Entry& entry) {
    if (end - next > ahead && next[ahead].here) {
      const Entry& later = next[ahead];
      prefetch<sizeof(THPVariable)>(later.here);
      if (later.object != later.here) prefetch<sizeof(THPVariable) + slots>(later.object);
      prefetch<sizeof(at::TensorImpl)>(later.impl);
      prefetch<sizeof(c10::StorageImpl)>(later.storage);
    }
    return next < end && *next++ == entry;
  }
};

// Tells shapes of one size apart: no axis below 2^31 makes up for another times this constant.
uint64_t shape_of(const at::TensorImpl& impl) {
  const at::IntArrayRef sizes = impl.sizes();
  uint64_t shape = sizes.size();
  for (const int64_t size : sizes) shape = shape * 0x9e3779b97f4a7c15 + size;
  return shape;
}

// False for a tensor that is no plain strided one, and where the taker says so.
template <class Taker>
bool describe(const at::Tensor& tensor, Entry&& entry, Taker& taker) {
  const at::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  const c10::Device device = impl.device();
  const bool contiguous = impl.is_contiguous();
  entry.numel = impl.numel();
  entry.type = int64_t(tensor.scalar_type()) << 32 | int64_t(device.type()) << 16 |
               (int64_t(device.index()) & 0xff) << 8 | contiguous;
  entry.shape = shape_of(impl);
  if (!taker.take(entry)) return false;
  for (int64_t axis = 0; !contiguous && axis < tensor.dim(); ++axis) {
    if (!taker.take({.type = tensor.stride(axis)})) return false;
  }
  return true;
}

bool is_plain(const at::Tensor& tensor) {
  return !tensor.unsafeGetTensorImpl()->key_set().has_any(not_plain);
}

struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Reference = std::unique_ptr<PyObject, Release>;

// Null where there is no such attribute.
Reference attribute(PyObject* object, PyObject* name) {
  Reference value(PyObject_GetAttr(object, name));
  if (!value) PyErr_Clear();
  return value;
}

// What an object of a class with `__slots__` has in one of them.
class Slot {
 public:
  explicit Slot(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  // Borrowed; null where the class has no such slot.
  PyObject* of(PyObject* object) {
    if (Py_TYPE(object) != known_) {
      const Reference slot = attribute(reinterpret_cast<PyObject*>(Py_TYPE(object)), name_);
      if (!slot || Py_TYPE(slot.get()) != &PyMemberDescr_Type) return nullptr;
      offset_ = reinterpret_cast<PyMemberDescrObject*>(slot.get())->d_member->offset;
      known_ = Py_TYPE(object);
    }
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }

 private:
  PyObject* name_;
  PyTypeObject* known_ = nullptr;
  Py_ssize_t offset_ = 0;
};

// What of a DTensor this rank has, borrowed; null for a tensor that is none.
PyObject* local_tensor(PyObject* object) {
  static Slot slot("_local_tensor");
  PyObject* local = slot.of(object);
  return local && THPVariable_CheckExact(local) ? local : nullptr;
}

// The tensor itself, of a DTensor what this rank has, borrowed; null for any other object.
PyObject* plain_tensor(PyObject* object) {
  return THPVariable_CheckExact(object) ? object : local_tensor(object);
}

// As THPVariable_Check, which asks a metaclass of what is no Tensor itself.
bool is_tensor(PyObject* object) { return plain_tensor(object) || THPVariable_Check(object); }

// Whether two DTensors are laid out alike over the same ranks.
bool lie_alike(PyObject* object, PyObject* other) {
  static Slot slot("_spec");
  static PyObject* const names[] = {PyUnicode_InternFromString("placements"),
                                    PyUnicode_InternFromString("mesh")};
  PyObject *const spec = slot.of(object), *const other_spec = slot.of(other);
  if (!spec || !other_spec) return false;
  if (spec == other_spec) return true;
  for (PyObject* name : names) {
    const Reference value = attribute(spec, name), other_value = attribute(other_spec, name);
    const bool alike = value && other_value &&
                       PyObject_RichCompareBool(value.get(), other_value.get(), Py_EQ) == 1;
    PyErr_Clear();
    if (!alike) return false;
  }
  return true;
}

// Of a tensor that stays where it is; `here` is its `plain_tensor`.
template <class Taker>
bool describe(PyObject* object, PyObject* here, Taker& taker) {
  const at::Tensor& tensor = THPVariable_Unpack(here);
  if (!is_plain(tensor)) return false;
  const at::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  const c10::StorageImpl* storage = impl.unsafe_storage().unsafeGetStorageImpl();
  if (!storage) return false;
  const char* data = static_cast<const char*>(storage->data());
  data += impl.itemsize() * impl.storage_offset();
  return describe(tensor, {object, here, &impl, storage, data}, taker);
}

// A parameter and its gradient, null where it has none; of DTensors what this rank has.
struct Pair {
  PyObject* param;
  const at::Tensor* grad;
  Reference dtensor;  // keeps `grad`
};

// The gradient is still the whole one.
bool find(PyObject* param, Pair& pair) {
  pair.param = plain_tensor(param);
  if (!pair.param) return false;
  const auto* meta = torch::autograd::impl::get_autograd_meta(THPVariable_Unpack(param));
  if (meta && meta->grad_.defined()) pair.grad = &meta->grad_;
  return true;
}

// False for a gradient that is not laid out as its parameter, a DTensor.
bool find_local_gradient(PyObject* param, Pair& pair) {
  pair.dtensor.reset(THPVariable_Wrap(*pair.grad));
  PyObject* const local = pair.dtensor ? local_tensor(pair.dtensor.get()) : nullptr;
  if (!local || !lie_alike(param, pair.dtensor.get())) return false;
  pair.grad = &THPVariable_Unpack(local);
  return true;
}

// Ahead of its turn.
[[gnu::always_inline]] inline void prefetch_gradient(const std::vector<Pair>& pairs, size_t i) {
  if (i < pairs.size() && pairs[i].grad) {
    prefetch<sizeof(at::TensorImpl)>(pairs[i].grad->unsafeGetTensorImpl());
  }
}

// In passes of few steps: the way to a gradient leads from object to object, each in a far cache,
// and a processor goes several such ways at once if they follow closely.
bool find(PyObject* params, std::vector<Pair>& pairs) {
  for (size_t i = 0; i < pairs.size(); ++i) {
    if (!find(PyList_GET_ITEM(params, i), pairs[i])) return false;
  }
  for (size_t i = 0; i < pairs.size(); ++i) {
    PyObject* const param = PyList_GET_ITEM(params, i);
    prefetch_gradient(pairs, i + 8);
    const bool is_dtensor = pairs[i].param != param;
    if (is_dtensor && pairs[i].grad && !find_local_gradient(param, pairs[i])) return false;
  }
  return true;
}

// Of the parameters, of their gradients, if any, and of the state of those that have one. The
// gradients' addresses, which a new backward may change, are no part of the entries.
template <class Taker>
bool describe(PyObject* params, PyObject* states, Taker& taker, std::vector<const void*>& grads) {
  const Py_ssize_t size = PyList_GET_SIZE(params);
  std::vector<Pair> pairs(size);
  if (PyList_GET_SIZE(states) != size || !find(params, pairs)) return false;
  grads.reserve(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject *param = PyList_GET_ITEM(params, i), *state = PyList_GET_ITEM(states, i);
    prefetch_gradient(pairs, i + 3);
    if (!describe(param, pairs[i].param, taker) || !PyDict_CheckExact(state)) return false;
    if (!pairs[i].grad) {
      if (!taker.take({.numel = -1})) return false;
      continue;
    }
    const at::Tensor& grad = *pairs[i].grad;
    if (!is_plain(grad) || !describe(grad, Entry{}, taker)) return false;
    grads.push_back(grad.unsafeGetTensorImpl()->data());
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(state, &position, &key, &value)) {
      PyObject* const here = plain_tensor(value);
      // What is no tensor is a wrapper's: a step reads none of it.
      if (here ? !describe(value, here, taker) : THPVariable_Check(value)) return false;
    }
  }
  return true;
}

template <class T>
PyObject* to_bytes(const std::vector<T>& values) {
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(values.data()),
                                   values.size() * sizeof(T));
}

bool are_lists(PyObject* const* arguments, Py_ssize_t count, Py_ssize_t expected) {
  bool lists = count == expected;
  for (Py_ssize_t i = 0; lists && i < expected; ++i) lists = PyList_CheckExact(arguments[i]);
  if (!lists) PyErr_Format(PyExc_TypeError, "expected %zd lists", expected);
  return lists;
}

// fingerprint(params, states) -> (bytes that `unchanged` takes, bytes of the gradients' addresses),
// or None where something is no plain tensor.
PyObject* fingerprint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!are_lists(arguments, count, 2)) return nullptr;
  Record record;
  std::vector<const void*> grads;
  if (!describe(arguments[0], arguments[1], record, grads)) Py_RETURN_NONE;
  return Py_BuildValue("(NN)", to_bytes(record.entries), to_bytes(grads));
  END_HANDLE_TH_ERRORS
}

// unchanged(params, states, fingerprint) -> the gradients' addresses, or None where something
// changed: the parameters are no longer the same objects, not the same of them have gradients, one
// of them or a tensor of a state dict lies elsewhere, or one, gradients included, has another dtype
// or layout.
PyObject* unchanged(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count != 3 || !PyBytes_CheckExact(arguments[2])) {
    return PyErr_Format(PyExc_TypeError, "expected two lists and bytes");
  }
  if (!are_lists(arguments, 2, 2)) return nullptr;
  const size_t size = PyBytes_GET_SIZE(arguments[2]);
  if (size % sizeof(Entry) != 0) Py_RETURN_NONE;
  const auto* known = reinterpret_cast<const Entry*>(PyBytes_AS_STRING(arguments[2]));
  Comparison comparison{known, known + size / sizeof(Entry)};
  std::vector<const void*> grads;
  if (!describe(arguments[0], arguments[1], comparison, grads)) Py_RETURN_NONE;
  if (comparison.next != comparison.end) Py_RETURN_NONE;
  return to_bytes(grads);
  END_HANDLE_TH_ERRORS
}

// gradients(params): those that there are, of DTensors what this rank has of them.
PyObject* gradients(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!are_lists(arguments, count, 1)) return nullptr;
  Reference found(PyList_New(0));
  for (Py_ssize_t i = 0; found && i < PyList_GET_SIZE(arguments[0]); ++i) {
    PyObject* param = PyList_GET_ITEM(arguments[0], i);
    if (!is_tensor(param)) return PyErr_Format(PyExc_TypeError, "expected tensors");
    const at::Tensor& grad = THPVariable_Unpack(param).grad();
    if (!grad.defined()) continue;
    const Reference object(THPVariable_Wrap(grad));
    PyObject* const local = object ? local_tensor(object.get()) : nullptr;
    if (!object || PyList_Append(found.get(), local ? local : object.get()) < 0) return nullptr;
  }
  return found.release();
  END_HANDLE_TH_ERRORS
}

// has_values(dict, values): whether the values of the dict are these objects, in this order.
PyObject* has_values(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 2 || !PyDict_Check(arguments[0]) || !PyList_CheckExact(arguments[1])) {
    return PyErr_Format(PyExc_TypeError, "expected a dict and a list");
  }
  PyObject *dict = arguments[0], *values = arguments[1], *key, *value;
  Py_ssize_t position = 0, i = 0;
  bool same = PyDict_Size(dict) == PyList_GET_SIZE(values);
  while (same && PyDict_Next(dict, &position, &key, &value)) {
    same = value == PyList_GET_ITEM(values, i++);
  }
  return PyBool_FromLong(same);
}

// mark_changed(params): autograd sees that they were written, as after any operation in place.
PyObject* mark_changed(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!are_lists(arguments, count, 1)) return nullptr;
  const Py_ssize_t size = PyList_GET_SIZE(arguments[0]);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject* param = PyList_GET_ITEM(arguments[0], i);
    if (!is_tensor(param)) return PyErr_Format(PyExc_TypeError, "expected tensors");
    const at::Tensor& tensor = THPVariable_Unpack(param);
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"fingerprint", reinterpret_cast<PyCFunction>(fingerprint), METH_FASTCALL, nullptr},
    {"unchanged", reinterpret_cast<PyCFunction>(unchanged), METH_FASTCALL, nullptr},
    {"gradients", reinterpret_cast<PyCFunction>(gradients), METH_FASTCALL, nullptr},
    {"has_values", reinterpret_cast<PyCFunction>(has_values), METH_FASTCALL, nullptr},
    {"mark_changed", reinterpret_cast<PyCFunction>(mark_changed), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_known_tensors", nullptr, -1, methods, {}, {}, {}, {}};

}  // namespace

#define CONCATENATE(a, b) a##b
#define INIT(name) CONCATENATE(PyInit_, name)

PyMODINIT_FUNC INIT(ROOTFREE_MODULE)() { return PyModule_Create(&module); }
