#pragma once
// Self-contained HTML pages: a page written as a file of the source tree, with its data inside.
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace moiety {

/// The page with its one `{{data}}` replaced by `data` as JSON, for a <script type="application/json"> element. No text
/// inside the data can end that element. Ill-formed UTF-8 becomes U+FFFD. Throws Error when the page has no `{{data}}`.
std::string html_with_data(std::string_view page, const nlohmann::json& data);

}  // namespace moiety
