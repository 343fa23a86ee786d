#pragma once
// How the process deals with memory it frees.

namespace moiety {

/// Memory that is freed stays with the process for its next use, large blocks too, instead of going back to the system
/// and coming again page by page. For programs that need the same large blocks over and over, as a training loop does:
/// there the system's work on pages is up to a third of the time. No effect where the C library is not glibc.
void keep_freed_memory();

}  // namespace moiety
