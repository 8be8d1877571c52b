"""The scripts as people run them: every launcher, one rank and two, short runs, bad input."""

import gzip
import importlib.util
import inspect
import json
import math
import os
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import args as flags
from rlhf import log, losses, models
from tests.conftest import (
    ROOT,
    SHARED,
    SMALL,
    metrics,
    run,
    run_script,
    to_flags,
    weights,
    write_jsonl,
)

METRICS = """step score score_std kl kl_coef reward entropy ratio_mean ratio_min ratio_max clip_frac approx_kl
    policy_loss value_loss value_clip_frac explained_variance return_mean advantage_mean
    response_length eos_rate actor_grad_norm critic_grad_norm actor_lr critic_lr seconds
    seconds_generate seconds_score seconds_train tokens_per_second tflops first_ratio_error_max
    skipped_steps"""


SCRIPTS = {m.__name__: m for m in (train_sft, train_rm, train_ppo, train_dpo)}


def commands():
    """Every call of a script in README and in the scripts' own docstrings -> [script, *flags]."""
    pages = [(ROOT / "README.md").read_text(), *(m.__doc__ for m in SCRIPTS.values())]
    for page in pages:
        text = re.sub(r"\\\\?\n\s*", " ", page)
        for name, given in re.findall(r"(train_\w+)\.py((?: +--?\w[^`|#\n&)]*)?)", text):
            yield [name, *given.split()]


def test_every_command_in_readme_is_understood(monkeypatch):
    found = [*commands()]
    assert len(found) > 20 and {name for name, *_ in found} == {*SCRIPTS}
    for name, *given in found:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *given])
        SCRIPTS[name].parse()


DEEPSPEED_CHAT = {
    "all": """add_eot_token compute_fp32_loss data_output_path data_path data_split dtype enable_tensorboard
        gradient_accumulation_steps local_rank lr_scheduler_type num_train_epochs num_warmup_steps offload
        only_optimize_lora output_dir seed tensorboard_path deepspeed deepspeed_config""",
    "one model": """dropout gradient_checkpointing learning_rate lora_dim lora_learning_rate lora_module_name
        max_seq_len model_name_or_path per_device_eval_batch_size per_device_train_batch_size
        weight_decay zero_stage""",
    "train_sft": "eot_token print_loss sft_only_data_path",
    "train_rm": "eval_interval eval_iters num_padding_at_beginning",
    "train_dpo": "beta label_smoothing offload_reference_model print_loss",
    "train_ppo": """actor_dropout actor_gradient_checkpointing actor_learning_rate actor_lora_dim
        actor_lora_learning_rate actor_lora_module_name actor_model_name_or_path actor_weight_decay
        actor_zero_stage align_overflow critic_dropout critic_gradient_checkpointing critic_learning_rate
        critic_lora_dim critic_lora_learning_rate critic_lora_module_name critic_model_name_or_path
        critic_weight_decay critic_zero_stage enable_ema enable_hybrid_engine enable_mixed_precision_lora
        enable_test_mode generation_batches inference_tp_size max_answer_seq_len max_prompt_seq_len
        num_padding_at_beginning offload_reference_model offload_reward_model
        per_device_generation_batch_size per_device_training_batch_size ppo_epochs
        preprocessing_num_workers print_answers print_answers_interval release_inference_cache
        test_stop_step tp_gather_partition_size unpin_actor_parameters unsup_coef
        unsupervised_dataset_config_name unsupervised_dataset_name""",
}


@pytest.fixture
def parser_of(monkeypatch):
    """A script -> its argparse parser."""
    made, parse_args = [], flags.Parser.parse_args
    monkeypatch.setattr(
        flags.Parser, "parse_args", lambda self: made.append(self) or parse_args(self, [])
    )
    return lambda script: script.parse() and made[-1]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_of_deepspeed_chat_is_ours_or_in_readmes_table(name, parser_of):
    theirs = DEEPSPEED_CHAT["all"].split() + DEEPSPEED_CHAT[name].split()
    theirs += DEEPSPEED_CHAT["one model"].split() * (name != "train_ppo")
    actions = parser_of(SCRIPTS[name])._actions
    ours = {text.lstrip("-") for action in actions for text in action.option_strings}
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("Its flags that are gone here") :].partition("\n## ")[0]
    gone = {*re.findall(r"`--(\w+)`", table)}
    assert {*theirs} <= ours | gone and not {*theirs} & ours & gone


# learning


def test_sft_overfits_eight_rows_and_the_saved_model_is_the_trained_one(world, call, tmp_path):
    rows = [
        {"prompt": f"w{i} w{i + 1}", "response": f" w{2 * i} w{i + 9} w{i + 3}"} for i in range(8)
    ]
    (tmp_path / "eight").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "eight" / f"{split}.jsonl", rows)
    eight = dict(
        data_path=tmp_path / "eight", data_split="1,0,0", per_device_train_batch_size=8, **SMALL
    )
    eight["no-dedup_prompts"] = True
    first, again = world["out"] / "sft", world["out"] / "again"
    long = dict(num_train_epochs=150, eval_interval=150)
    code, error = call(
        train_sft, **eight, **long, model_name_or_path=world["actor"], lr=1e-2, output_dir=first
    )
    assert code == 0, error
    before, *_, after = [r["eval_perplexity"] for r in metrics(first) if "eval_perplexity" in r]
    assert before > 20 and after < 1.1
    call(train_sft, **eight, model_name_or_path=first, lr=0, max_steps=1, output_dir=again)
    assert metrics(again)[0]["eval_perplexity"] == pytest.approx(after, rel=1e-5)
    assert json.load(open(first / "args.json"))["num_train_epochs"] == 150


