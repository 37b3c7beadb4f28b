// The usual case of `htv.engine.mode.ServingMode.__torch_function__`: what every torch call of a
// forward under the mode passes through.
#pragma once

#include "references.h"

namespace htv::engine {

// What calls are told apart by, given once by htv.engine.mode as it is imported.
struct CallTables {
  Ref handlers;   // dict: torch function -> what serves it
  Ref questions;  // set of functions that tell of a tensor, but not its values
  Ref scalars;    // set of types
  Ref reorders;   // function: whether a call with keywords has to be put in order
  Ref writes;     // function: whether a call changes its first argument
  Ref is_kept;    // function (call, of one tensor): whether shapes and marks decide its result's
  Ref layout;     // type of the mark of a tensor that holds the batch
  Ref derived;    // type of the mark of a tensor from parameters
};

CallTables& call_tables();

// ServingMode.__torch_function__(mode, func, types, args=(), kwargs=None).
PyObject* torch_function(PyObject*, PyObject* const* args, Py_ssize_t count);

// Runs a call that no layer serves and marks its result, if marks found earlier say how; else
// leaves both to `mode.unusual`, which does this in Python.
PyObject* general(PyObject* mode, PyObject* func, PyObject* args, PyObject* kwargs);

}  // namespace htv::engine
