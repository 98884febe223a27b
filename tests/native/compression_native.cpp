// Packets without Python: encode and decode at odd sizes and addresses, and mutated packets. Every
// buffer ends where its allocation ends, so that a byte read or written outside is an error of the
// address sanitizer. Usage: compression_native [mutations]
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "api.h"
#include "check.h"
#include "expect.h"
#include "sparsify.h"
#include "wire.h"

using namespace flcore;

// `bytes` bytes at an address `shift` off the allocation's start, ending where it ends.
struct Exact {
  Exact(int64_t bytes, int shift) : memory(new uint8_t[size_t(bytes + shift)]) {
    data = memory.get() + shift;
    std::memset(data, 0xA5, size_t(bytes));
  }
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data;
};

struct Case {
  int64_t numel, k;
  int value_dtype, index;
  bool e, h;
  int shift;
  std::vector<int64_t> layers;  // sizes; the rest of numel is one more layer
};

static wire::Header header_of(const Case& c) {
  wire::Header h;
  h.value_dtype = uint8_t(c.value_dtype);
  h.index = uint8_t(c.index);
  h.round = 7;
  h.epoch = 3;
  return h;
}

static FeedbackArgs feedback_of(int64_t numel, const std::vector<int64_t>& starts,
                                const std::vector<int>& dtypes,
                                const std::vector<const void*>& grads) {
  FeedbackArgs args = {};
  args.numel = numel;
  args.layers = int64_t(grads.size());
  args.starts = starts.data();
  args.dtype = dtypes.data();
  args.grads = grads.data();
  args.a = 0.25f;
  args.b = args.q = 1;
  args.state_dtype = F32;
  args.threads = 2;
  return args;
}

static std::vector<uint8_t> encode(const Case& c, std::mt19937& random) {
  std::vector<int64_t> starts = {0};
  for (int64_t size : c.layers) starts.push_back(starts.back() + size);
  starts.push_back(c.numel);
  std::vector<std::unique_ptr<Exact>> keep;
  std::vector<const void*> grads;
  std::vector<int> dtypes;
  std::normal_distribution<float> normal;
  for (size_t l = 0; l + 1 < starts.size(); ++l) {
    const int64_t size = starts[l + 1] - starts[l];
    const int dtype = int((l + size_t(c.shift)) % 2 ? F32 : F64);
    keep.emplace_back(new Exact(size * dtype_bytes(dtype), c.shift));
    for (int64_t i = 0; i < size; ++i) {
      const float f = normal(random);
      const double d = f;
      std::memcpy(keep.back()->data + i * dtype_bytes(dtype),
                  dtype == F32 ? static_cast<const void*>(&f) : static_cast<const void*>(&d),
                  size_t(dtype_bytes(dtype)));
    }
    grads.push_back(keep.back()->data);
    dtypes.push_back(dtype);
  }
  const auto floats = [&] { return std::unique_ptr<float[]>(new float[size_t(c.numel)]()); };
  const auto e = floats(), spare = floats(), h = floats();
  FeedbackArgs args = feedback_of(c.numel, starts, dtypes, grads);
  args.h = args.h_new = c.h ? h.get() : nullptr;
  wire::Header header = header_of(c);
  header.numel = uint64_t(c.numel);
  const wire::Layout layout = wire::plan_sparse(header, c.k, 0);
  const int64_t segment[2] = {0, c.numel};
  uint32_t tau = 0;
  std::vector<uint8_t> bytes;
  for (int round = 0; round < 3; ++round) {
    if (c.e) {  // in place, then to a spare: with histograms, then with the carried threshold
      args.e = round < 2 ? e.get() : spare.get();
      args.e_new = round < 1 ? e.get() : round < 2 ? spare.get() : e.get();
    }
    const Exact out(layout.total_bytes, c.shift);
    const SparsePacket packet{header_of(c), nullptr, 0, out.data, layout.total_bytes};
    const Selection selection{1, segment, &c.k, 0, 0, 0.9f, &tau};
    EXPECT(sparsify(args, selection, packet) == layout.total_bytes, "finite input");
    bytes.assign(out.data, out.data + layout.total_bytes);
  }
  return bytes;
}

// Decodes into two layers at an odd address, of both dtypes.
static void decode(const wire::Packet& p, int shift, bool add) {
  const int64_t numel = int64_t(p.header.numel), first = numel / 3;
  const int64_t starts[3] = {0, first, numel};
  const int dtypes[2] = {F32, F64};
  const Exact low(4 * first, shift), high(8 * (numel - first), shift);
  std::memset(low.data, 0, size_t(4 * first));
  std::memset(high.data, 0, size_t(8 * (numel - first)));
  void* out[2] = {low.data, high.data};
  const PacketView view = p.view(0.5);
  const DecodeArgs args{numel, 1, &view, 2, starts, dtypes, out, 2};
  (add ? cpu().decode->add : cpu().decode->dense)(args);
}

static std::vector<uint8_t> round_trip(const Case& c, std::mt19937& random) {
  const std::vector<uint8_t> bytes = encode(c, random);
  const Exact copy(int64_t(bytes.size()), c.shift);
  std::memcpy(copy.data, bytes.data(), bytes.size());
  const wire::Packet p = wire::parse(copy.data, bytes.size(), wire::Limits());
  EXPECT(p.k == c.k && int64_t(p.header.numel) == c.numel && p.header.round == 7, "header");
  decode(p, c.shift, true);
  decode(p, c.shift, false);
  return bytes;
}

