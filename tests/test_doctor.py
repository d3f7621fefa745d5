"""`gatt doctor` and the remark before training: which GPU is there, and why it is not used.

No GPU is needed: the driver's list comes from an executable `nvidia-smi` on PATH.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import Gatt, call_gatt
from support.nvidia import RTX_3060, write_nvidia_smi

from pipeline import gpu
from pipeline.errors import GattError
from pipeline.gpu import NvidiaGpu, NvidiaSmi, build_problem, card_problem
from pipeline.run_dir import RunDir
from pipeline.stages.doctor import llama_text
from pipeline.training import backend, unsloth
from pipeline.training.cpu.precision import has_bfloat16

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nvidia-smi is a shell script here")

CARD = NvidiaGpu(
    name="NVIDIA GeForce RTX 3060",
    driver="550.54.14",
    total_bytes=12288 * 2**20,
    free_bytes=11900 * 2**20,
)
CPU_INFO = "works on the CPU (CPU : SSE3 = 1 | AVX2 = 1 | OPENMP = 1)"
CUDA_INFO = "works with GPU offload (CUDA : ARCHS = 860 | USE_GRAPHS = 1 | CPU : AVX2 = 1)"
METAL_INFO = "works with GPU offload (MTL : EMBED_LIBRARY = 1 | CPU : NEON = 1)"


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an `nvidia-smi` that lists an RTX 3060 on PATH."""
    monkeypatch.setenv("PATH", write_nvidia_smi(tmp_path / "bin"))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that what a command sets is taken back


