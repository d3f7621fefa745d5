"""The training loop on a random miniature: parts of a step, too little memory, several processes, and going on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import GattError
from pipeline.recipe import Train
from pipeline.recipe_file import load_recipe
from pipeline.stages.train import mixed
from pipeline.training import trainer
from pipeline.training.examples import IGNORE_INDEX, TrainingExample
from pipeline.training.trainer import micro_batches, train_loop
from pipeline.training.unsloth import continue_from

_SETTINGS = Train(max_steps=3, batch_size=4, learning_rate=1e-2, save_steps=1)


def _examples() -> list[TrainingExample]:
    """Dialogues of different lengths, the second half of each learned and in part distilled."""
    found = []
    for n in range(8):
        ids = [(7 * n + 11 * place) % 250 + 3 for place in range(12 + 3 * n)]
        half = len(ids) // 2
        labels = [IGNORE_INDEX] * half + ids[half:]
        weights = [0.0] * half + [1.0 + 0.1 * n] * (len(ids) - half)
        found.append(
            TrainingExample(
                ids,
                labels,
                weights,
                ids[2:],
                [(place, place - 2) for place in range(half, len(ids) - 3)],
            )
        )
    return found


def _network(folder: Path) -> Any:
    """The miniature with a fresh adapter."""
    import peft
    import torch
    import transformers

    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))


def _trained(
    folder: Path, checkpoints: Path, settings: Train = _SETTINGS
) -> tuple[list[float], Any]:
    """The losses, and the adapter as one vector."""
    import torch

    network = _network(folder)
    losses = train_loop(network, 0, _examples(), settings, 1, checkpoints, lambda step: None)
    return losses, torch.cat(
        [p.detach().flatten() for p in network.parameters() if p.requires_grad]
    )


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], Any]:
    """Each step at once."""
    return _trained(tiny_llama, tmp_path_factory.mktemp("whole"))


def test_a_step_in_parts_is_the_same_step(
    tiny_llama: Path, tmp_path: Path, whole: tuple[list[float], Any]
) -> None:
    losses, adapter = _trained(tiny_llama, tmp_path, _SETTINGS.model_copy(update={"tokens": 40}))
    assert losses == pytest.approx(whole[0], rel=1e-5)
    assert adapter.tolist() == pytest.approx(whole[1].tolist(), abs=1e-5)


def test_out_of_memory_goes_on_in_smaller_parts(
    tiny_llama: Path,
    tmp_path: Path,
    whole: tuple[list[float], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    real, sizes = trainer.gatt_loss, []

    def tight(model: Any, batch: dict[str, Any], *more: Any) -> Any:
        sizes.append(tuple(batch["input_ids"].shape))
        loss = real(model, batch, *more)
        if batch["input_ids"].numel() > 60:
            loss.backward()  # what an interrupted step has left of its gradients must not count
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
            )
        return loss

    monkeypatch.setattr(trainer, "gatt_loss", tight)
    losses, adapter = _trained(tiny_llama, tmp_path)
    assert losses == pytest.approx(whole[0], rel=1e-5)
    assert adapter.tolist() == pytest.approx(whole[1].tolist(), abs=1e-5)
    assert sizes[0][0] == 4 and sizes[-1][0] < 4
    assert "out of memory; going on with at most" in capsys.readouterr().err


def test_one_dialogue_that_does_not_fit_is_an_error(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(trainer, "gatt_loss", never)
    with pytest.raises(GattError, match=r"Too little memory to train on a dialogue of \d+ tokens"):
        _trained(tiny_llama, tmp_path)


def test_a_run_goes_on_as_if_it_had_not_been_cut(
    tiny_llama: Path, tmp_path: Path, whole: tuple[list[float], Any]
) -> None:
    class Cut(Exception):
        pass

    def cut(step: trainer.Step) -> None:
        if step.number == 3:
            raise Cut

    with pytest.raises(Cut):
        train_loop(_network(tiny_llama), 0, _examples(), _SETTINGS, 1, tmp_path, cut)
    assert trainer.last_checkpoint(tmp_path) == 2
    losses, adapter = _trained(tiny_llama, tmp_path)
    assert losses == pytest.approx(whole[0], rel=1e-6)
    assert adapter.tolist() == pytest.approx(whole[1].tolist(), abs=1e-6)


def test_training_goes_on_from_an_adapter(
    tiny_llama: Path, tiny_adapter: Path, tmp_path: Path
) -> None:
    import peft

    network = _network(tiny_llama)
    continue_from(network, tiny_adapter)
    theirs = peft.load_peft_weights(str(tiny_adapter), device="cpu")
    ours = peft.get_peft_model_state_dict(network)
    assert ours.keys() == theirs.keys() and all(
        bool((ours[name] == theirs[name]).all()) for name in ours
    )
    wider = peft.get_peft_model(network.unload(), peft.LoraConfig(r=8, target_modules="all-linear"))
    with pytest.raises(
        GattError, match=r"of another rank, other targets or another base .* Set train.rank"
    ):
        continue_from(wider, tiny_adapter)
    with pytest.raises(GattError, match=r"no adapter_model.safetensors in"):
        continue_from(network, tmp_path)


def test_own_chats_are_mixed_in_by_their_share(tmp_path: Path) -> None:
    chats = tmp_path / "mine.jsonl"
    one = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    }
    chats.write_text("".join(json.dumps(one) + "\n" for _ in range(30)), encoding="utf-8")
    recipe = load_recipe(None, (f"train.replay_data={chats}", "train.replay_ratio=0.2"))
    assert len(mixed(recipe, 80)) == 20  # 20 of 100
    assert len(mixed(recipe, 800)) == 30  # all there are
    chats.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n', encoding="utf-8")
    with pytest.raises(GattError, match="line 1: expected at least one answer"):
        mixed(recipe, 80)


def test_a_step_is_done_in_parts_that_have_room() -> None:
    rows = [
        {"input_ids": [1] * n, "asked_ids": [1] * asked, "n": n}
        for n, asked in ((300, 0), (100, 0), (90, 110), (500, 0))
    ]

    def lengths(tokens: int) -> list[list[int]]:
        return [[row["n"] for row in part] for part in micro_batches(rows, tokens)]

    assert lengths(0) == [[100, 90, 300, 500]]
    assert lengths(400) == [[100, 90], [300], [500]]  # one that is too long by itself is a part
    assert lengths(2000) == [[100, 90, 300, 500]]


_SHARED = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from test_trainer import _trained
losses, adapter = _trained(Path({folder!r}), Path({checkpoints!r}))
torch.save((losses, adapter), {out!r})
"""