def test_training_on_prompts_too_makes_prompts_likelier(world, start, call):
    ids = torch.tensor([[3, 3, 3], [4, 3, 4], [5, 3, 5]])  # prompts of the data: w0 w0 w0, ...
    logp = {}
    for name, extra in (("responses", {}), ("both", {"train_on_prompt": True})):
        folder = world["out"] / name
        code, error = call(
            train_sft, **start, **extra, lr=1e-2, num_train_epochs=5, output_dir=folder
        )
        assert code == 0, error
        logp[name] = -AutoModelForCausalLM.from_pretrained(folder)(ids, labels=ids).loss
    assert logp["both"] > logp["responses"] + 0.3


def test_packing_takes_the_step_that_padding_takes(world, start, call, tmp_path):
    rows = [
        {"prompt": f"w{i} w{i + 1}" + " w1" * (i % 4), "response": " w2" * (1 + i % 5)}
        for i in range(8)
    ]
    (tmp_path / "eight").mkdir()
    write_jsonl(tmp_path / "eight" / "train.jsonl", rows)
    write_jsonl(tmp_path / "eight" / "test.jsonl", [{"prompt": "w29 w29", "response": " w3"}])
    start.update(data_path=tmp_path / "eight", data_split="1,0,0", max_seq_len=64, max_steps=1)
    padded, packed = world["out"] / "padded", world["out"] / "packed"
    assert call(train_sft, **start, per_device_train_batch_size=8, output_dir=padded)[0] == 0
    one = dict(per_device_train_batch_size=1, packing=True)  # all eight rows in one sequence
    code, error = call(train_sft, **start, **one, output_dir=packed)
    assert code == 0, error
    # all but the token count's own denominators agree: the step, and the model that it made
    names = ["loss", "grad_norm"]
    same(metrics(padded)[1], metrics(packed)[1], names)
    same(metrics(padded)[2], metrics(packed)[2], ["eval_perplexity"])


def test_grouping_by_length_trains_on_the_same_rows_and_pads_less(world, start, call):
    for script in (train_sft, train_rm):
        out = world["out"] / script.__name__
        code, error = call(script, **start, group_by_length=True, max_steps=3, output_dir=out)
        assert code == 0 and len(metrics(out)) == 5, error


def test_instructions_alone_do_not_bring_the_embedded_world_along(world, start, call, capsys):
    del start["data_path"]
    rows = [{"prompt": f"w{i % 30} w{i // 30}", "response": " w1"} for i in range(100)]
    path = write_jsonl(world["out"].parent / "instructions.jsonl", rows)
    out = world["out"] / "sft"
    code, error = call(train_sft, **start, sft_only_data_path=path, max_steps=1, output_dir=out)
    assert code == 0 and json.load(open(out / "args.json"))["data_path"] == [], error


def test_an_end_of_conversation_token_goes_through_all_three_steps(world, start, ppo, call):
    new = dict(end_of_conversation_token="<end>", add_eot_token=True)
    sft, rm = world["out"] / "sft", world["out"] / "rm"
    assert call(train_sft, **start, **new, max_steps=1, output_dir=sft)[0] == 0
    start["model_name_or_path"] = sft  # from here on it is the model's eos
    assert call(train_rm, **start, max_steps=1, output_dir=rm)[0] == 0
    models = dict(actor_model_name_or_path=sft, critic_model_name_or_path=rm)
    code, error = call(train_ppo, **ppo("ppo", **models, max_steps=1))
    assert code == 0, error
    opened = AutoModelForCausalLM.from_pretrained(world["out"] / "ppo" / "actor")
    assert opened.config.eos_token_id == opened.generation_config.eos_token_id == 33
    other = dict(**models, end_of_conversation_token="w3", max_steps=1)
    assert "responses end with w3" in call(train_ppo, **ppo("other", **other))[1]


def test_a_reward_model_separates_separable_pairs(reward_model):
    last = [row for row in metrics(reward_model) if "eval_accuracy" in row][-1]
    assert last["eval_accuracy"] > 0.95 and last["eval_margin"] > 1
    difference = last["eval_chosen_score"] - last["eval_rejected_score"]
    assert last["eval_margin"] == pytest.approx(difference, abs=1e-4)
    opened = AutoModelForSequenceClassification.from_pretrained(reward_model)
    assert opened.config.num_labels == 1


