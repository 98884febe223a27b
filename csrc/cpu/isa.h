// Names for one source compiled at several instruction-set levels.
//
// Contract of *.isa.cpp files: everything lives in namespace flcore::FLCORE_ISA with internal
// linkage and is exported only through FLCORE_TABLE(stem). No std:: templates: an inline function
// emitted here with wide instructions could be the copy the linker keeps for the whole program,
// and an older processor would die in it. tests/test_build.py checks the objects for weak symbols.
#pragma once

#ifndef FLCORE_ISA
#error "compile *.isa.cpp through flcore_isa() of CMakeLists.txt, which defines FLCORE_ISA"
#endif

#define FLCORE_JOIN_(a, b) a##_##b
#define FLCORE_JOIN(a, b) FLCORE_JOIN_(a, b)
#define FLCORE_TABLE(stem) FLCORE_JOIN(stem, FLCORE_ISA)
#define FLCORE_INLINE static inline __attribute__((always_inline))
#define FLCORE_MEMBER inline __attribute__((always_inline))
#define FLCORE_NOINLINE __attribute__((noinline))  // one copy of what many kernels call
