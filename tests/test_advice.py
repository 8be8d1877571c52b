"""The rules of thumb: each one speaks when it is broken, and only then."""

import re
import sys

import pytest

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import advice, engine
from rlhf.args import InputError
from tests.conftest import ROOT

SCRIPTS = {"sft": train_sft, "rm": train_rm, "dpo": train_dpo, "ppo": train_ppo}
SOUND = {
    "sft": "--learning_rate 2e-5 --num_train_epochs 3",
    "rm": "--learning_rate 9.65e-6 --weight_decay 0.1",
    "dpo": "--learning_rate 5e-6 --beta 0.1",
    "ppo": "--actor_lr 9.65e-6 --critic_lr 5e-6 --enable_ema",
}


@pytest.fixture
def advise(monkeypatch, capsys):
    """Flags -> what is said of them on four ranks, without the effective batch."""
    monkeypatch.setattr(engine, "world_size", lambda: 4)

    def run(step, given, total=None, **changes):
        words = ["train.py", "--data_path", "x", "--num_warmup_steps", "100", *given.split()]
        monkeypatch.setattr(sys, "argv", words)
        args = SCRIPTS[step].parse()
        vars(args).update(changes)
        total = total or 14 * args.num_warmup_steps
        capsys.readouterr()
        advice.check(args, step, total)
        first, *found = capsys.readouterr().out.splitlines()
        assert re.fullmatch(rf"effective batch \d+, {total} optimizer steps", first)
        assert all(line.startswith("advice: ") for line in found)
        return int(first.split()[2].strip(",")), [line.split()[1] for line in found]

    return run


@pytest.mark.parametrize("step", SOUND)
def test_nothing_is_said_of_the_published_settings(advise, step):
    assert advise(step, SOUND[step]) == (64, [])


BROKEN = {
    "sft": """--lr 9.6e-6: learning_rate; --lr 5.1e-5: learning_rate; --weight_decay 0.01: weight_decay
        --num_train_epochs 1: num_train_epochs; --num_train_epochs 17: num_train_epochs
        --lora_dim 8 --lora_learning_rate 4.9e-5: lora_learning_rate
        --lora_dim 8 --lora_learning_rate 5.1e-4: lora_learning_rate
        --lora_dim 3: lora_dim; --lora_dim 65: lora_dim; --lora_dim 8 --lora_alpha 8: lora_alpha_over_rank
        --per_device_train_batch_size 7: effective_batch; --per_device_train_batch_size 33: effective_batch
        --num_warmup_steps 49: warmup_share; --num_warmup_steps 101: warmup_share
        --max_grad_norm 0.4: max_grad_norm; --max_grad_norm 1.1: max_grad_norm""",
    "rm": """--lr 2.9e-6: learning_rate; --lr 5.1e-5: learning_rate; --weight_decay 0: weight_decay
        --lora_dim 8 --lr 1: learning_rate; --num_train_epochs 2: num_train_epochs
        --per_device_train_batch_size 7: effective_batch; --per_device_train_batch_size 17: effective_batch""",
    "dpo": """--lr 1.9e-6: learning_rate; --lr 2.1e-5: learning_rate; --beta 0.009: beta; --beta 0.51: beta
        --lora_dim 8 --lora_learning_rate 4.9e-5: lora_learning_rate
        --lora_dim 8 --lora_learning_rate 2.1e-4: lora_learning_rate
        --per_device_train_batch_size 3: effective_batch; --per_device_train_batch_size 17: effective_batch""",
    "ppo": """--actor_lr 9.9e-7: actor_learning_rate; --actor_lr 1.1e-5: actor_learning_rate
        --critic_lr 4.9e-6: critic_learning_rate; --critic_lr 1.1e-4: critic_learning_rate
        --critic_lora_dim 8 --critic_lr 1: critic_learning_rate
        --actor_lora_dim 8 --actor_lora_learning_rate 9e-6: actor_lora_learning_rate
        --actor_lora_dim 8 --actor_lora_learning_rate 6e-5: actor_lora_learning_rate
        --critic_lora_dim 2: critic_lora_dim; --actor_weight_decay 0.1: actor_weight_decay
        --critic_weight_decay 0.1: critic_weight_decay; --kl_coef 0.009: kl_coef; --kl_coef 2.1: kl_coef
        --ppo_epochs 2: ppo_epochs; --num_train_epochs 2: num_train_epochs
        --generation_batches 2: rollout_batches; --per_device_training_batch_size 8: rollout_batches
        --actor_lora_dim 16 --critic_lora_dim 8 --lora_alpha 32 --actor_lora_learning_rate 3e-5: critic_lora_alpha_over_rank""",
}


