"""run_all.sh itself, cut short: the embedded world learns."""

import json
import os
import sys

from tests.conftest import free_port, run


def test_the_whole_pipeline_learns_the_embedded_world(tmp_path):
    env = {
        "OUTPUT": str(tmp_path),
        "DS_ACCELERATOR": "cpu",
        "MASTER_PORT": str(free_port()),
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"],
        "SFT_FLAGS": "--max_steps 100 --max_eval_rows 300",
        "RM_FLAGS": "--max_steps 160 --max_eval_rows 300",
        "DPO_FLAGS": "--max_steps 80 --max_eval_rows 64 --eval_interval 80 --eval_kl_prompts 16",
        "PPO_FLAGS": "--max_steps 24",
        "EVAL_FLAGS": "--num_prompts 200 --best_of 4",
    }
    done = run(["bash", "run_all.sh"], **env)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "evaluation" / "evaluation.json") as file:
        rows = json.load(file)["models"]
    assert list(rows) == ["sft", "dpo", "ppo", "ema", "sft, best of 4"]
    sft, ppo, best = rows["sft"], rows["ppo"], rows["sft, best of 4"]
    for column in ("score", "true_reward", "polite"):
        assert ppo[column] > sft[column] + 0.3 and best[column] > sft[column], column
    assert ppo["true_reward"] - ppo["true_reward_ci"] > sft["true_reward"] + sft["true_reward_ci"]
    dpo = rows["dpo"]
    assert dpo["true_reward"] - dpo["true_reward_ci"] > sft["true_reward"] + sft["true_reward_ci"]
    assert (
        sft["kl"] == 0
        and sft["win_rate"] == 0.5
        and 0.5 < ppo["win_rate"] <= 1
        and 0 < ppo["kl"] < 10
    )
    assert (
        1 < sft["perplexity"] < ppo["perplexity"]
        and 0.9 < sft["eos_rate"] <= 1
        and 5 < ppo["response_length"] < 30
    )
    page = (tmp_path / "evaluation" / "evaluation.md").read_text()
    assert page in done.stdout + "\n" and page.count("**Human:") == 3
