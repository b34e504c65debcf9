#!/usr/bin/env bash
# The tests under each Python that doralib says it runs on, where that Python is on this machine; says which it found.
# Further arguments are pytest's: tests/pythons.sh tests/layers -k linear
set -euo pipefail
cd "$(dirname "$0")/.."
missing=() failed=()
for version in 3.11 3.12 3.13; do
    python=
    for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
        # pyenv's own command is there for versions that are not, and then fails
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            python=$candidate
        fi
    done
    if [ -z "$python" ]; then
        missing+=("$version")
        continue
    fi
    venv=.venv-python$version
    echo "== $("$python" --version), $python"
    if [ ! -e "$venv/.installed" ] || [ pyproject.toml -nt "$venv/.installed" ] || [ constraints.txt -nt "$venv/.installed" ]; then
        "$python" -m venv --clear "$venv"
        # a torch with CUDA, the only one for some Pythons, asks for a triton of its own
        sed '/^triton==/d' constraints.txt > "$venv/constraints.txt"
        torch=torch==$(sed -n 's/^torch==//p' constraints.txt)
        "$venv/bin/python" -m pip install --quiet --no-compile "$torch" --constraint "$venv/constraints.txt"
        "$venv/bin/python" -m pip install --quiet --no-compile --editable '.[test]' --constraint "$venv/constraints.txt"
        touch "$venv/.installed"
    fi
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/bin/pytest" -q -m "not slow and not interop and not torchtune" \
        --numprocesses "${WORKERS:-2}" --dist worksteal "$@" || failed+=("$version")
done
echo "not on this machine, and so not tried: ${missing[*]:-none}; failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
