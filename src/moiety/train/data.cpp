#include "moiety/train/data.h"

#include <fmt/format.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <numeric>

#include "moiety/base/error.h"
#include "moiety/base/random.h"
#include "moiety/nn/parallel.h"

namespace moiety {
namespace {

constexpr int64_t kDocumentsAtATime = 256;

// Documents `indices` in parallel. The first error is reported, whichever thread met it.
std::vector<Example> encode_documents(const Dataset& data, const Encoder& encoder, std::span<const int64_t> indices) {
  std::vector<Example> out(indices.size());
  std::vector<std::exception_ptr> errors(indices.size());
  parallel_for(0, static_cast<int64_t>(indices.size()), 1, [&](int64_t begin, int64_t end) {
    for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
      try {
        out[i] = encode_example(data.get(indices[i]), *encoder.tokenizer, encoder.chat_template.get(), encoder.options);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    }
  });
  for (const auto& e : errors)
    if (e) std::rethrow_exception(e);
  return out;
}

int64_t pad_of(const Tokenizer& tokenizer) {
  return tokenizer.pad().value_or(tokenizer.eos().value_or(0));
}

Packing packing_of(const DataConfig& config) {
  return config.packing == "best_fit" ? Packing::best_fit : Packing::sequential;
}

}  // namespace

DataOptions SourceConfig::options() const {
  DataOptions o;
  o.format = format;
  o.document = document;
  o.kind = kind;
  o.columns = columns;
  o.header = header;
  o.labels = labels;
  return o;
}

void DataConfig::fields(Fields& f) {
  f("sources", sources, "what to learn from").required().length(1, 1024);
  f("held_out", held_out, "share of the documents that is kept for evaluation and never learned").min(0).max(0.9);
  f("held_out_sources", held_out_sources, "data for evaluation, instead of a share of the documents");
  f("length", length, "tokens of a row").min(2).max(1 << 24);
  f("packing", packing,
    "sequential: documents one after another, cut at the ends of rows; best_fit: nothing is cut that fits a row, rows "
    "are padded")
      .choices({"sequential", "best_fit"});
  f("attention", attention, "document: tokens see only their own document; row: everything before them in the row")
      .choices({"document", "row"});
  f("shuffle", shuffle, "draw the order of documents and rows; false: as the data is");
  f("shuffle_tokens", shuffle_tokens, "rows are shuffled among about so many tokens; they are held in memory").min(1);
  f("cut", cut, "leave out what is behind the first `length` tokens of a document");
  f("add_end", add_end, "learn the end token behind texts and completions");
  f("learn_prompts", learn_prompts, "learn prompts and questions too, not answers only");
  f("last_answer_only", last_answer_only, "chats: learn the last answer only");
}

std::string DataConfig::problem() const {
  size_t weighted = 0;
  double sum = 0;
  for (const auto& s : sources) {
    weighted += s.weight ? 1 : 0;
    sum += s.weight.value_or(0);
  }
  if (weighted != 0 && weighted != sources.size()) return "some sources have a weight and some have none";
  const auto labelled =
      std::count_if(sources.begin(), sources.end(), [](const auto& s) { return s.label.has_value(); });
  if (labelled != 0 && labelled != static_cast<std::ptrdiff_t>(sources.size()))
    return "some sources have a label and some have none";
  if (labelled != 0 && weighted == 0) return "sources with a label need a weight, too";
  if (weighted != 0 && sum <= 0) return "the weights of all sources are 0";
  if (held_out > 0 && !held_out_sources.empty()) return "held_out and held_out_sources exclude each other";
  return "";
}

MicroBatch MicroBatch::to(torch::Device device) const {
  MicroBatch m = *this;
  for (torch::Tensor* t : {&m.ids, &m.images, &m.targets, &m.mask, &m.segments, &m.positions, &m.labels})
    if (t->defined()) *t = t->to(device);
  return m;
}

MicroBatch micro_batch(const Batch& batch, std::span<const int64_t> rows, bool own_document) {
  const auto count = static_cast<int64_t>(rows.size()), length = batch.length;
  MicroBatch m;
  m.ids = torch::empty({count, length}, torch::kInt64);
  m.targets = torch::full({count, length}, -100, torch::kInt64);
  auto segments = torch::empty({count, length}, torch::kInt64),
       positions = torch::empty({count, length}, torch::kInt64);
  bool padded = false, several = false;
  for (int64_t r = 0; r < count; ++r) {
    const auto from = static_cast<size_t>(rows[static_cast<size_t>(r)] * length);
    int64_t* ids = m.ids.data_ptr<int64_t>() + r * length;
    int64_t* targets = m.targets.data_ptr<int64_t>() + r * length;
    int64_t* segment = segments.data_ptr<int64_t>() + r * length;
    int64_t* position = positions.data_ptr<int64_t>() + r * length;
    for (int64_t t = 0; t < length; ++t) {
      const size_t at = from + static_cast<size_t>(t);
      ids[t] = batch.ids[at];
      segment[t] = batch.segments[at];
      position[t] = batch.positions[at];
      padded |= segment[t] == 0;
      several |= segment[t] > 1;
      m.tokens += segment[t] != 0 ? 1 : 0;
      if (t > 0 && batch.loss[at] != 0) {
        targets[t - 1] = ids[t];
        ++m.learned;
      }
    }
  }
  if (padded) m.mask = segments > 0;
  if (several && own_document) {
    m.segments = segments;
    m.positions = positions;
  }
  return m;
}

RowStream::RowStream(DatasetPtr data, Encoder encoder, const DataConfig& config, uint64_t seed, std::string name)
    : data_(std::move(data)), encoder_(std::move(encoder)), config_(config), seed_(seed), name_(std::move(name)) {
  check(data_->size() > 0, "{}: no documents to learn from", name_);
}

std::vector<int64_t> RowStream::order() const {
  if (config_.shuffle)
    return RandomStream(seed_, fmt::format("{}.documents.{}", name_, epoch_)).permutation(data_->size());
  std::vector<int64_t> out(static_cast<size_t>(data_->size()));
  std::iota(out.begin(), out.end(), int64_t{0});
  return out;
}

void RowStream::load_window() {
  const auto documents = order();
  std::vector<Example> examples;
  int64_t tokens = 0, at = first_;
  if (!whole_.empty()) {
    for (; at < data_->size(); ++at)
      examples.push_back(whole_[static_cast<size_t>(documents[static_cast<size_t>(at)])]);
  }
  while (at < data_->size() && tokens < config_.shuffle_tokens) {
    const auto count = std::min(kDocumentsAtATime, data_->size() - at);
    auto piece = encode_documents(*data_, encoder_,
                                  std::span(documents).subspan(static_cast<size_t>(at), static_cast<size_t>(count)));
    for (auto& e : piece) {
      if (tokens >= config_.shuffle_tokens) break;
      tokens += static_cast<int64_t>(e.ids.size());
      examples.push_back(std::move(e));
      ++at;
    }
  }
  behind_ = at;
  if (whole_.empty() && first_ == 0 && at == data_->size()) {
    whole_.resize(examples.size());
    for (size_t i = 0; i < examples.size(); ++i) whole_[static_cast<size_t>(documents[i])] = examples[i];
  }
  batch_ = pack(examples, config_.length, packing_of(config_), pad_of(*encoder_.tokenizer));
  if (config_.shuffle) {
    rows_ = RandomStream(seed_, fmt::format("{}.rows.{}.{}", name_, epoch_, first_)).permutation(batch_.rows);
  } else {
    rows_.resize(static_cast<size_t>(batch_.rows));
    std::iota(rows_.begin(), rows_.end(), int64_t{0});
  }
  loaded_ = true;
}

void RowStream::next(const Batch*& batch, int64_t& row) {
  bool whole_epoch_empty = false;
  for (;;) {
    if (!loaded_) load_window();
    if (used_ < batch_.rows) break;
    const bool empty = batch_.rows == 0;
    loaded_ = false;
    used_ = 0;
    first_ = behind_;
    if (first_ >= data_->size()) {
      check(!(whole_epoch_empty && empty), "{}: the documents have no tokens", name_);
      whole_epoch_empty = empty;
      first_ = 0;
      ++epoch_;
    }
  }
  batch = &batch_;
  row = rows_[static_cast<size_t>(used_++)];
}

int64_t RowStream::rows_of_an_epoch() {
  const auto kept = state();
  epoch_ = first_ = used_ = 0;
  int64_t rows = 0;
  do {
    load_window();
    rows += batch_.rows;
    first_ = behind_;
  } while (first_ < data_->size());
  restore(kept);
  return rows;
}

nlohmann::json RowStream::state() const {
  return {{"epoch", epoch_}, {"first", first_}, {"used", used_}};
}

void RowStream::restore(const nlohmann::json& state) {
  epoch_ = state.at("epoch").get<int64_t>();
  first_ = state.at("first").get<int64_t>();
  used_ = state.at("used").get<int64_t>();
  check(first_ >= 0 && first_ <= data_->size() && used_ >= 0, "{}: the saved position lies outside of the data", name_);
  loaded_ = false;
}

TrainingRows::TrainingRows(std::vector<std::unique_ptr<RowStream>> streams, std::vector<double> weights,
                           const DataConfig& config, std::vector<int64_t> labels)
    : streams_(std::move(streams)),
      weights_(std::move(weights)),
      labels_(std::move(labels)),
      taken_(streams_.size(), 0),
      config_(config) {
  const double sum = std::accumulate(weights_.begin(), weights_.end(), 0.0);
  for (double& w : weights_) w /= sum;
}

MicroBatch TrainingRows::next(int64_t rows) {
  // Rows of several windows are put into one batch first: a window may end within a micro-batch.
  Batch all;
  all.rows = rows;
  all.length = config_.length;
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < rows; ++i) {
    const auto total = static_cast<double>(std::accumulate(taken_.begin(), taken_.end(), int64_t{0}) + 1);
    size_t source = 0;
    double most = -1;
    for (size_t s = 0; s < streams_.size(); ++s) {
      const double lag = weights_[s] * total - static_cast<double>(taken_[s]);
      if (weights_[s] > 0 && lag > most) {
        most = lag;
        source = s;
      }
    }
    ++taken_[source];
    const Batch* batch = nullptr;
    int64_t row = 0;
    streams_[source]->next(batch, row);
    const auto append = [&](auto& to, const auto& from) {
      const auto begin = from.begin() + row * config_.length;
      to.insert(to.end(), begin, begin + config_.length);
    };
    append(all.ids, batch->ids);
    append(all.loss, batch->loss);
    append(all.segments, batch->segments);
    append(all.positions, batch->positions);
    if (!labels_.empty()) labels.push_back(labels_[source]);
  }
  std::vector<int64_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), int64_t{0});
  auto out = micro_batch(all, order, config_.attention == "document");
  if (!labels.empty()) out.labels = torch::tensor(labels, torch::kInt64);
  return out;
}

