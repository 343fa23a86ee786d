#pragma once
// The stream of training rows: documents in an order drawn anew every epoch, encoded, packed, shuffled. Its position is
// a few numbers, from which a resumed run finds the very row it would have taken next.
#include <torch/types.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "moiety/base/config.h"
#include "moiety/io/chat_template.h"
#include "moiety/io/dataset.h"
#include "moiety/io/examples.h"
#include "moiety/io/tokenizer.h"

namespace moiety {

struct SourceConfig {
  std::string path;
  std::optional<double> weight;
  std::optional<int64_t> label;
  std::string name, format = "auto", document = "file", kind = "auto", labels;
  std::map<std::string, std::string> columns;
  bool header = true;

  void fields(Fields& f) {
    f("path", path, "a file, a folder or a pattern (see docs/data.md)").required();
    f("weight", weight, "share of the rows that come from this source; give it to all sources or to none").min(0);
    f("name", name, "held-out losses are reported by it");
    f("label", label,
      "a number for the kind of its samples, for methods that tell kinds apart; for all sources or none")
        .min(0);
    f("format", format, "what the files are").choices({"auto", "text", "jsonl", "json", "csv", "tsv", "idx", "images"});
    f("document", document, "what is one document in text: file, line, paragraph, or the text that separates them");
    f("kind", kind, "what a record is").choices({"auto", "text", "completion", "chat", "choice"});
    f("columns", columns, "which key or column holds what, e.g. {text: body}");
    f("header", header, "csv, tsv: the first row names the columns");
    f("labels", labels, "idx: the file of labels, when it does not stand beside the images under the usual name");
  }
  DataOptions options() const;
};

struct DataConfig {
  std::vector<SourceConfig> sources;
  std::vector<SourceConfig> held_out_sources;
  double held_out = 0.0;
  int64_t length = 512;
  std::string packing = "sequential";
  std::string attention = "document";
  bool shuffle = true;
  int64_t shuffle_tokens = int64_t{1} << 21;
  bool cut = false;
  bool add_end = true;
  bool learn_prompts = false;
  bool last_answer_only = false;

  void fields(Fields& f);
  std::string problem() const;
};

/// Rows [B, T] ready for the model. Optional tensors are undefined where they would say nothing.
struct MicroBatch {
  torch::Tensor ids;        ///< [B, T] int64
  torch::Tensor images;     ///< [B, C, H, W] u8, in place of `ids`
  torch::Tensor targets;    ///< [B, T] int64: the token that follows, -100 where it is not learned; of images [B]
  torch::Tensor mask;       ///< [B, T] bool, false for padding
  torch::Tensor segments;   ///< [B, T] int64
  torch::Tensor positions;  ///< [B, T] int64
  torch::Tensor labels;     ///< [B] int64: `label` of the source a row comes from
  int64_t learned = 0;      ///< targets that count
  int64_t tokens = 0;       ///< real tokens; of images: images

  /// A copy on `device`.
  MicroBatch to(torch::Device device) const;
};

/// Rows begin ... begin + count of `batch`, in the order of `rows`. `own_document`: tokens see their own document only.
MicroBatch micro_batch(const Batch& batch, std::span<const int64_t> rows, bool own_document);

/// Everything that turns samples into tokens.
struct Encoder {
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  ///< null: none
  EncodeOptions options;
};

/// Endless rows from one data set. An epoch takes the documents in a drawn order, encodes as many as fill
/// `shuffle_tokens` (the window), packs them, takes the window's rows in a drawn order, and goes on behind them.
class RowStream {
 public:
  RowStream(DatasetPtr data, Encoder encoder, const DataConfig& config, uint64_t seed, std::string name);

  /// Points `batch` and `row` to the next row; valid until the following call.
  void next(const Batch*& batch, int64_t& row);
  int64_t documents() const { return data_->size(); }
  int64_t epoch() const { return epoch_; }
  /// Rows of the first epoch. Encodes everything once; the position stays.
  int64_t rows_of_an_epoch();

  nlohmann::json state() const;
  void restore(const nlohmann::json& state);

 private:
  void load_window();
  std::vector<int64_t> order() const;

  DatasetPtr data_;
  Encoder encoder_;
  DataConfig config_;
  uint64_t seed_;
  std::string name_;
  // Position: the window begins at document `first_` of the epoch's order, and `used_` of its rows are taken.
  int64_t epoch_ = 0, first_ = 0, used_ = 0;
  // The window.
  bool loaded_ = false;
  int64_t behind_ = 0;  // first document behind it
  Batch batch_;
  std::vector<int64_t> rows_;
  std::vector<Example> whole_;  // all documents by index, when they fit a window
};

/// What a run learns from, as endless micro-batches whose position can be saved.
class RowSource {
 public:
  virtual ~RowSource() = default;
  virtual MicroBatch next(int64_t rows) = 0;
  virtual int64_t epoch() const = 0;
  virtual int64_t documents() const = 0;  ///< or images
  virtual int64_t rows_of_an_epoch() = 0;
  virtual nlohmann::json state() const = 0;
  /// Error when the data is not what the position was saved over.
  virtual void restore(const nlohmann::json& state) = 0;
};

/// Several sources by weight: the next row comes from the source that lags most behind its share.
class TrainingRows : public RowSource {
 public:
  /// `labels`: of the rows of every stream; none: rows have none.
  TrainingRows(std::vector<std::unique_ptr<RowStream>> streams, std::vector<double> weights, const DataConfig& config,
               std::vector<int64_t> labels = {});
  MicroBatch next(int64_t rows) override;
  int64_t epoch() const override { return streams_[0]->epoch(); }  ///< of the first source
  int64_t documents() const override;
  /// Error when there are several sources with weights: they have no common epoch.
  int64_t rows_of_an_epoch() override;
  nlohmann::json state() const override;
  void restore(const nlohmann::json& state) override;

 private:
  std::vector<std::unique_ptr<RowStream>> streams_;
  std::vector<double> weights_;
  std::vector<int64_t> labels_;
  std::vector<int64_t> taken_;
  DataConfig config_;
};

/// Held-out rows, encoded once.
struct HeldOut {
  std::vector<MicroBatch> batches;
  int64_t documents = 0;
  int64_t learned = 0;  ///< scored tokens
  int64_t bytes = 0;    ///< UTF-8 bytes that they stand for
};
/// `limit`: about so many tokens; documents are drawn when there are more.
HeldOut held_out_rows(const DatasetPtr& data, const Encoder& encoder, const DataConfig& config, int64_t rows,
                      int64_t limit, uint64_t seed);

/// The sources opened: training rows, and the held-out documents, all together or, where sources have a name or a
/// label, one set a source.
struct HeldOutSource {
  std::string name;
  std::optional<int64_t> label;
  DatasetPtr data;
};
struct TrainingData {
  std::unique_ptr<TrainingRows> rows;
  std::vector<HeldOutSource> held_out;
};
TrainingData open_data(const DataConfig& config, const Encoder& encoder, uint64_t seed);

}  // namespace moiety
