// Bits, uniforms and normals into exactly sized heap buffers at odd offsets, for the sanitizers;
// stretches of a stream against its values one by one.
#include <cstring>
#include <initializer_list>
#include <memory>

#include "api.h"
#include "expect.h"

using namespace flcore;

typedef void (*Fill)(const RngArgs&);

static void stretch(Fill fill, const char* name, int64_t offset, int64_t numel, int shift) {
  const PhiloxStream stream = philox_stream(0xfedcba9876543210u, 1, 2, 3);
  const size_t bytes = size_t(4 * numel + shift);
  const std::unique_ptr<char[]> memory(new char[bytes + (bytes == 0)]);
  char* out = memory.get() + shift;
  fill({stream, offset, numel, out, 2});
  for (int64_t j = 0; j < numel; j += j < 100 || j + 100 > numel ? 1 : 97) {
    const std::unique_ptr<uint32_t> one(new uint32_t);
    fill({stream, offset + j, 1, one.get(), 1});
    EXPECT(!std::memcmp(one.get(), out + 4 * j, 4), "%s offset %lld value %d", name,
           static_cast<long long>(offset), int(j));
  }
}

int main() {
  const RngFns& rng = *cpu().rng;
  const struct {
    Fill fill;
    const char* name;
  } forms[] = {{rng.bits, "bits"}, {rng.uniform, "uniform"}, {rng.normal, "normal"}};
  for (const auto& form : forms)
    for (int64_t numel : {0, 1, 2, 31, 65, 33000})
      for (int64_t offset : {int64_t(0), int64_t(1), int64_t(7), PHILOX_LENGTH - numel})
        for (int shift : {0, 1}) stretch(form.fill, form.name, offset, numel, shift);
  std::printf("ok %s\n", cpu().name);
  return 0;
}
