#include "moiety/models/image_tokens.h"

#include <torch/torch.h>

#include "moiety/base/error.h"

namespace moiety {

using torch::Tensor;

namespace {

// In the state of a pass.
constexpr const char* kWhere = "placed.where";
constexpr const char* kVectors = "placed.vectors";

}  // namespace

void place_vectors(Pass& pass, const Tensor& where, const Tensor& vectors) {
  check(where.dim() == 2 && where.scalar_type() == torch::kBool, "where vectors stand is told by bool [batch, time]");
  check(vectors.dim() == 2 && vectors.is_floating_point(), "vectors in place of tokens are [count, hidden] floats");
  const auto places = where.sum().item<int64_t>();
  check(places == vectors.size(0), "{} vectors for {} places of tokens", vectors.size(0), places);
  pass.state[kWhere] = where;
  pass.state[kVectors] = vectors;
}

Tensor with_placed_vectors(const Tensor& x, Pass& pass) {
  const auto found = pass.state.find(kWhere);
  if (found == pass.state.end()) return x;
  const Tensor where = found->second, vectors = pass.state.at(kVectors);
  pass.state.erase(kWhere);
  pass.state.erase(kVectors);
  check(where.size(0) == x.size(0) && where.size(1) == x.size(1),
        "vectors are placed in {} rows of {} tokens, and the pass has {} of {}", where.size(0), where.size(1),
        x.size(0), x.size(1));
  check(vectors.size(1) == x.size(2), "vectors of {} numbers stand for tokens whose embeddings have {}",
        vectors.size(1), x.size(2));
  return x.masked_scatter(where.unsqueeze(-1), vectors.to(x.scalar_type()));
}

ImageTokens::ImageTokens(int64_t image, int64_t channels, int64_t patch, int64_t hidden)
    : image_(image), channels_(channels), patch_(patch) {
  check(image >= 1 && channels >= 1 && patch >= 1 && hidden >= 1 && image % patch == 0,
        "images of {} pixels cannot be cut into patches of {}", image, patch);
  side_ = image / patch;
  const torch::NoGradGuard frozen;
  auto weight = torch::empty({hidden, channels * patch * patch}).normal_(0.0, 0.02);
  adaptor_ = register_module("adaptor",
                             Linear(weight.set_requires_grad(true), torch::zeros({hidden}).set_requires_grad(true)));
}

Tensor ImageTokens::forward(const Tensor& images) {
  check(images.dim() == 4 && images.size(1) == channels_ && images.size(2) == image_ && images.size(3) == image_,
        "images of {} channel(s) and {} x {} pixels were expected", channels_, image_, image_);
  const auto patches = images.contiguous()
                           .view({images.size(0), channels_, side_, patch_, side_, patch_})
                           .permute({0, 2, 4, 1, 3, 5})
                           .reshape({images.size(0), tokens(), channels_ * patch_ * patch_});
  return adaptor_(patches.to(torch::kFloat32));
}

std::vector<StoredTensor> ImageTokens::stored() const {
  return {{"image_tokens.weight", [m = adaptor_] { return m->weight; }},
          {"image_tokens.bias", [m = adaptor_] { return m->bias; }}};
}

}  // namespace moiety
