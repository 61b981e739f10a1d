#pragma once

// VGGFAST_TARGET("avx2,fma"): functions from here to VGGFAST_TARGET_END are compiled for that instruction set. By function and not
// by file (-mavx2): else inline functions of the standard library would be, too, and the linker might keep those for every caller.
#define VGGFAST_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#  define VGGFAST_TARGET(names) VGGFAST_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#  define VGGFAST_TARGET_END VGGFAST_PRAGMA(clang attribute pop)
#else
#  define VGGFAST_TARGET(names) VGGFAST_PRAGMA(GCC push_options) VGGFAST_PRAGMA(GCC target(names))
#  define VGGFAST_TARGET_END VGGFAST_PRAGMA(GCC pop_options)
#endif
