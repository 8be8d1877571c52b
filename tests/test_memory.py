"""The memory that is foretold is the memory that is used."""

import json
import sys

import pytest

from tests.bench import memory
from tests.conftest import ENV, make_model, run


def test_foretold_memory_is_within_15_percent_of_real_steps(tmp_path):
    shape = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=4, head_dim=96)
    shape.update(num_attention_heads=4, num_key_value_heads=4, vocab_size=12000)
    path = make_model(tmp_path / "model", **shape)
    done = run([sys.executable, "tests/peaks.py", path, str(tmp_path / "out.json")], **ENV)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out.json") as file:
        found = json.load(file)
    assert len(found) == 7
    for name, (real, foretold) in found.items():
        assert abs(foretold / real - 1) < 0.15, (name, real, foretold)


@pytest.mark.parametrize(
    "script,flags,expected",
    [
        ("train_sft.py", [], {"model": 3}),
        ("train_rm.py", [], {"model": 6}),
        ("train_dpo.py", [], {"model": 6, "reference": 6}),
        ("train_dpo.py", ["--precompute_ref_logp"], {"model": 6}),
        ("train_dpo.py", ["--lora_dim=4"], {"model": 6}),
        ("train_dpo.py", ["--lora_dim=4", "--no-only_optimize_lora"], {"model": 6, "reference": 6}),
    ],
)
def test_every_model_of_a_run_and_both_rows_of_a_pair_are_foretold(script, flags, expected):
    args = memory.parsed(script, ["--per_device_train_batch_size=3", *flags])
    assert {model.name: model.rows for model in memory.plan(script, args)} == expected


@pytest.mark.parametrize("micro,scored", [(5, 5), (64, 16)])
def test_what_a_rollout_scores_at_once_is_foretold(micro, scored):
    args = memory.parsed("train_ppo.py", [f"--generation_micro_batch_size={micro}"])
    found = {model.name: (model.rows, model.sampled) for model in memory.plan("train_ppo.py", args)}
    read_only = {"reward": (scored, 0), "reference": (scored, 0)}
    assert found == {"actor": (16, 16), "critic": (16, 0), **read_only}


@pytest.mark.parametrize(
    "flags,on_gpu,on_cpu",
    [([], 4, 0), (["--actor_zero_stage=3"], 2, 0), (["--actor_zero_stage=3", "--offload"], 0, 2)],
)
def test_the_average_is_foretold_where_its_weights_lie(flags, on_gpu, on_cpu):
    """Bytes a weight on each of two ranks."""
    actor, found = memory.Model("actor", "toy", "actor_", 2, 4, 4), []
    for more in ([], ["--enable_ema"]):
        args = memory.parsed("train_ppo.py", ["--critic_zero_stage=1", *flags, *more])
        found.append(memory.estimate(actor, args, 2))
    less, more = found
    assert more["resident"] - less["resident"] == on_gpu * less["parameters"]
    assert more["CPU"] - less["CPU"] == on_cpu * less["parameters"]
