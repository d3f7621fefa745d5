"""Training with Ray Train, on a real cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.cli import Gatt, call_gatt
from support.cluster import add_node, local_cluster
from support.training import SETTINGS, Trained, tiny_job, train_tiny

from pipeline.errors import GattError
from pipeline.files import read_jsonl
from pipeline.run_dir import RunDir
from pipeline.training.job import last_checkpoint

ray = pytest.importorskip("ray", reason="the extra [cluster]")

from pipeline.cluster.storage import Storage, choose_storage, is_used, open_storage  # noqa: E402
from pipeline.cluster.train import processes_for, train_on_ray  # noqa: E402

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

_STOP_AT = 2
_REGISTRATION_SECONDS = 6
"""Ray Train's controller looks for new checkpoints every two seconds."""
_WEIGHTS = "adapter_model.safetensors"


class TrainTiny:
    """Train the tiny model in float32; what happens at a step is up to `at_step`."""

    def __init__(self, model_dir: Path, at_step: Callable[[int], None] = lambda step: None) -> None:
        self._model_dir, self._at_step = model_dir, at_step

    def __call__(self, folder: Path, on_checkpoint: Callable[[int], None]) -> None:
        """Train, and write the losses and the adapter as a file of torch."""
        from dataclasses import replace

        import torch

        from pipeline.system import is_main_process

        def should_stop(step: int, checkpoint: Path) -> bool:
            on_checkpoint(step)
            self._at_step(step)
            return False

        assert (folder / "hello").read_text() == "Ahoy!"
        job = replace(tiny_job(self._model_dir, folder / "train"), should_stop=should_stop)
        began_at = last_checkpoint(job.checkpoint_dir)
        trained = train_tiny(job)
        if is_main_process():
            world = os.environ["WORLD_SIZE"]
            torch.save((*trained, began_at, world), folder / "train" / "trained")


def _stop(step: int) -> None:
    if step == _STOP_AT:
        time.sleep(_REGISTRATION_SECONDS)
        raise GattError("The loss of step 3 is nan.")


def _die_once(marker: Path, step: int) -> None:
    """Kill the second process at a step, the first time that it comes there."""
    if step == _STOP_AT and os.environ["RANK"] == "1" and not marker.exists():
        marker.touch()
        time.sleep(_REGISTRATION_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Run two nodes, whose processes import this module and `support`."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": paths}), local_cluster("one", "two") as nodes:
        ray.init(address=nodes.address, log_to_driver=False)
        try:
            yield nodes
        finally:
            ray.shutdown()


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return the result of one process without Ray."""
    return train_tiny(tiny_job(tiny_llama, tmp_path_factory.mktemp("single")))


def _train(work: TrainTiny, out: Path, storage: Storage) -> None:
    train_on_ray(work, {"hello": b"Ahoy!"}, out, storage=storage, batch=4)


def _check(out: Path, expected: Trained, *, began_at: int, processes: int) -> None:
    import torch

    saved = torch.load(out / "train" / "trained", weights_only=False)
    losses, adapter, *rest = saved
    assert rest == [began_at, str(processes)]
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert torch.allclose(adapter, expected.adapter, rtol=1e-5, atol=1e-6)
    assert last_checkpoint(out / "train" / "checkpoints") == SETTINGS.max_steps


@pytest.mark.slow
def test_two_processes_end_with_the_adapter_of_one(
    cluster: Cluster, tiny_llama: Path, tmp_path: Path, expected: Trained
) -> None:
    storage = open_storage((tmp_path / "storage").as_uri(), "tiny")
    _train(TrainTiny(tiny_llama), tmp_path, storage)
    _check(tmp_path, expected, began_at=0, processes=2)


@pytest.mark.slow
def test_a_process_that_dies_costs_no_more_than_the_last_steps(
    cluster: Cluster,
    tiny_llama: Path,
    tmp_path: Path,
    expected: Trained,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = TrainTiny(tiny_llama, partial(_die_once, tmp_path / "died"))
    _train(work, tmp_path, open_storage(str(tmp_path / "storage"), "tiny"))
    assert (tmp_path / "died").exists()
    assert "); going on after step 2" in capsys.readouterr().err
    _check(tmp_path, expected, began_at=_STOP_AT, processes=2)


@pytest.mark.slow
def test_it_resumes_with_another_number_of_processes(
    cluster: Cluster, tiny_llama: Path, tmp_path: Path, expected: Trained
) -> None:
    """The error of a process is the user's, in one line; a node leaves before the next attempt."""
    storage = open_storage(str(tmp_path / "storage"), "tiny")
    with pytest.raises(GattError, match=r"\): The loss of step 3 is nan\.$"):
        _train(TrainTiny(tiny_llama, _stop), tmp_path, storage)
    assert not (tmp_path / "train").exists()
    cluster.remove_node(next(iter(cluster.worker_nodes)))
    try:
        _train(TrainTiny(tiny_llama), tmp_path, storage)
    finally:
        add_node(cluster, "three")
    _check(tmp_path, expected, began_at=_STOP_AT, processes=1)


