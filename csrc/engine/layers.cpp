#include "layers.h"

#include <array>

#include "dispatch.h"
#include "torch_objects.h"

namespace htv::engine {
namespace {

const Name TASK("task");
const Name FUNCTIONS("functions");
const Name FUNCTION("function");
const Name CALLED("called");
const Name NAMES("names");
const Name NEEDS("needs");
const Name DICT("__dict__");
const Name PARAMETERS("_parameters");

bool is_call(PyObject* function, PyObject* expected) {
  Ref told(PyObject_CallNoArgs(function));
  if (!told) PyErr_Clear();
  return told.get() == expected;
}

// Whether `mode` alone is on the stack of function modes, gradients are on, no hooks on saved
// tensors (a checkpoint's) are set, and it is not a backward that runs.
bool is_usual(PyObject* mode, const TorchObjects* torch) {
  if (number_from(torch->mode_count) != 1) return false;
  Ref zero(PyLong_FromLong(0));
  Ref top(PyObject_CallOneArg(torch->mode_at, zero.get()));
  if (top.get() != mode || !is_call(torch->grad_enabled, Py_True)) return false;
  Ref hooks(PyObject_CallOneArg(torch->saved_tensor_hooks, Py_True));
  if (hooks.get() != Py_None) return false;
  Ref task = TASK.of(mode);
  return task && PyLong_AsLong(task.get()) == number_from(torch->graph_task);
}

// An attribute of a module's own, or one of its parameters, in the order in which Python finds them;
// null without an error if it has none.
PyObject* attribute(PyObject* attributes, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(attributes, name);
  if (found != nullptr || PyErr_Occurred()) return found;
  PyObject* parameters = PyDict_GetItemWithError(attributes, PARAMETERS.get());
  if (parameters == nullptr || !PyDict_Check(parameters)) return nullptr;
  return PyDict_GetItemWithError(parameters, name);
}

// The arguments of the layer's call, `x` first; null without an error if they cannot be told.
Ref arguments_of(PyObject* layer, PyObject* module, PyObject* x) {
  Ref attributes = DICT.of(module);
  Ref names = NAMES.of(layer);
  Ref needs = NEEDS.of(layer);
  if (!attributes || !names || !needs) return Ref();
  if (needs.get() != Py_None) {  // (name, value) of an attribute
    PyObject* value = attribute(attributes.get(), PyTuple_GET_ITEM(needs.get(), 0));
    if (value == nullptr) return Ref();
    if (PyObject_RichCompareBool(value, PyTuple_GET_ITEM(needs.get(), 1), Py_EQ) != 1) return Ref();
  }
  Py_ssize_t count = PyTuple_GET_SIZE(names.get());
  Ref made(PyTuple_New(count + 1));
  if (!made) return made;
  PyTuple_SET_ITEM(made.get(), 0, Py_NewRef(x));
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* value = attribute(attributes.get(), PyTuple_GET_ITEM(names.get(), i));
    if (value == nullptr) return Ref();
    PyTuple_SET_ITEM(made.get(), i + 1, Py_NewRef(value));
  }
  return made;
}

}  // namespace

PyObject* call_layer(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 4) {
    PyErr_SetString(PyExc_TypeError, "call_layer takes a mode, a layer, a module and its input");
    return nullptr;
  }
  PyObject *mode = given[0], *layer = given[1], *module = given[2], *x = given[3];
  const TorchObjects* torch = torch_objects();
  if (torch == nullptr) return nullptr;
  if (Py_TYPE(x) != torch->tensor || !is_usual(mode, torch)) {
    PyErr_Clear();
    Py_RETURN_NOTIMPLEMENTED;
  }
  Ref functions = FUNCTIONS.of(layer);
  Ref called = CALLED.of(layer);
  Ref function = FUNCTION.of(layer);
  if (!functions || !called || !function) return nullptr;
  // Somebody may have put another function in its place.
  if (PyDict_GetItemWithError(functions.get(), called.get()) != function.get()) {
    PyErr_Clear();
    Py_RETURN_NOTIMPLEMENTED;
  }
  Ref arguments = arguments_of(layer, module, x);
  if (!arguments) {
    PyErr_Clear();
    Py_RETURN_NOTIMPLEMENTED;
  }
  Ref popped(PyObject_CallNoArgs(torch->pop_mode));
  if (!popped) return nullptr;
  std::array<PyObject*, 4> all{mode, function.get(), Py_None, arguments.get()};
  Ref result(torch_function(nullptr, all.data(), all.size()));
  PyObject *type, *value, *traceback;
  PyErr_Fetch(&type, &value, &traceback);
  Ref pushed(PyObject_CallOneArg(torch->push_mode, mode));
  if (type != nullptr) {
    PyErr_Restore(type, value, traceback);
    return nullptr;
  }
  return pushed ? result.release() : nullptr;
}

}  // namespace htv::engine
