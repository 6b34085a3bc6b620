"""Checks, at the end of an image's build, that what is installed meets what Loradock and its extras ask for.

    python3 docker/verify.py serve train postgres s3 gpu

The images install with --no-deps, so that nothing of the base image is replaced; this is what then notices a base image
of another vLLM, or one that has lost a package. It knows only installed metadata, and imports none of the packages.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement


def unmet(distribution: str, extras: list[str]) -> list[str]:
    """Requirements of `distribution` with these extras that the installed packages do not meet, one line each."""
    problems = []
    for line in requires(distribution) or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ["", *extras]):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement}: not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement}: {installed} is installed")
    return problems


def main() -> int:
    problems = unmet("loradock", sys.argv[1:])
    for problem in problems:
        sys.stderr.write(f"{problem}\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
