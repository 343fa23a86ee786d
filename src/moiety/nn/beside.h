#pragma once
// The site `linear`: what parts put beside matrices of a model, low-rank adapters and mixtures of them above all. The
// matrix stays as it is, in any store; what stands beside it changes its output.
#include <torch/nn/module.h>
#include <torch/types.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "moiety/nn/linear.h"
#include "moiety/nn/pass.h"

namespace moiety {

/// Stands beside one matrix, or beside several that read one input (queries, keys and values; gate and up).
class Beside : public torch::nn::Module {
 public:
  /// x [..., in]; `outputs` holds W x [..., out] of every matrix that this stands beside, in the order in which it was
  /// attached to them, and gets what they are to give.
  virtual void apply(const torch::Tensor& x, std::vector<torch::Tensor>& outputs, Pass& pass) = 0;
  /// The matrix [out, in] that gives what `weight` and this give together, in f32; `place` as in `outputs`. Error, with
  /// the reason, where no matrix does.
  virtual torch::Tensor merged(const torch::Tensor& weight, int64_t place) const;
  /// The other way: what merged() made `weight` of, up to rounding. Error as there, and where what is left of a matrix
  /// does not tell.
  virtual torch::Tensor unmerged(const torch::Tensor& weight, int64_t place) const;
  /// The bias [out] that goes with that matrix: `bias`, or what takes its place.
  virtual torch::Tensor merged_bias(const torch::Tensor& bias, int64_t place) const;
  /// From now on a token takes k of its experts, or of its ranks where these are chosen. False where it has no such
  /// number, or a Router in it has. Error: it has experts and no such number, or cannot take k.
  virtual bool set_active(int64_t k);
  int64_t matrices = 0;  ///< it is attached to; LinearImpl::attach counts

 protected:
  /// Nothing but the reason, for the Error of merged(): "its router chooses experts by the token".
  virtual std::string not_one_matrix() const { return "what it adds depends on more than its input"; }
};

/// Stands beside the matrices of all experts of a mixture.
class BesideStack : public torch::nn::Module {
 public:
  /// x [P, in] sorted by expert, counts [E], y [P, out] what the matrices give -> what they are to give.
  virtual torch::Tensor apply(const torch::Tensor& x, const std::vector<int64_t>& counts, torch::Tensor y) = 0;
  /// What merging adds to the matrix of one expert: [out, in] f32.
  virtual torch::Tensor delta(int64_t expert) const = 0;
  /// It stands in place of the matrices: apply() gets no `y`, which nobody computes.
  virtual bool replaces() const { return false; }
};

/// As multiply_all, with what stands beside the matrices. Error when one call has some matrices only of those that
/// share what stands beside them.
std::vector<torch::Tensor> project(std::initializer_list<Linear> matrices, const torch::Tensor& x, Pass& pass);
/// One matrix.
torch::Tensor project(Linear matrix, const torch::Tensor& x, Pass& pass);

}  // namespace moiety
