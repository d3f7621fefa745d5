"""Every setting of PEFT's `LoraConfig`: the merge equals PEFT's, or is refused by the name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import peft
import pytest
from peft.tuners.lora.config import LoraRuntimeConfig, MontecloraConfig, VeloraConfig
from support.adapters import (
    Adapted,
    assert_close,
    change_settings,
    gguf_weights,
    make_adapter,
    save_merged,
)
from support.families import save_family
from support.shared import make_once

from pipeline.errors import GattError
from pipeline.export.verify import load_and_predict
from pipeline.gguf.adapter import missing_from_gguf, write_adapter
from pipeline.gguf.checkpoint_writer import write_checkpoint
from pipeline.gguf.lora.settings import FOLLOWED, REFUSED, WITHOUT_EFFECT
from pipeline.gguf.lora.weights import read_adapter
from pipeline.gguf.merge import open_base
from pipeline.hub.convert import write_formats
from pipeline.hub.models import Model
from pipeline.inference.logits import mean_kl

_REASONS = {**REFUSED, "peft_type": "'LORA' expected", "init_lora_weights": "changes the base"}


class Case(NamedTuple):
    """A setting that is not at its default, with others that it needs.

    PEFT trains with it, unless it is only `edited` into a saved adapter's configuration. `error` is
    what the refusal says besides the name, "" where the merge must equal PEFT's."""

    name: str
    settings: dict[str, object]
    edited: bool = False
    error: str = ""


def _merged(**settings: object) -> Case:
    """Return a case with the first of `settings` as its subject."""
    return Case(next(iter(settings)), settings)


def _edited(**settings: object) -> Case:
    return Case(next(iter(settings)), settings, edited=True)


def _refused(**settings: object) -> Case:
    name = next(iter(settings))
    return Case(name, settings, edited=True, error=_REASONS[name])


CASES = (
    _merged(task_type="CAUSAL_LM"),
    _refused(peft_type="ADALORA"),
    _edited(auto_mapping={"base_model_class": "Qwen2ForCausalLM"}),
    _edited(peft_version="0.9"),
    _edited(base_model_name_or_path="owner/name"),
    _edited(revision="main"),
    _merged(inference_mode=True),
    _merged(r=2),
    _merged(target_modules=["q_proj", "down_proj"]),
    _merged(target_modules=r".*\.1\.mlp\.(up|gate)_proj"),
    _merged(target_modules=["lm_head", "embed_tokens", "v_proj"]),
    _merged(exclude_modules=["k_proj"]),
    _merged(lora_alpha=3),
    _merged(lora_dropout=0.1),
    _merged(fan_in_fan_out=True),
    _merged(bias="all"),
    _merged(bias="lora_only"),
    _merged(use_rslora=True),
    _merged(modules_to_save=["embed_tokens", "lm_head"]),
    _merged(modules_to_save=["norm", "input_layernorm"]),
    _merged(modules_to_save=["k_proj"], target_modules=["q_proj"]),
    *(_merged(init_lora_weights=init) for init in (False, "gaussian", "orthogonal", "eva", "mica")),
    *(_merged(init_lora_weights=init) for init in ("pissa", "olora")),
    _merged(init_lora_weights="pissa", use_dora=True),
    _merged(init_lora_weights="olora", use_rslora=True, lora_alpha=3),
    *(
        _refused(init_lora_weights=init)
        for init in ("pissa_niter_4", "corda", "loftq", "lora_ga", "of the future")
    ),
    _merged(layers_to_transform=[1], target_modules=["q_proj"]),
    _merged(layers_pattern="layers", layers_to_transform=[0], target_modules=["q_proj"]),
    _merged(rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 3}),
    _merged(rank_pattern={"proj": 2, "0.self_attn.q_proj": 6}, use_rslora=True),
    _merged(alpha_pattern={"^model.layers.0.mlp.up_proj": 2, "o_proj": 64}),
    _merged(alpha_pattern={r".*proj": 2.5}, rank_pattern={"k_proj": 1}),
    _refused(megatron_config={"tensor_model_parallel_size": 2}),
    _merged(megatron_core="other.core"),
    _merged(trainable_token_indices=[3, 300]),
    _merged(trainable_token_indices={"embed_tokens": [3, 300], "lm_head": [7]}),
    _edited(loftq_config={"loftq_bits": 4}),
    _edited(eva_config={"rho": 2.0}),
    _edited(corda_config={"corda_method": "ipm"}),
    _edited(lora_ga_config={"direction": "ArB2r"}),
    _merged(use_dora=True),
    _merged(velora_config=VeloraConfig(num_groups=4)),
    _refused(alora_invocation_tokens=[5, 6]),
    _refused(use_qalora=True),
    _merged(qalora_group_size=8),
    _merged(monteclora_config=MontecloraConfig()),
    _refused(layer_replication=[[0, 2], [1, 2]]),
    _merged(runtime_config=LoraRuntimeConfig(ephemeral_gpu_offload=True)),
    _refused(lora_bias=True),
    _refused(target_parameters=["mlp.experts.gate_up_proj"]),
    _refused(use_bdlora={"nblocks": 2}),
    _refused(arrow_config={"top_k": 3}),
    _refused(kasa_config={"beta": 1e-4}),
    _merged(ensure_weight_tying=True),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Qwen 2 in miniature, which has biases and an output of its own."""
    return make_once(tmp_path_factory, "adapters-qwen2", lambda to: save_family("qwen2", to))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Llama in miniature whose output is its embedding."""
    return make_once(tmp_path_factory, "adapters-tied", lambda to: save_family("smollm2", to))


