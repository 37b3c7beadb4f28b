#include "torch_objects.h"

namespace htv::engine {

namespace {

// Kept for the life of the process; null after an error.
PyObject* from_module(const char* module, const char* name) {
  Ref imported(PyImport_ImportModule(module));
  return imported ? PyObject_GetAttrString(imported.get(), name) : nullptr;
}

PyTypeObject* type_from_module(const char* module, const char* name) {
  return reinterpret_cast<PyTypeObject*>(from_module(module, name));
}

}  // namespace

const TorchObjects* torch_objects() {
  static TorchObjects found{};
  static bool ready = false;
  if (ready) return &found;
  found = TorchObjects{
      .tensor = type_from_module("torch", "Tensor"),
      .parameter = type_from_module("torch.nn", "Parameter"),
      .graph_task = from_module("torch._C", "_current_graph_task_id"),
      .grad_enabled = from_module("torch._C", "is_grad_enabled"),
      .saved_tensor_hooks = from_module("torch._C._autograd", "_top_saved_tensors_default_hooks"),
      .mode_count = from_module("torch._C", "_len_torch_function_stack"),
      .mode_at = from_module("torch._C", "_get_function_stack_at"),
      .pop_mode = from_module("torch._C", "_pop_torch_function_stack"),
      .push_mode = from_module("torch._C", "_push_on_torch_function_stack"),
  };
  ready = PyErr_Occurred() == nullptr;
  return ready ? &found : nullptr;
}

long number_from(PyObject* function) {
  Ref told(PyObject_CallNoArgs(function));
  if (!told) return -2;
  long number = PyLong_AsLong(told.get());
  return number == -1 && PyErr_Occurred() ? -2 : number;
}

}  // namespace htv::engine
