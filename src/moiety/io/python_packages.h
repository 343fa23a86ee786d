#pragma once
// Where Python packages lie: models and data that come as such are read without Python.
#include <filesystem>
#include <vector>

namespace moiety {

/// Folders of installed packages (site-packages), most wanted first, each once: of $MOIETY_PYTHON (an interpreter or a
/// prefix), $VIRTUAL_ENV, the .venv beside or above the current folder, the .venv beside or above the running program,
/// the python3 on the path, and the user's own. No interpreter is started.
std::vector<std::filesystem::path> python_package_folders();

}  // namespace moiety