def test_every_setting_of_peft_is_known_and_tried() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert {case.name for case in CASES} == fields
    assert FOLLOWED | WITHOUT_EFFECT | REFUSED.keys() == fields
    assert len(FOLLOWED) + len(WITHOUT_EFFECT) + len(REFUSED) == len(fields)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.settings)[:60])
def test_a_setting_is_merged_as_peft_does_or_refused_by_name(
    case: Case, base: Path, tmp_path: Path
) -> None:
    made = make_adapter(base, tmp_path / "adapter", {} if case.edited else case.settings)
    if case.edited:
        change_settings(made.folder, case.settings)
    if case.error:
        with pytest.raises(GattError, match=case.name) as error:
            write_formats(Model("base", base), made.folder, {"F32": tmp_path / "out.gguf"})
        assert case.error in str(error.value)
        assert not (tmp_path / "out.gguf").exists()
        return
    _assert_merged_as_by_peft(base, made, tmp_path)


def _assert_merged_as_by_peft(base: Path, made: Adapted, folder: Path) -> None:
    """Check the weights of the GGUF and of the merged checkpoint."""
    plain = gguf_weights(base, None, folder / "plain.gguf")
    actual = gguf_weights(base, made.folder, folder / "actual.gguf")
    write_checkpoint(base, made.folder, folder / "checkpoint")
    save_merged(base, made.model, folder / "merged")
    expected = gguf_weights(folder / "merged", None, folder / "expected.gguf")
    written = gguf_weights(folder / "checkpoint", None, folder / "checkpoint.gguf")
    # Two singular values that are close make the decomposition of PiSSA less exact.
    tolerance = 2e-6 if read_adapter(made.folder).settings.init == "plain" else 5e-5
    assert_close(actual, expected, tolerance)
    assert_close(written, expected, tolerance)
    assert any(not np.allclose(plain[name], expected[name], atol=1e-3) for name in plain)


