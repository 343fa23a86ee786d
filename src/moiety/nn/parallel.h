#pragma once
// Work on the threads that torch's own products use. at::parallel_for does this by OpenMP's pragmas in the caller's
// file, which bind the caller to one compiler's runtime; here one file asks torch's runtime for its threads.
#include <cstdint>
#include <functional>
#include <memory>

namespace moiety {
namespace parallel {

/// Runs body(index, count) once on each of `count` threads, `threads` of them where the runtime gives that many
/// (0: as torch is set). Nothing may leave `body` as an exception.
void on_threads(int threads, const std::function<void(int index, int count)>& body);
/// Whether the caller runs on a thread of on_threads or of torch's parallel regions.
bool inside();

using Part = void (*)(const void* body, int64_t begin, int64_t end);
void run(int64_t begin, int64_t end, int64_t grain, Part part, const void* body);

}  // namespace parallel

/// Runs body(first, last) over parts of [begin, end) of at least `grain` items, each item in one part: what
/// at::parallel_for does. One part where the caller is in a parallel region. An exception of a part is thrown here.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  parallel::run(
      begin, end, grain,
      [](const void* b, int64_t first, int64_t last) { (*static_cast<const Body*>(b))(first, last); },
      std::addressof(body));
}

}  // namespace moiety
