#pragma once
// Data to train and measure on: text, JSONL, CSV and TSV, IDX, PNG and JPEG, behind one interface. Files are indexed
// (one small entry a sample), and a sample is read when it is asked for: the data need not fit into memory.
// docs/data.md says which formats, keys and columns are understood.
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "moiety/io/image.h"

namespace moiety {

enum class SampleKind { text, completion, chat, choice, image };
std::string to_string(SampleKind kind);

struct Sample {
  SampleKind kind = SampleKind::text;
  std::string text;                  ///< of text
  std::string prompt, completion;    ///< of completion; `prompt` also is the question of choice
  nlohmann::ordered_json messages;   ///< of chat: list of {role, content, ...}
  nlohmann::ordered_json tools;      ///< of chat; null without
  std::vector<std::string> choices;  ///< of choice
  int64_t answer = -1;               ///< of choice: index into `choices`, -1 when the data has none
  Image image;                       ///< of image
  int64_t label = -1;                ///< of image and labelled text, -1 without
  std::string label_name;            ///< when the data names its labels
  std::string where;                 ///< "file:line" or the image's file
};

struct DataOptions {
  std::string format = "auto";  ///< auto, text, jsonl, json, csv, tsv, idx, images; auto goes by name and content
  std::string document =
      "file";  ///< what is a document in text: file, line, paragraph (blank lines between), or a separator
  std::string kind =
      "auto";  ///< of JSON and CSV records: auto (by the first record's keys), text, completion, chat, choice
  /// Which key or column holds what, when the name is not one of the usual ones: text, prompt, completion, messages,
  /// tools, question, choices, answer, label.
  std::map<std::string, std::string> columns;
  bool header = true;  ///< of CSV and TSV: the first row names the columns; else they are "0", "1", ...
  std::string labels;  ///< of IDX: the file of labels; "" looks beside the images (images-idx3 -> labels-idx1)
  int channels = 0;    ///< of images: 0 as in the file, else 1, 3 or 4
};

class Dataset {
 public:
  /// `location`: a file, a folder (all text files below it, or one folder of images a class), or a pattern with * ? [].
  /// Throws Error; damaged records are reported when they are read, with file and line.
  static std::shared_ptr<const Dataset> open(const std::string& location, const DataOptions& options = {});
  virtual ~Dataset() = default;

  virtual int64_t size() const = 0;
  /// Throws Error when `i` is not below size() or the record is malformed. May be called from several threads.
  virtual Sample get(int64_t i) const = 0;
  virtual SampleKind kind() const = 0;
  virtual std::vector<std::string> classes() const { return {}; }  ///< names of labels: folders of images
};
using DatasetPtr = std::shared_ptr<const Dataset>;

/// The samples with these indices, in this order.
DatasetPtr subset(DatasetPtr data, std::vector<int64_t> indices);
/// All samples in an order drawn from the seed (Fisher-Yates): a permutation, the same for the same seed everywhere.
DatasetPtr shuffled(DatasetPtr data, uint64_t seed);
/// {train, held out}: round(fraction * size) samples (documents) are held out, drawn from the seed, never none nor all
/// when there are two or more and 0 < fraction < 1. Both keep the order of the data.
std::pair<DatasetPtr, DatasetPtr> split(DatasetPtr data, double fraction, uint64_t seed);
/// One after another; all of one kind.
DatasetPtr concatenate(std::vector<DatasetPtr> parts);

/// A record as JSON (a line of JSONL, a row of CSV) to a sample. `kind` auto goes by the keys. Throws Error naming
/// `where`.
Sample sample_from_json(const nlohmann::ordered_json& record, const DataOptions& options, const std::string& where);

}  // namespace moiety
