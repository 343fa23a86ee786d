#include "moiety/compress/assignment.h"

#include <fmt/ranges.h>
#include <torch/torch.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "moiety/base/error.h"

namespace moiety {
namespace {

constexpr int64_t kNone = -1;

/// A partial assignment of least cost with its prices: cost[i, j] >= u[i] + v[j] always, equal where i has j.
class Assignment {
 public:
  Assignment(const double* cost, int64_t n)
      : cost_(cost),
        n_(n),
        u_(size()),
        v_(size()),
        column_of_(size(), kNone),
        row_of_(size(), kNone),
        distance_(size()),
        before_(size(), kNone),
        open_(size()) {}

  std::vector<int64_t> solve() {
    start();
    for (int64_t i = 0; i < n_; ++i)
      if (column_of_[at(i)] == kNone) augment(i);
    return column_of_;
  }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  size_t size() const { return at(n_); }
  const double* row(int64_t i) const { return cost_ + i * n_; }

  // Column reduction: every column's price is its least cost, and goes to that row if the row is free.
  void start() {
    std::vector<int64_t> cheapest(size(), 0);
    std::copy(row(0), row(0) + n_, v_.begin());
    for (int64_t i = 1; i < n_; ++i) {
      const double* c = row(i);
      for (int64_t j = 0; j < n_; ++j)
        if (c[j] < v_[at(j)]) {
          v_[at(j)] = c[j];
          cheapest[at(j)] = i;
        }
    }
    for (int64_t j = 0; j < n_; ++j) {
      const int64_t i = cheapest[at(j)];
      if (column_of_[at(i)] != kNone) continue;
      column_of_[at(i)] = j;
      row_of_[at(j)] = i;
    }
  }

  // The shortest path from the free row `root` to a free column (Dijkstra over reduced costs), along which rows and
  // columns change partners.
  void augment(int64_t root) {
    constexpr double kFar = std::numeric_limits<double>::infinity();
    std::fill(distance_.begin(), distance_.end(), kFar);
    std::iota(open_.begin(), open_.end(), int64_t{0});
    int64_t open = n_, i = root, end = kNone;
    double least = 0.0;
    reached_.clear();
    while (end == kNone) {
      const double* c = row(i);
      const double base = least - u_[at(i)];
      double best = kFar;
      int64_t place = 0;
      for (int64_t k = 0; k < open; ++k) {
        const int64_t j = open_[at(k)];
        const double through = base + c[j] - v_[at(j)];
        double& d = distance_[at(j)];
        if (through < d) {
          d = through;
          before_[at(j)] = i;
        }
        // Of equally near columns a free one ends the search.
        if (d < best || (d == best && row_of_[at(j)] == kNone && row_of_[at(open_[at(place)])] != kNone)) {
          best = d;
          place = k;
        }
      }
      least = best;
      const int64_t j = open_[at(place)];
      open_[at(place)] = open_[at(--open)];
      if (row_of_[at(j)] == kNone) {
        end = j;
      } else {
        reached_.push_back(j);
        i = row_of_[at(j)];
      }
    }
    u_[at(root)] += least;
    for (const int64_t j : reached_) {
      const double change = least - distance_[at(j)];
      u_[at(row_of_[at(j)])] += change;
      v_[at(j)] -= change;
    }
    for (int64_t j = end; j != kNone;) {
      const int64_t by = before_[at(j)], given_up = column_of_[at(by)];
      row_of_[at(j)] = by;
      column_of_[at(by)] = j;
      j = given_up;  // none at the root
    }
  }

  const double* cost_;
  int64_t n_;
  std::vector<double> u_, v_;                // prices of rows and columns
  std::vector<int64_t> column_of_, row_of_;  // partners
  std::vector<double> distance_;             // of columns from the root
  std::vector<int64_t> before_;              // the row before a column on its path
  std::vector<int64_t> open_, reached_;      // columns whose distance is not final, and that have been passed
};

}  // namespace

std::vector<int64_t> best_assignment(const torch::Tensor& profit) {
  check(profit.dim() == 2 && profit.size(0) == profit.size(1) && profit.size(0) > 0,
        "an assignment needs a square of profits, not [{}]",
        fmt::join(profit.sizes().begin(), profit.sizes().end(), ", "));
  const auto cost = profit.detach().to(torch::kCPU, torch::kFloat64).neg().contiguous();
  check(torch::isfinite(cost).all().item<bool>(), "a profit of the assignment is not a finite number");
  return Assignment(cost.const_data_ptr<double>(), cost.size(0)).solve();
}

}  // namespace moiety
