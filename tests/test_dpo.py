"""DPO: the gradient of the paper, any reference, and pairs that are learned."""

import argparse
import gzip
import json
import math
from functools import partial

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

import train_dpo
from rlhf import args as flags
from rlhf import lora, losses, models
from rlhf.batches import collate
from tests.conftest import FAMILIES, SHARED, make_model, make_tokenizer, metrics, rows_of
from tests.conftest import write_jsonl

TEXTS = [("w1 w2 w3 w4", " w4 w5", " w6"), ("w7", " w8 w9 w10 w11", " w12 w13")]
CLOCK = {"seconds", "tokens_per_second", "tflops", "eval_kl"}
LOG2 = pytest.approx(math.log(2), abs=1e-6)


class Engine:
    """What a step needs of DeepSpeed's engine, around a plain model."""

    passes = 3
    backward, step = staticmethod(torch.Tensor.backward), staticmethod(lambda: None)
    is_gradient_accumulation_boundary = staticmethod(lambda: True)
    zero_optimization_stage = staticmethod(lambda: 0)

    def __init__(self, model):
        self.module = model.eval()

    def get_global_grad_norm(self):
        return torch.nn.utils.get_total_norm(w.grad for w in self.module.parameters())

    def __call__(self, **inputs):
        return self.module(**inputs)


def settings(**changes):
    usual = dict(beta=0.3, label_smoothing=0.0, loss_type="sigmoid", length_normalized=False)
    return argparse.Namespace(**{**usual, **changes})


def logp_of(model, prompt, response):
    """Of one response, alone and without padding."""
    logp = model(torch.tensor([prompt + response])).logits[0].double().log_softmax(1)
    return sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(response))


@pytest.fixture
def two(model_folder):
    """two(family) -> tokenizer, rows, a policy, another model as its reference."""

    def load(family="llama"):
        paths = [model_folder(family, name=f"{seed}", seed=seed) for seed in (0, 1)]
        tokenizer = models.load_tokenizer(paths[0])
        loaded = [models.load_policy(path, tokenizer).eval() for path in paths]
        return tokenizer, rows_of(tokenizer, TEXTS), *loaded

    return load


