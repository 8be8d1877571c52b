"""Four-bit weights under adapters (QLoRA), and Adam with eight-bit states."""

import copy
import importlib.util
import json
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import engine, lora, models
from rlhf.log import work
from tests.conftest import make_model, metrics, weights
from tests.test_checkpoint import same_as_uninterrupted
from tests.test_lora import batch_of, stirred

WIDE = {
    "llama": dict(hidden_size=64, intermediate_size=128, head_dim=32),
    "opt": dict(hidden_size=64, ffn_dim=128, word_embed_proj_dim=32, dropout=0.0),
}


@pytest.fixture
def wide(tmp_path):
    """A policy whose linear maps are large enough for blocks of 64 weights."""
    return make_model(tmp_path / "wide", **WIDE["llama"])


def both(path):
    """A policy in 4 bits under adapters that do something, and it again with plain weights."""
    tokenizer = models.load_tokenizer(path)
    model = models.load_policy(path, tokenizer, in_4bit=True).eval()
    lora.add(model, 4, None, "all-linear", True)
    plain = copy.deepcopy(stirred(model))
    plain.dequantize()
    return tokenizer, model, plain.eval()


def gradients(model, batch):
    """Of the adapters, in the mode of PPO and DPO, after a forward that needs none."""
    with torch.no_grad():
        before = models.policy_logprobs(model, batch)
    logp = models.policy_logprobs(model, batch)
    assert torch.equal(logp, before)  # PPO's first ratio is 1
    model.zero_grad()
    logp[batch["mask"]].sum().backward()
    return logp, {name: w.grad for name, w in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("family", WIDE)
def test_four_bits_hold_the_weights_and_every_adapter_gets_its_gradient(family, tmp_path):
    path = make_model(tmp_path / family, family, **WIDE[family])
    tokenizer, model, plain = both(path)
    packed = [m for m in model.modules() if isinstance(m, Linear4bit)]
    dense = [m.base for m in lora.layers(plain).values()]
    assert len(packed) == len(dense) and not any(isinstance(m, Linear4bit) for m in plain.modules())
    for small, large in zip(packed, dense):
        assert small.weight.nbytes * 2 == large.weight.numel()
    batch = batch_of(tokenizer)
    (logp, found), (expected, wanted) = gradients(model, batch), gradients(plain, batch)
    assert torch.allclose(logp, expected, atol=1e-4)
    assert set(found) == set(wanted) and len(found) == 2 * len(packed)
    for name in wanted:
        assert wanted[name].norm() > 0
        assert (found[name] - wanted[name]).norm() < 1e-3 * wanted[name].norm(), name


def test_the_saved_model_is_whole_merged_and_may_be_saved_again(wide, tmp_path):
    tokenizer, model, _ = both(wide)
    whole = models.load_policy(wide, tokenizer).eval()
    batch = batch_of(tokenizer)
    logp = models.policy_logprobs(model, batch)
    models.save_model(model, tokenizer, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    saved = models.load_policy(str(tmp_path / "out"), tokenizer).eval()
    assert torch.allclose(models.policy_logprobs(saved, batch), logp, atol=1e-4)
    first = weights(tmp_path / "out")
    assert {n: w.shape for n, w in first.items()} == {n: w.shape for n, w in weights(wide).items()}
    model.model.layers[0].self_attn.q_proj.lora_B.data.zero_()  # as the average's weights are
    models.save_model(model, tokenizer, tmp_path / "out")
    again = weights(tmp_path / "out")
    moved = [name for name in first if not torch.equal(first[name], again[name])]
    assert moved == ["model.layers.0.self_attn.q_proj.weight"]
    near = again[moved[0]] - whole.model.layers[0].self_attn.q_proj.weight
    assert 0 < near.norm() < 0.15 * again[moved[0]].norm()  # what 4 bits lose


def test_sft_in_four_bits_killed_and_resumed_on_two_ranks_leaves_the_same_bytes(
    start, world, wide, fork
):
    start.update(model_name_or_path=wide, load_in_4bit=True, lora_dim=4, optim="adamw_8bit")
    start.update(output_dir=world["out"], max_steps=5, eval_interval=2, zero_stage=1)
    start.update(lora_learning_rate=1e-2, per_device_train_batch_size=8)
    cut = same_as_uninterrupted(fork, "train_sft", start, 2, [["save", 3, False], None])
    [checkpoint] = cut.glob("checkpoints/step*/policy/mp_rank_00_model_states.pt")
    saved = torch.load(checkpoint, weights_only=False)["module"]
    named = {name for name in saved if not name.rpartition("weight.")[1]}
    assert named and all(".lora_" in name for name in named)  # not what is frozen


def test_every_policy_learns_in_four_bits(start, world, wide, ppo, call):
    common = dict(load_in_4bit=True, optim="adamw_8bit", num_train_epochs=20)
    common.update(lora_dim=8, lora_learning_rate=1e-2, max_steps=40)
    flags = {**start, "model_name_or_path": wide, **common}
    assert call(train_sft, **flags, output_dir=world["out"] / "sft")[0] == 0
    rows = metrics(world["out"] / "sft")
    assert rows[-1]["eval_perplexity"] < 0.7 * rows[0]["eval_perplexity"]
    flags["model_name_or_path"] = world["out"] / "sft"
    assert call(train_dpo, **flags, output_dir=world["out"] / "dpo")[0] == 0
    assert metrics(world["out"] / "dpo")[-1]["eval_accuracy"] > 0.9
    reward = {**start, "model_name_or_path": wide, "lr": 5e-3, "output_dir": world["out"] / "rm"}
    assert call(train_rm, **reward)[0] == 0

    flags = ppo("ppo", actor_model_name_or_path=world["out"] / "sft", enable_ema=True)
    flags.update(load_in_4bit=True, actor_lora_dim=4, actor_lora_learning_rate=1e-2)
    assert call(train_ppo, **flags)[0] == 0
    rows = metrics(world["out"] / "ppo")
    assert abs(rows[0]["kl"]) < 1e-6 < abs(rows[1]["kl"])  # the reference is the start
    assert all(row["first_ratio_error_max"] < 1e-5 for row in rows)
    saved = [weights(world["out"] / path) for path in ("sft", "ppo/actor", "ppo/actor_ema")]
    for one, two in ((0, 1), (1, 2)):
        assert any(not torch.equal(saved[one][name], saved[two][name]) for name in saved[0])


def first_loss(folder):
    return next(row["loss"] for row in metrics(folder) if "loss" in row)


def test_what_has_no_adapter_trains_too_and_the_reference_is_a_copy_in_four_bits(
    start, world, wide, ppo, call
):
    """At first, policy and reference are the same; what was precomputed in 4 bits is of 4 bits."""
    common = {"no-only_optimize_lora": True, "max_steps": 2}
    flags = {**start, "model_name_or_path": wide, "lora_dim": 4, **common}
    for name, more in {
        "away": dict(offload_reference_model=True, load_in_4bit=True),
        "bf16": dict(dtype="bf16", reference_zero_stage=3, load_in_4bit=True),
        "precomputed": dict(precompute_ref_logp=True, load_in_4bit=True),
        "plain": dict(precompute_ref_logp=True),
    }.items():
        code, error = call(train_dpo, **flags, **more, output_dir=world["out"] / name)
        assert code == 0, error
        assert first_loss(world["out"] / name) == pytest.approx(math.log(2), abs=1e-6), name
    saved, given = weights(world["out"] / "away"), weights(wide)
    assert not torch.equal(saved["model.norm.weight"], given["model.norm.weight"])
    assert not (world["out"] / "away" / "adapter").exists()

    flags = ppo("ppo", actor_model_name_or_path=wide, actor_lora_dim=4, **common)
    assert call(train_ppo, **flags, load_in_4bit=True)[0] == 0
    assert abs(metrics(world["out"] / "ppo")[0]["kl"]) < 1e-6


def test_weights_are_nf4_quantised_twice_and_adapters_have_the_models_dtype(wide):
    model = models.load_policy(wide, models.load_tokenizer(wide), "bf16", in_4bit=True)
    lora.add(model, 4, None, "q_proj", False)
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            state = layer.weight.quant_state
            assert (state.quant_type, state.nested) == ("nf4", True), name
            assert layer.compute_dtype == torch.bfloat16 and not layer.weight.requires_grad, name
    adapters = [w for name, w in model.named_parameters() if ".lora_" in name]
    assert adapters and all(w.dtype == torch.bfloat16 and w.requires_grad for w in adapters)


def test_four_bit_weights_count_in_full_as_work(wide):
    """A product takes as many operations a token whatever its weights are stored in."""
    tokenizer, model, plain = both(wide)
    count = lambda m: work([batch_of(tokenizer)], {m: 1})["flops_total"]
    assert count(model) == count(plain)
    for weight in model.parameters():  # sharded, it says how many bytes there are
        weight.ds_numel = weight.numel()
    assert count(model) == count(plain)


@pytest.mark.parametrize("family", ["gpt2", "openai-gpt", None])
def test_a_quantised_folder_and_a_gpt2_in_four_bits_are_one_sentence(
    family, start, wide, call, world, tmp_path
):
    path = str(tmp_path / "given")
    if family:  # whose linear maps are Conv1D's
        make_model(path, "gpt2")
        config = json.loads((tmp_path / "given" / "config.json").read_text())
        (tmp_path / "given" / "config.json").write_text(
            json.dumps({**config, "model_type": family})
        )
    else:
        tokenizer = models.load_tokenizer(wide)
        models.load_policy(wide, tokenizer, in_4bit=True).save_pretrained(path)
        tokenizer.save_pretrained(path)
    flags = {**start, "model_name_or_path": path, "lora_dim": 2, "output_dir": world["out"]}
    code, error = call(train_sft, **flags, **({"load_in_4bit": True} if family else {}))
    assert code == 1 and "give weights that are not quantised; for 4 bits no GPT-1 or -2" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "script,settings",
    [
        (train_sft, dict()),
        (train_sft, dict(lora_dim=2, zero_stage=3)),
        (train_sft, dict(lora_dim=2, model_name_or_path="toy")),
        (train_rm, dict(lora_dim=2)),
    ],
)
def test_what_cannot_be_in_four_bits_is_one_sentence(script, settings, start, call, world):
    flags = {**start, "load_in_4bit": True, "output_dir": world["out"], **settings}
    code, error = call(script, **flags)
    expected = "--load_in_4bit needs a trained policy, --lora_dim, a stage < 3"
    assert code == 1 and expected in error and len(error.strip().splitlines()) == 1, error


def test_without_the_package_its_flags_are_one_sentence(start, call, world, monkeypatch):
    find = importlib.util.find_spec
    missing = lambda name, *rest: None if name == "bitsandbytes" else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    for flags in (dict(optim="adamw_8bit"), dict(load_in_4bit=True, lora_dim=2)):
        code, error = call(train_sft, **start, **flags, output_dir=world["out"])
        assert code == 1 and "need pip install -e '.[4bit]'" in error, error
        assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("stage", [0, 1])
def test_eight_bit_states_take_a_quarter_and_nearly_the_same_steps(stage, wide, world, monkeypatch):
    """Against the exact AdamW, from the same start on the same gradients."""
    after, states = {}, {}
    for optim in ("adamw", "adamw_8bit"):
        name = f"--output_dir={world['out']}"
        flags = [f"--optim={optim}", f"--zero_stage={stage}", "--weight_decay=5", name]
        monkeypatch.setattr("sys.argv", ["x", *flags, "--adam_beta2=0.7"])
        args = engine.init(train_sft.parse())
        args.lr_scheduler_type, args.learning_rate = "constant", 1e-2
        tokenizer = models.load_tokenizer(wide)
        trained = engine.train_engine(models.load_policy(wide, tokenizer), args, "", 2, 10)
        start = torch.cat([p.detach().flatten().clone() for p in trained.module.parameters()])
        for _ in range(8):
            train_sft.train_step(trained, [batch_of(tokenizer)])
        after[optim] = torch.cat([p.detach().flatten() for p in trained.module.parameters()])
        after[optim] = after[optim] - start
        inner = trained.optimizer if stage == 0 else trained.optimizer.optimizer
        kept = [value for state in inner.state.values() for value in state.values()]
        states[optim] = sum(torch.as_tensor(value).nbytes for value in kept)
        trained.destroy()
    assert states["adamw_8bit"] < 0.4 * states["adamw"]
    distance = (after["adamw"] - after["adamw_8bit"]).norm() / after["adamw"].norm()
    assert 1e-5 < distance < 0.1