def test_ppo_raises_the_score_and_leaves_everything_a_run_should(world, ppo, call):
    rows = dict(
        generation_batches=2, gradient_accumulation_steps=2, per_device_training_batch_size=8
    )
    shown = dict(print_answers_interval=10, enable_tensorboard=True)
    rates = dict(actor_lr=5e-3, critic_lr=5e-3, kl_coef=0.01, ppo_epochs=2, num_train_epochs=5)
    code, error = call(
        train_ppo, **ppo("ppo", max_steps=25, enable_ema=True, **rows, **shown, **rates)
    )
    assert code == 0, error
    folder = world["out"] / "ppo"
    rows = metrics(folder)
    assert rows[-1]["score"] > rows[0]["score"] + 1 and rows[-1]["kl"] > rows[0]["kl"]
    assert len(rows) == 25 and all(set(row) == set(METRICS.split()) for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert max(row["first_ratio_error_max"] for row in rows) < 1e-5
    assert max(row["ratio_max"] for row in rows) > 1.01
    begun, actor, ema = map(weights, (world["actor"], folder / "actor", folder / "actor_ema"))

    def distance(a):
        return sum((a[n].double() - begun[n]).square().sum() for n in begun).sqrt()

    assert 0 < distance(ema) < distance(actor)
    assert AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    samples = [json.loads(line) for line in open(folder / "samples.jsonl")]
    assert len(samples) == 3 * 32
    assert set(samples[0]) == {"step", "prompt", "response", "score", "kl"}
    assert list((folder / "tensorboard").rglob("events.out*"))


def test_target_kl_raises_the_coefficient_above_twice_it_and_lowers_it_below_half(
    world, ppo, call, monkeypatch
):
    kls = [0.101, 0.099, 0.05, 0.026, 0.024, 1.0, *[0.0] * 27]
    given, rollout = iter(kls), train_ppo.rollout

    def scripted(*args):
        experience, found = rollout(*args)
        return experience, {**found, "kl": next(given)}

    monkeypatch.setattr(train_ppo, "rollout", scripted)
    rates = dict(kl_coef=0.02, target_kl=0.05, max_steps=len(kls), num_train_epochs=9)
    code, error = call(train_ppo, **ppo("adaptive", **rates))
    assert code == 0, error
    expected = [0.02]
    for factor in (1.5, 1, 1, 1, 0.8, 1.5, *[0.8] * 26):
        expected.append(max(expected[-1] * factor, 0.0002))
    found = [row["kl_coef"] for row in metrics(world["out"] / "adaptive")]
    assert found == pytest.approx(expected) and found[-1] == found[-2] == 0.0002


def test_a_critic_that_warms_up_moves_alone_and_the_actors_schedule_waits(
    world, ppo, call, monkeypatch
):
    """Nor does the coefficient fall while the KL is 0 because nothing moves."""
    rates = dict(actor_lr=5e-3, critic_lr=5e-3, lr_scheduler_type="linear", enable_ema=True)
    graphs, loss, done, work = [], train_ppo.policy_loss, [], train_ppo.work
    monkeypatch.setattr(train_ppo, "work", lambda *given: done.append(given) or work(*given))
    noted = lambda logp, *rest: graphs.append(logp.requires_grad) or loss(logp, *rest)
    monkeypatch.setattr(train_ppo, "policy_loss", noted)
    warm = ppo("warm", **rates, critic_warmup_steps=2, max_steps=4, target_kl=50, save_interval=2)
    code, error = call(train_ppo, **warm)
    assert code == 0, error
    folder, rows = world["out"] / "warm", metrics(world["out"] / "warm")
    begun, actor, ema = map(weights, (world["actor"], folder / "actor", folder / "actor_ema"))
    for after in (actor, ema):
        assert any(not torch.equal(begun[n], after[n]) for n in begun)
    state = torch.load(
        folder / "checkpoints/step2/actor/mp_rank_00_model_states.pt", weights_only=False
    )
    then = state["module"]
    assert all(torch.equal(begun[n], then[n]) for n in begun)
    assert [row["actor_grad_norm"] > 0 for row in rows] == [False, False, True, True]
    assert all(row["critic_grad_norm"] > 0 for row in rows)
    assert [row["kl"] for row in rows[:3]] == pytest.approx([0] * 3, abs=1e-4)
    assert [row["kl_coef"] for row in rows] == pytest.approx([0.1, 0.1, 0.1, 0.08])
    assert [row["actor_lr"] for row in rows] == pytest.approx([5e-3, 5e-3, 5e-3, 2.5e-3])
    assert [row["critic_lr"] for row in rows] == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])
    assert graphs == [False, False, True, True]  # what is not learned from is not kept
    passes = [[*given[1].values()] for given in done[1::2]]  # of actor and critic, in updates
    assert passes == [[1, 3], [1, 3], [3, 3], [3, 3]]
    for changes in (dict(max_steps=3), dict(lr_range_test=9)):
        code, error = call(train_ppo, **ppo("never", critic_warmup_steps=3, **changes))
        assert code == 1 and "--critic_warmup_steps: below " in error, error


