// The Python module `part_fast._C`. It is empty: importing it loads the library, and loading the library
// registers the CPU implementations of the ops with torch's dispatcher.
#include "module.h"

// Python asks for this name.
// NOLINTNEXTLINE(bugprone-reserved-identifier)
PyMODINIT_FUNC PyInit__C(void) { return part_fast::empty_module("_C"); }
