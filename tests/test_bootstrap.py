"""The installation: which versions pip takes with and without a GPU, and how llama.cpp is built.

The resolutions are pip's own, against the index that is configured here, and the CUDA configuration
is CMake's own: both are slow. No GPU is needed.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import bootstrap
import pytest
from bootstrap import CONSTRAINTS, ROOT, LlamaBuild, choose_llama_build, llama_arguments
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.nvidia import write_nvidia_smi

from pipeline.gpu import find_nvcc

PLAIN, CUDA = LlamaBuild(), LlamaBuild(gpus="NVIDIA GeForce RTX 3060")
TORCH_VERSION = "2.13.0"
LEFT_OUT = {"torchvision", "torchao", "xformers", "wheel"}
"""Requirements of Unsloth that its CUDA branch imports only where they are installed."""
TWO_CARDS = (
    "NVIDIA GeForce RTX 4090, 580.95.05, 24564, 24000\n"
    "NVIDIA GeForce RTX 3060, 580.95.05, 12288, 11900\n"
    "NVIDIA GeForce RTX 3060, 580.95.05, 12288, 11900"
)

shell_script = pytest.mark.skipif(
    os.name == "nt", reason="the environment's Python is a shell script here"
)
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="CUDA wheels of Linux")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the only folder on PATH; it is empty, and no CUDA toolkit is anywhere else."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "cat").symlink_to(shutil.which("cat") or "")
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CUDA_HOME", "CUDA_PATH", "CUDACXX", "CMAKE_ARGS", "GATT_LLAMA_WHEEL"):
        monkeypatch.delenv(name, raising=False)
    if Path("/usr/local/cuda/bin/nvcc").exists():
        monkeypatch.setattr(bootstrap, "find_nvcc", lambda: shutil.which("nvcc") or "")
    return folder


def _add_nvcc(folder: Path) -> str:
    program = folder / "nvcc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return str(program)


def _choose(installed: LlamaBuild = PLAIN, **environment: str) -> LlamaBuild:
    return choose_llama_build(installed, environment)


def test_cuda_needs_a_card_and_a_compiler(machine: Path) -> None:
    assert _choose() == PLAIN
    _add_nvcc(machine)
    assert _choose() == PLAIN, "nvcc alone, as on a build server"
    write_nvidia_smi(machine)
    assert _choose() == CUDA
    (machine / "nvcc").unlink()
    assert _choose() == PLAIN


def test_the_cards_are_part_of_what_is_installed(machine: Path) -> None:
    _add_nvcc(machine)
    write_nvidia_smi(machine, TWO_CARDS)
    build = _choose()
    assert build.gpus == "NVIDIA GeForce RTX 3060, NVIDIA GeForce RTX 4090"
    assert llama_arguments(build, PLAIN), "a card that appears later is compiled for"
    assert llama_arguments(build, CUDA), "and another card, too"
    write_nvidia_smi(machine, "Failed to initialize NVML: Driver/library version mismatch", 18)
    assert _choose(build) == build, "a driver that waits for a restart"


def test_what_pip_is_asked_for() -> None:
    base = ["--no-deps", "-c", str(CONSTRAINTS)]
    llama = [*base, "llama-cpp-python"]
    assert llama_arguments(PLAIN, PLAIN) == []
    assert llama_arguments(CUDA, PLAIN) == [*llama, "--force-reinstall", "--no-cache-dir"]
    assert llama_arguments(CUDA, CUDA) == [*llama, "--no-cache-dir"]  # another version of it
    assert llama_arguments(PLAIN, CUDA) == [*llama, "--force-reinstall"]
    wheel = LlamaBuild(wheel="/w/llama_cpp_python-0.3.36-cp311-cp311-linux_x86_64.whl")
    assert llama_arguments(wheel, PLAIN) == [
        *base,
        wheel.wheel,
        "--force-reinstall",
        "--no-cache-dir",
    ]
    vulkan = LlamaBuild(cmake_args="-DGGML_VULKAN=on")
    assert llama_arguments(vulkan, PLAIN) == [*llama, "--force-reinstall", "--no-cache-dir"]


def test_options_of_the_user_are_added_last_and_remembered(machine: Path) -> None:
    build = _choose(CMAKE_ARGS="-DGGML_VULKAN=on -DLLAVA_BUILD=ON")
    options = bootstrap.compile_environment(build)["CMAKE_ARGS"].split()
    assert options[0] == "-DLLAVA_BUILD=OFF"
    assert options[-2:] == ["-DGGML_VULKAN=on", "-DLLAVA_BUILD=ON"]
    assert not [option for option in options if "CUDA" in option]
    assert _choose(build) == build
    assert _choose(build, CMAKE_ARGS="") == PLAIN

    compiler = _add_nvcc(machine)
    write_nvidia_smi(machine)
    cpu = _choose(CMAKE_ARGS="-DGGML_CUDA=off")
    environment = bootstrap.compile_environment(cpu)
    options = environment["CMAKE_ARGS"].split()
    assert options.index("-DGGML_CUDA=on") < options.index("-DGGML_CUDA=off")
    assert "-DCMAKE_CUDA_ARCHITECTURES=native" in options
    assert environment["CUDACXX"] == compiler


@pytest.mark.parametrize(
    ("compiler", "has_amx", "flags"),
    [
        ("g++ (GCC) 12.2.0", True, "-O3 -fno-tree-dse -fno-dse"),
        ("g++ (GCC) 12.2.0", False, "-O3"),
        ("Debian clang version 14.0.6", True, "-O3"),
    ],
)
def test_stores_of_a_tile_configuration_are_not_dropped(
    machine: Path, monkeypatch: pytest.MonkeyPatch, compiler: str, has_amx: bool, flags: str
) -> None:
    program = machine / "cxx"
    program.write_text(f"#!/bin/sh\necho '{compiler}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("CXXFLAGS", "-O3")
    monkeypatch.setattr(bootstrap, "_has_amx", lambda: has_amx)
    assert bootstrap.compile_environment(PLAIN)["CXXFLAGS"] == flags


def test_a_wheel_of_the_user(machine: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "llama_cpp_python-0.3.36-py3-none-any.whl"
    with pytest.raises(SystemExit, match=f"names no file: {wheel}"):
        _choose(GATT_LLAMA_WHEEL=str(wheel))
    wheel.touch()
    _add_nvcc(machine)
    write_nvidia_smi(machine)
    build = _choose(GATT_LLAMA_WHEEL=str(wheel))
    assert build == LlamaBuild(wheel=str(wheel))
    assert _choose(build) == build
    assert _choose(build, GATT_LLAMA_WHEEL="") == CUDA
    url = "https://host/llama_cpp_python-0.3.36-py3-none-any.whl"
    assert _choose(GATT_LLAMA_WHEEL=url).wheel == url


def test_what_is_announced(machine: Path) -> None:
    compiled = "llama.cpp is compiled from source, which takes 4 to 10 minutes the first time"
    assert bootstrap.announcement(PLAIN) == compiled
    write_nvidia_smi(machine)
    without_nvcc = bootstrap.announcement(_choose())
    assert without_nvcc.startswith(f"{compiled}.\n")
    assert "NVIDIA GeForce RTX 3060): nvcc is missing. Install the CUDA toolkit" in without_nvcc
    _add_nvcc(machine)
    assert "compiled for CUDA (NVIDIA GeForce RTX 3060)" in bootstrap.announcement(_choose())
    assert bootstrap.announcement(_choose(CMAKE_ARGS="-DGGML_CUDA=off")) == compiled


def _copy_project(folder: Path, python_script: str) -> Path:
    """Copy what installing needs; return the environment's Python, which is a shell script."""
    scripts = [f"scripts/{name}" for name in ("bootstrap.py", "demo.py", "constraints.txt")]
    for name in (*scripts, "pyproject.toml", "pipeline/__init__.py", "pipeline/gpu.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{python_script}\n")
    python.chmod(0o755)
    return python


