// The threads of a block as fibers of one thread of the processor, which runs each as far as its next
// barrier: of the block, or of its warp when the 32 threads exchange values.
#include <ucontext.h>

#include <exception>
#include <memory>
#include <vector>

#include <cuda_runtime.h>

namespace flcore {
namespace cuda {
extern uint4 shared_words[];
alignas(128) uint4 shared_words[(on_host::SHARED_LIMIT + 4096) / 16];
}  // namespace cuda
}  // namespace flcore

namespace on_host {

char* shared = reinterpret_cast<char*>(flcore::cuda::shared_words);

constexpr size_t STACK = 256 << 10;

static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
enum State : char { READY, AT_BLOCK, AT_WARP, FINISHED };
static std::vector<State> states;
static std::vector<uint64_t> given, taken;  // values of the last exchange: a thread's, its warp's
static std::unique_ptr<char[]> stacks;
static size_t stack_count = 0, current = 0;
static const std::function<void()>* body_of_block = nullptr;
static std::exception_ptr failure;

static void entry() {
  try {
    (*body_of_block)();
  } catch (...) {
    failure = std::current_exception();
  }
  states[current] = FINISHED;
  swapcontext(&fibers[current], &scheduler);
}

static void wait_at(State barrier) {
  states[current] = barrier;
  swapcontext(&fibers[current], &scheduler);
}

void wait() { wait_at(AT_BLOCK); }

const uint64_t* exchange(uint64_t value) {
  given[current] = value;
  wait_at(AT_WARP);
  return &taken[current / 32 * 32];
}

static size_t count(State state, size_t first, size_t last) {
  size_t found = 0;
  for (size_t i = first; i < last; ++i) found += size_t(states[i] == state);
  return found;
}

// Lets threads go on that wait for nobody any more; false when there are none.
static bool release(size_t n) {
  bool some = false;
  for (size_t first = 0; first < n; first += 32) {
    const size_t last = first + 32 < n ? first + 32 : n;
    if (count(AT_WARP, first, last) < last - first) continue;
    for (size_t i = first; i < last; ++i) taken[i] = given[i], states[i] = READY;
    some = true;
  }
  if (!some && count(AT_BLOCK, 0, n) == n) {
    states.assign(n, READY);
    some = true;
  }
  return some;
}

void run_block(const std::function<void()>& body) {
  const size_t n = blockDim.x;
  if (n > stack_count) stacks.reset(new char[n * STACK]), stack_count = n;
  fibers.resize(n);
  states.assign(n, READY);
  given.assign(n, 0);
  taken.assign(n, 0);
  body_of_block = &body;
  for (size_t i = 0; i < n; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks.get() + i * STACK;
    fibers[i].uc_stack.ss_size = STACK;
    fibers[i].uc_link = nullptr;
    makecontext(&fibers[i], entry, 0);
  }
  do {
    for (size_t k = 0; k < n && !failure; ++k) {
      current = reversed ? n - 1 - k : k;
      if (states[current] != READY) continue;
      threadIdx.x = unsigned(current);
      swapcontext(&scheduler, &fibers[current]);
    }
    if (failure) {
      const std::exception_ptr error = failure;
      failure = nullptr;
      std::rethrow_exception(error);
    }
  } while (release(n));
  if (count(FINISHED, 0, n) < n)
    throw std::runtime_error("some threads ended or exchange while others wait at a barrier");
}

}  // namespace on_host

// For a test: multiprocessors of the device, and whether threads run from the last to the first.
extern "C" void on_host_set(int multiprocessors, bool reversed) {
  on_host::multiprocessors = multiprocessors;
  on_host::reversed = reversed;
}

// Bytes of shared memory that a block can have; 0: as many as sm_90 has.
extern "C" void on_host_limit(size_t bytes) {
  on_host::shared_limit = bytes ? bytes : on_host::SHARED_LIMIT;
}
