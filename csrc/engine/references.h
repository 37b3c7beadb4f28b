// Owned references to Python objects, and calls that keep Python's error as it is.
#pragma once

#include <Python.h>

#include <utility>

namespace htv::engine {

// An owned reference; null after an error of Python's, which is set then.
class Ref {
 public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  static Ref copy(PyObject* borrowed) { return Ref(Py_XNewRef(borrowed)); }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

// An interned name, made once and kept for the life of the process.
class Name {
 public:
  explicit Name(const char* text) : object_(PyUnicode_InternFromString(text)) {}
  Ref of(PyObject* object) const { return Ref(PyObject_GetAttr(object, object_)); }
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

}  // namespace htv::engine