@pytest.mark.parametrize("step", SOUND)
def test_a_flag_just_outside_of_its_range_is_named_and_no_other(advise, step):
    for given, name in re.findall(r"(--[^:]*): (\w+)", BROKEN[step]):
        assert advise(step, f"{SOUND[step]} {given}", total=1000)[1] == [name], given
    named = {name for _, name in re.findall(r"(--[^:]*): (\w+)", BROKEN[step])}
    assert {name for name, *_ in advice.RULES[step]} <= named | {"enable_ema", "effective_batch"}


def test_what_has_nothing_to_say_is_not_judged(advise):
    assert advise("ppo", SOUND["ppo"].replace("--enable_ema", ""))[1] == ["enable_ema"]
    sft, rate = SOUND["sft"], "--lora_learning_rate 1"
    assert advise("sft", f"{sft} {rate} --lora_alpha 3")[1] == []  # no adapters
    adapters = f"{sft} --lora_dim 16 --lora_learning_rate 2e-4 --lr 1"
    assert advise("sft", adapters)[1] == []  # nothing trains at --lr
    assert advise("sft", f"{adapters} --no-only_optimize_lora")[1] == ["learning_rate"]
    assert advise("sft", f"{sft} --num_train_epochs 99 --max_steps 9")[1] == []
    accumulated = "--per_device_training_batch_size 8 --gradient_accumulation_steps 2"
    assert advise("ppo", f"{SOUND['ppo']} {accumulated}") == (64, [])


def test_strict_advice_is_an_error_that_names_all_of_it(advise):
    with pytest.raises(InputError, match="^--strict_advice: learning_rate is 0.001, usual: 9.65e-06 to "
                       r"5e-05 \(common practice\); num_train_epochs is 1"):  # fmt: skip
        advise("sft", "--strict_advice")
    assert advise("sft", f"{SOUND['sft']} --strict_advice") == (64, [])


def test_the_embedded_world_gets_no_advice(advise):
    assert advise("sft", "--strict_advice", data_path=["toy"])[1] == []


def test_a_strict_run_ends_before_it_trains(world, start, call):
    loose, strict = world["out"] / "loose", world["out"] / "strict"
    assert call(train_sft, **start, lr=0.3, max_steps=1, output_dir=loose)[0] == 0
    assert (loose / "config.json").exists()
    code, error = call(train_sft, **start, lr=0.3, strict_advice=True, output_dir=strict)
    assert code == 1 and "error: --strict_advice: learning_rate is 0.3" in error
    assert not (strict / "metrics.jsonl").exists()


def test_readmes_starting_values_are_within_the_rules(advise):
    page = (ROOT / "README.md").read_text()
    table = page[page.index("## Starting values") : page.index("## When a run ends early")]
    full = {}
    for method, command in re.findall(r"^\| (\S[^|]*) \| ([^|]*`[^|]*`) \|", table, re.M):
        name = method.partition(",")[0].lower()
        step = {"reward model": "rm"}.get(name, name)
        words = re.search("`(.*)`", command)[1]
        if words.startswith("deepspeed"):
            words = full[step] = re.sub(r".*\.py|--(model_name_or_path|data_path) \S+", "", words)
        else:  # the same with ...
            words = f"{full[step]} {words}"
        assert advise(step, words)[1] == [], (method, words)
    assert {*full} == {*SCRIPTS}


def test_rates_are_judged_as_they_are_scaled_by_the_batch(advise):
    """64 rows on four ranks, for rates that are meant for 16."""
    scaled = "--num_train_epochs 3 --base_batch_size 16 --lr_scaling"
    assert advise("sft", f"{scaled} linear --lr 1e-5") == (64, [])  # 4e-5
    assert advise("sft", f"{scaled} linear --lr 1.3e-5") == (64, ["learning_rate"])  # 5.2e-5
    assert advise("sft", f"{scaled} sqrt --lr 2.4e-5") == (64, [])  # 4.8e-5
    assert advise("sft", f"{scaled} sqrt --lr 2.6e-5") == (64, ["learning_rate"])  # 5.2e-5
    assert advise("sft", "--lr 1 --lr_range_test") == (64, [])  # of no use to a ramp
