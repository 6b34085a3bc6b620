"""What makes a small base image stand in for vLLM's: the packages that the real one brings, but for the huge ones.

    python3 stand_in.py names     prints what to pip-install: what the image's extras ask for, less what Dockerfile adds
    python3 stand_in.py engine    gives torch and vLLM a name and a version, and nothing else

With metadata alone, what asks for the version is answered (docker/verify.py), and what imports the package fails.
Runs in a folder that holds pyproject.toml, gpu.txt and gpu-image.txt.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import tomllib
from pathlib import Path

ENGINE = ("torch", "vllm")
FOR_S3FS = ("aiohttp", "jmespath", "requests", "six")
"""What vLLM asks for, s3fs needs, and nothing else here brings."""
EXTRAS = ("serve", "train", "postgres", "s3")
"""What docker/Dockerfile has verify.py look for, beside the engine."""


def pins(lock: str) -> dict[str, str]:
    text = Path(lock).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text, re.MULTILINE))


def brought_by_the_real_image() -> set[str]:
    """Names of the requirements that docker/Dockerfile leaves to its base image."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for extra in EXTRAS for line in extras[extra])]
    names = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower().replace("_", "-") for line in requirements}
    return (names | set(FOR_S3FS)) - set(ENGINE) - pins("gpu-image.txt").keys()


def name_the_engine() -> None:
    versions = pins("gpu.txt")
    for name in ENGINE:
        folder = Path(sysconfig.get_path("purelib", "posix_local")) / f"{name}-{versions[name]}.dist-info"
        folder.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {versions[name]}\n"
        (folder / "METADATA").write_text(metadata, encoding="utf-8")


def main() -> int:
    if sys.argv[1:] == ["names"]:
        sys.stdout.write(" ".join(sorted(brought_by_the_real_image())) + "\n")
    elif sys.argv[1:] == ["engine"]:
        name_the_engine()
    else:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
