# Sourced by bin/p2pinfer and bin/test: `prepare_venv SET` leaves a .venv in the repository root
# that holds this checkout with its pinned packages. The sets: `base`, `bench` (with what it is
# compared with), `test` (everything).
#
# The quick path compares a stamp, a copy of all that decides what is installed, and takes a few
# milliseconds. Only when it differs does bin/setup_venv.py work, under a lock.

stamp_text() {
    printf '%s\n' "$root"
    cat "$root/pyproject.toml" "$root/constraints.txt"
}

find_python() {
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s' "$candidate"
            return 0
        fi
    done
    found=$(python3 --version 2>/dev/null) || found="no python3"
    echo "error: p2pinfer needs Python 3.11 or newer, and there is $found on the PATH." >&2
    echo "Install one, or name it: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

prepare_venv() {
    case $1 in
        base) sets='base bench test' extras='' ;;
        bench) sets='bench test' extras=bench ;;
        test) sets=test extras=test ;;
    esac
    if [ -x "$root/.venv/bin/python" ]; then
        for set in $sets; do
            if stamp_text | cmp -s - "$root/.venv/.installed-$set"; then
                return 0
            fi
        done
    fi
    python=$(find_python) || exit 1
    # shellcheck disable=SC2086  # no extra means no argument
    stamp_text | "$python" "$root/bin/setup_venv.py" "$root/.venv" "$1" $extras || exit 1
}
