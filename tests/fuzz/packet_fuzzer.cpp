// Coverage-guided fuzzing of the packet reader (libFuzzer; needs clang):
//   tests/fuzz/fuzz.sh 600
// Three of four mutants get the right size and checksum again, else no mutant would pass that check.
#include <cstdint>

#include "packet_target.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  size = LLVMFuzzerMutate(data, size, max_size);
  if (seed % 4) target::reseal(data, size);
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  target::read(data, size, int(size % 4));
  return 0;
}
