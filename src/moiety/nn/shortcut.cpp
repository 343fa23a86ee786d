#include "moiety/nn/shortcut.h"

#include <torch/torch.h>

#include <algorithm>

namespace moiety {
namespace {

thread_local bool allowed = true;

}  // namespace

WithoutShortcuts::WithoutShortcuts() : before_(allowed) {
  allowed = false;
}

WithoutShortcuts::~WithoutShortcuts() {
  allowed = before_;
}

bool may_shorten(std::initializer_list<torch::Tensor> tensors) {
  if (!allowed) return false;
  return !torch::GradMode::is_enabled() || std::none_of(tensors.begin(), tensors.end(), [](const torch::Tensor& t) {
    return t.defined() && t.requires_grad();
  });
}

}  // namespace moiety
