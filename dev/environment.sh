# Sourced by speedrun.sh and tests/run.sh: makes .venv with the package in editable form, and sets PYTHON to its interpreter.
# Usage: make_environment [EXTRA...]    A second call with the same pyproject.toml and extras does nothing.

make_environment() {
    local extras stamp log base status
    # What would put another Python's modules into the environment, take the scripts out of it, or install elsewhere.
    unset PYTHONHOME PYTHONPATH PYTHONSAFEPATH PIP_PREFIX PIP_ROOT PIP_TARGET PIP_USER
    extras=$(IFS=,; echo "$*")
    base=${BASE_PYTHON:-python3}
    PYTHON=$PWD/.venv/bin/python
    stamp=.venv/.installed${extras:+-$extras}
    if [ -x "$PYTHON" ] && cmp -s pyproject.toml "$stamp"; then
        return 0
    fi
    if ! command -v "$base" > /dev/null; then
        echo "error: no $base here: install Python 3.10 or newer" >&2
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
    "$PYTHON" -m pip --version > /dev/null 2>&1 || "$base" -m venv .venv || return 1 # also one that was left half made
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
        echo "error: pip failed with exit code $status (all of its output: $log)" >&2
        return 1
    fi
    if ! (cd / && "$PYTHON" -c 'import torch, nanotrain') >> "$log" 2>&1; then
        tail -n 1 "$log" >&2
        echo "error: pip ended without an error, but what it should have installed cannot be imported from .venv ($log)" >&2
        return 1
    fi
    cp pyproject.toml "$stamp"
}
