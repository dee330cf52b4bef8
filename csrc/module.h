// What both Python modules are: nothing, but a way to load a library by importing it.
#pragma once

#include <Python.h>

// A program without Python loads the libraries too, and never calls the function that makes the module.
extern "C" __attribute__((weak)) PyAPI_FUNC(PyObject*) PyModule_Create2(PyModuleDef*, int);

namespace part_fast {

inline PyObject* empty_module(const char* name) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, nullptr, nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  module.m_name = name;
  return PyModule_Create(&module);
}

}  // namespace part_fast
