#include "dispatch.h"

#include <array>
#include <vector>

#include "marks.h"
#include "torch_objects.h"

namespace htv::engine {
namespace {

const Name TASK("task");
const Name TABLE("table");
const Name FOUND("found");
const Name EXAMPLES("examples");
const Name SHAPE("shape");
const Name DTYPE("dtype");
const Name REQUIRES_GRAD("requires_grad");
const Name UNUSUAL("unusual");
const Name IN_ORDER("in_order");
const Name LEARN("learn");

Ref call(PyObject* function, std::initializer_list<PyObject*> arguments) {
  return Ref(PyObject_Vectorcall(function, std::data(arguments), arguments.size(), nullptr));
}

Ref call_method(PyObject* self, const Name& name, std::initializer_list<PyObject*> arguments) {
  std::array<PyObject*, 8> all{self};
  std::copy(arguments.begin(), arguments.end(), all.begin() + 1);
  return Ref(PyObject_VectorcallMethod(name.get(), all.data(), arguments.size() + 1, nullptr));
}

// 1, 0, or -1 after an error.
int is_true(PyObject* function, std::initializer_list<PyObject*> arguments) {
  Ref told = call(function, arguments);
  return told ? PyObject_IsTrue(told.get()) : -1;
}

// The call as it is looked up among those made before: its function and all that decides what its
// result is to the batch.
class Key {
 public:
  void add(Ref part) { parts_.push_back(std::move(part)); }
  void add_borrowed(PyObject* part) { add(Ref::copy(part)); }
  // Adds what is asked of a tensor; false after an error.
  bool add_attribute(PyObject* tensor, const Name& name) {
    Ref value = name.of(tensor);
    if (!value) return false;
    add(std::move(value));
    return true;
  }
  Ref tuple() {
    Ref made(PyTuple_New(static_cast<Py_ssize_t>(parts_.size())));
    if (!made) return made;
    for (size_t i = 0; i < parts_.size(); ++i) {
      PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), parts_[i].release());
    }
    return made;
  }

 private:
  std::vector<Ref> parts_;
};

bool is_tensor(PyObject* value, const TorchObjects* torch) {
  return Py_TYPE(value) == torch->tensor || PyObject_TypeCheck(value, torch->tensor);
}

bool is_scalar(PyObject* value) {
  auto type = reinterpret_cast<PyObject*>(Py_TYPE(value));
  return PySet_Contains(call_tables().scalars.get(), type) == 1;
}

// A slice by its numbers, since slices themselves cannot be looked up; null if they are none.
Ref slice_key(PyObject* value) {
  auto* slice = reinterpret_cast<PySliceObject*>(value);
  if (!is_scalar(slice->start) || !is_scalar(slice->stop) || !is_scalar(slice->step)) return Ref();
  auto type = reinterpret_cast<PyObject*>(&PySlice_Type);
  return Ref(PyTuple_Pack(4, type, slice->start, slice->stop, slice->step));
}

// A tuple or list of scalars and slices as a key; null if it holds, or may hold, anything else.
Ref sequence_key(PyObject* sequence) {
  PyObject** items = PySequence_Fast_ITEMS(sequence);
  Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);
  Ref made(PyTuple_New(count));
  if (!made) return made;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Ref item;
    if (PySlice_Check(items[i])) {
      item = slice_key(items[i]);
    } else if (items[i] == Py_Ellipsis || is_scalar(items[i])) {
      item = Ref::copy(items[i]);
    }
    if (!item) return Ref();
    PyTuple_SET_ITEM(made.get(), i, item.release());
  }
  return made;
}

// A call whose operands all have marks of the usual kind.
class UsualCall {
 public:
  UsualCall(PyObject* table, const TorchObjects* torch) : table_(table), torch_(torch) {}

  // Takes one argument into account; false if it is not usual.
  bool take(PyObject* value) {
    PyTypeObject* type = Py_TYPE(value);
    if (is_tensor(value, torch_)) return take_tensor(value);
    Ref part;
    if (type == &PyTuple_Type || type == &PyList_Type) {
      part = sequence_key(value);
    } else if (type == &PySlice_Type) {
      part = slice_key(value);
    } else {
      part = Ref::copy(value);
    }
    if (!part) return false;
    key.add(std::move(part));
    return true;
  }

  Ref tensors() const { return as_tuple(tensors_); }
  Ref marks() const { return as_tuple(marks_); }
  bool has_one() const { return tensors_.size() <= 1; }

  Key key;

 private:
  bool take_tensor(PyObject* tensor) {
    const CallTables& tables = call_tables();
    PyObject* mark = usual_mark(table_, tensor);
    if (mark == nullptr) return false;
    auto type = reinterpret_cast<PyObject*>(Py_TYPE(mark));
    if (type == tables.derived.get()) return false;
    if (type == tables.layout.get()) {
      Ref examples = EXAMPLES.of(mark);
      if (!examples || examples.get() != Py_None) return false;
    }
    tensors_.push_back(Ref::copy(tensor));
    marks_.push_back(Ref::copy(mark));
    key.add_borrowed(mark);
    return key.add_attribute(tensor, SHAPE) && key.add_attribute(tensor, DTYPE) &&
           key.add_attribute(tensor, REQUIRES_GRAD);
  }