def _without_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *programs: str) -> None:
    """Let PATH have `programs` only."""
    folder = tmp_path / "only"
    folder.mkdir()
    for program in programs:
        (folder / program).symlink_to(shutil.which(program) or "")
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        (RTX_3060, 0, NvidiaSmi([CARD], "")),
        (f"{RTX_3060}\n{RTX_3060}\n", 0, NvidiaSmi([CARD, CARD], "")),
        (
            "NVIDIA GB10, 580.95.05, [N/A], [N/A]",  # shares the computer's memory
            0,
            NvidiaSmi(
                [NvidiaGpu(name="NVIDIA GB10", driver="580.95.05", total_bytes=0, free_bytes=0)], ""
            ),
        ),
        ("No devices were found", 6, NvidiaSmi([], "")),
        ("", 9, NvidiaSmi([], "exit status 9")),
        (
            "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580",
            18,
            NvidiaSmi([], "Failed to initialize NVML: Driver/library version mismatch"),
        ),
    ],
)
def test_the_cards_that_the_driver_lists(
    output: str, status: int, expected: NvidiaSmi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", write_nvidia_smi(tmp_path, output, status))
    assert gpu.query_nvidia_smi() == expected


def test_no_driver_is_no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_card(tmp_path, monkeypatch)
    assert gpu.query_nvidia_smi() == NvidiaSmi([], "")
    assert gpu.pytorch_problem() == ""


@pytest.mark.parametrize(
    ("driver", "version", "cuda", "problem"),
    [
        ("580.65.06", "2.13.0+cu130", "13.0", ""),
        ("550.54.14", "2.13.0+cu126", "12.6", ""),
        ("[N/A]", "2.13.0+cu130", "13.0", ""),
        (
            "575.51.03",
            "2.13.0+cu130",
            "13.0",
            "PyTorch 2.13.0+cu130 is built for CUDA 13.0, which needs driver 580 or newer; "
            "575.51.03 is installed. Update the driver, or install a PyTorch build for CUDA 12.",
        ),
        (
            "390.157",
            "2.13.0+cu126",
            "12.6",
            "PyTorch 2.13.0+cu126 is built for CUDA 12.6, which needs driver 525 or newer; "
            "390.157 is installed. Update the driver.",
        ),
    ],
)
def test_a_driver_that_is_too_old(driver: str, version: str, cuda: str, problem: str) -> None:
    card = NvidiaGpu(name="Card", driver=driver, total_bytes=0, free_bytes=0)
    assert build_problem(card, version, cuda) == problem


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the index has no CUDA build")
def test_a_build_without_cuda() -> None:
    problem = build_problem(CARD, "2.13.0+cpu", None)
    assert problem == (
        "PyTorch 2.13.0+cpu is built without CUDA. Install the CUDA build: "
        "`pip install torch===2.13.0`. CUDA 13 needs driver 580; 550.54.14 is installed."
    )
    newer = NvidiaGpu(name="Card", driver="590.1", total_bytes=0, free_bytes=0)
    assert build_problem(newer, "2.13.0+cpu", None).endswith("`pip install torch===2.13.0`.")


def test_a_card_that_is_too_old() -> None:
    architectures = ["sm_75", "sm_80", "sm_90a", "sm_100", "sm_120", "compute_120"]
    assert card_problem("2.13.0", (7, 5), architectures) == ""
    assert card_problem("2.13.0", (12, 0), architectures) == ""
    problem = card_problem("2.13.0+cu130", (6, 1), architectures)
    assert "compute capability 6.1; PyTorch 2.13.0+cu130 is compiled for 7.5 and newer" in problem


@pytest.mark.usefixtures("card")
def test_doctor_names_the_card_and_what_is_missing(gatt: Gatt) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("PyTorch uses a GPU here")
    done = gatt("doctor")  # in a process of its own: libraries complain when they are imported
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()[:12]
    assert "kernels" not in done.stdout
    rows = {line[:10].strip(): line[11:] for line in lines if line[:1].strip()}
    trains = "bfloat16" if has_bfloat16() else "float32: it has no instructions for bfloat16"
    assert rows["CPU"].endswith(f" cores, PyTorch trains in {trains}")
    assert rows["GPU"] == (
        "NVIDIA GeForce RTX 3060, 12.9 GB, 12.5 GB free, driver 550.54.14; PyTorch cannot use it"
    )
    assert rows["Triton"] == "can compile (C compiler and Python.h)"
    assert rows["llama.cpp"].startswith("CPU build, ")
    remarks = [line.strip() for line in lines if line.startswith(" ")]
    assert f"PyTorch {torch.__version__} is built" in remarks[0]
    assert "scripts/bootstrap.py" in remarks[1]


@pytest.mark.parametrize(
    ("output", "remark"),
    [
        ("No devices were found", None),
        ("Failed to initialize NVML", "nvidia-smi reports: Failed to initialize NVML"),
    ],
)
def test_doctor_on_a_driver_that_lists_nothing(
    output: str, remark: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", write_nvidia_smi(tmp_path, output, 6))
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    shown = call_gatt("doctor").stdout
    assert "none that PyTorch can use" in shown and "Triton" not in shown
    assert ("nvidia-smi reports" in shown) == (remark is not None)
    assert (remark or "") in shown


@pytest.mark.parametrize(
    ("info", "card", "nvcc", "expected"),
    [
        (CPU_INFO, False, False, f"CPU build, {CPU_INFO}"),
        (CUDA_INFO, True, True, f"CUDA build, {CUDA_INFO}"),
        (METAL_INFO, False, False, f"Metal build, {METAL_INFO}"),
        (
            CPU_INFO,
            True,
            True,
            f"CPU build, {CPU_INFO}\n"
            "`python3 scripts/bootstrap.py` compiles it for the NVIDIA card.",
        ),
        (
            CPU_INFO,
            True,
            False,
            f"CPU build, {CPU_INFO}\n"
            "For the NVIDIA card, install the CUDA toolkit (nvcc) or set GATT_LLAMA_WHEEL, then "
            "run `python3 scripts/bootstrap.py`.",
        ),
    ],
)
def test_which_build_of_llama_cpp(
    info: str, card: bool, nvcc: bool, expected: str, tmp_path: Path
) -> None:
    compiler = str(tmp_path / "nvcc") if nvcc else ""
    assert llama_text(info, has_nvidia_gpu=card, nvcc=compiler) == expected


def test_triton_needs_a_compiler_and_the_headers_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert gpu.compiler_problem() == ""
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert gpu.compiler_problem().startswith("Python.h is missing.")
    _without_card(tmp_path, monkeypatch)
    assert gpu.compiler_problem().startswith("no C compiler (gcc).")
    monkeypatch.setenv("CC", "/no/such/cc")
    assert "/no/such/cc" in gpu.compiler_problem()


def test_the_memory_of_a_card_is_not_fragmented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("platform.release", lambda: "6.1.0-18-amd64")
    monkeypatch.setenv("PATH", write_nvidia_smi(tmp_path / "bin"))
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert gpu.allocator_settings() == (expected if sys.platform == "linux" else {})
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:128")
            assert gpu.allocator_settings() == {}
    with monkeypatch.context() as patch:  # WSL, where expandable segments fail
        patch.setattr("platform.release", lambda: "5.15.167.4-microsoft-standard-WSL2")
        assert gpu.allocator_settings() == {}
    _without_card(tmp_path, monkeypatch)
    assert gpu.allocator_settings() == {}


def test_the_command_sets_the_allocator_before_torch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", write_nvidia_smi(tmp_path / "bin"))
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    program = (
        "import os, sys\nfrom pipeline.cli import main\nsys.argv = ['gatt', '--help']\n"
        "try:\n    main()\nfinally:\n"
        "    print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (
        done.stdout.splitlines()[-1]
        == f"{gpu.allocator_settings().get('PYTORCH_ALLOC_CONF')} False"
    )


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_training_on_the_cpu_beside_a_card_is_said_once(
    rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("PyTorch uses a GPU here")
    monkeypatch.setenv("RANK", rank)
    backend.report_unused_gpu.cache_clear()
    assert backend.choose_backend() is backend.choose_backend() is unsloth
    backend.report_unused_gpu.cache_clear()
    remarks = capsys.readouterr().err.splitlines()
    assert len(remarks) == lines
    for remark in remarks:
        assert remark.startswith(
            "train: the GPU is not used, the CPU trains. NVIDIA GeForce RTX 3060: PyTorch "
            f"{torch.__version__} is built "
        )


def test_no_training_on_a_card_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch says of a GTX 1080; nothing here runs on a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (6, 1))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_75", "sm_86"])
    backend.report_unused_gpu.cache_clear()
    with pytest.raises(GattError, match=r"capability 6\.1; PyTorch \S+ is compiled for 7\.5"):
        backend.choose_backend()


@pytest.mark.slow
def test_gatt_train_says_it_on_the_terminal(
    finished: RunDir, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    run = tmp_path / "run"
    ignored = shutil.ignore_patterns("train", "export", "evaluate", "report")
    shutil.copytree(finished.path, run, ignore=ignored)
    environment = os.environ | {"PATH": write_nvidia_smi(tmp_path / "bin")}
    done = gatt("train", "--run", run, *tiny, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("train: the GPU is not used, the CPU trains.") == 1
    assert "the GPU is not used" not in (run / "train/unsloth.log").read_text()