@pytest.mark.parametrize("scaling,factor", [("none", 1), ("sqrt", 0.5), ("linear", 0.25)])
def test_rates_follow_the_effective_batch_when_asked(start, world, call, scaling, factor):
    """Eight pairs where the rates are meant for 32."""
    cut = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1)
    how = dict(lr_scaling=scaling, base_batch_size=32, lr=1e-3)
    code, error = call(train_rm, **{**start, **cut, **how, "output_dir": world["out"] / "rm"})
    assert code == 0, error
    [row] = [row for row in metrics(world["out"] / "rm") if "lr" in row]
    assert row["lr"] == pytest.approx(1e-3 * factor)


def test_a_ramp_of_rates_says_where_the_loss_falls_steepest_and_touches_nothing(
    start, world, tmp_path
):
    """On two ranks, both of its groups of rates; it says so once."""
    flags = dict(lr_range_test=8, per_device_train_batch_size=4, num_warmup_steps=5, lora_dim=2)
    flags.update(output_dir=tmp_path / "rm", data_output_path=tmp_path / "cache")
    done = run_script("train_rm.py", *to_flags(**{**start, **flags}), ranks=2, launcher="deepspeed")
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path / "rm") == ["lr_range_test"]
    found = [row for row in metrics(tmp_path / "rm/lr_range_test") if "lr" in row]
    rates = [10 ** (-7 + 7 * step / 8) for step in range(8)]
    assert [row["lr"] for row in found] == pytest.approx(rates)
    said = re.findall(r"--lr_range_test: loss \S+ a decade, the most, at --lr (\S+)", done.stdout)
    assert len(said) == 1 and float(said[0]) in [pytest.approx(rate, rel=0.1) for rate in rates]


@pytest.mark.parametrize("steps", [100, 60, 20])
@pytest.mark.parametrize("wild", [lambda n: 9.0, lambda n: 200 * 0.9**n + 8], ids=["leap", "spike"])
def test_the_rate_that_a_ramp_suggests_is_where_a_known_curve_is_steepest(
    steps, wild, tmp_path, capsys
):
    """A logistic fall (the reward's rise) around 1e-3 and noise, then a leap, or a spike that decays
    (whose fall is the steepest of all).  One that ended before it fell; one too short for a slope."""
    noise, rows = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist(), []
    for step in range(steps):
        rate = 10 ** (-7 + 7 * step / 100)
        fallen = 1 / (1 + math.exp(-4 * (math.log10(rate) + 3)))
        loss = 5 - 4 * fallen + 0.2 * noise[step] + (wild(step - 72) if step > 72 else 0)
        rows.append({"step": step + 1, "actor_lr": rate, "critic_lr": rate, "kl": 0.0})
        rows[-1].update(reward=-loss, value_loss=loss if step != 5 else None)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log.suggest_rate(str(tmp_path / "metrics.jsonl"), 25)
    found = re.findall(r"(\S+) a decade, the most, at --(\S+) (\S+)", capsys.readouterr().out)
    rates = {name: float(rate) for _, name, rate in found}
    assert {*rates} == ({"actor_lr", "critic_lr"} if steps > 25 else set())
    if steps == 100:
        assert all(1e-3 / 1.5 < rate < 1e-3 * 1.5 for rate in rates.values()), rates
        slopes = {name: float(slope) for slope, name, _ in found}
        assert (
            slopes["actor_lr"] > 2 and slopes["critic_lr"] < -2
        )  # a logistic's: 4 * 4 / 4, blurred
    for row in rows:
        row.update(reward=-row["step"], value_loss=row["step"])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log.suggest_rate(str(tmp_path / "metrics.jsonl"), 25)
    assert re.findall(r"(\S+) gets better at no --(\S+)", capsys.readouterr().out) == (
        [("reward", "actor_lr"), ("value_loss", "critic_lr")] if steps > 25 else []
    )
    plotted = importlib.util.find_spec("matplotlib") is not None
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}.png" for name in rates if plotted
    }


def test_a_cosine_ends_at_the_least_rate_that_is_asked_for(start, world, call):
    shape = dict(lr_scheduler_type="cosine_with_min_lr", min_lr_ratio=0.2, lr=1e-3, max_steps=8)
    code, error = call(train_rm, **{**start, **shape, "output_dir": world["out"] / "rm"})
    assert code == 0, error
    found = [row["lr"] for row in metrics(world["out"] / "rm") if "lr" in row]
    cosine = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert found == pytest.approx([1e-3 * (0.2 + 0.8 * share) for share in cosine])


# the ratio


@pytest.mark.parametrize("changes", [{"temperature": 0.7, "top_k": 5}, {"dtype": "bf16"}])
def test_without_learning_every_ratio_is_one_whatever_the_minibatches(world, ppo, call, changes):
    cut = dict(per_device_training_batch_size=4, gradient_accumulation_steps=3)
    still = dict(actor_lr=0, critic_lr=0, ppo_epochs=3, generation_batches=3)
    code, error = call(train_ppo, **ppo("still", **cut, **still, **changes))
    assert code == 0, error
    tolerance = 2e-2 if "dtype" in changes else 1e-5
    for row in metrics(world["out"] / "still"):
        assert abs(row["ratio_max"] - 1) < tolerance and abs(row["ratio_min"] - 1) < tolerance
        assert row["first_ratio_error_max"] < tolerance and row["clip_frac"] == 0
        assert abs(row["kl"]) < tolerance