@pytest.mark.slow
def test_the_command_trains_on_a_cluster(
    cluster: Cluster, finished: RunDir, tmp_path: Path, gatt: Gatt, tiny: list[str]
) -> None:
    """Unsloth, 4 bits, held-out answers, one run folder: as `accelerate launch` in test_resume."""
    run_dir = RunDir(tmp_path / "run")
    ignored = shutil.ignore_patterns("train", "export", "evaluate", "report")
    shutil.copytree(finished.path, run_dir.path, ignore=ignored)
    place = tmp_path / "checkpoints"
    words = ("train", "--run", run_dir.path, *tiny)
    done = gatt(*words, "--ray", cluster.address, "--storage", place.as_uri())
    assert done.returncode == 0, done.stderr
    assert "train: 2 of 2 nodes" in done.stderr and "): train: steps: " in done.stderr
    losses, expected = (
        json.loads(run.losses.read_text(encoding="utf-8")) for run in (run_dir, finished)
    )
    # A hundred tokens in bfloat16; in float32 they are equal (above).
    assert losses == pytest.approx(expected, rel=3e-2)
    assert len(list(read_jsonl(run_dir.validation))) == 2
    weights, expected_weights = (
        np.concatenate([matrix.ravel() for matrix in load_file(run.adapter / _WEIGHTS).values()])
        for run in (run_dir, finished)
    )
    norms = np.linalg.norm(weights) * np.linalg.norm(expected_weights)
    assert weights @ expected_weights > 0.99 * norms
    assert [path.name for path in place.iterdir()] and not (run_dir.checkpoints / "ray").exists()
    again = gatt(*words)
    assert again.stderr.strip().endswith("train: done already")


@pytest.mark.parametrize(
    ("batch", "available", "processes"), [(4, 2, 2), (2, 3, 2), (6, 5, 3), (7, 6, 1), (8, 100, 8)]
)
def test_processes_share_a_batch_evenly(batch: int, available: int, processes: int) -> None:
    assert processes_for(batch, available) == processes


def test_storage_is_a_path_or_a_url(tmp_path: Path) -> None:
    import pyarrow.fs

    for place in (str(tmp_path), tmp_path.as_uri()):
        storage = open_storage(place, "mine")
        assert isinstance(storage.filesystem, pyarrow.fs.LocalFileSystem)
        assert storage.path == f"{tmp_path}/mine"
    in_memory = open_storage("memory://bucket/runs", "mine")  # of fsspec
    with in_memory.filesystem.open_output_stream(f"{in_memory.path}/x") as file:
        file.write(b"Ahoy!")
    info = in_memory.filesystem.get_file_info(f"{in_memory.path}/x")
    assert info.size == 5
    with pytest.raises(GattError, match=r"--storage nowhere://x: .*Expected a folder"):
        open_storage("nowhere://x", "mine")


def test_a_run_keeps_its_storage(tmp_path: Path) -> None:
    own, elsewhere = tmp_path / "own", tmp_path / "other"
    assert not is_used(own)
    first = choose_storage(own, "")
    assert is_used(own) and first.folder == str(own / "ray")
    assert choose_storage(own, "") == first
    with pytest.raises(GattError, match=rf"keeps its checkpoints in {own}/ray\. Leave --storage"):
        choose_storage(own, "s3://bucket/runs")
    second = choose_storage(elsewhere, str(tmp_path / "nfs"))
    assert second.path == f"{tmp_path}/nfs/{second.name}" and second.name != first.name
    assert choose_storage(elsewhere, "") == choose_storage(elsewhere, str(tmp_path / "nfs"))


def test_a_place_is_the_same_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = choose_storage(tmp_path / "run", "nfs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert choose_storage(tmp_path / "run", "") == first
    assert first.folder == f"{tmp_path}/nfs"


def test_a_place_that_cannot_be_written_can_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GattError, match=r"Checkpoints cannot be written to .* Name another"):
        choose_storage(tmp_path / "run", str(tmp_path / "file" / "nfs"))
    assert choose_storage(tmp_path / "run", str(tmp_path / "nfs")).folder == f"{tmp_path}/nfs"


def test_storage_needs_a_cluster(tmp_path: Path) -> None:
    done = call_gatt("train", "--run", tmp_path, "--storage", "s3://bucket/x")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == (
        "gatt: --storage s3://bucket/x needs --ray: without it, the run's folder is used."
    )
