// What a step reads of its tensors, in one pass without the interpreter: to ask each of them from
// Python for its gradient, addresses and layouts takes 0.4 us a parameter, here 0.05 us.
//
// torch's stable ABI has no way from a Python object to a tensor. So this module is built for one
// version of torch and of Python, which its name states; without it the optimizers ask from Python.
#include <torch/csrc/autograd/python_variable.h>

#include <cstdint>
#include <vector>

namespace {

using Numbers = std::vector<int64_t>;

// Neither sparse nor in another layout, no view that is computed, and no subclass with operators of
// its own.
constexpr c10::DispatchKeySet strange =
    c10::sparse_ks | c10::sparse_csr_ks | c10::mkldnn_ks | c10::python_ks |
    c10::DispatchKeySet({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                         c10::DispatchKey::NestedTensor});

// Appends what an update depends on beside the values: what a tensor is, and where its elements lie.
// False for a tensor that is no plain strided one.
bool describe(const at::Tensor& tensor, Numbers& what, Numbers& where) {
  const at::TensorImpl& impl = *tensor.unsafeGetTensorImpl();
  if (impl.key_set().has_any(strange)) return false;
  const c10::Device device = impl.device();
  const bool contiguous = impl.is_contiguous();
  where.push_back(reinterpret_cast<int64_t>(impl.data()));
  what.push_back(impl.numel());
  what.push_back(int64_t(tensor.scalar_type()) << 32 | int64_t(device.type()) << 16 |
                 (int64_t(device.index()) & 0xff) << 8 | contiguous);
  if (!contiguous) {
    what.push_back(tensor.dim());
    what.insert(what.end(), tensor.sizes().begin(), tensor.sizes().end());
    what.insert(what.end(), tensor.strides().begin(), tensor.strides().end());
  }
  return true;
}

// Of tensors that stay where they are, the place is a part of what they are.
bool describe(PyObject* object, Numbers& what) {
  return THPVariable_CheckExact(object) && describe(THPVariable_Unpack(object), what, what);
}

PyObject* to_bytes(const Numbers& numbers) {
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers.data()),
                                   numbers.size() * sizeof(int64_t));
}

bool are_lists(PyObject* const* arguments, Py_ssize_t count, Py_ssize_t expected) {
  bool right = count == expected;
  for (Py_ssize_t i = 0; right && i < count; ++i) right = PyList_CheckExact(arguments[i]);
  if (!right) PyErr_Format(PyExc_TypeError, "expected %zd lists", expected);
  return right;
}

// fingerprint(params, states) -> (what, grads), or None where something is no plain tensor.
// what: bytes that stay equal while the parameters are the same objects, the same of them have
// gradients, no parameter and no tensor of their state dicts lies elsewhere, and none, gradients
// included, has another dtype or layout. grads: the addresses of the gradients, which a new backward
// may change.
PyObject* fingerprint(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (!are_lists(arguments, count, 2)) return nullptr;
  PyObject *params = arguments[0], *states = arguments[1];
  const Py_ssize_t size = PyList_GET_SIZE(params);
  if (PyList_GET_SIZE(states) != size) Py_RETURN_NONE;
  Numbers what, grads;
  what.reserve(size * 16);
  grads.reserve(size);
  for (Py_ssize_t i = 0; i < size; ++i) {
    PyObject *param = PyList_GET_ITEM(params, i), *state = PyList_GET_ITEM(states, i);
    what.push_back(reinterpret_cast<int64_t>(param));
    if (!describe(param, what) || !PyDict_CheckExact(state)) Py_RETURN_NONE;
    const at::Tensor& grad = THPVariable_Unpack(param).grad();
    if (!grad.defined()) {
      what.push_back(-1);
      continue;
    }
    if (!describe(grad, what, grads)) Py_RETURN_NONE;
    PyObject *key, *value;
    Py_ssize_t position = 0;
    while (PyDict_Next(state, &position, &key, &value)) {
      if (!describe(value, what)) Py_RETURN_NONE;
    }
  }
  return Py_BuildValue("(NN)", to_bytes(what), to_bytes(grads));
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
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(arguments[0]); ++i) {
    PyObject* param = PyList_GET_ITEM(arguments[0], i);
    if (!THPVariable_Check(param)) return PyErr_Format(PyExc_TypeError, "expected tensors");
    const at::Tensor& tensor = THPVariable_Unpack(param);
    if (!tensor.is_inference()) tensor.unsafeGetTensorImpl()->bump_version();
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"fingerprint", reinterpret_cast<PyCFunction>(fingerprint), METH_FASTCALL, nullptr},
    {"has_values", reinterpret_cast<PyCFunction>(has_values), METH_FASTCALL, nullptr},
    {"mark_changed", reinterpret_cast<PyCFunction>(mark_changed), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_host", nullptr, -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

#define CONCATENATE(a, b) a##b
#define INIT(name) CONCATENATE(PyInit_, name)

PyMODINIT_FUNC INIT(ROOTFREE_HOST)() { return PyModule_Create(&module); }
