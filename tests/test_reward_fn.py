"""--reward_fn: a Python function is the reward, alone or beside a reward model."""

import json
import re
import textwrap

import pytest
import torch

import train_ppo
from tests.conftest import ROOT, metrics, weights

CHECKED = """
    def count(prompts, responses, rows):
        assert len(prompts) == len(responses) == len(rows)
        for prompt, row in zip(prompts, rows):
            assert prompt == row["prompt"] and row["chosen"].startswith(" w1"), (prompt, row)
        return [text.split().count("w1") for text in responses]
"""


@pytest.fixture
def function(tmp_path):
    """function(code) -> what --reward_fn takes; the function is the last one defined."""

    def write(code, name="rewards"):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        return f"{tmp_path}/{name}.py:{code.rpartition('def ')[2].partition('(')[0]}"

    return write


def alone(settings):
    """Step 3's flags without a reward model."""
    del settings["critic_model_name_or_path"]
    return settings


def test_a_function_alone_is_learned_from_and_the_critic_begins_as_the_actors_backbone(
    world, ppo, call, function
):
    spec = function(CHECKED)
    still = dict(actor_lr=0, critic_lr=0, max_steps=1, print_answers_interval=1)
    code, error = call(train_ppo, **alone(ppo("still", reward_fn=spec, **still)))
    assert code == 0, error
    actor, critic = (weights(world["out"] / "still" / name) for name in ("actor", "critic"))
    shared = actor.keys() & critic.keys()
    assert len(shared) > 10 and all(torch.equal(actor[n], critic[n]) for n in shared)
    assert critic["score.weight"].std() > 0
    samples = [json.loads(line) for line in open(world["out"] / "still" / "samples.jsonl")]
    assert all(row["score"] == row["response"].split().count("w1") for row in samples)
    assert {row["score"] for row in samples} >= {0, 1}

    learn = dict(actor_lr=2e-2, critic_lr=2e-2, kl_coef=0.01, max_steps=40, num_train_epochs=9)
    code, error = call(train_ppo, **alone(ppo("learned", reward_fn=spec, **learn)))
    assert code == 0, error
    scores = [row["score"] for row in metrics(world["out"] / "learned")]
    assert sum(scores[-5:]) > sum(scores[:5]) + 5, scores


def test_beside_a_reward_model_its_score_is_weighted_and_added_on_two_ranks(
    world, ppo, fork, function
):
    half = dict(per_device_generation_batch_size=8, per_device_training_batch_size=8)
    still = dict(actor_lr=0, critic_lr=0, max_steps=2, print_answers_interval=1, kl_coef=0, **half)
    both = dict(reward_fn=function(CHECKED), reward_fn_weight=0.25)
    for name, given in (("plain", {}), ("both", both)):
        fork("train_ppo", ppo(name, **still, **given), 2).succeeds()
    rows = [
        [json.loads(line) for line in open(world["out"] / name / "samples.jsonl")]
        for name in ("plain", "both")
    ]
    assert len(rows[0]) == len(rows[1]) == 16
    assert any(" w1" in row["response"] for row in rows[0])
    for plain, added in zip(*rows):
        assert added["response"] == plain["response"]
        count = plain["response"].split().count("w1")
        assert added["score"] == pytest.approx(plain["score"] + count / 4, abs=1e-4)


@pytest.mark.parametrize(
    "code,expected",
    [
        ("def f(p, r, rows): return [1 / (len(x) - 8) for x in p]", "division by zero"),
        ("def f(p, r, rows): return [float('nan') if '5' in x else 0 for x in p]", "[nan] for 1"),
        ("def f(p, r, rows): return [0.0]", "[0.0] for 16 responses"),
        ("def f(p, r, rows): return [row['answer'] for row in rows]", "KeyError('answer')"),
        ("def f(p, r, rows): return 1", "'int' object is not iterable"),
        ("import sys\ndef f(p, r, rows): sys.exit(0)", "SystemExit(0)"),
        ("def f(p, r, rows): return [[p.pop() for _ in p[1:]], 0.0][1:]", "[0.0] for 16 responses"),
    ],
)
def test_its_errors_name_the_prompt(world, ppo, call, function, code, expected):
    settings = alone(ppo("out", reward_fn=function(code)))
    status, error = call(train_ppo, **settings)
    assert status == 1 and len(error.strip().splitlines()) == 1
    assert error.startswith("train_ppo.py: error: --reward_fn: ") and expected in error
    said = re.findall("w[0-9 w]+", error.partition(" at ['")[2])
    with open(f"{world['data']}/train.jsonl") as file:
        prompts = {json.loads(line)["prompt"] for line in file}
    together = "for 16" in expected or "pop" in code
    assert {*said[:5]} <= prompts and (len(said) > 5 if together else len(said) == 1)
    if "zero" in expected:
        assert len(said[0]) == 8
    if "nan" in expected:
        assert "5" in said[0]


@pytest.mark.parametrize(
    "code,expected",
    [
        ("def f(: pass", "invalid syntax"),
        ("import no_such", "no_such"),
        ("x = 1", "'f'"),
        ("exit(0)", "0"),
    ],
)
def test_a_file_that_cannot_serve_is_one_sentence(world, ppo, call, tmp_path, code, expected):
    (tmp_path / "bad.py").write_text(code)
    missing = alone(ppo("out", reward_fn=f"{tmp_path}/bad.py:f"))
    code, error = call(train_ppo, **missing)
    assert code == 1 and "cannot load function f of" in error and expected in error
    code, error = call(train_ppo, **{**missing, "reward_fn": tmp_path / "none.py:f"})
    assert code == 1 and "none.py: there is no such file" in error
    code, error = call(train_ppo, **{**missing, "reward_fn": tmp_path / "bad.py"})
    assert code == 1 and f"cannot load function {tmp_path}/bad.py of {tmp_path}/bad.py" in error


def test_another_end_token_needs_no_second_model_to_agree(world, ppo, call, function):
    spec = function("def words(p, r, rows): return [len(text.split()) for text in r]")
    ends = dict(end_of_conversation_token="w3", max_steps=1)
    code, error = call(train_ppo, **alone(ppo("out", reward_fn=spec, **ends)))
    assert code == 0, error


def test_readmes_example_is_a_reward_function():
    section = (ROOT / "README.md").read_text().partition("## A reward of your own")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    assert len(code.strip().splitlines()) <= 10
    found = {}
    exec(code, found)
    rows = [{"answer": 12}, {"answer": "-3"}, {"answer": 4}, {"answer": 5}]
    said = ["6 + 6 is 12.", "-3", "4 or 5", "five"]
    assert found["right"]([""] * 4, said, rows) == [1, 1, 0, 0]
