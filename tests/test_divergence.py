"""The faults of tests/bench/divergence.py do what they say, and nothing is left of them afterwards."""

import pytest
import torch

import train_ppo
from rlhf import batches, generate, models
from tests.bench import divergence

MODULES = {"train_ppo": train_ppo, "generate": generate, "models": models}
SHIPPED = {name: dict(vars(module)) for name, module in MODULES.items()}


@pytest.fixture
def switch(monkeypatch):
    """Patches as the study makes them, undone in the order in which they and the test's own came."""

    def patch(path, value):
        module, name = path.split(".")
        monkeypatch.setattr(MODULES[module], name, value)

    return lambda fault: fault(patch, modules=MODULES)


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer("toy")
    policy = models.load_policy("toy", tokenizer).eval()
    rows = [{"prompt": tokenizer(text)["input_ids"]} for text in ("Human: red", "Human: a b c d")]
    return policy, tokenizer, batches.collate(tokenizer, rows * 8, responses=())


def test_rollouts(switch, toy):
    policy, tokenizer, prompts = toy
    switch(divergence.greedy)
    first, again = (train_ppo.sample(policy, prompts, 6) for _ in range(2))
    assert torch.equal(first["response_ids"], again["response_ids"])


def test_rollouts_without_an_end(switch, toy):
    policy, tokenizer, prompts = toy
    assert tokenizer.eos_token_id == 1 and train_ppo.sample(policy, prompts, 400)["ended"].any()
    switch(divergence.eos_suppressed)
    assert not train_ppo.sample(policy, prompts, 400)["ended"].any()


def test_rollouts_that_see_the_padding(switch, toy, monkeypatch):
    policy, _, prompts = toy
    seen = []
    plain = train_ppo.sample
    monkeypatch.setattr(train_ppo, "sample", lambda m, p, *a: seen.append(p) or plain(m, p, *a))
    switch(divergence.pads_attended)
    batch = train_ppo.sample(policy, prompts, 3)
    assert seen[0]["prompt_mask"].all() and not prompts["prompt_mask"].all()
    assert torch.equal(batch["prompt_mask"], prompts["prompt_mask"])


def test_the_first_token_is_hidden_from_every_forward(switch, toy):
    policy, _, prompts = toy
    batch = generate.sample(policy, prompts, 4)
    ids, before, _ = models._flush_right(batch)
    switch(divergence.first_token_masked)
    fewer, after, _ = models._flush_right(batch)
    assert (before.sum(1) == after.sum(1) + 1).all()
    for row, mask, left, seen in zip(ids, before, fewer, after):
        assert row[mask > 0].tolist()[1:] == left[seen > 0].tolist()


@pytest.mark.parametrize("fault", ["half", "half_one_side"])
def test_half_precision_log_probs(switch, toy, fault):
    policy, _, prompts = toy
    batch = generate.sample(policy, prompts, 8)
    exact = models.policy_logprobs(policy, batch).detach()
    switch(getattr(divergence, fault))
    new = models.policy_logprobs(policy, batch).detach()
    with torch.no_grad():
        old = models.policy_logprobs(policy, batch)
    assert 1e-4 < (new - exact).abs().max() < 0.1
    assert torch.equal(old, exact if fault == "half_one_side" else new)


def test_what_lies_behind_the_end_flows_back(switch):
    mask = torch.tensor([[True, True, False]])
    logp, ref_logp = torch.tensor([[0.0, 0, 5]]), torch.zeros(1, 3)
    values, score = torch.tensor([[1.0, 1, 9]]), torch.zeros(1)
    at = lambda: (train_ppo.shaped_rewards(score, logp, ref_logp, mask, 0.1), values, mask)
    clean, _ = train_ppo.gae(*at())
    switch(divergence.after_the_end)
    faulty, _ = train_ppo.gae(*at())
    # delta_2 = -0.5 - 9, delta_1 = 9 - 1, delta_0 = 0, lambda 0.95
    assert faulty[0].tolist() == pytest.approx([0.95 * 8 - 0.95**2 * 9.5, 8 - 0.95 * 9.5, -9.5])
    assert clean[0].tolist() == pytest.approx([-0.95, -1, 0])


def test_the_end_of_a_response_is_not_trained(switch, monkeypatch):
    mask = torch.tensor([[True, True, False], [True, True, True]])
    experience = {"mask": mask, "ended": torch.tensor([True, False])}
    monkeypatch.setattr(train_ppo, "rollout", lambda: (experience, {}))
    switch(divergence.eos_masked)
    trained, _ = train_ppo.rollout()
    assert trained["mask"].tolist() == [[True, False, False], [True, True, True]]


def test_dropout_is_on_in_old_and_new_forwards_of_actor_and_critic_alone(switch, toy, monkeypatch):
    policy, _, prompts = toy

    class Engine(torch.nn.Module):
        optimizer = None

        def __init__(self):
            super().__init__()
            self.module = models.load_policy("toy", toy[1]).eval()
            self.module.load_state_dict(policy.state_dict())

        def forward(self, **inputs):
            return self.module(**inputs)

    trained = Engine()
    monkeypatch.setattr(train_ppo, "load_models", lambda: (trained, trained))
    batch = generate.sample(policy, prompts, 8)
    switch(divergence.dropout)
    train_ppo.load_models()
    logp = lambda model: models.policy_logprobs(model, batch).detach()
    assert torch.equal(logp(policy), logp(policy))
    assert torch.equal(logp(trained.module), logp(policy))  # as in sampling: plain
    assert not torch.equal(logp(trained), logp(trained))


def test_nothing_is_left_of_them():
    for name, module in MODULES.items():
        assert {
            n for n, value in vars(module).items() if SHIPPED[name].get(n) is not value
        } == set()