@shell_script
def test_a_second_call_does_nothing_and_a_card_is_noticed(tmp_path: Path) -> None:
    """Run the script in a copy of the project whose Python only writes down what pip should do."""
    log = tmp_path / "log"
    python = _copy_project(tmp_path, f'echo "$*" >> {log}')
    stamp = tmp_path / ".venv/installed"
    stamp.write_text("fb89e19baf772cf8")  # of a version that wrote the hash only

    named_nothing = {"CMAKE_ARGS": "", "GATT_LLAMA_WHEEL": ""}

    def installed(path: str) -> list[str]:
        """Return what the last words of pip's command lines are."""
        log.write_text("")
        command = [sys.executable, "scripts/bootstrap.py"]
        subprocess.run(
            command, cwd=tmp_path, env=os.environ | {"PATH": path, **named_nothing}, check=True
        )
        lines = log.read_text().splitlines()
        return [line.split()[-1] for line in lines if line != "-m pip --version"]

    without_card = write_nvidia_smi(tmp_path / "none", "No devices were found", 6)
    everything = [f"{tmp_path}[dev]", bootstrap.BARE[-1]]
    assert installed(without_card) == everything, "llama.cpp is there and stays"
    assert installed(without_card) == []
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("# another requirement\n")
    assert installed(without_card) == everything

    path = write_nvidia_smi(tmp_path / "bin")
    _add_nvcc(tmp_path / "bin")
    assert installed(path) == ["--no-cache-dir", *everything]
    assert installed(path) == installed(without_card) == []
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\ncase "$*" in *dev*) exit 1;; esac\n')
    stamp.unlink()
    with pytest.raises(subprocess.CalledProcessError):
        installed(path)
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\n')
    again = log.read_text().splitlines()[1]
    assert "--force-reinstall" in again
    assert installed(path) == ["--no-cache-dir", *everything]
    assert "--force-reinstall" not in log.read_text(), "what was compiled is not compiled again"


