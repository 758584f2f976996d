#include <cuda_runtime.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace loki {
thread_local uint32_t layer_keys[227 * 1024 / 4];
}

namespace emulator {
namespace {

enum class State { ready, at_block_barrier, at_warp_barrier, ended };

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  State state = State::ended;
  uint3 index;
};

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr size_t kMaxBlockThreads = 1024;

thread_local std::vector<std::unique_ptr<Fiber>> fibers;
thread_local Fiber* current = nullptr;
thread_local int current_number = 0, threads = 0;
thread_local jmp_buf scheduler;
thread_local const std::function<void()>* body = nullptr;
thread_local uint64_t slots[kMaxBlockThreads];
bool refuses_launches = false;

void leave(State state) {
  current->state = state;
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

void work() {  // a fiber lives on from block to block
  for (;;) {
    (*body)();
    leave(State::ended);
  }
}

void enter(int number) {
  Fiber& fiber = *fibers[number];
  current = &fiber;
  current_number = number;
  threadIdx = fiber.index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  fiber.stack = std::make_unique<char[]>(kStack);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, work, 0);
  setcontext(&fiber.start);
}

// Lets through whoever may pass; false if nobody can.
bool release() {
  bool released = false;
  int waiting = 0, alive = 0;
  for (int first = 0; first < threads; first += kWarp) {
    int here = 0, lanes = std::min(kWarp, threads - first);
    for (int i = first; i < first + lanes; ++i) {
      here += fibers[i]->state == State::at_warp_barrier;
      waiting += fibers[i]->state == State::at_block_barrier;
      alive += fibers[i]->state != State::ended;
    }
    if (here < lanes) continue;  // every lane takes part: the masks in csrc are all full
    for (int i = first; i < first + lanes; ++i) fibers[i]->state = State::ready;
    released = true;
  }
  if (alive == 0 || waiting < alive) return released;
  for (int i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::at_block_barrier) fibers[i]->state = State::ready;
  }
  return true;
}

void run_block(std::mt19937& random) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < threads; ++i) fibers[i]->state = State::ready;
  std::fill(std::begin(loki::layer_keys), std::end(loki::layer_keys), random());
  do {
    std::shuffle(order.begin(), order.end(), random);
    for (const int i : order) {
      if (fibers[i]->state == State::ready) enter(i);
    }
  } while (release());
  for (int i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::ended) continue;
    std::fprintf(stderr, "emulator: thread %d waits at a barrier that others never reach\n", i);
    std::abort();
  }
}

}  // namespace

void wait(Scope scope) {
  leave(scope == Scope::block ? State::at_block_barrier : State::at_warp_barrier);
}

int lane() { return current_number % kWarp; }
int warp_size() { return std::min(kWarp, threads - current_number / kWarp * kWarp); }
uint64_t& slot(int lane) { return slots[current_number / kWarp * kWarp + lane]; }

cudaError_t run(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const auto product = [](dim3 d) { return uint64_t{d.x} * d.y * d.z; };
  if (refuses_launches || product(block) == 0 || product(block) > kMaxBlockThreads ||
      product(grid) == 0 || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  threads = static_cast<int>(product(block));
  while (fibers.size() < static_cast<size_t>(threads)) fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < static_cast<unsigned>(threads); ++i) {
    fibers[i]->index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  blockDim = block;
  gridDim = grid;
  body = &kernel;
  std::mt19937 random(0);
  for (uint64_t i = 0; i < product(grid); ++i) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(random);
  }
  return cudaSuccess;
}

}  // namespace emulator

void __syncthreads() { emulator::wait(emulator::Scope::block); }

unsigned __ballot_sync(unsigned, int predicate) {
  emulator::slot(emulator::lane()) = predicate != 0;
  emulator::wait(emulator::Scope::warp);
  unsigned ballot = 0;
  for (int i = 0; i < emulator::warp_size(); ++i) {
    ballot |= static_cast<unsigned>(emulator::slot(i)) << i;
  }
  emulator::wait(emulator::Scope::warp);
  return ballot;
}

extern "C" {

void emulator_refuses_launches(bool refuses) { emulator::refuses_launches = refuses; }

cudaError_t cudaGetLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "the emulator refused the launch";
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
}
