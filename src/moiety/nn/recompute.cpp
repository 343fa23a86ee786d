#include "moiety/nn/recompute.h"

#include <torch/torch.h>

#include "moiety/base/error.h"
#include "moiety/nn/random_state.h"
#include "moiety/nn/shortcut.h"

namespace moiety {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What one piece is, shared by both runs.
struct Piece : torch::CustomClassHolder {
  std::function<Tensor(const Tensor&, Pass&)> body;
  Pass* live = nullptr;                  // the caller's pass, during the first run only
  Pass before;                           // the pass as the piece found it, without state and losses
  Tensor random;                         // state of the generator
  std::vector<std::string> state_names;  // of the state that the piece found
  std::vector<std::string> written;      // names of the state that it replaced or added
  size_t losses = 0;                     // it added
};

// Output, then losses, then written state.
variable_list outputs_of(const Tensor& y, const Pass& pass, size_t first_loss,
                         const std::vector<std::string>& written) {
  variable_list out{y};
  for (size_t i = first_loss; i < pass.losses.size(); ++i) out.push_back(pass.losses[i].second);
  for (const auto& name : written) out.push_back(pass.state.at(name));
  return out;
}

class Recompute : public torch::autograd::Function<Recompute> {
 public:
  // `anchor` asks for gradients, so that the piece is run again even when only its parameters learn.
  static variable_list forward(AutogradContext* context, const Tensor& anchor, const Tensor& x, at::TensorList state,
                               c10::intrusive_ptr<Piece> piece) {
    Pass& live = *piece->live;
    const size_t first_loss = live.losses.size();
    const auto found = live.state;
    piece->random = random_state(x.device());
    const WithoutShortcuts as_with_a_graph;  // which the second run builds, and has to meet the same values
    const Tensor y = piece->body(x, live);
    piece->losses = live.losses.size() - first_loss;
    for (const auto& [name, value] : live.state) {
      const auto it = found.find(name);
      if (it == found.end() || !it->second.is_same(value)) piece->written.push_back(name);
    }
    variable_list saved{x};
    saved.insert(saved.end(), state.begin(), state.end());
    context->save_for_backward(std::move(saved));
    context->saved_data["piece"] = c10::IValue::make_capsule(piece);
    context->set_materialize_grads(false);
    return outputs_of(y, live, first_loss, piece->written);
  }

  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto piece = c10::static_intrusive_pointer_cast<Piece>(context->saved_data["piece"].toCapsule());
    const auto saved = context->get_saved_variables();
    variable_list inputs;
    for (const Tensor& t : saved) {
      auto copy = t.detach();
      if (copy.is_floating_point()) copy.requires_grad_(true);
      inputs.push_back(copy);
    }
    Pass pass = piece->before;
    for (size_t i = 0; i < piece->state_names.size(); ++i) pass.state[piece->state_names[i]] = inputs[i + 1];
    const torch::Device device = saved[0].device();
    const Tensor now = random_state(device);
    variable_list outputs;
    {
      const torch::AutoGradMode on(true);
      set_random_state(device, piece->random);
      const Tensor y = piece->body(inputs[0], pass);
      set_random_state(device, now);
      check(pass.losses.size() == piece->losses, "a block adds {} losses, and {} when it is computed again",
            piece->losses, pass.losses.size());
      outputs = outputs_of(y, pass, 0, piece->written);
    }
    variable_list roots, root_grads;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grads[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grads[i]);
    }
    if (!roots.empty()) torch::autograd::backward(roots, root_grads);
    variable_list out{Tensor()};
    for (const Tensor& t : inputs) out.push_back(t.requires_grad() ? t.grad() : Tensor());
    out.push_back(Tensor());
    return out;
  }
};

}  // namespace

Tensor recompute(const Tensor& x, Pass& pass, std::function<Tensor(const Tensor&, Pass&)> body) {
  check(pass.cache == nullptr, "activations cannot be recomputed while a cache of keys and values grows");
  auto piece = c10::make_intrusive<Piece>();
  piece->body = std::move(body);
  piece->live = &pass;
  piece->before = pass;
  piece->before.state.clear();
  piece->before.losses.clear();
  piece->before.trace = nullptr;
  piece->before.recomputing = true;
  std::vector<Tensor> state;
  for (const auto& [name, value] : pass.state) {
    piece->state_names.push_back(name);
    state.push_back(value);
  }
  const auto anchor = torch::empty({0}, x.options().dtype(torch::kFloat32)).requires_grad_(true);
  const size_t first_loss = pass.losses.size();
  const at::TensorList states(state);
  const auto outputs = Recompute::apply(anchor, x, states, piece);
  piece->live = nullptr;
  for (size_t i = 0; i < piece->losses; ++i) pass.losses[first_loss + i].second = outputs[1 + i];
  for (size_t i = 0; i < piece->written.size(); ++i) pass.state[piece->written[i]] = outputs[1 + piece->losses + i];
  return outputs[0];
}

}  // namespace moiety
