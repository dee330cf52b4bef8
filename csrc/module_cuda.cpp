// The Python module `part_fast._C_cuda`. It is empty: importing it loads the library, and loading the library
// registers the CUDA implementations of the ops with torch's dispatcher.
#include "module.h"

// Python asks for this name.
// NOLINTNEXTLINE(bugprone-reserved-identifier)
PyMODINIT_FUNC PyInit__C_cuda(void) { return part_fast::empty_module("_C_cuda"); }
