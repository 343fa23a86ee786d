#include "moiety/nn/pass.h"

#include <torch/torch.h>

namespace moiety {

void Trace::add(Record record) {
  const auto detach = [](torch::Tensor& t) {
    if (t.defined()) t = t.detach();
  };
  for (torch::Tensor* t : {&record.routing.experts, &record.routing.gates, &record.routing.scores,
                           &record.routing.logits, &record.input, &record.output, &record.real})
    detach(*t);
  if (on_record)
    on_record(record);
  else
    records.push_back(std::move(record));
}

void Pass::at_end(const std::string& name, std::function<void(Pass&)> body) {
  for (const auto& [known, unused] : ends_)
    if (known == name) return;
  ends_.emplace_back(name, std::move(body));
}

void Pass::finish() {
  const auto ends = std::move(ends_);
  ends_.clear();
  for (const auto& [name, body] : ends) body(*this);
}

}  // namespace moiety
