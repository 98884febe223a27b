// Packets changed at random: truncated, with flipped bits, edited lengths and counts, with the right
// checksum again or not.  Usage: packet_mutations FOLDER_OF_PACKETS [COUNT] [SEED]
#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "packet_target.h"

namespace {

using Bytes = std::vector<uint8_t>;

void put(Bytes& bytes, size_t at, uint64_t value, int width) {
  for (int i = 0; i < width && at + size_t(i) < bytes.size(); ++i)
    bytes[at + size_t(i)] = uint8_t(value >> (8 * i));
}

void mutate(Bytes& bytes, std::mt19937_64& random) {
  static const uint64_t edges[] = {0, 1, 2, 7, 8, 63, 64, 255, 4096, 65535, 65536, 65537,
                                   uint64_t(1) << 31, uint64_t(1) << 32, uint64_t(1) << 60,
                                   uint64_t(1) << 63, ~uint64_t(0), ~uint64_t(0) - 63};
  const size_t size = bytes.size(), at = random() % size;
  switch (random() % 8) {
    case 0: bytes.resize(at); break;
    case 1: bytes[at] ^= uint8_t(1u << random() % 8); break;
    case 2: bytes.insert(bytes.begin() + long(at), 1 + random() % 80, uint8_t(random())); break;
    case 3:
      bytes.erase(bytes.begin() + long(at),
                  bytes.begin() + long(std::min(size, at + 1 + random() % 80)));
      break;
    case 4:  // a field of the header or of the section table
      put(bytes, random() % std::min<size_t>(size, 200), edges[random() % 18],
          1 << random() % 4);
      break;
    case 5:  // a small step of a field
      bytes[random() % std::min<size_t>(size, 200)] += random() % 2 ? 1 : 255;
      break;
    case 6: bytes[at] += random() % 2 ? 1 : 255; break;
    default:
      for (int i = 0; i < 8; ++i) bytes[random() % size] = uint8_t(random());
  }
}

}  // namespace

int main(int argc, char** argv) {
  target::expect(argc > 1, "usage: packet_mutations FOLDER_OF_PACKETS [COUNT] [SEED]");
  const long count = argc > 2 ? std::atol(argv[2]) : 20000;
  std::mt19937_64 random(argc > 3 ? uint64_t(std::atoll(argv[3])) : 1);
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1]))
    files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::vector<Bytes> seeds;
  for (const auto& file : files) {
    std::ifstream in(file, std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>());
    target::expect(target::read(seeds.back().data(), seeds.back().size(), 1),
                   "a packet of the folder is refused");
  }
  target::expect(!seeds.empty(), "the folder is empty");
  long decoded = 0;
  for (long i = 0; i < count; ++i) {
    Bytes bytes = seeds[random() % seeds.size()];
    for (unsigned times = 1 + unsigned(random() % 3); times && !bytes.empty(); --times)
      mutate(bytes, random);
    if (random() % 4) target::reseal(bytes.data(), bytes.size());
    decoded += target::read(bytes.data(), bytes.size(), int(random() % 4));
  }
  target::expect(decoded > count / 100, "too few mutants reach the decoder to mean anything");
  std::printf("ok %s: %zu packets, %ld mutants, %ld of them still packets\n", flcore::cpu().name,
              seeds.size(), count, decoded);
  return 0;
}
