"""Adapters: nothing at first, everything when merged, and PEFT's when read by PEFT."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf import lora, models
from rlhf.args import InputError
from rlhf.batches import collate
from tests.conftest import FAMILIES, rows_of

FOLDERS = sorted(FAMILIES)
TEXTS = [("w1 w2 w3", " w4 w5", " w6"), ("w7", " w8 w9 w10 w11", " w12 w13")]


def batch_of(tokenizer):
    return collate(tokenizer, rows_of(tokenizer, TEXTS))


def stirred(model):
    """Adapters that do something, and a head that moved."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


@pytest.mark.parametrize("family", FOLDERS)
def test_at_first_and_without_adapters_the_model_is_what_it_was(family, model_folder):
    path = model_folder(family)
    tokenizer = models.load_tokenizer(path)
    model = models.load_policy(path, tokenizer).eval()
    batch = batch_of(tokenizer)
    start = models.policy_logprobs(model, batch)
    lora.add(model, 2, None, "all-linear", True)
    assert torch.equal(models.policy_logprobs(model, batch), start)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    stirred(model)
    assert (models.policy_logprobs(model, batch) - start).abs().max() > 0.01
    engine = type("Engine", (), {"module": model, "__call__": lambda self, **x: model(**x)})()
    reference = lora.WithoutAdapters(engine)
    assert torch.equal(models.policy_logprobs(reference, batch), start)
    assert (models.policy_logprobs(model, batch) - start).abs().max() > 0.01  # on again


@pytest.mark.parametrize("family", FOLDERS)
def test_the_merged_model_is_the_trained_one_and_peft_loads_the_adapter(
    family, model_folder, tmp_path
):
    path = model_folder(family)
    tokenizer = models.load_tokenizer(path)
    model = models.load_policy(path, tokenizer).eval()
    lora.add(model, 2, 6.0, "all-linear", True)
    logp = models.policy_logprobs(stirred(model), batch_of(tokenizer))
    models.save_model(model, tokenizer, str(tmp_path / "out"))
    merged = models.load_policy(str(tmp_path / "out"), tokenizer).eval()
    assert torch.allclose(models.policy_logprobs(merged, batch_of(tokenizer)), logp, atol=1e-5)

    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(path)
    if base.config.vocab_size < len(tokenizer):  # it lacks the row of the new pad
        return
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    found = models.policy_logprobs(theirs.base_model.model, batch_of(tokenizer))
    assert torch.allclose(found, logp, atol=1e-5)
    assert json.load(open(tmp_path / "out" / "adapter" / "adapter_config.json"))["r"] == 2


@pytest.mark.parametrize("family", FOLDERS)
def test_a_scalar_models_head_trains_in_full_and_is_saved_with_both(family, model_folder, tmp_path):
    path = model_folder(family)
    tokenizer = models.load_tokenizer(path)
    model = models.load_scalar(path, tokenizer, new_head=True).eval()
    lora.add(model, 3, None, "all-linear", True)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert "classifier.score.weight" in trained and all(
        "lora_" in n or "score" in n for n in trained
    )
    scores = models.sequence_scores(stirred(model), batch_of(tokenizer))
    models.save_model(model, tokenizer, str(tmp_path / "out"))
    merged = models.load_scalar(str(tmp_path / "out"), tokenizer).eval()
    assert torch.allclose(models.sequence_scores(merged, batch_of(tokenizer)), scores, atol=1e-5)

    peft = pytest.importorskip("peft")
    base = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()
    scalar = models.ScalarModel(theirs.base_model.model)
    found = models.sequence_scores(scalar, batch_of(tokenizer))
    assert torch.allclose(found, scores, atol=1e-5)


def test_the_update_is_alpha_over_rank_times_b_a():
    torch.manual_seed(0)
    layer = lora.LoRA(torch.nn.Linear(5, 4), 2, 8)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5)
    change = torch.zeros(4, 5)
    for i in range(4):
        for j in range(5):
            change[i, j] = sum(4 * layer.lora_B[i, k] * layer.lora_A[k, j] for k in range(2))
    expected = x @ (layer.base.weight + change).T + layer.base.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_modules_are_chosen_by_parts_of_their_names(model_folder):
    path = model_folder("opt")
    model = models.load_policy(path, models.load_tokenizer(path))
    chosen = copy.deepcopy(model)
    lora.add(chosen, 2, None, "q_proj,layers.1.fc", True)
    names = sorted(name.rpartition("layers.")[2] for name in lora.layers(chosen))
    assert names == ["0.self_attn.q_proj", "1.fc1", "1.fc2", "1.self_attn.q_proj"]
    spaced = copy.deepcopy(model)
    lora.add(spaced, 2, None, "q_proj, v_proj", True)
    assert len(lora.layers(spaced)) == 4
    for modules in ("layers.9.", "q_proj,layers.9.", "q_proj,"):
        with pytest.raises(InputError, match="is in no linear layer's name: choose parts of"):
            lora.add(model, 2, None, modules, True)


def test_what_has_no_adapter_may_train_too(model_folder):
    path = model_folder("llama")
    model = models.load_policy(path, models.load_tokenizer(path))
    lora.add(model, 2, None, "q_proj", only=False)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {f"model.layers.{i}.self_attn.q_proj.base.weight" for i in (0, 1)}
