#include "moiety/models/text_windows.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"

namespace moiety {

void each_window(const std::vector<std::vector<int64_t>>& texts, const WindowOptions& options, int64_t longest,
                 const std::function<void(const WindowBatch&)>& each, int64_t skip) {
  check(options.context >= 1 && options.context <= longest, "context {} must be from 1 to the model's {}",
        options.context, longest);
  check(options.batch_size >= 1, "batch size {} must be at least 1", options.batch_size);
  const int64_t lead = options.bos >= 0 ? 1 : 0, fresh = options.context - lead;
  check(fresh >= 1, "a context of {} has no room for a token behind BOS", options.context);
  WindowBatch batch;
  for (const auto& ids : texts) batch.windows += (static_cast<int64_t>(ids.size()) + fresh - 1) / fresh;
  check(batch.windows > 0, "there is no token to read");
  for (; batch.of < static_cast<int64_t>(texts.size()); ++batch.of) {
    const auto& ids = texts[static_cast<size_t>(batch.of)];
    const auto count = static_cast<int64_t>(ids.size());
    for (int64_t from = 0; from < count; from += fresh * options.batch_size) {
      const int64_t left = count - from, rows = std::min(options.batch_size, (left + fresh - 1) / fresh);
      const int64_t width = lead + std::min(fresh, left);
      batch.done += rows;
      if (skip-- > 0) continue;
      batch.ids = torch::zeros({rows, width}, torch::kInt64);
      batch.mask = torch::zeros({rows, width}, torch::kBool);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t begin = from + r * fresh, end = std::min(begin + fresh, count);
        if (lead) batch.ids[r][0] = options.bos;
        std::copy(ids.begin() + begin, ids.begin() + end, batch.ids.data_ptr<int64_t>() + r * width + lead);
        batch.mask[r].narrow(0, 0, lead + end - begin).fill_(true);
      }
      batch.text = batch.mask.clone();
      if (lead) batch.text.select(1, 0).fill_(false);
      each(batch);
    }
  }
}

void read_window(CausalModel& model, const WindowBatch& batch, Pass& pass) {
  const torch::NoGradGuard no_grad;
  const auto parameters = model.parameters();
  const auto device = parameters.empty() ? torch::Device(torch::kCPU) : parameters.front().device();
  if (!batch.mask.all().item<bool>()) pass.mask = batch.mask.to(device);
  model.hidden(batch.ids.to(device), pass);
}

}  // namespace moiety
