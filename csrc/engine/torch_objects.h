// The objects of torch and htv that the engine's compiled part asks: imported when it is first
// used, since the module itself loads without torch.
#pragma once

#include "references.h"

namespace htv::engine {

struct TorchObjects {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  PyObject* graph_task;          // torch._C._current_graph_task_id
  PyObject* grad_enabled;        // torch._C.is_grad_enabled
  PyObject* saved_tensor_hooks;  // torch._C._autograd._top_saved_tensors_default_hooks
  PyObject* mode_count;          // torch._C._len_torch_function_stack
  PyObject* mode_at;             // torch._C._get_function_stack_at
  PyObject* pop_mode;            // torch._C._pop_torch_function_stack
  PyObject* push_mode;           // torch._C._push_on_torch_function_stack
};

// Null after an error of Python's.
const TorchObjects* torch_objects();

// What a function without arguments returns as a number; -2 after an error.
long number_from(PyObject* function);

}  // namespace htv::engine
