# Sourced by speedrun.sh and tests/run.sh: installs the package in editable mode into .venv and sets PYTHON to its interpreter.
# Usage: make_environment [EXTRA...]    Does nothing if pyproject.toml and extras have not changed since.

make_environment() {
    local extras stamp log base status
    # These would mix in another Python's modules, hide the scripts, or install elsewhere.
    unset PYTHONHOME PYTHONPATH PYTHONSAFEPATH PIP_PREFIX PIP_ROOT PIP_TARGET PIP_USER
    extras=$(IFS=,; echo "$*")
    base=${BASE_PYTHON:-python3}
    PYTHON=$PWD/.venv/bin/python
    stamp=.venv/.installed${extras:+-$extras}
    if [ -x "$PYTHON" ] && cmp -s pyproject.toml "$stamp"; then
        return 0
    fi
    if ! command -v "$base" > /dev/null; then
        echo "error: $base not found: install Python 3.10 or newer" >&2
        return 1
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $("$base" --version) is too old: nanotrain needs Python 3.10 or newer (BASE_PYTHON=python3.12 chooses one)" >&2
        return 1
    fi
    if ! "$base" -c 'import ensurepip, venv' 2> /dev/null; then
        echo "error: this Python has no venv module: install it (Debian and Ubuntu: sudo apt install python3-venv) and run again" >&2
        return 1
    fi
    echo "installing nanotrain${extras:+[$extras]} into .venv (a few minutes the first time)"
    "$PYTHON" -m pip --version > /dev/null 2>&1 || "$base" -m venv .venv || return 1 # also repairs a half-made one
    log=.venv/install.log
    "$PYTHON" -m pip install --no-user --disable-pip-version-check --editable ".${extras:+[$extras]}" > "$log" 2>&1 &
    local pip=$!
    while kill -0 "$pip" 2> /dev/null; do
        sleep 2
        if [ -t 1 ] && [ "${TERM:-dumb}" != dumb ]; then
            printf '\r\033[K  %s' "$(grep -E '^(Collecting|Downloading|Installing)' "$log" | tail -n 1 | cut -c 1-70)"
        fi
    done
    if [ -t 1 ] && [ "${TERM:-dumb}" != dumb ]; then printf '\r\033[K'; fi
    status=0
    wait "$pip" || status=$?
    if [ "$status" -ne 0 ]; then
        tail -n 5 "$log" >&2
        echo "error: pip failed with exit code $status (full output: $log)" >&2
        return 1
    fi
    if ! (cd / && "$PYTHON" -c 'import torch, nanotrain') >> "$log" 2>&1; then
        tail -n 1 "$log" >&2
        echo "error: pip reported success, but torch and nanotrain cannot be imported from .venv ($log)" >&2
        return 1
    fi
    cp pyproject.toml "$stamp"
}
