// The Python module `part_fast._C`. It is empty: importing it loads the library, and loading the library
// registers the CPU implementations of the ops with torch's dispatcher.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