def test_an_unknown_setting_is_refused_unless_it_is_off(base: Path, tmp_path: Path) -> None:
    made = make_adapter(base, tmp_path / "adapter", {})
    change_settings(made.folder, {"use_later_lora": False, "later_config": None})
    read_adapter(made.folder)
    change_settings(made.folder, {"use_later_lora": True})
    with pytest.raises(GattError, match="use_later_lora = True cannot be merged"):
        read_adapter(made.folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [3, 300]},
        {"trainable_token_indices": {"embed_tokens": [3, 300], "lm_head": [7]}},
    ],
    ids=str,
)
def test_a_tied_base_predicts_what_the_adapter_was_trained_to(
    settings: dict[str, object], tied: Path, tmp_path: Path
) -> None:
    """PEFT's own merge changes both ends of a tied base, so its unmerged model is the measure."""
    import torch
    import transformers

    made = make_adapter(tied, tmp_path / "adapter", settings)
    tokens = [[1, 3, 300, 7, 40, 7, 3, 9]]
    with torch.no_grad():
        expected = made.model(input_ids=torch.tensor(tokens)).logits[0].numpy()
    write_formats(Model("tied", tied), made.folder, {"F32": tmp_path / "out.gguf"})
    actual = load_and_predict(tmp_path / "out.gguf", (), tokens).logits.values
    np.testing.assert_allclose(actual, expected, atol=2e-3)
    write_checkpoint(tied, made.folder, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        logits = merged(input_ids=torch.tensor(tokens)).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_one_file_of_an_adapter_holds_patterns_of_rank_and_alpha(
    base: Path, tmp_path: Path
) -> None:
    """llama.cpp has one alpha for all matrices."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 40, "k_proj": 1}}
    made = make_adapter(base, tmp_path / "adapter", patterns)
    write_adapter(open_base(base), made.folder, tmp_path / "adapter.gguf")
    write_formats(Model("base", base), None, {"F32": tmp_path / "base.gguf"})
    write_formats(Model("base", base), made.folder, {"F32": tmp_path / "tuned.gguf"})
    tokens = [list(range(5, 40))]
    merged, plain = (
        load_and_predict(tmp_path / name, (), tokens).logits.values
        for name in ("tuned.gguf", "base.gguf")
    )
    applied = load_and_predict(tmp_path / "base.gguf", (), tokens, tmp_path / "adapter.gguf")
    assert mean_kl(merged, applied.logits.values) < 1e-5 < 1e-3 < mean_kl(merged, plain)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "is a DoRA"),
        ({"init_lora_weights": "pissa"}, "starts from a base that pissa changed"),
        ({"modules_to_save": ["lm_head"]}, "replaces lm_head.weight"),
        ({"trainable_token_indices": [3]}, "replaces model.embed_tokens.weight"),
        ({"target_modules": ["q_proj", "lm_head"]}, "changes lm_head"),
        ({}, ""),
    ],
    ids=str,
)
def test_what_llama_cpp_cannot_apply_gets_no_file_of_its_own(
    settings: dict[str, object], reason: str, base: Path, tmp_path: Path
) -> None:
    made = make_adapter(base, tmp_path / "adapter", settings)
    actual = missing_from_gguf(made.folder)
    assert actual.startswith(reason) if reason else not actual


def test_gemma_2_has_no_place_for_a_second_output(tmp_path: Path) -> None:
    save_family("gemma 2", tmp_path / "base")
    made = make_adapter(tmp_path / "base", tmp_path / "adapter", {"modules_to_save": ["lm_head"]})
    with pytest.raises(GattError, match="no second one for gemma2"):
        write_formats(Model("g", tmp_path / "base"), made.folder, {"F32": tmp_path / "out.gguf"})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama 2", "gemma 3", "phi 3", "qwen3"])
def test_saved_modules_of_other_families_are_merged_as_by_peft(name: str, tmp_path: Path) -> None:
    """Llama's q and k are stored in another order, Gemma's norms with 1 added."""
    base = tmp_path / "base"
    save_family(name, base)
    modules = ["q_proj", "input_layernorm", "lm_head"] if name != "phi 3" else ["lm_head", "norm"]
    settings = {"modules_to_save": modules, "target_modules": ["down_proj"]}
    made = make_adapter(base, tmp_path / "adapter", settings)
    import torch

    tokens = [[4, 3, 20, 7, 40, 7, 3, 9]]
    with torch.no_grad():
        expected = made.model(input_ids=torch.tensor(tokens)).logits[0].numpy()
    write_formats(Model("base", base), made.folder, {"F32": tmp_path / "out.gguf"})
    actual = load_and_predict(tmp_path / "out.gguf", (), tokens).logits.values
    width = min(actual.shape[1], expected.shape[1])
    np.testing.assert_allclose(actual[:, :width], expected[:, :width], atol=5e-3)


def test_pissa_needs_the_original_weights(base: Path, tmp_path: Path) -> None:
    made = make_adapter(base, tmp_path / "adapter", {"init_lora_weights": "pissa"})
    write_formats(Model("base", base), None, {"F32": tmp_path / "base.gguf"})
    with pytest.raises(GattError, match=r"pissa left of the base.*Hugging Face folder"):
        write_formats(
            Model("base", tmp_path / "base.gguf"), made.folder, {"F32": tmp_path / "out.gguf"}
        )


def test_files_of_two_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    made = make_adapter(base, tmp_path / "adapter", {})
    change_settings(made.folder, {"r": 8})
    with pytest.raises(GattError, match="rank 8 expected"):
        read_adapter(made.folder)
    change_settings(made.folder, {"r": 4, "use_dora": True})
    with pytest.raises(GattError, match=r"use_dora is set.*no lora_magnitude_vector"):
        read_adapter(made.folder)
    change_settings(made.folder, {"use_dora": False, "modules_to_save": ["lm_head"]})
    with pytest.raises(GattError, match=r"modules_to_save names lm_head.*missing"):
        read_adapter(made.folder)
    change_settings(made.folder, {"modules_to_save": None, "rank_pattern": {"(": 4}})
    with pytest.raises(GattError, match="not a regular expression"):
        read_adapter(made.folder)
