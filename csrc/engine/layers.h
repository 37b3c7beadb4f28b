// torch's own layers called under the mode: their one torch call made at once, without its way
// through the module's forward, torch's parsing of arguments and the stack of function modes.
#pragma once

#include "references.h"

namespace htv::engine {

// call_layer(mode, layer, module, x) -> result, or NotImplemented where anything is not the usual
// case: the module's forward is then to be called.
PyObject* call_layer(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace htv::engine
