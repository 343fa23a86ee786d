#include "moiety/io/whole_matrices.h"

#include <map>
#include <set>

#include "moiety/base/error.h"
#include "moiety/base/text.h"
#include "moiety/io/low_rank_sparse.h"
#include "moiety/io/packed_rows.h"

namespace moiety {
namespace {

using nlohmann::json;

// Knows what it was made of.
class Whole : public Checkpoint {
 public:
  Whole(std::shared_ptr<const Checkpoint> stored, std::shared_ptr<const Checkpoint> whole)
      : stored_(std::move(stored)), whole_(std::move(whole)) {}
  const json& config() const override { return whole_->config(); }
  const json& generation_config() const override { return whole_->generation_config(); }
  const std::vector<TensorInfo>& tensors() const override { return whole_->tensors(); }
  bool has(const std::string& name) const override { return whole_->has(name); }
  TensorView get(const std::string& name) const override { return whole_->get(name); }
  std::filesystem::path path() const override { return whole_->path(); }
  std::shared_ptr<const GgufFile> gguf() const override { return whole_->gguf(); }
  int64_t bytes_on_disk() const override { return whole_->bytes_on_disk(); }
  const Checkpoint& stored() const { return *stored_; }

 private:
  std::shared_ptr<const Checkpoint> stored_, whole_;
};

std::shared_ptr<const Checkpoint> whole_of(std::shared_ptr<const Checkpoint> checkpoint, const MatrixForm& form) {
  json config = checkpoint->config();
  const auto section = config.is_object() ? config.find("moiety") : config.end();
  if (section == config.end() || !section->is_object() || !section->contains(form.section)) return checkpoint;
  const WholeMatrix matrix = form.open(checkpoint, (*section)[form.section]);
  section->erase(form.section);
  if (section->empty()) config.erase("moiety");
  std::map<std::string, TensorInfo> infos;
  for (const TensorInfo& t : checkpoint->tensors()) infos[t.name] = t;
  std::vector<OverlayTensor> tensors;
  std::set<std::string> removed;
  for (const auto& [name, first] : infos) {
    const std::string& mark = form.parts[0];
    if (name.size() <= mark.size() || !name.ends_with(mark)) continue;
    const std::string stem = name.substr(0, name.size() - mark.size());
    std::vector<TensorInfo> parts;
    for (const std::string& part : form.parts) {
      const auto it = infos.find(stem + part);
      check(it != infos.end(), "{}: '{}' lacks '{}{}'", checkpoint->path().string(), shown(name), shown(stem), part);
      removed.insert(it->first);
      parts.push_back(it->second);
    }
    tensors.push_back(matrix(stem, parts));
    const std::string& made = tensors.back().info.name;
    check(infos.count(made) == 0, "{}: '{}' is there whole and in parts", checkpoint->path().string(), shown(made));
  }
  return overlay(std::move(checkpoint), std::move(config), std::move(tensors), removed);
}

}  // namespace

TensorView matrix_of(const TensorInfo& info, std::shared_ptr<const std::vector<std::byte>> bytes) {
  TensorView view;
  static_cast<TensorInfo&>(view) = info;
  view.data = *bytes;
  view.owner = std::move(bytes);
  return view;
}

std::shared_ptr<const Checkpoint> with_whole_matrices(std::shared_ptr<const Checkpoint> checkpoint) {
  auto whole = checkpoint;
  for (const MatrixForm& form : {low_rank_sparse_form(), packed_rows_form()}) whole = whole_of(std::move(whole), form);
  return whole == checkpoint ? checkpoint : std::make_shared<Whole>(std::move(checkpoint), std::move(whole));
}

const std::vector<TensorInfo>& stored_tensors(const Checkpoint& checkpoint) {
  const auto* whole = dynamic_cast<const Whole*>(&checkpoint);
  return whole ? whole->stored().tensors() : checkpoint.tensors();
}

}  // namespace moiety