def test_dropout_in_a_models_config_does_not_reach_step_3(world, ppo, call):
    path = os.path.join(world["actor"], "config.json")
    with open(path) as file:
        config = json.load(file)
    with open(path, "w") as file:
        json.dump({**config, "attention_dropout": 0.5}, file)
    assert call(train_ppo, **ppo("dry", max_steps=1))[0] == 0
    assert metrics(world["out"] / "dry")[0]["first_ratio_error_max"] < 1e-5


def test_the_unsupervised_mix_keeps_text_likely(world, ppo, call, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(["w5 w6 w7 w8 w9 w10"] * 400))
    text = dict(unsupervised_dataset_name=tmp_path / "text.txt", max_steps=10, actor_lr=5e-3)
    code, error = call(train_ppo, **ppo("ptx", **text))
    assert code == 0, error
    rows = metrics(world["out"] / "ptx")
    tokenizer = models.load_tokenizer(world["actor"])
    ids = torch.tensor([tokenizer("w5 w6 w7 w8 w9 w10")["input_ids"] + [tokenizer.eos_token_id]])
    start = AutoModelForCausalLM.from_pretrained(world["actor"])(ids, labels=ids).loss.item()
    assert rows[0]["unsup_loss"] == pytest.approx(start, rel=1e-4)
    assert rows[-1]["unsup_loss"] < start - 0.5


@pytest.mark.parametrize("clip", [0.01, 1000])
def test_a_missing_end_of_sequence_is_penalised_whatever_the_clip(world, ppo, call, clip):
    for name, penalty in (("free", 0), ("priced", 3)):
        price = dict(missing_eos_penalty=penalty, clip_reward=clip, kl_coef=0, max_steps=1)
        assert call(train_ppo, **ppo(name, **price))[0] == 0
    free, priced = (metrics(world["out"] / name)[0] for name in ("free", "priced"))
    assert free["score"] == priced["score"] and 0 < free["eos_rate"] < 1
    cut_short = 1 - free["eos_rate"]
    assert priced["reward"] == pytest.approx(free["reward"] - 3 * cut_short, abs=1e-5)


def test_every_flag_of_the_algorithm_arrives_where_it_belongs(ppo, call, monkeypatch):
    calls = {}

    def spy(name):
        signature, real = inspect.signature(getattr(losses, name)), getattr(losses, name)

        def watched(*arguments, **settings):
            bound = signature.bind(*arguments, **settings)
            bound.apply_defaults()
            calls[name] = bound.arguments
            return real(*arguments, **settings)

        monkeypatch.setattr(train_ppo, name, watched)

    for name in ("shaped_rewards", "gae", "policy_loss", "value_loss", "whiten"):
        spy(name)
    reward = dict(kl_coef=0.03, kl_estimator="k3", gamma=0.9, lam=0.8, no_whiten_advantages=True)
    update = dict(clip=0.11, value_clip=0.07, ppo_epochs=2, lr_scheduler_type="linear")
    counted, work = [], train_ppo.work
    monkeypatch.setattr(train_ppo, "work", lambda *given: counted.append(given) or work(*given))
    assert (
        call(train_ppo, **ppo("wired", **reward, **update, actor_lr=1e-3, critic_lr=2e-3))[0] == 0
    )
    assert calls["shaped_rewards"]["kl_coef"] == 0.03 and calls["shaped_rewards"]["kind"] == "k3"
    assert calls["gae"]["gamma"] == 0.9 and calls["gae"]["lam"] == 0.8
    assert calls["policy_loss"]["clip"] == 0.11 and calls["value_loss"]["clip"] == 0.07
    assert "whiten" not in calls and [len(given[0]) for given in counted] == [1, 2] * 3
    assert call(train_ppo, **ppo("white", max_steps=1))[0] == 0 and "whiten" in calls


def test_schedules_end_with_the_run_and_the_unsupervised_weight_counts(world, ppo, call, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(["w5 w6 w7 w8 w9 w10"] * 400))
    text = dict(unsupervised_dataset_name=tmp_path / "text.txt", ppo_epochs=2, max_steps=4)
    rates = dict(actor_lr=1e-3, critic_lr=2e-3, lr_scheduler_type="linear")
    for name, weight in (("none", 0), ("some", 10), ("more", 20)):
        assert call(train_ppo, **ppo(name, **text, **rates, unsup_coef=weight))[0] == 0
    none, some, more = (metrics(world["out"] / name) for name in ("none", "some", "more"))
    assert [row["actor_lr"] for row in none] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
    assert [row["critic_lr"] for row in none] == pytest.approx([2e-3, 1.5e-3, 1e-3, 5e-4])
    # at first the two parts of the gradient add up, the text's far larger than the policy's
    assert more[0]["actor_grad_norm"] > 1.5 * some[0]["actor_grad_norm"] > 0


