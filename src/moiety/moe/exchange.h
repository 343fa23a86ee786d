#pragma once
// Experts that live on several processes: what a set asks of whatever joins the processes, and the way of rows to the
// experts and back.
#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "moiety/moe/experts.h"

namespace moiety {

/// Processes that hand rows to each other. All call the same functions in the same order.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual int64_t rank() const = 0;
  virtual int64_t size() const = 0;
  /// rows [sum of send, d], the first send[0] of them for process 0, and so on -> [sum of receive, d], those of process
  /// 0 first. Without gradient.
  virtual torch::Tensor all_to_all(const torch::Tensor& rows, const std::vector<int64_t>& send,
                                   const std::vector<int64_t>& receive) = 0;
};

/// A set of E experts of which process r holds experts r * E / size ... and runs them on the rows of all processes
/// (Lepikhin et al. 2020, arXiv 2006.16668). Gradients travel the same way back, so that the weights get those of all
/// rows. Its parameters are called as those of the set that it stands for.
class SpreadExperts : public Experts {
 public:
  /// `local` holds matrices of its own experts only; `exchange` must outlive this. Error: `count` experts are no
  /// multiple of the processes.
  SpreadExperts(std::shared_ptr<Experts> local, int64_t count, Exchange& exchange);
  int64_t count() const override { return count_; }
  torch::Tensor forward(const torch::Tensor& x, const std::vector<int64_t>& counts) override;
  void train(bool on = true) override;

 private:
  std::shared_ptr<Experts> local_;  // its parts are registered, not it: names stay
  int64_t count_;
  Exchange& exchange_;
};

}  // namespace moiety
