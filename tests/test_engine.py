"""The same numbers everywhere: every cut of a batch, every ZeRO stage, through the real launcher."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file

import train_ppo
import train_sft
from rlhf import engine, models
from tests.conftest import (
    ENV,
    ROOT,
    free_port,
    make_model,
    metrics,
    run,
    run_script,
    to_flags,
    weights,
)

COUNTED = {"loss", "grad_norm", "accuracy", "margin", "policy_loss", "value_loss", "ratio_mean"}
COUNTED |= {"ratio_max", "clip_frac", "actor_grad_norm", "critic_grad_norm", "approx_kl"}
COUNTED |= {"chosen_reward", "rejected_reward", "chosen_logp", "rejected_logp", "unsup_loss"}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The steps that tests/cuts.py took on one rank and on two.  Nothing is compiled for them: a
    compiler's lock outlives a process that is killed, and all later ones would wait for it."""
    folder = tmp_path_factory.mktemp("cuts")
    policy = make_model(folder / "policy", "opt", dropout=0.0)
    tokenizer = models.load_tokenizer(policy)
    model = models.load_scalar(policy, tokenizer, new_head=True)
    models.save_model(model, tokenizer, folder / "rm")
    env = {**ENV, "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}

    def launch(ranks):
        paths = (folder / f"{ranks}", policy, folder / "rm")
        done = run_script("tests/cuts.py", *paths, ranks=ranks, launcher="deepspeed", **env)
        assert done.returncode == 0, done.stderr
        assert not os.path.exists(env["TORCH_EXTENSIONS_DIR"])
        return torch.load(paths[0])

    return {1: launch(1), 2: launch(2)}


def distance(one, two):
    """The largest relative distance of two steps: their metrics, all updated weights as vectors."""
    shared = COUNTED & set(one["metrics"])
    assert shared & {"loss", "policy_loss"} and set(one["metrics"]) == set(two["metrics"])
    pairs = [(one["metrics"][n], two["metrics"][n]) for n in shared]
    far = [abs(a - b) / abs(b) if a != b else 0.0 for a, b in pairs]  # DPO's adapters start at 0
    for a, b in zip(one["after"], two["after"]):
        assert set(a) == set(b)
        a, b = (torch.cat([state[n].flatten() for n in sorted(b)]).double() for state in (a, b))
        far.append(((a - b).norm() / b.norm()).item())
    return max(far)


def test_every_cut_and_every_zero_stage_takes_the_same_step(steps):
    for kind in ("sft", "rm", "ppo", "dpo"):
        whole = steps[1][kind, 0, 8]
        assert distance({**whole, "after": [whole["before"]]}, whole) > 1e-4  # it did move
        cuts = [(n, key) for n in steps for key in steps[n] if key[0] == kind]
        cuts = [(n, key) for n, key in cuts if isinstance(key[2], int)]
        assert {(n, key[2]) for n, key in cuts} == {(1, 8), (1, 1), (2, 4), (2, 2)}
        assert {key[1] for _, key in cuts} == {0, 1, 2, 3}
        for n, key in cuts:
            assert distance(steps[n][key], whole) < 1e-5, (n, key)


def test_the_naive_mean_of_means_depends_on_the_cut(steps):
    """The negative control: what the one global mean is for."""
    assert distance(steps[2]["sft", 0, "naive"], steps[1]["sft", 0, "naive"]) > 1e-3


@pytest.mark.parametrize("kind,stages", [("sft", (0, 3)), ("ppo", (0, 3)), ("dpo", (0, 3))])
def test_adapters_take_the_same_step_on_two_ranks_and_sharded(steps, kind, stages):
    whole = steps[1][kind, 0, "lora"]
    for stage in stages:
        assert distance(steps[2][kind, stage, "lora"], whole) < 1e-5


def test_offload_and_checkpointing_change_nothing(steps):
    whole = steps[1]["sft", 0, 8]
    keys = [key for key in steps[2] if key[2] in ("offload", "checkpointing")]
    assert len(keys) == 4
    for key in keys:
        assert distance(steps[2][key], whole) < 1e-5, key
    assert distance(steps[1]["sft", 0, "checkpointing"], whole) < 1e-5


def test_bf16_takes_the_same_step_at_every_stage_and_nearly_the_same_on_two_ranks(steps):
    """On one rank to the bit; on two, gradients are summed in bf16."""
    whole = steps[1]["sft", 1, "bf16"]
    for stage in (0, 1, 3):
        assert distance(steps[1]["sft", stage, "bf16"], whole) < 1e-6
        assert distance(steps[2]["sft", stage, "bf16"], whole) < 0.02
    assert distance(whole, steps[1]["sft", 0, 8]) < 0.02


def test_the_average_moves_half_way_under_every_stage_and_dtype(steps):
    """Its decay is 0.5 here, over one step."""
    for ranks in (1, 2):
        for key, step in steps[ranks].items():
            before, after, average = step["before"], step["after"][0], step["average"]
            bf16 = key[2] == "bf16"
            moved = 0.0
            for name in before:
                if key[2] != "lora":  # merged weights are no linear function of A and B
                    half = (before[name] + after[name]) / 2
                    # bf16: the shadow is fp32, but is written into bf16 weights
                    assert torch.allclose(average[name], half, rtol=1e-2 * bf16, atol=1e-6), key
                moved = max(moved, (average[name] - before[name]).abs().max().item())
            same = all(torch.equal(average[name], after[name]) for name in after)
            assert moved > 1e-5 and not same, (ranks, key)


def test_two_nodes_are_two_launchers_and_one_run(ppo, world, call, tmp_path):
    """As README says: the same command on each node, with its --node_rank."""
    common = dict(top_k=1, max_steps=2, data_output_path=tmp_path / "cache", actor_zero_stage=3)
    common.update(actor_lr=1e-3, critic_lr=1e-3)
    assert call(train_ppo, **ppo("one", **common))[0] == 0
    half = dict(per_device_generation_batch_size=8, per_device_training_batch_size=8)
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
    start = [os.path.join(os.path.dirname(sys.executable), "deepspeed"), "--no_ssh", "--quiet"]
    start += ["--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1"]
    start += ["--master_port", str(free_port())]
    flags = to_flags(**ppo("two", **{**common, **half}))
    nodes = [
        subprocess.Popen(
            [*start, f"--node_rank={rank}", "train_ppo.py", *flags],
            cwd=ROOT,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [node.communicate(timeout=900)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    one, two = metrics(world["out"] / "one"), metrics(world["out"] / "two")
    assert len(one) == len(two) == 2
    for name in ("score", "return_mean", "value_loss", "actor_grad_norm", "critic_grad_norm"):
        for a, b in zip(one, two):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_ppo_with_adapters_keeps_no_second_copy_and_saves_both(ppo, world, call, tmp_path):
    """Through the launcher: the sharded actor's adapters train, its own weights are the reference."""
    common = dict(
        data_output_path=tmp_path / "cache", max_steps=2, actor_lora_dim=2, enable_ema=True
    )
    common.update(
        actor_lora_learning_rate=0.02, critic_lora_dim=2, actor_zero_stage=3, ema_decay=0.5
    )
    common.update(per_device_generation_batch_size=8, per_device_training_batch_size=8)
    flags = to_flags(**ppo("lora", **common), critic_zero_stage=2, offload_reward_model=True)
    stale = world["out"] / "lora" / "actor" / "adapter" / "adapter_stale.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")  # another run's
    done = run_script("train_ppo.py", *flags, ranks=2, launcher="deepspeed", DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    out, rows = world["out"] / "lora", metrics(world["out"] / "lora")
    assert abs(rows[0]["kl"]) < 1e-6 < abs(rows[1]["kl"])  # the reference is the start
    assert rows[0]["first_ratio_error_max"] < 1e-5
    start, actor, ema = (
        weights(path) for path in (world["actor"], out / "actor", out / "actor_ema")
    )
    assert set(start) == set(actor) == set(ema)
    moved = {name for name in start if not torch.equal(start[name], actor[name])}
    assert moved and all("proj" in name for name in moved)
    assert any(not torch.equal(actor[name], ema[name]) for name in moved)
    assert not stale.exists()
    adapter = load_file(out / "actor" / "adapter" / "adapter_model.safetensors")
    assert {name.rpartition("lora_")[2] for name in adapter} == {"A.weight", "B.weight"}
    assert any(
        "score" in name for name in load_file(out / "critic/adapter/adapter_model.safetensors")
    )


def test_a_reference_and_reward_model_may_be_sharded_or_on_the_cpu(ppo, call, world):
    flags = dict(max_steps=2, top_k=1, actor_lr=1e-3)
    assert call(train_ppo, **ppo("plain", **flags))[0] == 0
    flags.update(offload_reference_model=True, reward_zero_stage=3)
    assert call(train_ppo, **ppo("away", **flags))[0] == 0
    for a, b in zip(metrics(world["out"] / "plain"), metrics(world["out"] / "away")):
        for name in ("score", "kl", "actor_grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-8), name


def test_fp32_products_stay_exact():
    """As engine.prepare() leaves them: bf16's would be off by 1e-2."""
    before = torch.get_float32_matmul_precision()
    try:
        engine.prepare("error")
        a, b = torch.randn(512, 768), torch.randn(768, 512)
        assert ((a @ b) - (a.double() @ b.double())).abs().max() < 1e-3
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_that_would_round_to_bf16_are_not_taken(monkeypatch):
    """As on a CPU with AMX: "medium" computes in bf16 there."""
    before, plain = torch.get_float32_matmul_precision(), torch.Tensor.__matmul__

    def amx(a, b):
        if torch.get_float32_matmul_precision() == "medium":
            return plain(a.bfloat16(), b.bfloat16()).float()
        return plain(a, b)

    try:
        monkeypatch.setattr(torch.Tensor, "__matmul__", amx)
        engine.prepare("error")
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "width,tokens,found",
    [(128, 512, "medium"), (128, 513, "medium"), (128, 512, "highest"), (256, 512, "medium")],
)
def test_narrow_models_attend_without_the_flash_kernel(
    model_folder, ppo, call, world, monkeypatch, width, tokens, found
):
    """Where oneDNN computes the products, of short rows.  A rollout leaves it so."""
    shape = dict(hidden_size=width, max_position_embeddings=1024)
    narrow = model_folder("llama", name="narrow", **shape)
    scored = model_folder("llama", name="scored", **shape)
    tokenizer = models.load_tokenizer(scored)
    models.save_model(models.load_scalar(scored, tokenizer, new_head=True), tokenizer, scored)
    flash, load = torch.backends.cuda.flash_sdp_enabled, train_ppo.load_models
    before, seen = torch.get_float32_matmul_precision(), []
    rollout = train_ppo.rollout
    monkeypatch.setattr(train_ppo, "rollout", lambda *a: (rollout(*a), seen.append(flash()))[0])

    def loaded(*arguments):
        torch.set_float32_matmul_precision(found)  # as engine.prepare() would
        torch.backends.cuda.enable_flash_sdp(True)  # no other test's run
        return load(*arguments)

    monkeypatch.setattr(train_ppo, "load_models", loaded)
    flags = dict(actor_model_name_or_path=narrow, critic_model_name_or_path=scored, max_steps=2)
    flags.update(max_prompt_seq_len=tokens - 8)
    try:
        code, error = call(train_ppo, **ppo("narrow", **flags))
        assert code == 0, error
        assert seen == [(width, tokens, found) != (128, 512, "medium")] * 2
        assert torch.get_float32_matmul_precision() == found
    finally:
        torch.set_float32_matmul_precision(before), torch.backends.cuda.enable_flash_sdp(True)


def test_the_rate_of_products_counts_a_multiplication_and_an_addition_each(monkeypatch):
    """A result has 2048 of both; at half a second a product."""
    monkeypatch.setattr(torch.utils.benchmark.Timer, "timeit", lambda *_: SimpleNamespace(mean=0.5))
    assert engine.products_rate("fp32") == pytest.approx(2048 * 2048 * (2048 + 2048) / 0.5 / 1e12)


KEPT = """
import resource, torch
from rlhf import engine
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
engine.prepare("error")
torch.ones(16_000_000)
before = faults()
for _ in range(20):
    torch.ones(16_000_000)
print(faults() - before)
"""


def test_freed_memory_is_kept_on_cpus():
    """Each of the twenty tensors has 64 MB, 15,625 pages; a second place may have been made."""
    env = {**ENV, "THP_MEM_ALLOC_ENABLE": "0"}
    done = run([sys.executable, "-c", KEPT], **env)
    assert int(done.stdout.split()[-1]) < 3 * 15_625, done.stderr


@pytest.fixture
def fp16(monkeypatch, tmp_path):
    """fp16(power) -> flags of a run whose loss scale begins at 2^power; the file says what no flag
    does.  PyTorch computes in fp16 on any CPU; DeepSpeed would ask for one that is fast at it."""
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)

    def flags(power):
        scale = {"fp16": {"initial_scale_power": power, "hysteresis": 1}}
        (tmp_path / "scale.json").write_text(json.dumps(scale))
        return dict(dtype="fp16", deepspeed_config=tmp_path / "scale.json")

    return flags


def test_fp16_where_there_is_none_is_one_sentence(start, call, world, monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    code, error = call(train_sft, **start, dtype="fp16", output_dir=world["out"])
    assert code == 1 and len(error.splitlines()) == 1, error
    assert "see --dtype" in error and "fp16 is not supported" in error
    assert os.getcwd() + ":" not in error  # nor is this folder to blame


@pytest.mark.parametrize("stage", [0, 3])
def test_an_fp16_run_skips_steps_until_its_scale_fits_and_then_learns(
    fp16, start, call, world, stage
):
    settings = dict(start, max_steps=30, lr=5e-3, zero_stage=stage, log_interval=1)
    found = {}
    for dtype in (fp16(21), dict(dtype="fp32")):
        out = world["out"] / dtype["dtype"]
        code, error = call(train_sft, **settings, **dtype, output_dir=out)
        assert code == 0, error
        found[dtype["dtype"]] = [row for row in metrics(out) if "loss" in row]
    half, full = found["fp16"], found["fp32"]
    skipped = [0] + [row["skipped_steps"] for row in half]
    assert 0 < skipped[-1] == skipped[10] < 10
    steps = 0  # that were taken: only they move the schedule
    for before, row in zip(skipped, half):
        overflowed = row["skipped_steps"] - before
        assert overflowed in (0, 1) and (row["grad_norm"] is None) == overflowed
        assert row["lr"] == full[steps]["lr"]
        steps += 1 - overflowed
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=1e-3)
    assert half[-1]["loss"] == pytest.approx(full[steps]["loss"], rel=0.05)
    assert full[steps]["loss"] < full[0]["loss"] - 1


def test_an_fp16_overflow_skips_the_step_and_counts_none(fp16, ppo, call, world):
    flags = dict(fp16(32), max_steps=2, actor_lr=1e-3, critic_lr=1e-3)
    flags.update(lr_scheduler_type="linear", enable_ema=True)
    code, error = call(train_ppo, **ppo("fp16", **flags))
    assert code == 0, error
    rows, out = metrics(world["out"] / "fp16"), world["out"] / "fp16"
    assert [row["actor_lr"] for row in rows] == [1e-3, 1e-3]  # the schedule stands still
    assert [row["skipped_steps"] for row in rows] == [1, 2]
    start = {name: weight.half() for name, weight in weights(world["actor"]).items()}
    for name in ("actor", "actor_ema"):
        assert all(torch.equal(start[n], w) for n, w in weights(out / name).items())


@pytest.mark.parametrize("stage,accumulation", [(0, 1), (2, 2), (3, 1)])
def test_align_overflow_lets_both_models_skip_the_step_that_one_overflows(
    fp16, ppo, call, world, monkeypatch, stage, accumulation
):
    """At this scale the critic's gradients overflow at first, the actor's do not: its stays."""
    engines, load = [], train_ppo.load_models
    monkeypatch.setattr(
        train_ppo, "load_models", lambda *args: [engines.append(e) or e for e in load(*args)]
    )
    flags = dict(fp16(16), actor_lr=1e-3, critic_lr=1e-3, actor_zero_stage=stage, max_steps=4)
    flags.update(critic_zero_stage=stage, gradient_accumulation_steps=accumulation)
    flags.update(per_device_training_batch_size=16 // accumulation, lr_scheduler_type="linear")
    rows = {}
    for aligned in (False, True):
        out = f"aligned {aligned}"
        code, error = call(train_ppo, *["--align_overflow"] * aligned, **ppo(out, **flags))
        assert code == 0, error
        rows[aligned] = metrics(world["out"] / out)
    overflows = [
        [row[f"{name}_grad_norm"] is None for name in ("actor", "critic")] for row in rows[False]
    ]
    assert [False, True] in overflows
    steps = 0
    for row in rows[True]:
        assert (row["kl"] == 0) == (steps == 0)  # until the first step the actor is the reference
        for name in ("actor", "critic"):
            assert row[f"{name}_lr"] == pytest.approx(1e-3 * (1 - steps / 4))
        skipped = row["actor_grad_norm"] is None
        assert skipped == (row["critic_grad_norm"] is None)
        steps += not skipped
        assert row["skipped_steps"] == row["step"] - steps
    assert 0 < steps < 4
    actor, critic = (trained.optimizer for trained in engines[-4:-2])
    assert actor.loss_scale == 2**16 and critic.loss_scale == 2 ** (16 - row["skipped_steps"])
    assert not {"check_overflow", "_update_scale"} & {*vars(actor), *vars(critic)}


def test_an_overflow_that_only_the_norm_shows_lowers_the_scale_too(
    fp16, ppo, call, world, monkeypatch
):
    """DeepSpeed's second look, with --align_overflow as without."""
    load = train_ppo.load_models

    def late(*arguments):
        actor, critic, *frozen = load(*arguments)
        optimizer, norm = critic.optimizer, critic.optimizer.scaled_global_norm
        optimizer.scaled_global_norm = lambda: (
            torch.tensor(float("inf")) if optimizer.loss_scale > 256 else norm()
        )
        return actor, critic, *frozen

    monkeypatch.setattr(train_ppo, "load_models", late)
    flags = dict(fp16(10), align_overflow=True, critic_zero_stage=2, actor_lr=1e-3, max_steps=4)
    assert call(train_ppo, **ppo("late", **flags))[0] == 0
    norms = [row["critic_grad_norm"] for row in metrics(world["out"] / "late")]
    assert [norm is None for norm in norms] == [True, True, False, False]


def test_align_overflow_waits_for_the_actor_while_the_critic_trains_alone(fp16, ppo, call, world):
    flags = dict(fp16(10), critic_warmup_steps=2, align_overflow=True, actor_lr=1e-3)
    assert call(train_ppo, **ppo("warm", **flags))[0] == 0
    rows = metrics(world["out"] / "warm")
    assert [row["actor_grad_norm"] > 0 for row in rows] == [False, False, True]
    assert all(row["critic_grad_norm"] > 0 for row in rows)


def test_align_overflow_is_for_fp16(ppo, call):
    code, error = call(train_ppo, **ppo("x", align_overflow=True))
    assert code == 2 and "--align_overflow is for fp16" in error


@pytest.mark.parametrize(
    "given,settings,expected",
    [
        ({"zero_optimization": {"stage": 2}}, {}, "zero_optimization.stage is 2, but flags say"),
        ({"gradient_clipping": 3}, {}, "gradient_clipping is 3, but flags say 1.0"),
        ({"optimizer": {"type": "Adam"}}, {}, "but flags say their own: change"),
        ({"train_batch_size": 999}, {}, "train_batch_size is not equal to micro_batch_per_gpu"),
        ([], {}, "cannot load the JSON object in"),
        ({}, {"offload": True}, "give --zero_stage 1, 2 or 3"),
        (
            {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
            {"zero_stage": 1},
            "zero_optimization.offload_optimizer.device is cpu, but flags say none",
        ),
        (
            {"zero_optimization": {"reduce_bucket": 1}},
            {},
            "cannot load DeepSpeed's engine (see --dtype), in",
        ),
        (
            {},
            {"lora_dim": 2, "add_eot_token": True, "end_of_conversation_token": "<end>"},
            "--add_eot_token's row would not train: give --no-only_optimize_lora",
        ),
        (
            {},
            {"lora_dim": 2, "lora_module_name": "decoder.layers."},
            "is in no linear layer's name",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(
    start, call, tmp_path, given, settings, expected
):
    (tmp_path / "ds.json").write_text(json.dumps(given))
    start.update(deepspeed_config=tmp_path / "ds.json", max_steps=1, output_dir=tmp_path / "out")
    code, error = call(train_sft, **start, **settings)
    assert code == 1 and expected in error and len(error.strip().splitlines()) == 1, error


def test_a_deepspeed_file_adds_what_no_flag_says_and_may_repeat_what_one_does(
    start, call, tmp_path
):
    given = {
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 1000},
    }
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "optimizer")
    (tmp_path / "ds.json").write_text(json.dumps({**given, **dict.fromkeys(auto, "auto")}))
    start.update(deepspeed_config=tmp_path / "ds.json", zero_stage=1, max_steps=1)
    made = []
    train_step = train_sft.train_step
    train_sft.train_step = lambda engine, rows: made.append(engine) or train_step(engine, rows)
    try:
        code, error = call(train_sft, **start, output_dir=tmp_path / "out")
    finally:
        train_sft.train_step = train_step
    assert code == 0, error
    assert made[0]._config.zero_config.reduce_bucket_size == 1000


def test_one_process_alone_copies_no_gradients(world, start, call, monkeypatch):
    """DeepSpeed would flatten them all, reduce them over itself and copy them back."""
    reduced, reduce = [], DeepSpeedEngine.allreduce_bucket
    counted = lambda *args, **kwargs: reduced.append(1) or reduce(*args, **kwargs)
    monkeypatch.setattr(DeepSpeedEngine, "allreduce_bucket", counted)
    code, error = call(train_sft, **start, max_steps=2, output_dir=world["out"] / "alone")
    assert code == 0 and not reduced, error


def test_without_zero_gradients_are_clipped_and_their_norm_before_that_is_logged(
    world, start, call, monkeypatch
):
    used, step = [], torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        weights = [w for group in self.param_groups for w in group["params"]]
        used.append(torch.cat([w.grad.flatten() for w in weights]).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    for limit in (0.01, 100):
        out = world["out"] / f"{limit}"
        accumulate = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
        settings = {**start, **accumulate, "max_steps": 2, "max_grad_norm": limit, "lr": 0}
        assert call(train_sft, **settings, output_dir=out)[0] == 0
    clipped, free = used[:2], used[2:]
    logged = [row["grad_norm"] for row in metrics(world["out"] / "0.01") if "loss" in row]
    assert clipped == pytest.approx([0.01, 0.01], rel=1e-3)
    assert logged == pytest.approx(free, rel=1e-5) and min(free) > 0.1


COLLECTIVES = """
import sys, time, torch, deepspeed, train_sft
from rlhf import engine
sys.argv[1:] = ["--profile", "--output_dir", sys.argv[1]]
engine.init(train_sft.parse())
deepspeed.comm.comm.cdb.all_reduce = lambda *_, **__: time.sleep(0.02)
for _ in range(4):
    engine.communicated(), time.sleep(0.5)
    for _ in range(5):
        deepspeed.comm.all_reduce(torch.ones(3))
    print(engine.communicated())
"""


def test_collectives_are_timed_since_the_last_time(tmp_path):
    """Five of 0.02 s each, four times; nothing between them counts, nothing counts twice."""
    done = run([sys.executable, "-c", COLLECTIVES, str(tmp_path)], **ENV)
    found = [float(line) for line in done.stdout.split()[-4:]]
    assert len(found) == 4 and all(0.1 <= seconds < 0.5 for seconds in found), (found, done.stderr)


@pytest.mark.parametrize("script", ["train_sft", "train_ppo"])
def test_a_profile_says_where_each_step_went(fork, start, ppo, world, script):
    """On two ranks that share gradients and shards; without the flag nothing is timed or said."""
    flags = dict(start, max_steps=3, zero_stage=2)
    if script == "train_ppo":
        flags = ppo("profile", actor_zero_stage=2, critic_zero_stage=2)
    said = {}
    for profile in (True, False):
        out = world["out"] / f"{script}{profile}"
        given = {**flags, **({"profile": True} if profile else {}), "output_dir": out}
        lines = fork(script, given, 2).succeeds().read("out0").splitlines()
        said[profile] = [line for line in lines if "of_products" in line]
    assert len(said[True]) == 3 and not said[False]
    rows = [row for row in metrics(world["out"] / f"{script}True") if "tflops" in row]
    for line, row in zip(said[True], rows, strict=True):
        found = {name: float(value) for name, value in re.findall(r"(\w+) ([-+.e\d]+)", line)}
        assert 0 < found["communication"] < 1 and found["of_products"] > 0
        assert found["tflops"] == pytest.approx(row["tflops"], rel=1e-3)
        assert found["tokens_per_second"] == pytest.approx(row["tokens_per_second"], rel=1e-3)
        if script == "train_ppo":
            parts = [found[name] for name in ("generate", "score", "train")]
            assert all(part > 0 for part in parts)
            if row["step"] > 1:  # before the first, rank 1 waits for rank 0's files
                assert 0.5 < sum(parts) < 1.1
            assert found["generate"] == pytest.approx(
                row["seconds_generate"] / row["seconds"], rel=1e-3
            )
