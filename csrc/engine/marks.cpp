#include "marks.h"

#include "torch_objects.h"

namespace htv::engine {
namespace {

const Name VERSION("_version");
const Name REQUIRES_GRAD("requires_grad");

}  // namespace

bool is_plain_type(PyTypeObject* type) {
  const TorchObjects* torch = torch_objects();
  return torch != nullptr && (type == torch->tensor || type == torch->parameter);
}

PyObject* usual_mark(PyObject* table, PyObject* tensor) {
  if (!is_plain_type(Py_TYPE(tensor))) return nullptr;
  Ref identity(PyLong_FromVoidPtr(tensor));
  if (!identity) return nullptr;
  PyObject* entry = PyDict_GetItemWithError(table, identity.get());
  if (entry == nullptr) return nullptr;
  PyObject* version = PyTuple_GET_ITEM(entry, 2);
  if (version == Py_None || PyWeakref_GetObject(PyTuple_GET_ITEM(entry, 0)) != tensor) {
    return nullptr;
  }
  Ref now = VERSION.of(tensor);
  if (!now) return nullptr;
  int same = PyObject_RichCompareBool(version, now.get(), Py_EQ);
  if (same != 1) return nullptr;
  Ref graded = REQUIRES_GRAD.of(tensor);
  if (!graded) return nullptr;
  bool got_gradient = graded.get() == Py_True && PyTuple_GET_ITEM(entry, 3) != Py_True;
  return got_gradient ? nullptr : PyTuple_GET_ITEM(entry, 1);
}

bool put_usual(PyObject* table, PyObject* tensor, PyObject* mark) {
  Ref identity(PyLong_FromVoidPtr(tensor));
  Ref reference(PyWeakref_NewRef(tensor, nullptr));
  if (!identity || !reference) return false;
  Ref version = VERSION.of(tensor);
  if (!version) return false;
  Ref graded = REQUIRES_GRAD.of(tensor);
  if (!graded) return false;
  Ref entry(PyTuple_Pack(4, reference.get(), mark, version.get(), graded.get()));
  return entry && PyDict_SetItem(table, identity.get(), entry.get()) == 0;
}

}  // namespace htv::engine
