#include "moiety/nn/packed.h"

#include <ATen/Parallel.h>

#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "moiety/base/error.h"
#include "moiety/nn/parallel.h"
#include "moiety/nn/tasks.h"

namespace moiety {
namespace {

// Multiplications below which a second thread costs more than it saves.
constexpr int64_t kAlone = 200'000;
constexpr int64_t kShares = 2;  // of what is left, for each thread: those that are held up do not hold up the others

// Matrices lie one behind another in large pages where the system has them: a token reads all of them, and with pages
// of 4 KiB the processor is held up by looking these up.
constexpr size_t kPage = size_t{2} << 20, kBlock = size_t{32} << 20;

std::shared_ptr<std::byte> piece(size_t bytes) {
  struct Free {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{kPage}); }
  };
  static std::mutex lock;
  static std::shared_ptr<std::byte> block;  // the one that is being filled
  static size_t used = 0, size = 0;
  const std::lock_guard<std::mutex> guard(lock);
  bytes = (bytes + 63) / 64 * 64;
  if (!block || used + bytes > size) {
    size = std::max((bytes + kPage - 1) / kPage * kPage, kBlock);
    used = 0;
    block.reset(static_cast<std::byte*>(::operator new[](size, std::align_val_t{kPage})), Free());
#if defined(MADV_HUGEPAGE)
    ::madvise(block.get(), size, MADV_HUGEPAGE);  // a wish: nothing is lost where it is not granted
#endif
  }
  std::shared_ptr<std::byte> out(block, block.get() + used);
  used += bytes;
  if (used == size) block.reset();
  return out;
}

}  // namespace

PackedMatrix::PackedMatrix(const TensorView& blocks)
    : format_(blocks.format), rows_(blocks.shape.at(0)), cols_(blocks.shape.at(1)) {
  check(can_pack(format_), "this machine has no products for packed rows of {}", info(format_).name);
  const int64_t bytes = packed_group_bytes(format_, cols_);
  const auto to = piece(static_cast<size_t>(bytes * groups()));
  data_ = to;
  parallel_for(0, groups(), std::max<int64_t>(1, (1 << 18) / bytes), [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; ++g)
      pack_group(format_, blocks.data.data(), rows_, cols_, g, to.get() + g * bytes);
  });
}

PackedMatrix::PackedMatrix(Format format, int64_t rows, int64_t cols, const std::byte* packed)
    : format_(format), rows_(rows), cols_(cols), data_(std::shared_ptr<void>(), packed) {}

int64_t PackedMatrix::bytes() const {
  return groups() * packed_group_bytes(format_, cols_);
}

void run_jobs(std::span<const PackedJob> jobs) {
  int64_t work = 0;
  for (const PackedJob& j : jobs) work += j.matrix->rows() * j.matrix->cols() * j.x->size();
  const auto run = [](const PackedJob& j, int64_t first, int64_t last) {
    packed_products(j.matrix->format(), j.matrix->data(), j.matrix->rows(), j.matrix->cols(), first, last, *j.x, j.y,
                    j.stride);
  };
  const int64_t threads = at::get_num_threads();
  if (work <= kAlone || threads == 1) {
    for (const PackedJob& j : jobs) run(j, 0, j.matrix->groups());
    return;
  }
  // Ever smaller pieces, side by side in memory, so that all threads end together.
  struct Piece {
    size_t job;
    int64_t first, last;
  };
  static thread_local std::vector<Piece> pieces;
  pieces.clear();
  int64_t left = work;
  for (size_t i = 0; i < jobs.size(); ++i) {
    const PackedJob& j = jobs[i];
    const int64_t group = std::max<int64_t>(1, kPackedRows * j.matrix->cols() * j.x->size()), all = j.matrix->groups();
    for (int64_t first = 0; first < all;) {
      const int64_t share = std::max(left / (threads * kShares), kAlone / 4);
      const int64_t n = std::clamp<int64_t>(share / group, 1, all - first);
      pieces.push_back({i, first, first + n});
      first += n;
      left -= n * group;
    }
  }
  const auto& all = pieces;  // of the calling thread
  run_tasks(static_cast<int64_t>(all.size()), [&](int64_t i) {
    const Piece& p = all[static_cast<size_t>(i)];
    run(jobs[p.job], p.first, p.last);
  });
}

void quantize_all(std::span<const TileJob> jobs) {
  int64_t elements = 0;
  for (const TileJob& j : jobs) elements += j.x->size() * j.x->cols();
  const auto fill = [](const TileJob& j, int64_t tile) { j.x->fill(tile, j.from, j.stride, j.index); };
  if (elements <= 32768 || at::get_num_threads() == 1) {
    for (const TileJob& j : jobs)
      for (int64_t t = 0; t < j.x->tiles(); ++t) fill(j, t);
    return;
  }
  std::vector<std::pair<size_t, int64_t>> all;
  for (size_t i = 0; i < jobs.size(); ++i)
    for (int64_t t = 0; t < jobs[i].x->tiles(); ++t) all.emplace_back(i, t);
  parallel_for(0, static_cast<int64_t>(all.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const auto [job, tile] = all[static_cast<size_t>(i)];
      fill(jobs[job], tile);
    }
  });
}

}  // namespace moiety
