#pragma once
// The parts of one model while it is assembled, whatever model it is: where each stands, and how those of the site
// `linear` get beside its matrices.
#include <any>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "moiety/models/weights_source.h"
#include "moiety/nn/part.h"

namespace moiety {

/// Tensors of a part by names behind `prefix` ("layers.3.mlp."). `beside`: of a part beside matrices.
class NamedWeights : public PartWeights {
 public:
  NamedWeights(WeightsSource& source, std::string prefix, bool beside = false)
      : source_(source), prefix_(std::move(prefix)), beside_(beside) {}
  bool has(const std::string& name) const override { return source_.has(prefix_ + name, false); }
  torch::Tensor get(const std::string& name, std::vector<int64_t> shape, const Init& init) override {
    return source_.tensor(prefix_ + name, std::move(shape), init, /*optional=*/false, beside_);
  }
  torch::Tensor optional(const std::string& name, std::vector<int64_t> shape, const Init& init) override {
    return source_.tensor(prefix_ + name, std::move(shape), init, /*optional=*/true, beside_);
  }
  Linear linear(const std::string& name, int64_t in, int64_t out, const Init& init, const Init& bias) override;

 private:
  WeightsSource& source_;
  std::string prefix_;
  bool beside_;
};

/// Parts by (site, layer), and what they share.
struct ModelParts {
  std::vector<PartEntry> entries;
  int64_t layers = 0;
  std::map<std::string, std::any> shared;
  std::set<std::string> beside;  ///< "layers.3.q_proj NAME" of parts beside matrices
  const PartEntry* at(const std::string& site, int64_t layer) const;
};

/// A matrix that parts may stand beside; those that read one input have one `input` and follow each other.
struct SiteMatrix {
  std::string name, half;  ///< "q_proj" of "self_attn"
  int input;
  Linear linear;
  bool elsewhere = false;  ///< it is an earlier layer's too, which has what stands beside it
};

/// Matrices of experts that parts may stand beside.
struct SiteStack {
  std::string name;  ///< "experts.down_proj", of "mlp"
  std::vector<LinearStackImpl*> stacks;
};

/// What a layer is called: its tensors begin with `tensors` ("layers.3."), those of parts with `tensors` and
/// "adapters."; paths of its matrices, which targets see, with `path` ("model.layers.3.").
struct LayerName {
  std::string tensors, path;
  int64_t index = 0;
};

/// Makes the parts at the site `linear` of one layer and attaches them to its matrices. Error naming part, matrix and
/// layer: a target that the layer does not have, two parts of one name beside one matrix, what the part's factory says.
void attach_parts(WeightsSource& weights, const LayerName& layer, ModelParts& parts,
                  const std::vector<SiteMatrix>& matrices, const std::vector<SiteStack>& stacks = {});
/// Once all layers are built. Error naming a part beside matrices that stands beside none.
void check_placed(const ModelParts& parts);

}  // namespace moiety
