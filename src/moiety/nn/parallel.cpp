#include "moiety/nn/parallel.h"

#include <ATen/Parallel.h>
#include <c10/util/ParallelGuard.h>

#include <algorithm>
#include <atomic>
#include <exception>

// What the pragmas of gcc compile to. libgomp and libomp both have them.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_num_threads();
int omp_get_thread_num();
int omp_in_parallel();
}

namespace moiety::parallel {

void on_threads(int threads, const std::function<void(int index, int count)>& body) {
  const auto call = [](void* data) {
    (*static_cast<const std::function<void(int, int)>*>(data))(omp_get_thread_num(), omp_get_num_threads());
  };
  GOMP_parallel(call, const_cast<std::function<void(int, int)>*>(&body), static_cast<unsigned>(threads), 0);
}

bool inside() {
  return omp_in_parallel() != 0;
}

void run(int64_t begin, int64_t end, int64_t grain, Part part, const void* body) {
  if (begin >= end) return;
  at::internal::lazy_init_num_threads();
  const int64_t items = end - begin;
  const auto one = [&](int64_t first, int64_t last) {
    const c10::ParallelGuard guard(true);
    part(body, first, last);
  };
  if (items == 1 || items <= grain || at::in_parallel_region() || at::get_num_threads() == 1) {
    const at::internal::ThreadIdGuard id(0);
    one(begin, end);
    return;
  }
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr failure;
  on_threads(0, [&](int index, int count) {
    int64_t parts = count;
    if (grain > 0) parts = std::min(parts, at::divup(items, grain));
    const int64_t size = at::divup(items, parts), first = begin + index * size;
    if (first >= end) return;
    try {
      const at::internal::ThreadIdGuard id(index);
      one(first, std::min(end, first + size));
    } catch (...) {
      if (!failed.test_and_set()) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

}  // namespace moiety::parallel
