// The threads of a block as fibers of one thread of the processor.
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
static std::vector<char> finished;
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
  finished[current] = 1;
  swapcontext(&fibers[current], &scheduler);
}

void wait() { swapcontext(&fibers[current], &scheduler); }

void run_block(const std::function<void()>& body) {
  const size_t n = blockDim.x;
  if (n > stack_count) stacks.reset(new char[n * STACK]), stack_count = n;
  fibers.resize(n);
  finished.assign(n, 0);
  body_of_block = &body;
  for (size_t i = 0; i < n; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = stacks.get() + i * STACK;
    fibers[i].uc_stack.ss_size = STACK;
    fibers[i].uc_link = nullptr;
    makecontext(&fibers[i], entry, 0);
  }
  for (size_t left = n; left > 0;) {  // from one barrier to the next
    const size_t before = left;
    for (size_t k = 0; k < n && !failure; ++k) {
      current = reversed ? n - 1 - k : k;
      if (finished[current]) continue;
      threadIdx.x = unsigned(current);
      swapcontext(&scheduler, &fibers[current]);
      left -= size_t(finished[current]);
    }
    if (failure) {
      const std::exception_ptr error = failure;
      failure = nullptr;
      std::rethrow_exception(error);
    }
    if (left > 0 && left < before)
      throw std::runtime_error("some threads ended while others wait at a barrier");
  }
}

}  // namespace on_host

// For a test: multiprocessors of the device, and whether threads run from the last to the first.
extern "C" void on_host_set(int multiprocessors, bool reversed) {
  on_host::multiprocessors = multiprocessors;
  on_host::reversed = reversed;
}