// ---- mutations --------------------------------------------------------------------------------

static void put(std::vector<uint8_t>& bytes, size_t at, uint64_t value, int width) {
  for (int i = 0; i < width && at + size_t(i) < bytes.size(); ++i)
    bytes[at + size_t(i)] = uint8_t(value >> (8 * i));
}

static void mutate(std::vector<uint8_t>& bytes, std::mt19937& random) {
  static const uint64_t edges[] = {0, 1, 2, 63, 64, 65535, 65536, 65537, uint64_t(1) << 31,
                                   uint64_t(1) << 32, uint64_t(1) << 60, uint64_t(1) << 63,
                                   ~uint64_t(0), ~uint64_t(0) - 63};
  const size_t size = bytes.size();
  switch (random() % 6) {
    case 0: bytes.resize(random() % (size + 1)); break;
    case 1: bytes[random() % size] ^= uint8_t(1u << random() % 8); break;
    case 2: bytes.insert(bytes.begin() + long(random() % size), uint8_t(random())); break;
    case 3: bytes.erase(bytes.begin() + long(random() % size)); break;
    case 4: {  // a field of the header or the section table
      static const int widths[] = {1, 2, 4, 8};
      const int width = widths[random() % 4];
      put(bytes, random() % (size < 168 ? size : 168), edges[random() % 14], width);
      break;
    }
    default:
      for (int i = 0; i < 8; ++i) bytes[random() % size] = uint8_t(random());
  }
}

// The only outcomes are "decodes" and PacketError.
static bool read(const std::vector<uint8_t>& bytes, int shift) {
  const Exact copy(int64_t(bytes.size()), shift);
  if (!bytes.empty()) std::memcpy(copy.data, bytes.data(), bytes.size());
  wire::Limits limits;
  limits.max_numel = uint64_t(1) << 20;
  try {
    const wire::Packet p = wire::parse(copy.data, bytes.size(), limits);
    decode(p, shift, true);
    return true;
  } catch (const PacketError& error) {
    EXPECT(std::string(error.what()).size() > 10, "an error without a sentence");
    return false;
  }
}

static void fuzz(const std::vector<std::vector<uint8_t>>& seeds, int64_t count) {
  std::mt19937 random(12345);
  int64_t decoded = 0, refused = 0;
  for (int64_t i = 0; i < count; ++i) {
    std::vector<uint8_t> bytes = seeds[random() % seeds.size()];
    for (unsigned times = 1 + random() % 3; times && !bytes.empty(); --times) mutate(bytes, random);
    const bool sealed = random() % 2 && bytes.size() >= 64;
    if (sealed) {
      if (random() % 2) put(bytes, 24, bytes.size() - 64, 8);
      wire::seal(bytes.data(), bytes.size());
    }
    (read(bytes, int(random() % 4)) ? decoded : refused) += 1;
  }
  EXPECT(decoded > count / 200 && refused > count / 2, "decoded %ld refused %ld", long(decoded),
         long(refused));
}

int main(int argc, char** argv) {
  std::mt19937 random(1);
  std::vector<std::vector<uint8_t>> seeds;
  for (int64_t numel : {0, 1, 15, 16, 17, 1023, 1024, 1025, 4097, 65535, 65536, 65537, 131073})
    for (int value_dtype : {int(F32), int(F16), int(BF16)})
      for (int index : {int(wire::TILE16), int(wire::BITMASK)}) {
        const int64_t k = numel ? 1 + numel / 50 : 0;
        const int shift = int(numel % 4);
        const std::vector<int64_t> cut = {numel / 7, 0, numel / 3};
        const auto bytes =
            round_trip({numel, k, value_dtype, index, numel % 2 == 0, value_dtype != F16, shift,
                        numel > 2 ? cut : std::vector<int64_t>{}},
                       random);
        round_trip({numel, numel, value_dtype, index, true, true, shift, {}}, random);
        if (numel < 5000) seeds.push_back(bytes);
      }
  const int64_t numel = 5000;
  std::unique_ptr<float[]> bad(new float[size_t(numel)]());
  bad[numel - 1] = std::numeric_limits<float>::infinity();
  const std::vector<int64_t> starts = {0, numel};
  const std::vector<int> dtype = {F32};
  const std::vector<const void*> grads = {bad.get()};
  const int64_t k = 5, total = 1024;
  const Exact out(total, 1);
  const Selection selection{1, starts.data(), &k, 0, 0, 0.9f, nullptr};
  const SparsePacket packet{wire::Header(), nullptr, 0, out.data, total};
  EXPECT(sparsify(feedback_of(numel, starts, dtype, grads), selection, packet) == -1, "inf");
  for (int64_t i = 0; i < total; ++i) EXPECT(out.data[i] == 0xA5, "byte %ld", long(i));
  fuzz(seeds, argc > 1 ? std::atoll(argv[1]) : 20000);
  std::printf("ok %s\n", cpu().name);
}
