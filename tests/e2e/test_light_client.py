"""The light client in an environment of its own: what `pip install loradock` gives, without the network.

The environment holds links to the packages of requirements/client.txt and to the project, and nothing else, so whatever
the commands import beyond the lock fails here as it would on a laptop. It knows nothing of what the commands do.
"""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def client_packages() -> list[str]:
    """Names of the light client's lock, less those of other systems."""
    text = (ROOT / "requirements/client.txt").read_text(encoding="utf-8")
    return re.findall(r"^([a-z0-9-]+)==\S+$", text, re.MULTILINE)


def link_package(name: str, site_packages: Path) -> None:
    """Links the top-level files and folders of an installed distribution into another environment."""
    listed = files(name)
    if listed is None:
        raise PackageNotFoundError(name)
    for file in listed:
        top = file.parts[0]
        if top not in {"..", "__pycache__"} and not (site_packages / top).exists():
            (site_packages / top).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)


@pytest.fixture(scope="module")
def light_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the light client alone."""
    environment = tmp_path_factory.mktemp("light") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    for name in [*client_packages(), "loradock"]:
        link_package(name, site_packages)
    folders = "\n".join(str(ROOT / name) for name in ("adapters", "serve", "train"))
    (site_packages / "project.pth").write_text(folders + "\n", encoding="utf-8")
    return environment / "bin/python"


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = "from loradock_adapters.cli import main; main()"
    environment = {"PATH": os.environ["PATH"], "HOME": str(python.parent), "COLUMNS": "120"}
    return subprocess.run(
        [str(python), "-I", "-c", program, *arguments], capture_output=True, text=True, env=environment, timeout=60
    )


def test_light_environment_lacks_the_heavy_packages(light_python: Path) -> None:
    program = (
        "import importlib.util as u; print([n for n in ('torch', 'vllm', 'sqlalchemy', 'httpx') if u.find_spec(n)])"
    )
    done = subprocess.run([str(light_python), "-I", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['httpx']"


def test_help_lists_every_command_without_the_extras(light_python: Path) -> None:
    done = run(light_python, "--help")
    assert done.returncode == 0, done.stderr
    for command in ("push", "ls", "show", "rm", "rollback", "inspect", "train", "serve"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "arguments", [["ls"], ["show", "demo"], ["rm", "demo"], ["rollback", "demo", "1"]], ids=lambda words: str(words[0])
)
def test_client_command_without_a_server_fails_for_want_of_the_server(light_python: Path, arguments: list[str]) -> None:
    # Port 9 (discard) of loopback: nothing listens, so the command has loaded all it needs and tried.
    done = run(light_python, *arguments, "--server", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "config"), [("train", "model_id: base\ntrain_path: rows.jsonl\n"), ("serve", "base: base\n")]
)
def test_heavy_command_names_the_extra_that_it_needs(
    light_python: Path, command: str, config: str, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a row"}\n', encoding="utf-8")
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    done = run(light_python, command, str(tmp_path / "config.yaml"))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"loradock[{command}]" in done.stderr
