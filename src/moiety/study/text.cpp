#include "moiety/study/text.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <span>

#include "moiety/base/config.h"
#include "moiety/base/error.h"
#include "moiety/base/files.h"
#include "moiety/base/text.h"
#include "moiety/io/image.h"
#include "moiety/io/sha256.h"
#include "moiety/io/unicode.h"

namespace moiety {

namespace fs = std::filesystem;
using nlohmann::json;

namespace {

constexpr int64_t kTrainBytes = 1'200'000, kHeldOutBytes = 120'000, kDocumentBytes = 60'000;
constexpr int kRecipe = 1;  // counts changes of what is made

struct Document {
  std::string name, text;
};

uint64_t hash_of(const std::string& text) {
  uint64_t h = 1469598103934665603ull;  // FNV-1a
  for (const unsigned char c : text) h = (h ^ c) * 1099511628211ull;
  // Its low bits are weak: one round of splitmix64.
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9ull;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebull;
  return h ^ (h >> 31);
}

std::vector<Document> files_below(const fs::path& folder, const std::string& extension) {
  std::vector<Document> out;
  if (!fs::is_directory(folder)) return out;
  for (const auto& entry : fs::recursive_directory_iterator(folder)) {
    if (!entry.is_regular_file() || entry.path().extension() != extension) continue;
    const auto size = static_cast<int64_t>(entry.file_size());
    // Tables of characters teach nothing about language.
    if (size < 500 || size > 400'000) continue;
    out.push_back({fs::relative(entry.path(), folder).string(), read_text(entry.path())});
  }
  return out;
}

std::vector<Document> python() {
  fs::path newest;
  for (const auto& entry : fs::directory_iterator("/usr/lib"))
    if (std::regex_match(entry.path().filename().string(), std::regex("python3\\.[0-9]+")) &&
        fs::exists(entry.path() / "argparse.py"))
      newest = std::max(newest, entry.path());
  if (newest.empty()) return {};
  auto out = files_below(newest, ".py");
  std::erase_if(out, [](const Document& d) { return d.name.find("-packages/") != std::string::npos; });
  return out;
}

std::vector<Document> perl() {
  std::vector<Document> out;
  if (!fs::is_directory("/usr/share/perl")) return out;
  for (const auto& entry : fs::directory_iterator("/usr/share/perl"))
    if (entry.is_directory() && !entry.is_symlink())
      for (auto& d : files_below(entry.path() / "pod", ".pod")) out.push_back(std::move(d));
  return out;
}

std::vector<Document> prose() {
  const fs::path folder = "/usr/share/games/fortunes";
  std::vector<Document> out;
  if (!fs::is_directory(folder)) return out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (!entry.is_regular_file() || entry.is_symlink() || !entry.path().extension().empty()) continue;
    const std::string text = read_text(entry.path());
    size_t begin = 0, number = 0;
    while (begin < text.size()) {
      size_t end = text.find("\n%\n", begin);
      if (end == std::string::npos) end = text.size();
      out.push_back(
          {fmt::format("{}-{}", entry.path().filename().string(), number++), text.substr(begin, end - begin)});
      begin = end + 3;
    }
  }
  return out;
}

// Sections "1.2.3. Title" of the body; the table of contents, whose lines are indented, has none.
std::vector<Document> manual(const std::string& language) {
  const fs::path file = fmt::format("/usr/share/debian-reference/debian-reference.{}.txt.gz", language);
  std::vector<Document> out;
  if (!fs::exists(file)) return out;
  const std::string packed = read_text(file);
  const auto bytes = gunzip(std::as_bytes(std::span(packed)), file.string(), uint64_t{64} << 20);
  const std::string text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  static const std::regex heading("^([0-9]+\\.[0-9]+(\\.[0-9]+)?)\\.( |\xC2\xA0)");
  std::string name;
  size_t line = 0;
  while (line < text.size()) {
    size_t end = text.find('\n', line);
    if (end == std::string::npos) end = text.size();
    const std::string_view here(text.data() + line, end - line);
    std::cmatch match;
    if (!here.empty() && std::isdigit(static_cast<unsigned char>(here[0])) &&
        std::regex_search(here.data(), here.data() + here.size(), match, heading)) {
      name = match[1];
      out.push_back({name, ""});
    }
    if (!name.empty()) out.back().text.append(here).append("\n");
    line = end + 1;
  }
  return out;
}

struct Recipe {
  std::string name, package, text;
  std::function<std::vector<Document>()> read;
};

const std::vector<Recipe>& recipes() {
  static const std::vector<Recipe> all{
      {"python", "libpython3-stdlib", "Python's own library", python},
      {"perl", "perl-doc", "Perl's manual, POD", perl},
      {"prose", "fortunes", "sayings, jokes and verses", prose},
      {"manual-en", "debian-reference-en", "the Debian Reference in English", [] { return manual("en"); }},
      {"manual-de", "debian-reference-de", "the same in German", [] { return manual("de"); }},
      {"manual-fr", "debian-reference-fr", "the same in French", [] { return manual("fr"); }},
      {"manual-ja", "debian-reference-ja", "the same in Japanese", [] { return manual("ja"); }},
  };
  return all;
}

std::string lines_of(const std::vector<const Document*>& documents, size_t label, int64_t limit, int64_t& bytes) {
  std::string out;
  bytes = 0;
  for (const Document* d : documents) {
    if (bytes >= limit) break;
    // Long files are cut: no document rules the text.
    std::string text = d->text;
    if (static_cast<int64_t>(text.size()) > kDocumentBytes) {
      size_t cut = kDocumentBytes;
      while ((static_cast<unsigned char>(text[cut]) & 0xC0) == 0x80) --cut;
      text.resize(cut);
    }
    bytes += static_cast<int64_t>(text.size());
    out += json{{"text", text}, {"label", label}}.dump(-1, ' ', false, json::error_handler_t::replace) + "\n";
  }
  return out;
}

}  // namespace

StudyText study_text(const fs::path& where) {
  const fs::path folder = where.empty() ? cache_folder() / "text" : where;
  const fs::path index = folder / "index.json";
  if (!fs::exists(index)) {
    std::vector<std::vector<Document>> documents;
    std::set<std::string> missing;
    for (const auto& r : recipes()) {
      documents.push_back(r.read());
      if (documents.back().empty()) missing.insert(r.package);
    }
    check(missing.empty(), "studies learn text of Debian packages that are not installed: apt-get install {}",
          fmt::join(missing, " "));
    fs::create_directories(folder);
    Sha256 hash;
    json list = json::array();
    for (size_t i = 0; i < documents.size(); ++i) {
      std::erase_if(documents[i], [](const Document& d) { return d.text.size() < 200; });
      std::vector<const Document*> train, held_out;
      std::vector<std::pair<uint64_t, const Document*>> order;
      for (const auto& d : documents[i]) order.emplace_back(hash_of(d.name), &d);
      std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
        return std::tie(a.first, a.second->name) < std::tie(b.first, b.second->name);
      });
      for (const auto& [h, d] : order) ((h >> 32) % 12 == 0 ? held_out : train).push_back(d);
      int64_t train_bytes = 0, held_out_bytes = 0;
      const auto& r = recipes()[i];
      const std::string learned = lines_of(train, i, kTrainBytes, train_bytes),
                        kept = lines_of(held_out, i, kHeldOutBytes, held_out_bytes);
      hash.update(std::as_bytes(std::span(learned)));
      hash.update(std::as_bytes(std::span(kept)));
      write_file(folder / (r.name + ".train.jsonl"), learned);
      write_file(folder / (r.name + ".held-out.jsonl"), kept);
      list.push_back({{"name", r.name},
                      {"train_bytes", train_bytes},
                      {"held_out_bytes", held_out_bytes},
                      {"documents", std::count(learned.begin(), learned.end(), '\n')}});
    }
    write_file(index, json{{"recipe", kRecipe}, {"sources", list}, {"digest", hash.hex()}}.dump(1) + "\n");
  }
  const json kept = parse_json(read_text(index), index.string());
  return reading_json(index.string(), [&] {
    check(kept.at("recipe") == kRecipe && kept.at("sources").size() == recipes().size(),
          "{} was made by another version of the program: remove the folder", folder.string());
    StudyText out;
    out.digest = kept.at("digest");
    for (size_t i = 0; i < recipes().size(); ++i) {
      const auto& r = recipes()[i];
      const json& k = kept.at("sources").at(i);
      out.sources.push_back({r.name, r.package, r.text, k.at("train_bytes"), k.at("held_out_bytes"), k.at("documents"),
                             folder / (r.name + ".train.jsonl"), folder / (r.name + ".held-out.jsonl")});
    }
    return out;
  });
}

std::vector<StudySource> study_sources(const std::vector<std::string>& names) {
  const StudyText text = study_text();
  if (names.empty()) return text.sources;
  std::vector<StudySource> out;
  for (const auto& name : names) {
    const auto it =
        std::find_if(text.sources.begin(), text.sources.end(), [&](const auto& s) { return s.name == name; });
    check(it != text.sources.end(), "there is no text called {}", name);
    out.push_back(*it);
  }
  return out;
}

}  // namespace moiety