@pytest.fixture
def dpo(world, start, call):
    """dpo(name, flags) runs a short training -> its evaluations and steps, as logged."""

    def run(name, **changes):
        small = dict(max_steps=3, num_warmup_steps=0, eval_kl_prompts=8, eval_interval=2)
        small.update({**start, **changes})
        code, error = call(train_dpo, **small, output_dir=world["out"] / name)
        assert code == 0, error
        return metrics(world["out"] / name)

    return run


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_first_loss_is_log_two_and_the_gradient_is_the_papers(family, two):
    """Rafailov et al. 2023, section 4, from rows without padding."""
    tokenizer, rows, policy, reference = two(family)
    batch = collate(tokenizer, rows, ("chosen", "rejected"))
    assert train_dpo.train_step(Engine(policy), policy, [batch], settings())["loss"] == LOG2
    policy.zero_grad()
    train_dpo.train_step(Engine(policy), reference, [batch], settings())
    expected = {name: torch.zeros_like(weight) for name, weight in policy.named_parameters()}
    for row in rows:
        ratio, ref_ratio = (
            logp_of(model, row["prompt"], row["chosen"])
            - logp_of(model, row["prompt"], row["rejected"])
            for model in (policy, reference)
        )
        grads = torch.autograd.grad(ratio, list(policy.parameters()), materialize_grads=True)
        for name, grad in zip(expected, grads):
            expected[name] += -0.3 * torch.sigmoid(-0.3 * (ratio - ref_ratio)).item() * grad / 2
    assert max(grad.abs().max() for grad in expected.values()) > 1e-2
    for name, weight in policy.named_parameters():
        assert torch.allclose(weight.grad, expected[name], atol=1e-5), name


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("kind,smoothing", [("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.1)])
def test_flags_reach_the_loss_and_padding_does_not(two, kind, smoothing, by_length):
    tokenizer, rows, policy, reference = two()
    changes = dict(label_smoothing=smoothing, loss_type=kind, length_normalized=by_length)
    step = partial(train_dpo.train_step, Engine(policy), reference, args=settings(**changes))
    alone = [step([collate(tokenizer, [row], ("chosen", "rejected"))]) for row in rows]
    together = step([collate(tokenizer, rows, ("chosen", "rejected"))])
    for row, found in zip(rows, alone):
        logps = [
            logp_of(model, row["prompt"], row[name]).detach() / (len(row[name]) ** by_length)
            for model in (policy, reference)
            for name in ("chosen", "rejected")
        ]
        loss, rewards = losses.dpo_loss(*torch.stack(logps)[:, None], 0.3, smoothing, kind)
        margin = rewards["chosen_reward"] - rewards["rejected_reward"]
        assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
        assert found["margin"].item() == pytest.approx(margin.item(), abs=1e-5)
        assert found["accuracy"] == (margin > 0)
        assert found["chosen_logp"].item() == pytest.approx(logps[0].item(), abs=1e-5)
    for name in ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp"):
        mean = sum(found[name].item() for found in alone) / 2
        assert together[name].item() == pytest.approx(mean, abs=1e-5), name


# the reference


def alike(one, two, tolerance=1e-6):
    assert len(one) == len(two)
    for a, b in zip(one, two):
        assert set(a) - CLOCK == set(b) - CLOCK
        for name in set(a) - CLOCK:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), name


def test_precomputed_log_probs_take_the_same_steps_and_are_cached(
    world, dpo, monkeypatch, tmp_path
):
    computed, score_pairs = [], train_dpo.score_pairs
    monkeypatch.setattr(train_dpo, "score_pairs", lambda *a: computed.append(a) or score_pairs(*a))
    ready = partial(dpo, precompute_ref_logp=True, lr=5e-3)
    plain = dpo("plain", lr=5e-3)
    first, count = ready("first"), len(computed)
    alike(plain, first)
    assert plain[0]["eval_kl"] == pytest.approx(0, abs=1e-6) and "eval_kl" not in first[0]
    assert plain[1]["loss"] == LOG2
    assert plain[-2]["loss"] < 0.66 and plain[-1]["eval_kl"] != 0
    alike(ready("again"), first, 0)
    assert count == len(computed) == 2  # training rows and held-out rows, once

    alike(dpo("long", length_normalized=True), ready("longer", lr=2e-6, length_normalized=True))
    make_model(world["actor"], seed=5)  # another model in the same folder
    alike(dpo("other", lr=5e-3), ready("others"))
    assert len(computed) == 6


def test_the_same_pairs_with_flipped_labels_are_computed_anew(dpo, tmp_path):
    pair = dict(chosen=" w1", rejected=" w3")
    flipped = dict(zip(pair, reversed(pair.values())))
    for name, answers in (("one", pair), ("two", flipped)):
        (tmp_path / name).mkdir()
        for split, rows in (("train", range(20)), ("test", range(20, 30))):
            pairs = [dict(prompt=f"w{i} w2", **answers) for i in rows]
            write_jsonl(tmp_path / name / f"{split}.jsonl", pairs)
        usual = dict(data_path=tmp_path / name, data_split="0,1,0", max_steps=1)
        found = dpo(name, precompute_ref_logp=True, **usual)
        assert found[1]["loss"] == LOG2


def test_adapters_need_no_second_model_precomputed_or_not(dpo, monkeypatch):
    loaded, references = [], []
    load, evaluate = models.load_policy, train_dpo.evaluate
    monkeypatch.setattr(models, "load_policy", lambda *a: loaded.append(a) or load(*a))
    monkeypatch.setattr(
        train_dpo, "evaluate", lambda p, r, *a: references.append(r) or evaluate(p, r, *a)
    )
    adapters = dict(lora_dim=2, lora_learning_rate=0.05)
    found = dpo("lora", **adapters)
    assert len(loaded) == 1 and type(references[0]) is lora.WithoutAdapters
    assert found[0]["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert found[1]["loss"] == LOG2
    assert found[-2]["loss"] < found[1]["loss"]
    alike(dpo("ready", **adapters, precompute_ref_logp=True), found)
    assert len(loaded) == 2 and references[-1] is None
    dpo("full", max_steps=1)
    assert len(loaded) == 4


def test_eval_kl_is_the_exact_one_of_single_tokens_and_a_sum_over_longer_ones(two, monkeypatch):
    tokenizer, _, policy, reference = two()
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
    rows = [dict(prompt=[3 + i % 30], chosen=[3], rejected=[4]) for i in range(6000)]
    usual = dict(max_seq_len=2, per_device_eval_batch_size=3000, eval_kl_prompts=6000)
    evaluate = partial(train_dpo.evaluate, Engine(policy), reference, tokenizer=tokenizer)
    pairs = partial(collate, tokenizer, responses=("chosen", "rejected"))
    torch.manual_seed(0)
    found = evaluate(Dataset.from_list(rows), pairs, args=settings(**usual))["eval_kl"]
    with torch.no_grad():
        ours, other = (
            model(torch.arange(3, 33)[:, None]).logits[:, 0].double().log_softmax(1)
            for model in (policy, reference)
        )
    kl = (ours.exp() * (ours - other)).sum(1).mean().item()
    error = ((ours.exp() * (ours - other) ** 2).sum(1).mean().item() / 6000) ** 0.5
    assert kl > 0.05 and abs(found - kl) < 4 * error < kl / 4

    drawn, sample = [], train_dpo.sample
    monkeypatch.setattr(train_dpo, "sample", lambda *a: drawn.append(sample(*a)) or drawn[-1])
    usual.update(max_seq_len=24, per_device_eval_batch_size=4, eval_kl_prompts=10)
    found = evaluate(Dataset.from_list(rows[:12]), pairs, args=settings(**usual))["eval_kl"]
    names = ("prompt_ids", "response_ids", "mask")
    answers = [row for batch in drawn for row in zip(*(batch[name] for name in names))]
    answers = [(p.tolist(), r[mask].tolist()) for p, r, mask in answers]
    ratios = [(logp_of(policy, *a) - logp_of(reference, *a)).item() for a in answers]
    assert len(ratios) == 10 and found == pytest.approx(sum(ratios) / 10, abs=1e-4)


# learning


def test_dpo_learns_separable_pairs_the_right_way_round(world, dpo):
    found = dpo("learned", lr=5e-3, max_steps=10)
    assert [row["step"] for row in found if "eval_accuracy" in row] == [0, 2, 4, 6, 8, 10]
    assert found[-1]["eval_accuracy"] > 0.95 and found[-1]["eval_margin"] > 0.5
    assert found[0]["eval_accuracy"] == found[0]["eval_margin"] == 0  # no reward yet: all are ties
    begun, trained = (
        models.load_policy(path, make_tokenizer())
        for path in (world["actor"], world["out"] / "learned")
    )
    w1, w2 = ((logp_of(trained, [3, 3], [i]) - logp_of(begun, [3, 3], [i])).item() for i in (4, 5))
    assert w1 > w2 + 0.5  # the first words of preferred and of other responses


def test_dpo_fits_real_pairs(dpo, tmp_path):
    model, pairs = SHARED / "stories260K", SHARED / "rm-static"
    if not model.is_dir() or not pairs.is_dir():
        pytest.skip("the real data is not here")
    with gzip.open(pairs / "train.jsonl.gz", "rt") as file:
        data = write_jsonl(tmp_path / "pairs.jsonl", [json.loads(next(file)) for _ in range(210)])
    real = dict(data_path=data, model_name_or_path=model, data_split="0,1,0", max_seq_len=32)
    real.update(max_prompt_seq_len=16, per_device_train_batch_size=32, beta=0.1, max_steps=0)
    real.update(num_train_epochs=3, num_warmup_steps=3, eval_interval=1000, eval_kl_prompts=0)
    steps = [row for row in dpo("real", lr=1e-3, **real) if "loss" in row]
    assert sum(row["accuracy"] for row in steps[-6:]) / 6 > 0.9
    assert steps[0]["loss"] == LOG2


# flags


def test_the_defaults_are_the_published_recipe_and_every_help_names_its_source(monkeypatch):
    parsers, parse_args = [], flags.Parser.parse_args
    monkeypatch.setattr(
        flags.Parser, "parse_args", lambda p: parsers.append(p) or parse_args(p, [])
    )
    recipe = dict(learning_rate=2e-6, beta=0.5, lr_scheduler_type="linear", num_warmup_steps=10)
    recipe.update(weight_decay=0.01, label_smoothing=0.0, loss_type="sigmoid")
    assert recipe.items() <= vars(train_dpo.parse()).items()
    for action in parsers[0]._actions[1:]:
        assert action.help.endswith("]") and "[" in action.help, action.option_strings
    assert "--beta" in parsers[0].format_help()


def test_a_long_prompt_loses_its_beginning_but_not_its_bos(world, dpo, monkeypatch):
    make_model(world["actor"], specials="bos is eos")
    tokenizer = make_tokenizer("bos is eos")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    tokenizer.save_pretrained(world["actor"])
    seen, train_step = [], train_dpo.train_step
    monkeypatch.setattr(
        train_dpo, "train_step", lambda p, r, b, a: seen.extend(b) or train_step(p, r, b, a)
    )
    dpo("cut", max_prompt_seq_len=3, max_steps=1)
    prompts = {tuple(row) for row in seen[0]["prompt_ids"].tolist()}
    ends = {(2, 3 + i // 30, 3 + i % 7) for i in range(400)}  # of w{i % 30} w{i // 30} w{i % 7}
    assert len(prompts) > 1 and prompts <= ends and seen[0]["prompt_mask"].all()


def test_a_missing_model_is_one_sentence(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, error = call(train_dpo)
    sentence = "output/sft: there is no such file or folder: run train_sft.py first"
    assert code == 1 and error.endswith(f"{sentence}\n") and error.count("\n") == 1
    assert not [path for path in (tmp_path / "output").rglob("*") if path.is_file()]