@shell_script
def test_an_environment_without_pip_gets_it(tmp_path: Path) -> None:
    """Creation was interrupted after Python, or failed where python3-venv is missing."""
    log = tmp_path / "log"
    without_pip = f'echo "$*" >> {log}\ncase "$*" in *"pip --version") exit 1;; esac'
    python = _copy_project(tmp_path, without_pip)
    command = [sys.executable, "scripts/bootstrap.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Adding pip to .venv" in done.stdout
    assert log.read_text().splitlines()[1] == "-Im ensurepip --upgrade --default-pip"

    (tmp_path / ".venv/installed").unlink()
    python.write_text("#!/bin/sh\nexit 1\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "install python3-venv and run this again" in done.stderr


@pytest.mark.slow
def test_a_real_environment_without_pip_gets_it(tmp_path: Path) -> None:
    venv.create(tmp_path, with_pip=False)
    python = tmp_path / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    bootstrap._create_venv(tmp_path, python)
    assert subprocess.call([python, "-m", "pip", "--version"]) == 0


@shell_script
def test_the_demo_waits_for_a_training_that_saves_its_step_after_ctrl_c(tmp_path: Path) -> None:
    saves = "trap 'sleep 1; echo saved; exit 3' INT; echo started; while :; do sleep 0.1; done"
    _copy_project(tmp_path, f'case "$*" in *"pipeline run --quick") {saves};; esac')
    command = [sys.executable, "scripts/demo.py", "--quick"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as demo:
        assert demo.stdout
        assert "started\n" in iter(demo.stdout.readline, "")
        os.killpg(demo.pid, signal.SIGINT)  # as a terminal does
        assert demo.stdout.read() == "saved\n"
    assert demo.returncode == 3


def test_the_stamp(tmp_path: Path) -> None:
    stamp = tmp_path / "installed"
    assert bootstrap.read_stamp(stamp) == ("", PLAIN)
    build = replace(CUDA, cmake_args="-DGGML_CUDA_FORCE_MMQ=on")
    bootstrap.write_stamp(stamp, "abc", build)
    assert bootstrap.read_stamp(stamp) == ("abc", build)
    for older in ("fb89e19baf772cf8", "1234", "{}", '{"requirements": "a", "llama": {"x": 1}}'):
        stamp.write_text(older)
        assert bootstrap.read_stamp(stamp) == ("", PLAIN), older


def test_the_constraints_leave_to_pytorch_what_its_build_decides() -> None:
    names = {line.partition("==")[0] for line in CONSTRAINTS.read_text().splitlines()}
    assert "torch" in names
    assert not [name for name in names if name.startswith(("triton", "nvidia", "cuda"))]


def _wheel(folder: Path, version: str) -> Path:
    """Write a wheel of llama-cpp-python that has no library."""
    name = f"llama_cpp_python-{version}"
    file = folder / f"{name}-py3-none-any.whl"
    information = f"{name}.dist-info"
    parts = {
        "llama_cpp/__init__.py": f"build = {version!r}\n",
        f"{information}/METADATA": (
            f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n"
        ),
        f"{information}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(file, "w") as archive:
        for path, text in parts.items():
            archive.writestr(path, text)
        record = "".join(f"{path},,\n" for path in [*parts, f"{information}/RECORD"])
        archive.writestr(f"{information}/RECORD", record)
    return file


def _pip(python: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_pip_takes_the_wheel_and_leaves_it_there(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / ("venv/Scripts/python.exe" if os.name == "nt" else "venv/bin/python")
    build = LlamaBuild(wheel=str(_wheel(tmp_path, "0.3.36+cu130")))
    done = _pip(python, *llama_arguments(build, PLAIN))
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        [python, "-c", "import llama_cpp; print(llama_cpp.build)"], capture_output=True, text=True
    )
    assert shown.stdout.strip() == "0.3.36+cu130", shown.stderr
    again = _pip(python, "--no-deps", "-c", str(CONSTRAINTS), "llama-cpp-python==0.3.36")
    assert "already satisfied" in again.stdout

    other = LlamaBuild(wheel=str(_wheel(tmp_path, "0.3.35")))
    refused = _pip(python, *llama_arguments(other, build))
    assert refused.returncode == 1
    assert "llama-cpp-python==0.3.36" in refused.stderr + refused.stdout


def _resolve(tmp_path: Path, *requirements: str) -> dict[str, str]:
    """Return the version of every package that pip would install into an empty environment."""
    report = tmp_path / "report.json"
    flags = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
    done = _pip(sys.executable, *flags, "-c", str(CONSTRAINTS), f"{ROOT}[dev]", *requirements)
    if "No matching distribution found for torch===" in done.stderr:
        pytest.skip(f"This index has no {requirements[0]}")
    assert done.returncode == 0, done.stderr
    packages = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {canonicalize_name(package["name"]): package["version"] for package in packages}


def _missing_for_unsloth(versions: dict[str, str]) -> list[str]:
    """Return the requirements of Unsloth that `versions` do not meet."""
    installed_without = {bare.partition("==")[0] for bare in bootstrap.BARE}
    requirements = [
        Requirement(text)
        for package in ("unsloth", "unsloth_zoo")
        for text in metadata.requires(package) or []
    ]
    missing = []
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT or requirement.name in installed_without:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if name not in versions or not requirement.specifier.contains(versions[name]):
            missing.append(str(requirement))
    return missing


@linux_only
@pytest.mark.slow
def test_the_default_index_resolves_for_cuda(tmp_path: Path) -> None:
    # === leaves out local versions, such as 2.13.0+cpu of PyTorch's own index.
    versions = _resolve(tmp_path, f"torch==={TORCH_VERSION}")
    assert versions["torch"] == TORCH_VERSION
    assert versions["triton"] == "3.7.1"
    assert versions["nvidia-cublas"].startswith("13.")
    assert _missing_for_unsloth(versions) == []


@linux_only
@pytest.mark.slow
def test_the_cpu_build_resolves(tmp_path: Path) -> None:
    versions = _resolve(tmp_path, f"torch==={TORCH_VERSION}+cpu")
    assert versions["torch"] == f"{TORCH_VERSION}+cpu"
    assert "triton" in versions  # cut_cross_entropy imports it
    assert not [name for name in versions if name.startswith("nvidia")]
    assert _missing_for_unsloth(versions) == []


def _llama_source(tmp_path: Path) -> Path:
    """Return llama-cpp-python's source in the version that is installed."""
    arguments = ["download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(tmp_path)]
    command = [sys.executable, "-m", "pip", *arguments, "-c", str(CONSTRAINTS), "llama-cpp-python"]
    subprocess.run(command, check=True)
    archive = next(tmp_path.glob("llama_cpp_python-*.tar.gz"))
    with tarfile.open(archive) as content:
        content.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz")


def _cublas(tmp_path: Path) -> Path:
    """Return a folder with cuBLAS from NVIDIA's wheel, named as CMake looks for it."""
    arguments = ["download", "-q", "--no-deps", "-d", str(tmp_path), "nvidia-cublas<14"]
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)
    wheel = next(tmp_path.glob("nvidia_cublas-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "cublas")
    wheel.unlink()
    folder = tmp_path / "cublas/nvidia/cu13"
    for library in folder.glob("lib/libcublas*.so.13"):
        library.with_suffix("").symlink_to(library.name)
    return folder


def _has_cublas(nvcc: str) -> bool:
    return (Path(nvcc).resolve().parent.parent / "include/cublas_v2.h").exists()


@linux_only
@pytest.mark.slow
@pytest.mark.skipif(not find_nvcc(), reason="no nvcc here")
def test_llama_cpp_configures_for_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No card is here: its architecture cannot be asked for ("native"), nor its driver linked.
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_CUDA_ARCHITECTURES=86 -DGGML_CUDA_NO_VMM=on")
    monkeypatch.setenv("PATH", write_nvidia_smi(tmp_path / "bin"))
    build = choose_llama_build(PLAIN, os.environ)
    assert build.gpus == CUDA.gpus
    environment = bootstrap.compile_environment(build)
    if not _has_cublas(find_nvcc()):
        environment["CMAKE_PREFIX_PATH"] = str(_cublas(tmp_path))
    options: Sequence[str] = shlex.split(environment["CMAKE_ARGS"])
    source = _llama_source(tmp_path)
    done = subprocess.run(
        ["cmake", "-S", source, "-B", tmp_path / "build", *options],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "Including CUDA backend" in done.stdout
    assert "Using CMAKE_CUDA_ARCHITECTURES=86" in done.stdout
    cache = (tmp_path / "build/CMakeCache.txt").read_text()
    assert "GGML_CUDA:BOOL=on" in cache and "LLAVA_BUILD:BOOL=OFF" in cache
    shutil.rmtree(tmp_path)  # 2 GB
