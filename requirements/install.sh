#!/usr/bin/env bash
# Installs lock files into a virtual environment:  install.sh VENV LOCK...
# The Makefile and docker/Dockerfile.cpu both run it; it does not know the project itself.
#   PYTHON            makes VENV where there is none
#   TORCH_CPU_INDEX   where PyTorch's CPU builds lie, asked only when the plain install does not find torch's +cpu build
# Quiet: one line a step, a line every few packages, and everything pip said if it fails.
set -euo pipefail

venv=$1
shift
locks=("$@")
here=$(cd "$(dirname "$0")" && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Byte code is compiled below, for all packages at once and on all cores; an engine's start is mostly imports.
unset PYTHONDONTWRITEBYTECODE

pip_install() {
    # The environment is complete by construction (the locks), so pip resolves nothing. Its warnings go to the log.
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-deps --no-compile "$@" 2>> "$log"
}

progress() { # a line every 20 packages, with what the step is at
    awk -v total="$1" '
        /^(Collecting|Processing|Requirement already satisfied:) / {
            sub(/^Requirement already satisfied:/, "have"); name = $2; sub(/.*\//, "", name); n++
            if (n % 20 == 0) { printf "    %d of %d: %s\n", n, total, name; fflush() } }
        /^Installing collected packages/ { print "    unpacking"; fflush() }'
}

fail() {
    echo "error: $1" >&2
    grep -v 'is ignored: it is neither a file nor a directory' "$log" | tail -n 40 >&2
    exit 1
}

seconds_start=$SECONDS
if [ ! -x "$venv/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$venv" > "$log" 2>&1 || fail "cannot make a virtual environment in $venv"
fi

paths=()
for lock in "${locks[@]}"; do paths+=(-r "$here/$lock"); done
pins=$(cat "${locks[@]/#/$here/}" | grep -c -E '^[A-Za-z0-9_.-]+==' || true)
torch=$(cat "${locks[@]/#/$here/}" | grep -o -m1 -E '^torch==[^ ;]+' || true)

if [[ "$torch" == *+cpu ]]; then
    echo "  $torch"
    if ! pip_install "$torch" > /dev/null; then
        [ -n "${TORCH_CPU_INDEX:-}" ] || fail "$torch is not on the default package index; set TORCH_CPU_INDEX"
        echo "    from PyTorch's own index of CPU builds"
        pip_install "$torch" -i "$TORCH_CPU_INDEX" > /dev/null || fail "cannot install $torch"
    fi
fi

echo "  ${locks[*]}: $pins packages"
pip_install "${paths[@]}" | progress "$pins" || fail "cannot install ${locks[*]}"

echo "  byte code"
# Some packages ship files for other Python versions, which do not compile here: not an error.
"$venv/bin/python" -m compileall -q -j 0 "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    > "$log" 2>&1 || true
echo "  installed in $((SECONDS - seconds_start)) s"
