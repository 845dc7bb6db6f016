"""Constraints for pip, printed: the set that was tested, or the oldest of every range in pyproject.toml.

pip install --dry-run --ignore-installed --quiet --report - ... | python .ci/pins.py lock > constraints.txt
python .ci/pins.py floors > floors.txt
python .ci/pins.py versions        # what is installed here, of what optin depends on
"""

from __future__ import annotations

import datetime
import json
import platform
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
LINE = re.compile(r"([A-Za-z0-9._-]+)\s*(?:>=\s*([0-9.]+))?")


def lock(report: str) -> list[str]:
    """One `name==version` for each package that pip would install, optin itself left out."""
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report)["install"]}
    head = f"# Made by `make lock` with Python {platform.python_version()} on {datetime.date.today()}"
    pins = [f"{name}=={found[name].split('+')[0]}" for name in sorted(found, key=str.lower)]
    return [head, *(pin for pin in pins if not pin.startswith(f"{PROJECT['name']}=="))]


def requirements(extra: str = "test") -> list[tuple[str, str]]:
    """(name, floor) of each dependency; of the extra, too, and of those that it takes in."""
    found = []
    for line in PROJECT["dependencies"] * (extra == "test") + PROJECT["optional-dependencies"][extra]:
        if inner := re.match(rf"{PROJECT['name']}\[(\w+)\]", line):
            found += requirements(inner[1])
        elif match := LINE.match(line):
            found.append(match.groups(default=""))
    return found


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main(what: str) -> None:
    if what == "lock":
        lines = lock(sys.stdin.read())
    elif what == "floors":
        lines = [f"{name}=={floor}" for name, floor in requirements() if floor]
    elif what == "versions":
        lines = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
        lines += [f"{name} {installed(name)}" for name, _ in requirements()]
    else:
        raise SystemExit(__doc__)
    print("\n".join(lines))


if __name__ == "__main__":
    main(*sys.argv[1:])
