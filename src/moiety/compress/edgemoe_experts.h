#pragma once
// The experts of a loaded model with widths that change in place, for the search of EdgeMoE: no weight is read twice,
// and one expert more or less costs its own matrices only.
#include <torch/types.h>

#include <functional>
#include <memory>
#include <vector>

#include "moiety/compress/edgemoe.h"
#include "moiety/io/edge_experts.h"
#include "moiety/models/model.h"

namespace moiety {

class EdgeMoeExperts : public EdgeMoeModel {
 public:
  using Accuracy = std::function<double(CausalModel&)>;
  /// Takes the experts of `model` over: from now on they are stacks in its compute dtype. `accuracy` measures it.
  /// Error: no expert layers; layers whose experts are not gated ones, or differ in number or size.
  EdgeMoeExperts(std::shared_ptr<CausalModel> model, Int2Scale int2, Accuracy accuracy);
  ~EdgeMoeExperts() override;

  int64_t experts() const override;
  void set_bits(const std::vector<int64_t>& bits) override;
  double accuracy() override;
  std::vector<bool> unused() override;

  /// The weights that the model came with.
  EdgeExpert original(int64_t layer, int64_t expert) const;
  /// Of the model with the bits set last; `router_hash` is left open.
  const EdgeLayout& layout() const { return layout_; }

 private:
  struct Layer;
  std::shared_ptr<CausalModel> model_;
  Int2Scale int2_;
  Accuracy accuracy_;
  std::vector<std::unique_ptr<Layer>> layers_;
  EdgeLayout layout_;
  bool measured_ = false;  // since the bits were set
};

}  // namespace moiety
