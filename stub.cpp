#include "api.h"
#include <cstdlib>
#include <cstring>
namespace flcore {
extern const MomentsFns moments_base, moments_avx2, moments_avx512;
const CpuTable& cpu() { static CpuTable t{}; const char* w=std::getenv("FLCORE_ISA"); t.name=w; t.moments=!std::strcmp(w,"base")?&moments_base:!std::strcmp(w,"avx2")?&moments_avx2:&moments_avx512; return t; }
}
