"""What a measurement depends on, and the file that holds it."""

import dataclasses
import datetime
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def commit() -> str | None:
    """The commit of this checkout, with a `+` where a kernel's source differs from it; None without git."""
    def git(*arguments):
        return subprocess.run(("git", *arguments), cwd=FOLDER, capture_output=True, text=True)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + ("+" if git("status", "--porcelain", "--", "*.py").stdout.strip() else "")
    except OSError:
        return None


def code() -> str:
    """A digest of the kernels' sources: what tells results of different code apart, also where there is no git."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.rglob("*.py")):
        digest.update(str(path.relative_to(FOLDER)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions(*packages: str) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def key_of(shape: Iterable[int]) -> str:
    """`(4096, 24576, 1536)` is "4096x24576x1536"."""
    return "x".join(map(str, shape))


def fields(tiles: Any) -> dict[str, int]:
    """A tile choice as JSON holds it; {} for an operation that has none."""
    return {} if tiles is None else dataclasses.asdict(tiles)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replaces the file in one step: whoever reads it, at whatever moment, sees a whole one.

    A list's items are lines of their own.
    """
    def text(value):
        if isinstance(value, list) and value:
            return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        return json.dumps(value, indent=1).replace("\n", "\n ")

    lines = ",\n ".join(f"{json.dumps(name)}: {text(value)}" for name, value in content.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_text(f"{{\n {lines}\n}}\n")
    os.replace(fresh, path)
