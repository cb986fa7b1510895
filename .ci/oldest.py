"""The lower bounds of pyproject.toml as constraints for pip: with them it installs the oldest versions that are allowed.

    python .ci/oldest.py > constraints-oldest.txt

Of packages that are named twice, as by the library and by the tests, the higher bound counts. What these packages ask for
themselves is left to pip. Needs `packaging`.
"""

from __future__ import annotations

import itertools
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def main() -> None:
    lowest: dict[str, Version] = {}
    for text in itertools.chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        for bound in requirement.specifier:
            if bound.operator == ">=":
                lowest[name] = max(lowest.get(name, Version("0")), Version(bound.version))
    print("\n".join(f"{name}=={version}" for name, version in sorted(lowest.items())))


if __name__ == "__main__":
    main()