  static Ref as_tuple(const std::vector<Ref>& values) {
    Ref made(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
    if (!made) return made;
    for (size_t i = 0; i < values.size(); ++i) {
      PyTuple_SET_ITEM(made.get(), static_cast<Py_ssize_t>(i), Py_NewRef(values[i].get()));
    }
    return made;
  }

  PyObject* table_;
  const TorchObjects* torch_;
  std::vector<Ref> tensors_, marks_;
};

Ref in_python(PyObject* mode, PyObject* func, PyObject* args, PyObject* kwargs) {
  PyErr_Clear();
  return call_method(mode, UNUSUAL, {func, args, kwargs});
}

// The mark that calls of this kind were found to have; null without an error if there is none.
Ref found_mark(PyObject* found, PyObject* key) {
  PyObject* mark = PyDict_GetItemWithError(found, key);
  if (mark == nullptr) PyErr_Clear();  // a slice, say, cannot be looked up
  return Ref::copy(mark);
}

}  // namespace

CallTables& call_tables() {
  static auto* tables = new CallTables();
  return *tables;
}

PyObject* general(PyObject* mode, PyObject* func, PyObject* args, PyObject* kwargs) {
  const CallTables& tables = call_tables();
  const TorchObjects* torch = torch_objects();
  if (torch == nullptr) return nullptr;
  Ref found = FOUND.of(mode);
  Ref table = TABLE.of(mode);
  if (!found || !table) return nullptr;
  if (found.get() == Py_None || number_from(torch->mode_count) != 0) {
    return in_python(mode, func, args, kwargs).release();
  }
  UsualCall made(table.get(), torch);
  made.key.add_borrowed(func);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(args); ++i) {
    if (!made.take(PyTuple_GET_ITEM(args, i))) {
      return in_python(mode, func, args, kwargs).release();
    }
  }
  PyObject *name, *value;
  Py_ssize_t position = 0;
  while (PyDict_Next(kwargs, &position, &name, &value)) {
    made.key.add_borrowed(name);
    if (!made.take(value)) return in_python(mode, func, args, kwargs).release();
  }
  int writes = is_true(tables.writes.get(), {func});
  if (writes < 0) return nullptr;
  if (writes) return in_python(mode, func, args, kwargs).release();

  Ref result(PyObject_Call(func, args, kwargs));
  if (!result) return nullptr;
  Ref key = Ref::copy(Py_None);
  if (Py_TYPE(result.get()) == torch->tensor) {
    int kept = is_true(tables.is_kept.get(), {func, made.has_one() ? Py_True : Py_False});
    if (kept < 0) return nullptr;
    Ref graded(PyObject_CallNoArgs(torch->grad_enabled));
    if (!graded) return nullptr;
    if (kept && graded.get() == Py_True) {
      if (!made.key.add_attribute(result.get(), SHAPE) ||
          !made.key.add_attribute(result.get(), REQUIRES_GRAD)) {
        return nullptr;
      }
      key = made.key.tuple();
      if (!key) return nullptr;
      Ref mark = found_mark(found.get(), key.get());
      if (mark) {
        return put_usual(table.get(), result.get(), mark.get()) ? result.release() : nullptr;
      }
    }
  }
  Ref tensors = made.tensors();
  Ref marks = made.marks();
  if (!tensors || !marks) return nullptr;
  return call_method(mode, LEARN,
                     {func, args, kwargs, tensors.get(), marks.get(), result.get(), key.get()})
      .release();
}

PyObject* torch_function(PyObject*, PyObject* const* given, Py_ssize_t count) {
  const CallTables& tables = call_tables();
  const TorchObjects* torch = torch_objects();
  if (torch == nullptr) return nullptr;
  if (count < 3 || count > 5) {
    PyErr_SetString(PyExc_TypeError, "__torch_function__ takes func, types, args and kwargs");
    return nullptr;
  }
  PyObject *mode = given[0], *func = given[1];
  Ref args(count > 3 ? PySequence_Tuple(given[3]) : PyTuple_New(0));
  Ref kwargs = count > 4 && given[4] != Py_None ? Ref::copy(given[4]) : Ref(PyDict_New());
  if (!args || !kwargs) return nullptr;
  int asks = PySet_Contains(tables.questions.get(), func);
  if (asks < 0) return nullptr;
  if (!asks) {
    Ref task = TASK.of(mode);
    if (!task) return nullptr;
    Ref current(PyObject_CallNoArgs(torch->graph_task));
    if (!current) return nullptr;
    int same = PyObject_RichCompareBool(task.get(), current.get(), Py_EQ);
    if (same < 0) return nullptr;
    asks = !same;  // of a backward that the forward calls
  }
  if (asks) return PyObject_Call(func, args.get(), kwargs.get());
  if (PyDict_GET_SIZE(kwargs.get()) != 0) {
    int reorders = is_true(tables.reorders.get(), {func, args.get()});
    if (reorders < 0) return nullptr;
    if (reorders) {
      Ref ordered = call_method(mode, IN_ORDER, {func, args.get(), kwargs.get()});
      if (!ordered) return nullptr;
      args = Ref::copy(PyTuple_GET_ITEM(ordered.get(), 0));
      kwargs = Ref::copy(PyTuple_GET_ITEM(ordered.get(), 1));
    }
  }
  PyObject* handler = PyDict_GetItemWithError(tables.handlers.get(), func);
  if (handler == nullptr && PyErr_Occurred()) return nullptr;
  if (handler != nullptr) {
    Ref served = call(handler, {mode, func, args.get(), kwargs.get()});
    if (!served || served.get() != Py_NotImplemented) return served.release();
  }
  return general(mode, func, args.get(), kwargs.get());
}

}  // namespace htv::engine
