#pragma once

#include <omp.h>

#include <cstdint>

namespace sca::SCA_CPU_CAPABILITY {
namespace {

// One piece of machine code for any number of threads: compilers contract and vectorise each copy of a text as they
// like, and copies may differ in the last bits.
template <typename Task>
[[gnu::noinline, gnu::noclone]] void run_task(const Task& task, int64_t item, int thread) {
  task(item, thread);
}

// Runs task(item, thread) for every item. One thread opens no parallel region: a process forked after an OpenMP region
// must be able to go on with one thread.
template <typename Task>
void parallel_for(int64_t items, int32_t threads, const Task& task) {
  const int64_t team = items < threads ? items : threads;
  if (team <= 1) {
    for (int64_t item = 0; item < items; ++item) run_task(task, item, 0);
    return;
  }
#pragma omp parallel num_threads(static_cast<int>(team))
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < items; ++item) run_task(task, item, thread);
  }
}

// Hands out consecutive, aligned pieces of memory; without memory it only counts.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 64;
  char* base_;
  int64_t used_ = 0;
};

}  // namespace
}  // namespace sca::SCA_CPU_CAPABILITY
