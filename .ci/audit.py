"""Are there known vulnerabilities in the packages of this environment? Exits with 1 if so.

pip-audit asks PyPI. Where that cannot be reached, or knows none of the packages, nothing was audited: that is said aloud, and is
no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys

ALONE = "SKIPPED, nothing was audited: "


def main() -> int:
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--local",
        "--progress-spinner",
        "off",
        "--timeout",
        "15",
        "-f",
        "json",
    ]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        print(ALONE + "the database of vulnerabilities did not answer within 5 minutes")
        return 0
    try:
        packages = json.loads(run.stdout)["dependencies"]
    except ValueError:
        print(ALONE + (run.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1])
        return 0
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        print(
            f"{ALONE}the database of vulnerabilities knows none of {len(packages)} packages here, or cannot be reached"
        )
        return 0
    found = [(package, vulnerability) for package in audited for vulnerability in package["vulns"]]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no release yet"
        print(f"{package['name']} {package['version']}: {vulnerability['id']}, fixed in {fixed}")
    left_out = ", ".join(package["name"] for package in packages if "vulns" not in package) or "none"
    print(f"{len(audited)} packages audited, {len(found)} known vulnerabilities; not in the database: {left_out}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