int64_t TrainingRows::documents() const {
  int64_t sum = 0;
  for (const auto& s : streams_) sum += s->documents();
  return sum;
}

int64_t TrainingRows::rows_of_an_epoch() {
  check(streams_.size() == 1, "several sources with weights have no common epoch: give train.steps, not train.epochs");
  return streams_[0]->rows_of_an_epoch();
}

nlohmann::json TrainingRows::state() const {
  nlohmann::json out = {{"documents", documents()}, {"taken", taken_}, {"streams", nlohmann::json::array()}};
  for (const auto& s : streams_) out["streams"].push_back(s->state());
  return out;
}

void TrainingRows::restore(const nlohmann::json& state) {
  const auto before = state.at("documents").get<int64_t>();
  check(before == documents(), "the data has {} documents now and had {} when the run began: the position is lost",
        documents(), before);
  const auto& streams = state.at("streams");
  check(streams.size() == streams_.size(), "the saved state has {} sources, the run has {}", streams.size(),
        streams_.size());
  taken_ = state.at("taken").get<std::vector<int64_t>>();
  check(taken_.size() == streams_.size(), "the saved state has {} counts for {} sources", taken_.size(),
        streams_.size());
  for (size_t i = 0; i < streams_.size(); ++i) streams_[i]->restore(streams[i]);
}

