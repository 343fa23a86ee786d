#include "moiety/compress/assignment.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <numeric>

#include "message_of.h"
#include "moiety/base/random.h"

namespace moiety {
namespace {

using torch::Tensor;

double value_of(const Tensor& profit, const std::vector<int64_t>& p) {
  double sum = 0.0;
  for (size_t a = 0; a < p.size(); ++a) sum += profit[static_cast<int64_t>(a)][p[a]].item<double>();
  return sum;
}

bool is_permutation_of_all(std::vector<int64_t> p) {
  std::sort(p.begin(), p.end());
  for (size_t i = 0; i < p.size(); ++i)
    if (p[i] != static_cast<int64_t>(i)) return false;
  return true;
}

double best_by_trying(const Tensor& profit) {
  std::vector<int64_t> p(static_cast<size_t>(profit.size(0)));
  std::iota(p.begin(), p.end(), int64_t{0});
  const double* m = profit.const_data_ptr<double>();
  double best = -std::numeric_limits<double>::infinity();
  do {
    double sum = 0.0;
    for (size_t a = 0; a < p.size(); ++a) sum += m[static_cast<int64_t>(a) * profit.size(0) + p[a]];
    best = std::max(best, sum);
  } while (std::next_permutation(p.begin(), p.end()));
  return best;
}

// Whole numbers from a narrow range tie often, and their sums are exact.
RC_GTEST_PROP(Assignment, NoOtherIsBetter, ()) {
  const int64_t d = *rc::gen::inRange(1, 8), range = *rc::gen::element(2, 4, 1000);
  auto profit = torch::empty({d, d}, torch::kFloat64);
  for (int64_t i = 0; i < d * d; ++i)
    profit.data_ptr<double>()[i] = static_cast<double>(*rc::gen::inRange<int64_t>(-range, range));
  const auto p = best_assignment(profit);
  RC_ASSERT(is_permutation_of_all(p));
  RC_ASSERT(value_of(profit, p) == best_by_trying(profit));
}

TEST(Assignment, IsNotWhatTheGreedyTakes) {
  // Taking the 10 leaves 0; 9 and 8 are better.
  EXPECT_EQ(best_assignment(torch::tensor({{10.0, 9.0}, {8.0, 0.0}})), (std::vector<int64_t>{1, 0}));
}

TEST(Assignment, NamesTheColumnOfEveryRow) {
  const auto order = RandomStream(1, "order").permutation(40);
  auto profit = torch::rand({40, 40}, torch::kFloat64);
  for (int64_t a = 0; a < 40; ++a) profit[a][order[static_cast<size_t>(a)]] += 100.0;
  EXPECT_EQ(best_assignment(profit), order);
}

// Prices prove it: a sum of least row and column prices that no assignment can pass. Here by permuting and shifting a
// matrix, which permutes the answer.
TEST(Assignment, FollowsPermutedRowsAndShiftedColumns) {
  torch::manual_seed(2);
  const int64_t d = 60;
  const auto profit = torch::randn({d, d}, torch::kFloat64);
  const auto p = best_assignment(profit);
  const auto order = RandomStream(3, "rows").permutation(d);
  const auto moved = profit.index_select(0, torch::tensor(order)) + torch::randn({d}, torch::kFloat64) +
                     torch::randn({d, 1}, torch::kFloat64);
  const auto q = best_assignment(moved);
  for (size_t a = 0; a < q.size(); ++a) EXPECT_EQ(q[a], p[static_cast<size_t>(order[a])]);
}

TEST(Assignment, EqualsGiveTheSameAnswerEveryTime) {
  const auto flat = torch::ones({20, 20});
  const auto p = best_assignment(flat);
  EXPECT_TRUE(is_permutation_of_all(p));
  EXPECT_EQ(best_assignment(flat.clone()), p);
}

TEST(Assignment, TakesSecondsForTheNeuronsOfARealExpert) {
  torch::manual_seed(4);
  const int64_t d = 1536;
  const auto profit = torch::matmul(torch::randn({d, 64}), torch::randn({64, d}));
  const auto start = std::chrono::steady_clock::now();
  EXPECT_TRUE(is_permutation_of_all(best_assignment(profit)));
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 20.0);
}

TEST(Assignment, BadInputIsAnError) {
  EXPECT_NE(message_of([] { best_assignment(torch::ones({2, 3})); }).find("[2, 3]"), std::string::npos);
  EXPECT_NE(message_of([] { best_assignment(torch::ones({0, 0})); }).find("square"), std::string::npos);
  EXPECT_NE(message_of([] {
              best_assignment(torch::full({2, 2}, std::numeric_limits<double>::quiet_NaN()));
            }).find("finite"),
            std::string::npos);
}

}  // namespace
}  // namespace moiety
