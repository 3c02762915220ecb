"""A release: ``python _build/release.py --out whl`` builds the wheels of every architecture and lays out an index.

    whl/cpu/bitdecoding/index.html              one wheel without kernels
    whl/cu12/sm90a/bitdecoding/index.html       one wheel per toolkit and architecture
    whl/index.json                              all wheels: size, SHA-256, kernels

Each of these folders is an index as pip wants it (PEP 503), on any static file server, or as it lies on the disk:
``pip install bitdecoding --extra-index-url <address>/whl/cu12/sm90a/``. Needs neither a GPU nor a CUDA toolkit, but an
index with the build requirements; these go into a virtual environment that all wheels are built in.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import quote

from wheel_version import ARCHS, TOOLKITS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKS = "bitdecoding/lib/packs/"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="build the wheels of a release and an index of them")
    parser.add_argument("--out", type=Path, default=Path("whl"), help="folder of the index (default: whl)")
    parser.add_argument("--arch", nargs="+", choices=("cpu", *ARCHS), default=("cpu", *ARCHS), help="default: all")
    parser.add_argument("--cuda", choices=TOOLKITS, default=TOOLKITS[0], help="toolkit that compiles the kernels")
    parser.add_argument(
        "--python", type=Path, help="an interpreter that has the build requirements, instead of a new one"
    )
    parser.add_argument("--keep", type=Path, help="folder for what is built on the way; a later call goes on from there")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.keep or Path(scratch)
        python = args.python or make_environment(work / "venv", args.cuda)
        for arch in args.arch:
            folder = args.out / ("cpu" if arch == "cpu" else f"{args.cuda}/{arch}")
            wheel = build(python, arch, args.cuda, folder, work / "build")
            print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    write_index(args.out)
    return 0


def make_environment(folder: Path, cuda: str) -> Path:
    """A virtual environment with the build requirements, made where it is missing -> its interpreter."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    overrides = project["tool"]["scikit-build"]["overrides"]
    wanted = [*project["build-system"]["requires"], "cmake", "ninja", "pip"]
    wanted += [
        each
        for o in overrides
        if o["if"]["env"].get("BITDECODING_CUDA", cuda) == cuda
        for each in o["build"]["requires"]
    ]
    venv.create(folder, with_pip=True)
    run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *wanted], {})
    return python


def build(python: Path, arch: str, cuda: str, folder: Path, build_dir: Path) -> Path:
    """One wheel into ``folder``/bitdecoding, whose others are removed."""
    folder = folder / "bitdecoding"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", folder]
    run([*command, "-C", f"build-dir={build_dir}", ROOT], {"BITDECODING_ARCH": arch, "BITDECODING_CUDA": cuda})
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(command: list[object], environment: dict[str, str]) -> None:
    search = os.pathsep.join([str(Path(str(command[0])).parent), os.environ.get("PATH", "")])  # cmake, patchelf
    subprocess.run([str(word) for word in command], check=True, env=os.environ | {"PATH": search} | environment)


def write_index(out: Path) -> None:
    """The pages of every folder that has wheels, and index.json."""
    facts = []
    for folder in sorted({wheel.parent for wheel in out.rglob("*.whl")}):
        links = []
        for wheel in sorted(folder.glob("*.whl")):
            fact = describe(wheel)
            facts.append({"path": wheel.relative_to(out).as_posix(), **fact})
            requires = html.escape(fact["requires_python"])
            address = f"{quote(wheel.name)}#sha256={fact['sha256']}"
            links.append(f'<a href="{address}" data-requires-python="{requires}">{wheel.name}</a>')
        (folder / "index.html").write_text(page(links))
        (folder.parent / "index.html").write_text(page([f'<a href="{folder.name}/">{folder.name}</a>']))
    (out / "index.json").write_text(json.dumps(facts, indent=1) + "\n")


def page(links: list[str]) -> str:
    head = '<!DOCTYPE html>\n<html><head><meta name="pypi:repository-version" content="1.0"></head><body>\n'
    return head + "".join(f"{link}<br>\n" for link in links) + "</body></html>\n"


def describe(wheel: Path) -> dict[str, object]:
    """Facts of a wheel, those of its kernels from the manifests in it."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        headers = HeaderParser().parsestr(archive.read(metadata).decode())
        packs = [json.loads(archive.read(n)) for n in sorted(names) if n.startswith(PACKS) and n.endswith(".json")]
    return {
        "version": headers["Version"],
        "requires_python": headers["Requires-Python"],
        "bytes": wheel.stat().st_size,
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "packs": [
            {key: pack[key] for key in ("arch", "dsl", "toolkit", "source_digest")} | {"kernels": len(pack["kernels"])}
            for pack in packs
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