HeldOut held_out_rows(const DatasetPtr& data, const Encoder& encoder, const DataConfig& config, int64_t rows,
                      int64_t limit, uint64_t seed) {
  HeldOut out;
  const auto order = RandomStream(seed, "data.held_out").permutation(data->size());
  std::vector<Example> examples;
  int64_t tokens = 0;
  for (int64_t at = 0; at < data->size() && tokens < limit;) {
    const auto count = std::min(kDocumentsAtATime, data->size() - at);
    for (auto& e : encode_documents(*data, encoder,
                                    std::span(order).subspan(static_cast<size_t>(at), static_cast<size_t>(count)))) {
      if (tokens >= limit) break;
      // The last document is cut: one book may be longer than the limit.
      const auto keep = std::min<int64_t>(static_cast<int64_t>(e.ids.size()), limit - tokens);
      e.ids.resize(static_cast<size_t>(keep));
      e.loss.resize(static_cast<size_t>(keep));
      tokens += keep;
      examples.push_back(std::move(e));
      ++out.documents;
    }
    at += count;
  }
  const Batch batch = pack(examples, config.length, packing_of(config), pad_of(*encoder.tokenizer));
  check(batch.rows > 0, "the held-out documents have no tokens");
  // Bytes of every scored token: what it adds to the text that is decoded in order.
  for (int64_t r = 0; r < batch.rows; ++r) {
    DecodeStream stream(encoder.tokenizer, /*skip_special=*/true);
    for (int64_t t = 0; t < batch.length; ++t) {
      const auto i = static_cast<size_t>(r * batch.length + t);
      if (batch.segments[i] == 0) break;
      const auto piece = stream.push(batch.ids[i]);
      if (batch.loss[i] != 0) out.bytes += static_cast<int64_t>(piece.size());
    }
  }
  for (int64_t r = 0; r < batch.rows; r += rows) {
    std::vector<int64_t> pick(static_cast<size_t>(std::min(rows, batch.rows - r)));
    std::iota(pick.begin(), pick.end(), r);
    out.batches.push_back(micro_batch(batch, pick, config.attention == "document"));
    out.learned += out.batches.back().learned;
  }
  check(out.learned > 0, "no token of the held-out documents is scored: they are too short");
  return out;
}