def test_it_stops_when_that_is_enough(
    tiny_llama: Path, tmp_path: Path, whole: tuple[list[float], Any]
) -> None:
    asked = []

    def enough(step: int, folder: Path) -> bool:
        asked.append(step)
        return (folder / "adapter_model.safetensors").exists() and step == 2

    losses = train_loop(
        _network(tiny_llama), 0, _examples(), _SETTINGS, 1, tmp_path, lambda step: None, enough
    )
    assert asked == [1, 2]
    assert losses == pytest.approx(whole[0][:2])


def test_what_was_computed_is_counted(tiny_llama: Path, tmp_path: Path) -> None:
    seen: list[trainer.Step] = []
    settings = _SETTINGS.model_copy(update={"steps": 2, "tokens": 40})
    train_loop(_network(tiny_llama), 0, _examples(), settings, 1, tmp_path, seen.append)
    lengths = [len(e.input_ids) for e in _examples()]  # two steps of four are all of them
    assert seen[-1].learned == sum(n - n // 2 for n in lengths)
    assert seen[-1].computed - seen[-1].padding == sum(n + n - 2 for n in lengths)
    assert 0 < seen[-1].padding < 20
    assert [s.number for s in seen] == [1, 2] and 0 < seen[0].seconds < seen[1].seconds
    assert seen[-1].memory > 1e8 and seen[-1].learning_rate > 0


def test_two_processes_share_a_step(
    tiny_llama: Path, tmp_path: Path, whole: tuple[list[float], Any]
) -> None:
    import torch

    script, out = tmp_path / "shared.py", tmp_path / "out"
    tests = str(Path(__file__).parent)
    script.write_text(
        _SHARED.format(
            tests=tests, folder=str(tiny_llama), checkpoints=str(tmp_path / "c"), out=str(out)
        ),
        encoding="utf-8",
    )
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        script,
    ]
    done = subprocess.run(
        [str(word) for word in launch], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    losses, adapter = torch.load(out, weights_only=False)
    assert losses == pytest.approx(whole[0], rel=1e-5)
    assert adapter.tolist() == pytest.approx(whole[1].tolist(), abs=1e-5)
