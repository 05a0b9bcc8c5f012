#include "bindings/torch_tensors.h"

#include <utility>

namespace py = pybind11;

namespace angle {
namespace {

constexpr char kCapsule[] = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;
constexpr uint8_t kFloat = 2;

// Python's names of what tensors are asked, made once.
struct Names {
  PyObject *dtype, *shape, *is_cpu, *is_contiguous, *data_ptr;
};
const Names& names() {
  static const auto name = PyUnicode_InternFromString;
  static const Names made = {name("dtype"), name("shape"), name("is_cpu"), name("is_contiguous"), name("data_ptr")};
  return made;
}

// Throws what Python raised.
py::object checked(PyObject* made) {
  if (made == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}
py::object attribute(PyObject* of, PyObject* name) { return checked(PyObject_GetAttr(of, name)); }
py::object call(PyObject* of, PyObject* name) {
  PyObject* arguments[] = {of};
  return checked(PyObject_VectorcallMethod(name, arguments, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
}

TensorReader::Seen seen_by(const DLExchange& exchange, PyObject* tensor) {
  TensorReader::Seen seen;
  DLTensor found{};
  if (exchange.look(tensor, &found) != 0) throw py::error_already_set();
  if (found.device.device_type != DLDevice().device_type || found.dtype.code != kFloat || found.dtype.bits != 32 ||
      found.dtype.lanes != 1)
    return seen;
  if (found.ndim < 1 || found.ndim > 2 || found.byte_offset != 0) return seen;
  int64_t size = 1;  // of the axes behind; an axis of length 1 may have any stride
  for (int32_t axis = found.ndim; axis-- > 0; size *= found.shape[axis]) {
    if (found.strides != nullptr && found.shape[axis] != 1 && found.strides[axis] != size) return seen;
    seen.shape[static_cast<size_t>(axis)] = static_cast<size_t>(found.shape[axis]);
  }
  seen.axes = static_cast<size_t>(found.ndim);
  seen.data = static_cast<float*>(found.data);
  return seen;
}

TensorReader::Seen seen_by_asking(PyObject* tensor, PyObject* float32) {
  TensorReader::Seen seen;
  const py::object shape = attribute(tensor, names().shape);
  const Py_ssize_t axes = PyTuple_GET_SIZE(shape.ptr());
  if (axes < 1 || axes > 2 || attribute(tensor, names().dtype).ptr() != float32 ||
      call(tensor, names().is_contiguous).ptr() != Py_True || attribute(tensor, names().is_cpu).ptr() != Py_True) {
    return seen;
  }
  seen.axes = static_cast<size_t>(axes);
  for (size_t axis = 0; axis < seen.axes; ++axis)
    seen.shape[axis] = PyLong_AsSize_t(PyTuple_GET_ITEM(shape.ptr(), static_cast<Py_ssize_t>(axis)));
  seen.data =
      reinterpret_cast<float*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(call(tensor, names().data_ptr).ptr())));
  return seen;
}

}  // namespace

TensorReader::TensorReader(py::object float32, py::object exchange)
    : float32_(std::move(float32)), capsule_(std::move(exchange)) {
  if (!PyCapsule_IsValid(capsule_.ptr(), kCapsule)) return;
  const auto* offered = static_cast<const DLExchange*>(PyCapsule_GetPointer(capsule_.ptr(), kCapsule));
  if (offered->major == kMajor && offered->look != nullptr) exchange_ = offered;
}

TensorReader::Seen TensorReader::look(PyObject* tensor) const {
  return exchange_ != nullptr ? seen_by(*exchange_, tensor) : seen_by_asking(tensor, float32_.ptr());
}

}  // namespace angle
