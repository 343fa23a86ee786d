#pragma once
// Ctrl-C in verbs that train.

namespace moiety::cli {

/// From now on the first SIGINT or SIGTERM is only noted: the verb saves and ends; the second ends at once, as signals
/// do.
void note_interrupts();
bool interrupted();

}  // namespace moiety::cli
