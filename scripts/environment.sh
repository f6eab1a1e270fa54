# Sourced by the scripts beside it: builds .venv from requirements/cpu.txt (of scripts/docs: .venv-docs from
# requirements/docs.txt), or reuses it while both are unchanged.
# Sets ROOT and PYTHON (the environment's interpreter). Choose another interpreter for it with SPATTN_PYTHON=python3.12.
# Where the package index serves torch with CUDA and a CPU build is wanted, name an index that has it in SPATTN_TORCH_INDEX.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"
REQUIREMENTS="$ROOT/requirements/cpu.txt"

stop() {
  printf 'error: %s\n' "$@" >&2
  exit 1
}

find_base_python() {
  local candidate
  for candidate in ${SPATTN_PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  stop "no Python 3.10 or newer found (looked for: ${SPATTN_PYTHON:-python3, python3.10 to python3.13})." \
    "Install one (Debian, Ubuntu: apt-get install python3 python3-venv) or name one: SPATTN_PYTHON=/path/to/python3"
}

check_compiler() {
  local candidate
  for candidate in ${CXX:-} ${CC:-} g++ gcc clang++ clang c++ cc; do
    command -v "$candidate" >/dev/null 2>&1 && return
  done
  stop "no C++ compiler found (looked for \$CXX, \$CC, g++, gcc, clang++, clang, c++, cc). It links the compiled kernels." \
    "Install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX."
}

build_environment() {
  local base="$1" stamp="$2" started=$SECONDS
  local -a index=()
  [ -n "${SPATTN_TORCH_INDEX:-}" ] && index=(--extra-index-url "$SPATTN_TORCH_INDEX")
  echo "Building ${VENV##*/} from requirements/${REQUIREMENTS##*/} (once; a few minutes at most)"
  rm -rf "$VENV"
  "$base" -m venv "$VENV" || stop "$base cannot make a virtual environment." \
    "Debian, Ubuntu: apt-get install python3-venv"
  "$PYTHON" -m pip install -qq --disable-pip-version-check ${index[@]+"${index[@]}"} -r "$REQUIREMENTS" ||
    stop "the packages of requirements/${REQUIREMENTS##*/} could not be installed (see pip's message above)."
  echo "$stamp" >"$VENV/spattn-environment"
  echo "Environment ready after $((SECONDS - started)) s"
}

install_project() {
  local stamp="$1"
  "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation --editable "$ROOT" ||
    stop "spattn-tvm itself could not be installed (see pip's message above)."
  echo "$stamp" >"$VENV/spattn-project"
}

digest() {
  "$1" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

ensure_environment() {
  ensure_packages install
}

# The site is built from the text of the sources: without torch, TVM or a compiler.
ensure_documentation_environment() {
  VENV="$ROOT/.venv-docs"
  PYTHON="$VENV/bin/python"
  REQUIREMENTS="$ROOT/requirements/docs.txt"
  ensure_packages
}

# Packages at their pins; with "install" also this project, editable, and a compiler for its kernels.
ensure_packages() {
  local base environment_stamp project_stamp
  base="$(find_base_python)" || exit 1
  if [ "${1:-}" = install ]; then
    check_compiler
  fi
  # A virtual environment holds absolute paths: a moved checkout builds its own.
  environment_stamp="$( (cat "$REQUIREMENTS" && "$base" -c 'import sys; print(sys.version)' && echo "$ROOT") | digest "$base")"
  project_stamp="$(digest "$base" <"$ROOT/pyproject.toml")"
  if command -v flock >/dev/null 2>&1; then
    exec 9>"$ROOT/.environment.lock"
    flock 9
  fi
  if [ "$(cat "$VENV/spattn-environment" 2>/dev/null)" != "$environment_stamp" ] || ! "$PYTHON" -c '' 2>/dev/null; then
    build_environment "$base" "$environment_stamp"
  fi
  if [ "${1:-}" = install ] && [ "$(cat "$VENV/spattn-project" 2>/dev/null)" != "$project_stamp" ]; then
    install_project "$project_stamp"
  fi
  if command -v flock >/dev/null 2>&1; then
    exec 9>&-
  fi
  # Packages of the user's own site directory or PYTHONPATH must not shadow the pinned ones.
  export PYTHONNOUSERSITE=1
  unset PYTHONPATH PYTHONHOME
}
