#pragma once
// The text that studies of language models learn: several languages, prose, manuals and code that Debian packages
// install, cut into documents, a fixed twentieth of which is held out. One mixture for all studies.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace moiety {

struct StudySource {
  std::string name;     ///< "python", "manual-de"
  std::string package;  ///< Debian package that installs it
  std::string text;     ///< what it is
  int64_t train_bytes = 0, held_out_bytes = 0, documents = 0;
  std::filesystem::path train, held_out;  ///< JSONL, one {"text", "label"} a document; label is the source's number
};

struct StudyText {
  std::vector<StudySource> sources;
  std::string digest;  ///< of all documents: results are comparable when it is the same
};

/// Reads the packages once and keeps the documents in `folder` ("": text/ in the cache folder). Documents are drawn by
/// a hash of their name up to about 1.2 MB a source; sections of the manual that exists in several languages are held
/// out by their number, in all languages alike. Throws Error naming the packages that are missing.
StudyText study_text(const std::filesystem::path& folder = {});

/// Those of these names, in the order of the names; all where none is named. Error: a text that does not exist.
std::vector<StudySource> study_sources(const std::vector<std::string>& names);

}  // namespace moiety
