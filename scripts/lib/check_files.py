"""Checks what every file of the repository has to keep to, whatever it holds.

Text ends in one newline, has no trailing blanks and no merge conflict; nothing is large; no module of
the package is longer than a reader can keep in mind.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LARGEST_NBYTES = 500_000
LONGEST_MODULE = 400


def problems(path: Path) -> list[str]:
    """Return what is wrong with one file, in words."""
    content = path.read_bytes()
    found = []
    if len(content) > LARGEST_NBYTES:
        found.append(f"has {len(content)} bytes; a repository keeps at most {LARGEST_NBYTES} in one file")
    if b"\0" in content:
        return found
    if content and (not content.endswith(b"\n") or content.endswith(b"\n\n")):
        found.append("must end in exactly one newline")
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line != line.rstrip():
            found.append(f"line {number} ends in blanks")
        if line.startswith((b"<<<<<<< ", b">>>>>>> ")):
            found.append(f"line {number} is left from a merge conflict")
    if path.parts[0] == "mpitrain" and path.suffix == ".py" and len(lines) > LONGEST_MODULE:
        found.append(f"has {len(lines)} lines; split a module before it has {LONGEST_MODULE}")
    return found


def main() -> int:
    """Check the files named as arguments, or all that git tracks or would track; return the exit status."""
    names = sys.argv[1:]
    if not names:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        names = listing.stdout.split("\0")
    paths = [Path(name) for name in names if name]
    messages = [f"{path}: {problem}" for path in paths if path.is_file() for problem in problems(path)]
    print("\n".join(messages) if messages else f"{len(paths)} files are in order")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
