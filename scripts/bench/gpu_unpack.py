"""Unpack on a GPU machine what `gpu_pack.py` has packed, and print lines for the shell.

    eval "$(python3 scripts/bench/gpu_unpack.py)"

joins the pieces in `.gpu/`, checks them, and sets PYTHONPATH. Sets whose pieces are not all there
are left out. `--build-llama` compiles llama-cpp-python from its source, for CUDA where nvcc is,
with the CMake and ninja of this machine. Only the standard library is used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETS = {"packages": "all parts", "model": "embedded, llama", "llama": "embedded, llama"}
"""Which parts of gpu.py need a set."""
_CMAKE_ARGS = (
    "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native -DGGML_CUDA_NO_VMM=ON -DGGML_CUDA_NCCL=OFF "
    "-DGGML_CUDA_COMPRESSION_MODE=size -DLLAVA_BUILD=OFF"
)


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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
            if sha256(piece) != expected["sha256"]:
                sys.exit(f"{piece} is damaged. Copy it again.")
        _extract(pieces, target / name)
    return left_out


def _extract(pieces: Sequence[Path], target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as joined:
        for piece in pieces:
            joined.write(piece.read_bytes())
        joined.seek(0)
        with tarfile.open(fileobj=joined, mode="r:gz") as tar:
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
    sites = [target / name / "site" for name in SETS]
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
    """Unpack, and print the lines; remarks go to stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".gpu", help="of the pieces")
    default = Path(tempfile.gettempdir()) / "gatt-gpu"
    parser.add_argument("--to", type=Path, default=default, help="where to unpack")
    parser.add_argument("--build-llama", action="store_true", help="compile llama-cpp-python")
    options = parser.parse_args()
    left_out = unpack(options.folder, options.to)
    if options.build_llama:
        build_llama(options.to)
    print("\n".join(shell_lines(options.to)))
    for name in left_out:
        print(f"{name} is not here, which these parts need: {SETS[name]}", file=sys.stderr)


if __name__ == "__main__":
    main()
