#include "moiety/decode/session.h"

#include <torch/torch.h>

#include <algorithm>

#include "moiety/base/error.h"

namespace moiety {

Session::Session(std::shared_ptr<CausalModel> model, int64_t chunk)
    : model_(std::move(model)),
      device_(model_->parameters().empty() ? torch::Device(torch::kCPU) : model_->parameters()[0].device()),
      chunk_(chunk),
      cache_(model_->make_cache()) {
  check(chunk_ > 0, "prompts are read in chunks of at least 1 token, not {}", chunk_);
}

torch::Tensor Session::feed(const std::vector<std::vector<int64_t>>& pieces) {
  return run(pieces, false);
}

torch::Tensor Session::feed_all(const std::vector<std::vector<int64_t>>& pieces) {
  return run(pieces, true);
}

torch::Tensor Session::run(const std::vector<std::vector<int64_t>>& pieces, bool all) {
  check(!pieces.empty(), "there is nothing to feed: give at least one row of token ids");
  const auto batch = static_cast<int64_t>(pieces.size());
  check(columns_.empty() || rows() == batch, "the session holds {} rows but {} were fed", rows(), batch);
  const int64_t vocabulary = model_->vocab_size();
  int64_t tokens = 0;
  bool padded = false;
  for (size_t row = 0; row < pieces.size(); ++row) {
    const auto count = static_cast<int64_t>(pieces[row].size());
    check(count > 0, "row {} has no tokens: a prompt needs at least one", row);
    for (const int64_t id : pieces[row])
      check(id >= 0 && id < vocabulary, "token id {} does not exist: the model's vocabulary has {}", id, vocabulary);
    padded = padded || (tokens != 0 && count != tokens);
    tokens = std::max(tokens, count);
  }
  if (columns_.empty()) {
    columns_.resize(pieces.size());
    real_.assign(pieces.size(), 0);
  }

  auto ids = torch::zeros({batch, tokens}, torch::kInt64);
  auto mask = padded ? torch::zeros({batch, tokens}, torch::kBool) : torch::Tensor();
  for (size_t row = 0; row < pieces.size(); ++row) {
    const auto& piece = pieces[row];
    const auto gap = tokens - static_cast<int64_t>(piece.size());
    std::copy(piece.begin(), piece.end(), ids.data_ptr<int64_t>() + static_cast<int64_t>(row) * tokens + gap);
    if (padded) mask[static_cast<int64_t>(row)].slice(0, gap).fill_(true);
  }
  ids = ids.to(device_);
  if (padded) mask = mask.to(device_);

  const torch::AutoGradMode grad(gradients);
  std::vector<torch::Tensor> logits;
  for (int64_t begin = 0; begin < tokens; begin += chunk_) {
    const int64_t end = std::min(tokens, begin + chunk_);
    Pass pass;
    pass.cache = &cache_;
    pass.edits = edits;
    pass.trace = trace;
    pass.last_logits_only = !all;
    if (padded) pass.mask = mask.slice(1, begin, end);
    const auto piece = ids.slice(1, begin, end);
    if (!all && end < tokens)
      model_->hidden(piece, pass);
    else
      logits.push_back(model_->forward(piece, pass));
  }
  for (size_t row = 0; row < pieces.size(); ++row) {
    auto& column = columns_[row];
    column.insert(column.end(), static_cast<size_t>(tokens) - pieces[row].size(), -1);
    column.insert(column.end(), pieces[row].begin(), pieces[row].end());
    real_[row] += static_cast<int64_t>(pieces[row].size());
  }
  if (!all) return logits.back().select(1, -1);
  return logits.size() == 1 ? logits[0] : torch::cat(logits, 1);
}

torch::Tensor Session::restart(const std::vector<std::vector<int64_t>>& pieces, int64_t* reused) {
  int64_t common = 0;
  // Rows share their columns, so only one row, or rows without padding, can keep a head.
  if (rows() == static_cast<int64_t>(pieces.size()) && !pieces.empty()) {
    common = length();
    for (size_t row = 0; row < pieces.size(); ++row) {
      // The last token is always fed: its logits are wanted.
      const size_t most =
          std::min<size_t>(static_cast<size_t>(common), pieces[row].empty() ? 0 : pieces[row].size() - 1);
      const auto differ =
          std::mismatch(pieces[row].begin(), pieces[row].begin() + static_cast<int64_t>(most), columns_[row].begin());
      common = differ.first - pieces[row].begin();
    }
  }
  if (!cache_.can_crop(common)) common = 0;
  if (reused) *reused = common * static_cast<int64_t>(pieces.size());
  if (common == 0) {
    clear();
    return feed(pieces);
  }
  crop(common);
  std::vector<std::vector<int64_t>> rest;
  for (const auto& piece : pieces) rest.emplace_back(piece.begin() + common, piece.end());
  return feed(rest);
}

void Session::select(const std::vector<int64_t>& rows) {
  check(!columns_.empty() && !rows.empty(), "there are no rows to select");
  std::vector<std::vector<int64_t>> columns;
  std::vector<int64_t> real;
  for (const int64_t row : rows) {
    check(row >= 0 && row < this->rows(), "row {} does not exist: the session holds {}", row, this->rows());
    columns.push_back(columns_[static_cast<size_t>(row)]);
    real.push_back(real_[static_cast<size_t>(row)]);
  }
  cache_.select(torch::tensor(rows, torch::kInt64).to(device_));
  columns_ = std::move(columns);
  real_ = std::move(real);
}

Session Session::fork() const {
  Session copy = *this;
  copy.cache_ = cache_.fork();
  return copy;
}

void Session::crop(int64_t length) {
  cache_.crop(length);
  for (size_t row = 0; row < columns_.size(); ++row) {
    columns_[row].resize(static_cast<size_t>(length));
    real_[row] = std::count_if(columns_[row].begin(), columns_[row].end(), [](int64_t id) { return id >= 0; });
  }
}

void Session::clear() {
  cache_ = model_->make_cache();
  columns_.clear();
  real_.clear();
}

}  // namespace moiety
