// What is known of tensors by identity: the table of htv.engine.provenance.Marks, read and written
// here for the usual case. The table is a dict of Python's, identity -> (weak reference, mark, how
// often the memory had been written to or None, whether the tensor had a gradient).
#pragma once

#include "references.h"

namespace htv::engine {

// The mark of `tensor` if it is what it was when it got that, borrowed from the table; null without
// an error of Python's if anything about it is not the usual case.
PyObject* usual_mark(PyObject* table, PyObject* tensor);

// Puts the mark of a plain tensor that no function mode watches over. False after an error.
bool put_usual(PyObject* table, PyObject* tensor, PyObject* mark);

// Whether a type is torch.Tensor or torch.nn.Parameter itself.
bool is_plain_type(PyTypeObject* type);

}  // namespace htv::engine
