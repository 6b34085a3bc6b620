#!/usr/bin/env bash
# Builds both images without a Docker daemon, and runs the CPU one:  make docker-check [ARGS=--keep]
#
#   compose   compose.yaml is read by `docker compose`, or by docker-compose from Debian; both profiles
#   gpu       the GPU Dockerfile builds on a stand-in for vLLM's image (the packages it brings, but no engine): the entry point answers
#   cpu       the CPU Dockerfile builds on Debian with the Python that is there
#   run       the CPU image runs as its non-root user in a network of its own (check_run.py): healthy, an adapter pushed by a
#             light client, answered, another container on the same volume, the adapter still answered; trains in it, too
#
# Needs root, and about 15 GB for a while. What this machine's pip needs (mirrors, certificates, local wheels) reaches the builds as a mounted
# pip.conf and read-only mounts, never as a line in a Dockerfile. ONLY="gpu cpu" picks steps; --keep leaves the work folder for another go.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(realpath --no-symlinks "${PYTHON:-.venv/bin/python}")
steps=" ${ONLY:-compose gpu cpu run} "
keep=0
if [ "${1:-}" = --keep ]; then keep=1; fi

say() { printf '== %s (%s s)\n' "$1" "$SECONDS"; }

[ "$(id -u)" = 0 ] || { echo "error: building images without a daemon needs root" >&2; exit 1; }
missing=()
command -v buildah > /dev/null || missing+=(buildah)
command -v debootstrap > /dev/null || missing+=(debootstrap)
command -v ip > /dev/null || missing+=(iproute2)
docker compose version > /dev/null 2>&1 || command -v docker-compose > /dev/null || missing+=(docker-compose)
if [ ${#missing[@]} -gt 0 ]; then
    say "apt-get install ${missing[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
fi

work=${LORADOCK_CHECK_DIR:-$(mktemp -d)}
mkdir -p "$work"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
b=(buildah --root "$work/storage" --runroot "$work/runroot")
clean_up() {
    if [ $keep = 1 ]; then echo "kept: $work"; else rm -rf "$work"; fi
}
trap clean_up EXIT

# This machine's pip settings, and mounts for the files that they name.
"$python" docker/host_pip.py "$work/pip.conf" > "$work/mounts"
mapfile -t mounts < "$work/mounts"
mounts+=(-v "$work/pip.conf:/etc/pip.conf:ro")

check_compose() {
    local compose=(docker-compose)
    if docker compose version > /dev/null 2>&1; then compose=(docker compose); fi
    say "compose.yaml, read by ${compose[*]}"
    for profile in gpu cpu; do
        LORADOCK_ADMIN_KEY=key "${compose[@]}" -f docker/compose.yaml --profile "$profile" config > "$work/compose-$profile.yaml"
        grep -q "loradock:$profile" "$work/compose-$profile.yaml"
    done
    if env -u LORADOCK_ADMIN_KEY "${compose[@]}" -f docker/compose.yaml --profile cpu config > /dev/null 2> "$work/compose.err"; then
        echo "error: compose.yaml is accepted without LORADOCK_ADMIN_KEY" >&2
        exit 1
    fi
    grep -q LORADOCK_ADMIN_KEY "$work/compose.err"
}

stand_in_base() { # Debian with the Python that python:3.11-slim has
    if "${b[@]}" inspect --type image loradock-base > /dev/null 2>&1; then return; fi
    say "a base image, by debootstrap"
    local container root
    container=$("${b[@]}" from scratch)
    root=$("${b[@]}" mount "$container")
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv bookworm "$root" > "$work/debootstrap.log" 2>&1 ||
        { tail -n 20 "$work/debootstrap.log" >&2; exit 1; }
    rm -rf "$root"/var/cache/apt/archives/*.deb
    "${b[@]}" commit --quiet --rm "$container" loradock-base > /dev/null
}

build() { # build TAG DOCKERFILE BASE ARGS...
    local tag=$1 file=$2 base=$3 start=$SECONDS
    shift 3
    "${b[@]}" build --quiet --format docker --layers=false "${mounts[@]}" --build-arg "BASE_IMAGE=$base" "$@" -f "$file" -t "$tag" . > "$work/build.log" 2>&1 ||
        { tail -n 60 "$work/build.log" >&2; exit 1; }
    say "$tag: $(size "$tag"), built in $((SECONDS - start)) s"
}

size() { "${b[@]}" images --json "$1" | "$python" -c 'import json, sys; print(json.load(sys.stdin)[0]["size"])'; }

expect() { # expect WORDS CONTAINER COMMAND... : what the command prints there has the words
    local words=$1 container=$2 printed
    shift 2
    printed=$("${b[@]}" run "$container" -- "$@")
    [[ "$printed" == *"$words"* ]] || { echo "error: no '$words' in what \`$*\` printed: ${printed:-nothing}" >&2; exit 1; }
}

check_gpu() {
    stand_in_base
    say "a stand-in for vLLM's image"
    local container
    container=$("${b[@]}" from loradock-base)
    "${b[@]}" copy --quiet "$container" requirements/gpu.txt requirements/gpu-image.txt pyproject.toml docker/stand_in.py /tmp/stand-in/ > /dev/null
    "${b[@]}" run "${mounts[@]}" --workingdir /tmp/stand-in "$container" -- sh -c '
        export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
        python3 -m pip install --no-cache-dir -qq -c gpu.txt $(python3 stand_in.py names) && python3 stand_in.py engine'
    "${b[@]}" config --entrypoint '["vllm", "serve"]' "$container"
    "${b[@]}" commit --quiet --rm "$container" vllm-stand-in > /dev/null
    build loradock:gpu docker/Dockerfile vllm-stand-in
    container=$("${b[@]}" from loradock:gpu)
    expect push "$container" loradock --help
    expect --overwrite "$container" loradock train --help
    expect imported "$container" python3 -c 'import psycopg, s3fs, zstandard, PIL; print("imported")'
    local entry
    mapfile -t entry < <("${b[@]}" inspect --type image loradock:gpu | "$python" -c 'import json, sys; print(*json.load(sys.stdin)["Docker"]["config"]["Entrypoint"], sep="\n")')
    expect --data-dir "$container" "${entry[@]}" --help
    expect 10001 "$container" id -u
    "${b[@]}" rm "$container" > /dev/null
    say "loradock:gpu: ${entry[*]} --help, as user 10001"
}

check_cpu() {
    stand_in_base
    build loradock:cpu docker/Dockerfile.cpu loradock-base --build-arg "TORCH_CPU_INDEX=${TORCH_CPU_INDEX:-}"
}

check_run() {
    say "a light client"
    rm -rf "$work/client"
    PYTHON="$python" requirements/install.sh "$work/client" client.txt build.txt
    "$work/client/bin/python" -m pip install -qq --no-deps --no-build-isolation .
    "$work/client/bin/python" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(name) for name in ("torch", "vllm", "sqlalchemy")))'

    say "a tiny base and an adapter"
    rm -rf "$work/models" "$work/data" "$work/cache"
    PYTHONPATH=tests/support "$python" - "$work/models" > "$work/models.log" 2>&1 << 'PY' || { cat "$work/models.log" >&2; exit 1; }
import json
import sys
from pathlib import Path

from loradock_testing.tiny_models import make_adapter, make_llama

root = Path(sys.argv[1])
base = make_llama(root / "tiny-base")
make_adapter(root / "tiny-adapter", base, seed=1)
rows = [{"prompt": f"def f{n}", "completion": f"(x): return {n}"} for n in range(32)]
(root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
config = {"model_id": "/models/tiny-base", "train_path": "/models/rows.jsonl", "context_length": 64, "max_steps": 4,
          "train_batch_size_per_device": 4, "mixed_precision": "no", "lora_config": {"r": 4}}
(root / "train.yaml").write_text(json.dumps(config), encoding="utf-8")
PY
    chmod -R a+rX "$work/models"

    say "loradock:cpu as a container"
    # A network of its own, with nothing but loopback: port 8080 is free there, and nothing can be downloaded.
    unshare --net -- sh -c 'ip link set lo up && exec "$@"' sh "$python" docker/check_run.py --work "$work" -- "${b[@]}"
}

for step in compose gpu cpu run; do
    if [[ "$steps" == *" $step "* ]]; then "check_$step"; fi
done
say "done"