@pytest.mark.parametrize("changes", [{"zero_stage": 1}, {"dtype": "bf16"}])
def test_the_gradient_norm_is_this_steps_with_accumulation_too(world, start, call, changes):
    start.update(max_steps=3, lr=1e-2, **changes)
    whole, cut = world["out"] / "whole", world["out"] / "cut"
    assert call(train_sft, **start, per_device_train_batch_size=8, output_dir=whole)[0] == 0
    accumulate = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert call(train_sft, **start, **accumulate, output_dir=cut)[0] == 0
    tolerance = 0.05 if "dtype" in changes else 1e-5
    for one, two in zip(metrics(whole)[1:4], metrics(cut)[1:4]):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=tolerance)


# launchers and ranks


def same(one, two, names):
    for name in names:
        assert one[name] == pytest.approx(two[name], rel=1e-5), name


@pytest.mark.parametrize("script", [train_sft, train_rm, train_dpo])
def test_two_ranks_with_half_the_batch_take_the_same_step(
    start, world, call, fork, tmp_path, script
):
    rows = [
        {
            "prompt": f"w{i % 30} w{i // 30} " + "w1 " * (i % 9),
            "chosen": " w2" * (1 + i % 5),
            "rejected": " w3" * (1 + i % 3),
        }
        for i in range(100)
    ]
    ragged = write_jsonl(tmp_path / "ragged.jsonl", rows)
    start.update(data_path=ragged, data_output_path=tmp_path / "cache", max_steps=2)
    one, two = world["out"] / "one", world["out"] / "two"
    if script is train_dpo:  # what it samples depends on the rank
        start.update(eval_kl_prompts=0, eval_interval=2)
    assert call(script, **start, per_device_train_batch_size=8, output_dir=one)[0] == 0

    cut = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, output_dir=two)
    if script is train_sft:  # by torchrun, no compiler in sight, nothing that was compiled before
        env = {"DS_ACCELERATOR": "cpu", "PATH": os.path.dirname(sys.executable)}
        env["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
        flags = to_flags(**{**start, **cut})
        done = run_script("train_sft.py", *flags, ranks=2, launcher="torchrun", **env)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
    else:
        run = fork(script.__name__, {**start, **cut}, 2).succeeds()
        lines = run.read("out0").splitlines()
        assert not (run.read("out1") + run.read("err0") + run.read("err1")).strip()
    one, two = metrics(one), metrics(two)
    assert [set(row) for row in one] == [set(row) for row in two] and len(one) == 4
    for i in (1, 2):
        same(one[i], two[i], {"loss", "grad_norm", "accuracy", "margin"} & set(one[i]))
    for i in (0, 3):  # evaluations
        same(one[i], two[i], one[i])
    # and the terminal holds our lines only
    ours = ("step ", str(tmp_path), "effective batch 8, 2 optimizer steps", "advice: ")
    assert all(line.startswith(ours) for line in lines), lines
    assert all(any(line.startswith(start) for line in lines) for start in ours)


def test_ppo_on_two_ranks_under_zero_takes_the_same_step(
    world, ppo, call, fork, tmp_path, monkeypatch
):
    """--top_k 1 makes the rollouts alike: Transformers' with a static cache, and ours in pieces.
    Actor under ZeRO-3, critic under ZeRO-2, with EMA."""
    common = dict(top_k=1, max_steps=1, data_output_path=tmp_path / "cache", log_interval=1)
    rates = dict(enable_ema=True, ema_decay=0.5, actor_lr=1e-3, critic_lr=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "sample", None)  # it must not be called
        assert call(train_ppo, **ppo("one", **common, **rates, compiled_generation=True))[0] == 0
    cut = dict(
        per_device_generation_batch_size=8,
        generation_micro_batch_size=3,
        per_device_training_batch_size=4,
        gradient_accumulation_steps=2,
    )
    zero = dict(actor_zero_stage=3, critic_zero_stage=2)
    fork("train_ppo", ppo("two", **common, **rates, **zero, **cut), 2).succeeds()
    one, two = world["out"] / "one", world["out"] / "two"
    names = "actor_grad_norm critic_grad_norm value_loss score return_mean explained_variance"
    same(metrics(one)[0], metrics(two)[0], names.split())
    assert metrics(two)[0]["first_ratio_error_max"] < 1e-5
    for name in ("actor", "actor_ema", "critic"):
        a, b = weights(one / name), weights(two / name)
        # Adam moves a weight whose gradient is only rounding by a whole step: compare means
        assert set(a) == set(b) and all((a[n] - b[n]).abs().mean() < 2e-5 for n in a)
    begun, actor, ema = map(weights, (world["actor"], two / "actor", two / "actor_ema"))
    assert all(torch.allclose(ema[n], (begun[n] + actor[n]) / 2, atol=1e-6) for n in ema)
    assert not torch.equal(begun["lm_head.weight"], actor["lm_head.weight"])


# bad input


@pytest.mark.parametrize(
    "script,arguments,expected",
    [
        (train_sft, "--lr -1", "--learning_rate/--lr: must be a number, 0 or more, not -1"),
        (train_sft, "--per_device_train_batch_size 0", "must be a whole number above 0, not 0"),
        (train_rm, "--num_train_epochs many", "must be a whole number above 0, not many"),
        (
            train_rm,
            "--num_padding_at_beginning 1",
            "--num_padding_at_beginning is unknown: see --help, or README's",
        ),
        (train_ppo, "--actor_dropout=0.0", "--actor_dropout=0.0 is unknown"),
        (train_ppo, "--kl_koef 1", "--kl_koef is unknown"),
        (train_ppo, "--lam 2", "must be a number from 0 to 1"),
        (train_ppo, "--top_p 0", "must be a number above 0, at most 1"),
        (train_ppo, "--per_device_training_batch_size 7", "a rollout of 16 rows"),
        (train_sft, "--max_seq_len 1", "must be a whole number above 1, not 1"),
        (train_sft, "--seed 5000000000", "must be a whole number below 2^31"),
        (train_ppo, "stray", "stray is unknown"),
        (train_sft, "--packing --group_by_length", "no padding for --group_by_length to save"),
        (train_ppo, "--target_kl 1 --kl_coef 0", "--target_kl adapts a --kl_coef above 0"),
    ],
)
def test_a_bad_flag_is_one_sentence_and_exit_code_2(call, script, arguments, expected):
    code, error = call(script, *arguments.split())
    assert code == 2 and expected in error and len(error.strip().splitlines()) == 1, error


@pytest.mark.parametrize("script", [train_sft, train_rm, train_dpo, train_ppo])
def test_every_flag_has_help_with_the_source_of_its_default(script, parser_of):
    parser = parser_of(script)
    for action in parser._actions[1:]:
        assert "[" in (action.help or ""), action.option_strings
    assert "--seed" in parser.format_help()


ENDS = """
import atexit, ctypes
from rlhf import args
def main():
    print("done")
atexit.register(print, "and told")
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)        # as a thread that is not joined would
args.run(main)
"""


FAILS = """
import os, sys
from torch import distributed as dist
from rlhf import args, engine
dist.destroy_process_group = lambda: print("left", flush=True)
fails = os.fork() == 0
def main():
    parser = args.Parser("", sys.argv[1])
    args.add_training(parser, 0.0)
    engine.init(parser.parse_args([]))
    if fails:
        raise args.InputError("a bad row")
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
    raise SystemExit(0)
args.run(main)
"""


def test_a_failure_leaves_no_group_in_which_others_wait(tmp_path):
    """NCCL would wait for them there; a run that ends well, or is stopped, leaves it."""
    done = run([sys.executable, "-c", FAILS, str(tmp_path)], PYTHONWARNINGS="ignore")
    assert (done.returncode, done.stdout) == (0, "1\nleft\n"), done
    assert done.stderr.endswith("-c: error: a bad row\n")


def test_a_script_that_is_through_ends_well_whatever_its_libraries_leave_running():
    done = run([sys.executable, "-c", ENDS])
    assert done.returncode == 0 and done.stdout == "done\nand told\n", done.stderr


def test_bad_input_is_one_sentence_exit_code_1_and_nothing_is_written_over(
    world, start, reward_model, ppo, call, model_folder, tmp_path, monkeypatch
):
    rm = world["out"] / "rm"
    before = {path: path.read_bytes() for path in rm.iterdir()}
    other = model_folder(name="other")
    file = os.path.join(other, "tokenizer.json")
    with open(file) as opened:
        text = opened.read()
    with open(file, "w") as opened:
        opened.write(text.replace('"w29"', '"w30"'))
    headless = model_folder(name="headless")
    os.remove(os.path.join(headless, "model.safetensors"))
    monkeypatch.chdir(tmp_path)

    def ppo_with(**changes):
        return ppo("rm", **changes)

    for script, settings, expected in [
        (train_ppo, {}, "output/sft: there is no such file or folder: run train_sft.py first"),
        (train_ppo, {"actor_model_name_or_path": world["actor"]}, "run train_rm.py first"),
        (train_ppo, ppo_with(critic_model_name_or_path=world["actor"]), "it is no reward model"),
        (train_ppo, ppo_with(actor_model_name_or_path=other), "different vocabularies"),
        (train_ppo, ppo_with(max_answer_seq_len=60), "exceed the 64-token context"),
        (
            train_rm,
            {**start, "model_name_or_path": tmp_path / "no"},
            "there is no such file or folder",
        ),
        (train_rm, {**start, "model_name_or_path": headless}, "cannot load the weights"),
        (train_rm, {**start, "max_seq_len": 65}, "exceed the 64-token context"),
        (train_rm, {**start, "data_path": tmp_path / "no.jsonl"}, "there is no such file"),
        (train_sft, {**start, "output_dir": "/proc/no"}, "cannot write to --output_dir /proc/no"),
        (train_sft, {**start, "output_dir": f"{file}/in"}, "cannot write to --output_dir"),
        (train_sft, {**start, "data_output_path": f"{file}/in"}, "write to --data_output_path"),
        (train_sft, {**start, "data_split": "nan,1,1"}, "--data_split must be three numbers"),
        (train_ppo, ppo_with(unsupervised_dataset_name=rm / "model.safetensors"), "ends in none"),
        (train_sft, {**start, "per_device_train_batch_size": 4096}, "do not fill a step of"),
    ]:
        code, error = call(script, **{"output_dir": rm, **settings})
        assert code == 1 and expected in error and len(error.strip().splitlines()) == 1, error
    assert {path: path.read_bytes() for path in rm.iterdir()} == before


def test_two_ranks_say_an_error_once(tmp_path):
    done = run_script(
        "train_sft.py",
        *to_flags(data_path=tmp_path / "no.jsonl", output_dir=tmp_path, data_output_path=tmp_path),
        ranks=2,
        launcher="deepspeed",
        DS_ACCELERATOR="cpu",
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1 and said.count("there is no such file or folder") == 1
    assert "Traceback" not in said


# the whole way


def test_the_real_language_model_and_real_pairs_go_through_all_three_steps(call, tmp_path):
    model, pairs = SHARED / "stories260K", SHARED / "rm-static"
    if not model.is_dir() or not pairs.is_dir():
        pytest.skip("the real data is not here")
    with gzip.open(pairs / "train.jsonl.gz", "rt") as file:
        data = write_jsonl(tmp_path / "pairs.jsonl", [json.loads(line) for line in file][:300])
    sft, rm, out = (tmp_path / name for name in ("sft", "rm", "ppo"))
    common = dict(data_path=data, max_steps=2)
    short = dict(**common, **{**SMALL, "max_seq_len": 160}, per_device_train_batch_size=4)
    assert call(train_sft, **short, model_name_or_path=model, output_dir=sft)[0] == 0
    assert call(train_rm, **short, model_name_or_path=model, output_dir=rm)[0] == 0
    paths = dict(actor_model_name_or_path=sft, critic_model_name_or_path=rm, output_dir=out)
    lengths = dict(max_prompt_seq_len=128, max_answer_seq_len=32)
    rows = dict(per_device_generation_batch_size=4, per_device_training_batch_size=4)
    code, error = call(train_ppo, **common, **paths, **lengths, **rows)
    assert code == 0, error
    assert metrics(out)[0]["first_ratio_error_max"] < 1e-5


def test_a_rollout_is_scored_as_many_rows_at_a_time_as_asked(world, ppo, call, monkeypatch):
    """Two batches of 16: the metrics are the same, and no forward before the update has more."""
    flush_right, update, scored, found = models._flush_right, train_ppo.ppo_update, [], {}
    asked, sample = [], train_ppo.sample
    noted = lambda *given, **more: asked.append(more) or sample(*given, **more)
    monkeypatch.setattr(train_ppo, "sample", noted)

    def updated(*given, **more):
        found[rows] = scored[:]
        return update(*given, **more)

    monkeypatch.setattr(train_ppo, "ppo_update", updated)
    monkeypatch.setattr(
        models, "_flush_right", lambda b: scored.append(len(b["mask"])) or flush_right(b)
    )
    for rows in (64, 3):
        scored.clear()
        changes = dict(generation_micro_batch_size=rows, generation_batches=2, max_steps=1)
        assert call(train_ppo, **ppo(f"rows{rows}", **changes))[0] == 0
    assert asked == [{"rows": 64}] * 2 + [{"rows": 3}] * 2
    assert found == {64: [16] * 8, 3: 2 * ([3] * 20 + [1] * 4)}  # actor, reference, critic, reward
    whole, cut = (metrics(world["out"] / f"rows{rows}")[0] for rows in (64, 3))
    same(whole, cut, [name for name in cut if "second" not in name and name != "tflops"])


def test_the_micro_batches_of_a_ppo_step_are_alike_in_length(ppo, call, monkeypatch):
    """So many positions are computed as the sorted lengths say, in two steps of four micro-batches,
    for actor and critic."""
    flush_right, update, widths, lengths = models._flush_right, train_ppo.ppo_update, [], []

    def flushed(batch):
        result = flush_right(batch)
        widths.append(result[0].numel())
        return result

    def updated(actor, critic, experience, *rest, **more):
        widths.clear()
        lengths[:] = (experience["prompt_mask"].sum(1) + experience["mask"].sum(1)).tolist()
        return update(actor, critic, experience, *rest, **more)

    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).flip(0))
    monkeypatch.setattr(models, "_flush_right", flushed)
    monkeypatch.setattr(train_ppo, "ppo_update", updated)
    flags = ppo("sorted", max_steps=1, per_device_training_batch_size=2)
    flags.update(gradient_accumulation_steps=4, data_split="0,0,1")
    code, error = call(train_ppo, **flags)
    assert code == 0, error
    steps = [sorted(lengths[8:]), sorted(lengths[:8])]
    expected = [2 * max(step[i : i + 2]) for step in steps for i in range(0, 8, 2) for _ in "ac"]
    assert widths == expected and len({*lengths}) > 3, (widths, expected)
