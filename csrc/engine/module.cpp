// htv._engine: the compiled part of htv.engine, for the usual case of what every torch call of a
// forward and every gradient of a backward passes through. htv/engine/usual.py says what each does,
// and does it in Python where this is not built. Loads without torch.
#include <pybind11/pybind11.h>

#include <unordered_map>

#include "dispatch.h"
#include "layers.h"
#include "marks.h"
#include "torch_objects.h"

namespace py = pybind11;

namespace htv::engine {
namespace {

// usual_mark(table, tensor) -> mark or None.
PyObject* usual_mark_or_none(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyDict_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "usual_mark takes a table and a tensor");
    return nullptr;
  }
  PyObject* mark = usual_mark(args[0], args[1]);
  PyErr_Clear();
  return Py_NewRef(mark == nullptr ? Py_None : mark);
}

// put_usual(table, tensor, mark) -> whether it was a plain tensor that no function mode sees.
PyObject* put_if_usual(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyDict_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "put_usual takes a table, a tensor and a mark");
    return nullptr;
  }
  const TorchObjects* torch = torch_objects();
  if (torch == nullptr) return nullptr;
  if (!is_plain_type(Py_TYPE(args[1])) || number_from(torch->mode_count) != 0) Py_RETURN_FALSE;
  if (!put_usual(args[0], args[1], args[2])) {
    PyErr_Clear();  // a tensor of inference mode counts no versions
    Py_RETURN_FALSE;
  }
  Py_RETURN_TRUE;
}

// of_identity(table, object) -> what the table has for this very object, or None.
PyObject* of_identity(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 2 || !PyDict_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "of_identity takes a table and an object");
    return nullptr;
  }
  Ref identity(PyLong_FromVoidPtr(args[1]));
  if (!identity) return nullptr;
  PyObject* found = PyDict_GetItemWithError(args[0], identity.get());
  if (found == nullptr && PyErr_Occurred()) return nullptr;
  return Py_NewRef(found == nullptr ? Py_None : found);
}

// ServingMode.general(mode, func, args, kwargs).
PyObject* general_method(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 4 || !PyDict_Check(args[3])) {
    PyErr_SetString(PyExc_TypeError, "general takes a function, a sequence and a dict");
    return nullptr;
  }
  Ref arguments(PySequence_Tuple(args[2]));
  return arguments ? general(args[0], args[1], arguments.get(), args[3]) : nullptr;
}

// has_members(members) -> whether all dicts of [(dict, [value, ...]), ...] hold these very values.
PyObject* has_members(PyObject*, PyObject* members) {
  if (!PyList_Check(members)) {
    PyErr_SetString(PyExc_TypeError, "has_members takes a list");
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(members); ++i) {
    PyObject* pair = PyList_GET_ITEM(members, i);
    PyObject *dict = PyTuple_GET_ITEM(pair, 0), *known = PyTuple_GET_ITEM(pair, 1);
    if (PyDict_GET_SIZE(dict) != PyTuple_GET_SIZE(known)) Py_RETURN_FALSE;
    PyObject *name, *value;
    Py_ssize_t position = 0, number = 0;
    while (PyDict_Next(dict, &position, &name, &value)) {
      if (value != PyTuple_GET_ITEM(known, number++)) Py_RETURN_FALSE;
    }
  }
  Py_RETURN_TRUE;
}

