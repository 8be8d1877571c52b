"""The evaluation compares what it says it compares."""

import json
import math
import sys

import pytest
import torch

from rlhf import args as flags
from rlhf import evaluate, models
from tests.conftest import write_jsonl


@pytest.fixture
def run(model_folder, tmp_path, monkeypatch, capsys):
    """run(flags...) evaluates two tiny models on rows of 2 and of 20 prompt tokens."""
    one, two = model_folder(name="one"), model_folder(name="two", seed=1)
    tokenizer = models.load_tokenizer(one)
    torch.manual_seed(2)
    reward_model = models.load_scalar(one, tokenizer, new_head=True)
    models.save_model(reward_model, tokenizer, str(tmp_path / "rm"))
    rows = [
        {
            "prompt": f"w{i % 30} w{i // 30}" + " w1" * (0 if i % 2 else 18),
            "response": " w2 w3 w4 w5",
        }
        for i in range(200)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)

    def call(*arguments):
        common = ("--models", f"sft={one}", f"ppo={two}", "--reward_model", str(tmp_path / "rm"))
        paths = ("--data_path", data, "--output_dir", str(tmp_path / "out"))
        cache = ("--data_output_path", str(tmp_path / "cache"), "--eval_fraction", "0.5")
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *common, *paths, *cache, *arguments])
        try:
            flags.run(evaluate.main)
        except SystemExit as stop:
            return stop.code, capsys.readouterr().err
        with open(tmp_path / "out" / "evaluation.json") as file:
            return json.load(file)["models"], (tmp_path / "out" / "evaluation.md").read_text()

    return call


def test_rows_columns_and_their_meaning(run):
    rows, page = run("--max_prompt_seq_len", "30", "--max_answer_seq_len", "20", "--best_of", "4")
    sft, ppo, best = rows["sft"], rows["ppo"], rows["sft, best of 4"]
    assert sft["kl"] == 0 and sft["win_rate"] == 0.5 and 0 < ppo["win_rate"] < 1
    assert ppo["kl"] > 0.01  # of the policy from the baseline, on its own samples
    assert best["score"] > sft["score"] and best["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert sft["score_ci"] > 0 and 0 < sft["eos_rate"] < 1 and 1 < sft["response_length"] < 20
    assert 10 < sft["perplexity"] < 100 and "true_reward" not in sft
    assert page.startswith("| model") and page.count("- ppo (") == 3


def test_long_prompts_are_left_out_and_not_cut(run, monkeypatch):
    asked, respond = [], evaluate.respond
    monkeypatch.setattr(
        evaluate, "respond", lambda *args: asked.append(len(args[4])) or respond(*args)
    )
    short, page = run("--max_prompt_seq_len", "5", "--max_answer_seq_len", "4")
    assert 30 < asked[0] < 70  # about half of the 100 held-out rows
    assert all(len(line.split()) == 2 for line in page.splitlines() if line.startswith("**"))
    code, error = run("--max_prompt_seq_len", "1", "--max_answer_seq_len", "4")
    assert code == 1 and "only 0 held-out prompts fit --max_prompt_seq_len" in error


def test_bad_input(run):
    same = "--models: two have the same name: give each its own, NAME=PATH\n"
    assert run("--models", "a=x", "a=y")[1].endswith(same)
    assert "run train_rm.py first" in run("--reward_model", "output/rm")[1]
    assert "exceed the 64-token context" in run("--max_prompt_seq_len", "60")[1]
    assert run("--num_prompts", "1")[0] == 2


def test_a_model_that_no_script_has_left_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for made, expected in (
        ("", "output/sft: there is no such file or folder: run train_sft.py"),
        ("output/sft", "tokenizer"),
    ):
        (tmp_path / made).mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr("sys.argv", ["evaluate.py", "--output_dir", str(tmp_path / "out")])
        with pytest.raises(flags.InputError, match=expected):
            evaluate.main()