TrainingData open_data(const DataConfig& config, const Encoder& encoder, uint64_t seed) {
  TrainingData out;
  std::vector<DatasetPtr> training, held_out;
  std::vector<const SourceConfig*> held_out_of;
  for (size_t i = 0; i < config.sources.size(); ++i) {
    const auto& source = config.sources[i];
    auto data = Dataset::open(source.path, source.options());
    check(data->kind() != SampleKind::image,
          "{} holds images: a language model learns from text, and `task: image-classification` from images",
          source.path);
    if (config.held_out > 0) {
      auto [train, test] = split(data, config.held_out, seed);
      check(test->size() > 0,
            "{}: of {} document(s) none can be held out: choose a smaller unit (document: paragraph), or name "
            "held_out_sources",
            source.path, data->size());
      held_out.push_back(std::move(test));
      held_out_of.push_back(&source);
      data = std::move(train);
    }
    training.push_back(std::move(data));
  }
  for (const auto& source : config.held_out_sources) {
    held_out.push_back(Dataset::open(source.path, source.options()));
    held_out_of.push_back(&source);
  }
  std::vector<std::unique_ptr<RowStream>> streams;
  std::vector<double> weights;
  std::vector<int64_t> labels;
  if (config.sources[0].weight) {
    for (size_t i = 0; i < training.size(); ++i) {
      streams.push_back(
          std::make_unique<RowStream>(training[i], encoder, config, seed, fmt::format("data.sources[{}]", i)));
      weights.push_back(*config.sources[i].weight);
      if (config.sources[i].label) labels.push_back(*config.sources[i].label);
    }
  } else {
    auto all = training.size() == 1 ? training[0] : concatenate(training);
    streams.push_back(std::make_unique<RowStream>(std::move(all), encoder, config, seed, "data.sources"));
    weights.push_back(1.0);
  }
  check(labels.empty() || labels.size() == weights.size(), "some sources have a label and some have none");
  out.rows = std::make_unique<TrainingRows>(std::move(streams), std::move(weights), config, std::move(labels));
  if (held_out.empty()) return out;
  // Sources with a name or a label are scored apart, the others together.
  const bool apart = std::any_of(held_out_of.begin(), held_out_of.end(),
                                 [](const SourceConfig* s) { return s->label.has_value() || !s->name.empty(); });
  if (!apart) {
    out.held_out.push_back({"", {}, held_out.size() == 1 ? held_out[0] : concatenate(held_out)});
    return out;
  }
  for (size_t i = 0; i < held_out.size(); ++i) {
    const SourceConfig& source = *held_out_of[i];
    const auto name = source.name.empty() ? std::filesystem::path(source.path).filename().string() : source.name;
    check(std::none_of(out.held_out.begin(), out.held_out.end(), [&](const auto& h) { return h.name == name; }),
          "two sources are called '{}': give them a `name` each, held-out losses are reported by it", name);
    out.held_out.push_back({name, source.label, held_out[i]});
  }
  return out;
}

}  // namespace moiety
