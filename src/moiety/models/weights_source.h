#pragma once
// Where a model's tensors come from: a checkpoint (any naming and layout of its family), or random initialisation from
// a seed.
#include <torch/types.h>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "moiety/io/checkpoint.h"
#include "moiety/models/model.h"
#include "moiety/nn/linear.h"

namespace moiety {

/// While one lives, on this thread, what a model's tensors are stored as is what their matrices give together with the
/// parts that stand beside them, Beside::merged; backwards, what they give without them: Beside::unmerged.
class StoreMerged {
 public:
  explicit StoreMerged(bool backwards = false);
  ~StoreMerged();
  StoreMerged(const StoreMerged&) = delete;
  StoreMerged& operator=(const StoreMerged&) = delete;
};
/// What a checkpoint stores of a matrix, and of matrix `expert` of a stack or of all.
torch::Tensor stored_matrix(const Linear& matrix);
torch::Tensor stored_matrix(const LinearStack& stack, int64_t expert);
torch::Tensor stored_matrices(const LinearStack& stack);
torch::Tensor stored_bias(const Linear& matrix);

class WeightsSource {
 public:
  /// From a checkpoint. Float tensors are mapped when their dtype is the compute dtype, else converted; blocks stay
  /// mapped.
  WeightsSource(const Checkpoint& checkpoint, const LoadOptions& options);
  /// The same of a model whose tensor names begin with `prefix`.
  WeightsSource(const Checkpoint& checkpoint, const LoadOptions& options, std::string prefix);
  /// Random: matrices N(0, std), vectors 0 (biases) or 1 (norms).
  WeightsSource(double std, const LoadOptions& options);

  bool random() const { return checkpoint_ == nullptr; }
  /// True when the checkpoint has the tensor under the model's prefix; `fallback` when random.
  bool has(const std::string& name, bool fallback) const;
  /// The first of `names` that the checkpoint has; Error naming all when it has none. The first one when random.
  std::string pick(const std::vector<std::string>& names) const;

  /// A float tensor of exactly this shape (decoded when it is blocks). `fill`: what random initialisation puts there.
  torch::Tensor tensor(const std::string& name, std::vector<int64_t> shape, double fill);
  /// One of a part: filled by `init` when it is not stored; Error then unless may_create, random() or `optional`.
  /// `beside`: of a part beside matrices, which alone is trainable where the base is frozen.
  torch::Tensor tensor(const std::string& name, std::vector<int64_t> shape,
                       const std::function<void(torch::Tensor)>& init, bool optional = false, bool beside = false);
  bool may_create = false;
  /// Beside a frozen base its biases learn, too.
  bool biases_learn = false;
  /// The matrix NAME.weight [out, in] and NAME.bias when there is one (`bias`: when random).
  Linear linear(const std::string& name, int64_t in, int64_t out, bool bias);
  /// Rows [begin, begin + out) of a fused matrix NAME.weight with `total` rows.
  Linear rows(const std::string& name, int64_t in, int64_t total, int64_t begin, int64_t out, bool bias);
  /// The view of a stored tensor, marked as used; Error unless its shape is `shape`.
  TensorView view(const std::string& name, const std::vector<int64_t>& shape);
  /// A stored matrix as a Linear.
  Linear matrix(const TensorView& view, torch::Tensor bias = {});
  /// A matrix of blocks that are written when they are used, see LinearImpl.
  Linear made_matrix(const TensorInfo& info, std::function<TensorView()> make);
  /// A view as a float tensor in the compute dtype: a parameter of its own, see parameter().
  torch::Tensor floats(const TensorView& view) const { return parameter(values(view)); }
  /// The same without a gradient and perhaps shared with the file: what parameters are cut or joined from.
  torch::Tensor values(const TensorView& view) const;
  /// values() and parameter() for biases, which may learn where the rest is frozen: then they are f32.
  torch::Tensor bias_values(const TensorView& view) const;
  torch::Tensor bias_parameter(const torch::Tensor& t) const;
  /// What a module may register. Trainable models get a contiguous copy that asks for gradients, always a leaf; others
  /// `t` itself.
  torch::Tensor parameter(const torch::Tensor& t) const;
  torch::Tensor random_matrix(std::vector<int64_t> shape);

  using Value = std::function<torch::Tensor()>;
  /// Records what a checkpoint holds under `name`: `value` of the parameters as they will be, or, when several are
  /// recorded under one name, the part of it that begins at `begin` of dimension `dim`. tensor(), linear() and rows()
  /// record what they hand out by themselves.
  void store(const std::string& name, Value value, int64_t dim = 0, int64_t begin = 0);
  /// Everything recorded, by name.
  std::vector<StoredTensor> stored() const;
  /// Random: what the family calls a tensor; unset: names stay.
  std::function<std::string(std::string)> rename;
  /// Random: what stands before all names but the head's.
  std::string inner = "model.";
  bool trainable() const { return options_.trainable && !options_.frozen_base; }
  bool leave_experts() const { return options_.leave_experts; }
  /// A matrix of an expert: where experts are left in their file a view of it, whatever its format.
  Linear expert_matrix(const TensorView& view);

  /// Error naming tensors of the checkpoint that the model has no place for, except those that `ignored` accepts.
  void check_all_used(const std::function<bool(const std::string&)>& ignored) const;
  torch::Dtype dtype() const { return dtype_; }
  torch::Device device() const { return options_.device; }

 private:
  struct Parts {
    int64_t dim = 0;
    std::map<int64_t, Value> values;  // by where they begin
  };

  std::string full(const std::string& name) const;
  torch::Tensor fresh(const std::vector<int64_t>& shape, double fill) const;
  torch::Dtype parameter_dtype() const;
  bool learns_biases() const { return options_.trainable && biases_learn; }
  torch::Tensor leaf(const torch::Tensor& t) const;

  const Checkpoint* checkpoint_ = nullptr;
  LoadOptions options_;
  double std_ = 0.02;
  std::string prefix_;
  torch::Dtype dtype_;
  std::set<std::string> used_;
  std::map<std::string, Parts> stored_;
};

}  // namespace moiety
