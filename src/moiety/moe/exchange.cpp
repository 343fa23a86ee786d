#include "moiety/moe/exchange.h"

#include <torch/torch.h>

#include <numeric>

#include "moiety/base/error.h"

namespace moiety {
namespace {

using torch::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Way : torch::CustomClassHolder {
  Exchange* exchange = nullptr;
  std::vector<int64_t> send, receive;
};

// Forward: rows go out by `send` and come in by `receive`; backward: the other way round.
class AllToAll : public torch::autograd::Function<AllToAll> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& rows, c10::intrusive_ptr<Way> way) {
    context->saved_data["way"] = c10::IValue::make_capsule(way);
    return way->exchange->all_to_all(rows, way->send, way->receive);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    const auto way = c10::static_intrusive_pointer_cast<Way>(context->saved_data["way"].toCapsule());
    return {way->exchange->all_to_all(grads[0], way->receive, way->send), Tensor()};
  }
};

Tensor all_to_all(const Tensor& rows, Exchange& exchange, std::vector<int64_t> send, std::vector<int64_t> receive) {
  auto way = c10::make_intrusive<Way>();
  way->exchange = &exchange;
  way->send = std::move(send);
  way->receive = std::move(receive);
  return AllToAll::apply(rows, way);
}

}  // namespace

SpreadExperts::SpreadExperts(std::shared_ptr<Experts> local, int64_t count, Exchange& exchange)
    : local_(std::move(local)), count_(count), exchange_(exchange) {
  check(count % exchange.size() == 0, "{} experts cannot be spread evenly over {} processes", count, exchange.size());
  for (const auto& child : local_->named_children()) register_module(child.key(), child.value());
}

void SpreadExperts::train(bool on) {
  Experts::train(on);
  local_->train(on);
}

Tensor SpreadExperts::forward(const Tensor& x, const std::vector<int64_t>& counts) {
  const int64_t processes = exchange_.size(), own = count_ / processes;
  check(static_cast<int64_t>(counts.size()) == count_, "counts of {} experts do not fit {}", counts.size(), count_);
  // How many rows every process has for each of the experts here.
  const std::vector<int64_t> once(static_cast<size_t>(processes), 1);
  const auto wanted = torch::tensor(counts, torch::kInt64).view({processes, own});
  const auto coming = exchange_.all_to_all(wanted, once, once);
  const auto list = [](const Tensor& t) {
    return std::vector<int64_t>(t.const_data_ptr<int64_t>(), t.const_data_ptr<int64_t>() + t.numel());
  };
  const auto send = list(wanted.sum(1)), receive = list(coming.sum(1));
  auto rows = all_to_all(x, exchange_, send, receive);
  // They come by process, and for each by expert; an expert wants its rows side by side.
  const auto expert = torch::arange(own, torch::kInt64).repeat({processes}).repeat_interleave(coming.reshape({-1}));
  const auto order = std::get<1>(at::sort(expert, /*stable=*/true, 0, false));
  const auto back = std::get<1>(at::sort(order, /*stable=*/true, 0, false));
  const auto y = local_->forward(rows.index_select(0, order.to(x.device())), list(coming.sum(0)));
  return all_to_all(y.index_select(0, back.to(x.device())), exchange_, receive, send);
}

}  // namespace moiety