PyMethodDef FUNCTIONS[] = {
    {"usual_mark", reinterpret_cast<PyCFunction>(usual_mark_or_none), METH_FASTCALL, nullptr},
    {"put_usual", reinterpret_cast<PyCFunction>(put_if_usual), METH_FASTCALL, nullptr},
    {"call_layer", reinterpret_cast<PyCFunction>(call_layer), METH_FASTCALL, nullptr},
    {"of_identity", reinterpret_cast<PyCFunction>(of_identity), METH_FASTCALL, nullptr},
    {"has_members", has_members, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyMethodDef TORCH_FUNCTION = {"__torch_function__", reinterpret_cast<PyCFunction>(torch_function),
                              METH_FASTCALL, nullptr};

PyMethodDef GENERAL = {"general", reinterpret_cast<PyCFunction>(general_method), METH_FASTCALL,
                       nullptr};

// A function of this module as a class's method.
py::object method(PyMethodDef& definition) {
  py::object function = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
  return py::reinterpret_steal<py::object>(PyInstanceMethod_New(function.ptr()));
}

Ref owned(const py::object& object) { return Ref::copy(object.ptr()); }

void set_tables(const py::dict& handlers, const py::set& questions, const py::set& scalars,
                const py::object& reorders, const py::object& writes, const py::object& is_kept,
                const py::object& layout, const py::object& derived) {
  call_tables() = CallTables{owned(handlers), owned(questions), owned(scalars), owned(reorders),
                             owned(writes),   owned(is_kept),   owned(layout),  owned(derived)};
}

const Name DATA_PTR("data_ptr");
const Name VERSION("_version");

// Where a gradient's memory is, and how often it had been written to.
struct Delivery {
  long long memory, version;
  bool operator==(const Delivery&) const = default;
};

// The hook on a served parameter's gradient. It holds its owner weakly: the parameter holds the
// hook.
class GradientGuard {
 public:
  GradientGuard(py::weakref owner, size_t most) : owner_(std::move(owner)), most_(most) {}

  // Notes that `gradient`, and nothing else, reaches the parameter in the backward pass `task`,
  // None for no gradient; tells whether something was to reach it already.
  bool expect(const py::object& gradient, long task) {
    bool again = deliveries_.contains(task);
    if (gradient.is_none()) {
      deliveries_.erase(task);
      return again;
    }
    given_ = deliveries_[task] = delivery_of(gradient);
    if (deliveries_.size() > most_) {  // of passes that went elsewhere in the end
      auto oldest = deliveries_.begin();
      for (auto it = deliveries_.begin(); it != deliveries_.end(); ++it) {
        if (it->first < oldest->first) oldest = it;
      }
      deliveries_.erase(oldest);
    }
    return again;
  }

  void check(const py::object& gradient) {
    py::object owner = owner_();
    if (owner.is_none() || gradient.is_none()) return;
    long task = number_from(torch()->graph_task);
    auto found = deliveries_.find(task);
    if (found != deliveries_.end()) {
      bool expected = found->second == delivery_of(gradient);
      deliveries_.erase(found);
      if (expected) return;
    }
    owner.attr("refuse_unexpected")(task);
  }

  // Whether `gradient`, not yet changed, is the last one that was delivered.
  bool gave(const py::object& gradient) const { return delivery_of(gradient) == given_; }

  void forget() { given_ = {0, -1}; }

  size_t waiting() const { return deliveries_.size(); }

 private:
  static const TorchObjects* torch() {
    const TorchObjects* found = torch_objects();
    if (found == nullptr) throw py::error_already_set();
    return found;
  }

  static Delivery delivery_of(const py::object& gradient) {
    PyObject* self = gradient.ptr();
    Ref memory(PyObject_VectorcallMethod(DATA_PTR.get(), &self, 1, nullptr));
    Ref version = VERSION.of(self);
    if (!memory || !version) throw py::error_already_set();
    return {PyLong_AsLongLong(memory.get()), PyLong_AsLongLong(version.get())};
  }

  py::weakref owner_;
  size_t most_;
  std::unordered_map<long, Delivery> deliveries_;  // by backward pass
  Delivery given_{0, -1};
};

}  // namespace
}  // namespace htv::engine

PYBIND11_MODULE(_engine, m) {
  using namespace htv::engine;
  m.doc() = "The compiled part of htv.engine.";
  if (PyModule_AddFunctions(m.ptr(), FUNCTIONS) != 0) throw py::error_already_set();
  m.attr("torch_function") = method(TORCH_FUNCTION);
  m.attr("general") = method(GENERAL);
  m.def("set_tables", &set_tables, py::kw_only(), py::arg("handlers"), py::arg("questions"),
        py::arg("scalars"), py::arg("reorders"), py::arg("writes"), py::arg("is_kept"),
        py::arg("layout"), py::arg("derived"));
  py::class_<GradientGuard>(m, "GradientGuard")
      .def(py::init<py::weakref, size_t>(), py::arg("owner"), py::arg("most"))
      .def("expect", &GradientGuard::expect, py::arg("gradient"), py::arg("task"))
      .def("gave", &GradientGuard::gave, py::arg("gradient"))
      .def("forget", &GradientGuard::forget)
      .def("__call__", &GradientGuard::check, py::arg("gradient"))
      .def("__len__", &GradientGuard::waiting);
}
