"""The formulas of rlhf/losses.py against independent oracles: closed forms, enumeration, O(R^2)
sums, gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf import losses

NAN = float("nan")


def ragged(lengths, width=None):
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


# token_logprobs


def test_token_logprobs_match_the_hugging_face_loss():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()
    ids = torch.randint(50, (3, 9))
    out = model(ids, labels=ids)
    logp = losses.token_logprobs(out.logits[:, :-1], ids[:, 1:])
    assert torch.allclose(-logp.mean(), out.loss, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_logprobs_are_the_log_of_the_tempered_softmax(temperature):
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    weights = (logits / temperature).double().exp()
    expected = (weights.gather(2, ids[..., None]).squeeze(2) / weights.sum(2)).log()
    assert torch.allclose(
        losses.token_logprobs(logits, ids, temperature).double(), expected, atol=1e-6
    )


def test_token_logprobs_of_half_precision_logits_are_computed_in_fp32():
    torch.manual_seed(0)
    logits, ids = (3 * torch.randn(4, 5, 1000)).bfloat16(), torch.randint(1000, (4, 5))
    got = losses.token_logprobs(logits, ids)
    assert got.dtype == torch.float32
    assert torch.equal(got, losses.token_logprobs(logits.float(), ids))


def test_token_logprobs_keep_no_fp32_copy_of_the_logits():
    logits = torch.randn(2, 3, 1000, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses.token_logprobs(logits, torch.zeros(2, 3, dtype=torch.long))
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() >= logits.numel()]


# means and whitening


def test_masked_mean_ignores_what_is_under_the_mask_and_takes_a_denominator():
    x, mask = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN]]), ragged([2, 1], 3)
    assert losses.masked_mean(x, mask).item() == pytest.approx(7 / 3)
    assert losses.masked_mean(x, mask, denom=10).item() == pytest.approx(0.7)


def test_whiten_by_hand():
    out = losses.whiten(torch.tensor([[1.0, 3.0, NAN], [5.0, NAN, NAN]]), ragged([2, 1], 3))
    scale = math.sqrt(8 / 3)  # mean 3, biased variance (4 + 0 + 4) / 3
    assert torch.allclose(out, torch.tensor([[-2 / scale, 0, 0], [2 / scale, 0, 0]]), atol=1e-6)


# preferences


def test_bradley_terry_closed_forms():
    a, b = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    assert losses.bradley_terry_loss(a, b).item() == pytest.approx(
        (math.log(2) + math.log(1 + math.exp(-3))) / 2
    )
    assert losses.bradley_terry_loss(
        torch.tensor([-1e4]), torch.tensor([1e4])
    ).item() == pytest.approx(2e4)


def test_bradley_terry_gradient_is_minus_the_probability_of_being_wrong():
    chosen = torch.tensor([0.3], requires_grad=True)
    losses.bradley_terry_loss(chosen, torch.tensor([1.0])).backward()
    assert chosen.grad.item() == pytest.approx(-(1 - 1 / (1 + math.exp(0.7))))


def test_dpo_starts_at_log_two_and_equals_bradley_terry_on_implicit_rewards():
    torch.manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 6)
    loss, _ = losses.dpo_loss(ref_chosen, ref_rejected, ref_chosen, ref_rejected, beta=0.3)
    assert loss.item() == pytest.approx(math.log(2))
    loss, stats = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    by_hand = (
        sum(
            math.log1p(math.exp(-0.3 * ((c - rc) - (r - rr))))
            for c, r, rc, rr in zip(
                *(x.tolist() for x in (chosen, rejected, ref_chosen, ref_rejected))
            )
        )
        / 6
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert loss.item() == pytest.approx(
        losses.bradley_terry_loss(stats["chosen_reward"], stats["rejected_reward"]).item()
    )


def test_dpo_label_smoothing_is_the_expected_loss_under_flipped_labels():
    chosen, rejected, zero = torch.tensor([1.0]), torch.tensor([-2.0]), torch.zeros(1)
    right, wrong = (
        losses.dpo_loss(*pair, zero, zero, 0.5)[0]
        for pair in ((chosen, rejected), (rejected, chosen))
    )
    smooth, _ = losses.dpo_loss(chosen, rejected, zero, zero, 0.5, label_smoothing=0.2)
    assert smooth.item() == pytest.approx(0.8 * right.item() + 0.2 * wrong.item())


def closed_form(kind, h, beta):
    """A DPO loss of log-ratio difference h, and its slope: plain Python."""
    if kind == "sigmoid":
        return math.log1p(math.exp(-beta * h)), -beta / (1 + math.exp(beta * h))
    if kind == "ipo":
        return (h - 1 / (2 * beta)) ** 2, 2 * (h - 1 / (2 * beta))
    return max(0.0, 1 - beta * h), -beta * (beta * h < 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_every_kind_of_dpo_is_its_closed_form_with_its_gradient(kind, smoothing):
    torch.manual_seed(0)
    parts = 4 * torch.randn(4, 8, dtype=torch.double)
    parts.requires_grad_()
    loss, stats = losses.dpo_loss(*parts, 0.2, smoothing, kind)
    loss.backward()
    chosen, rejected, ref_chosen, ref_rejected = parts.detach()
    assert torch.allclose(stats["chosen_reward"], 0.2 * (chosen - ref_chosen))
    assert torch.allclose(stats["rejected_reward"], 0.2 * (rejected - ref_rejected))
    total, slopes = 0.0, []
    for h in (chosen - rejected - ref_chosen + ref_rejected).tolist():
        (right, down), (wrong, up) = (closed_form(kind, x, 0.2) for x in (h, -h))
        total += (1 - smoothing) * right + smoothing * wrong
        slopes.append(((1 - smoothing) * down - smoothing * up) / 8)
    assert loss.item() == pytest.approx(total / 8, rel=1e-9)
    signs = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]])
    assert torch.allclose(parts.grad, signs * torch.tensor(slopes, dtype=torch.double), rtol=1e-9)


# KL


def test_kl_estimators_against_exact_enumeration_and_in_the_right_direction():
    torch.manual_seed(0)
    pi, ref = torch.randn(2, 6).double().softmax(1)
    exact = (pi * (pi / ref).log()).sum()
    reverse = (ref * (ref / pi).log()).sum()
    assert abs(exact - reverse) > 0.01  # the direction can be told
    logp, ref_logp = pi.log()[None], ref.log()[None]
    expectation = {
        kind: (pi * losses.kl_estimate(logp, ref_logp, kind)[0]).sum()
        for kind in ("k1", "k2", "k3")
    }
    assert expectation["k1"].item() == pytest.approx(exact.item(), abs=1e-12)
    assert expectation["k3"].item() == pytest.approx(exact.item(), abs=1e-12)
    assert expectation["k2"].item() == pytest.approx(
        (pi * (pi / ref).log() ** 2 / 2).sum().item(), abs=1e-12
    )
    assert (losses.kl_estimate(logp, ref_logp, "k3") >= 0).all()
    with pytest.raises(KeyError, match="k4"):
        losses.kl_estimate(logp, ref_logp, "k4")


def test_gradient_of_expected_k2_is_the_gradient_of_the_kl():
    torch.manual_seed(0)
    theta, ref = (
        torch.randn(6, dtype=torch.double, requires_grad=True),
        torch.randn(6).double().log_softmax(0),
    )
    logp = theta.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta, retain_graph=True)
    (k2,) = torch.autograd.grad(
        (logp.exp().detach() * losses.kl_estimate(logp, ref, "k2")).sum(), theta
    )
    assert torch.allclose(k2, exact, atol=1e-12)


# rewards and advantages


def test_the_score_lands_on_the_last_action_and_kl_on_every_action():
    mask = ragged([1, 3, 4])  # one token, finished early, full length
    logp, ref_logp = torch.full((3, 4), -1.0), torch.full((3, 4), -1.5)
    rewards = losses.shaped_rewards(
        torch.tensor([1.0, 9.0, -9.0]), logp, ref_logp, mask, kl_coef=0.1, clip_reward=5.0
    )
    kl = -0.05
    expected = torch.tensor([[1 + kl, 0, 0, 0], [kl, kl, 5 + kl, 0], [kl, kl, kl, -5 + kl]])
    assert torch.allclose(rewards, expected, atol=1e-6)


def gae_by_definition(rewards, values, length, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}: the double sum, one row, plain Python."""
    v = values[:length] + [0.0]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(length)]
    return [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)
    ]


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_gae_against_the_double_sum(gamma, lam):
    torch.manual_seed(0)
    lengths, rewards, values = [1, 4, 7], torch.randn(3, 7).double(), torch.randn(3, 7).double()
    mask = ragged(lengths)
    advantages, returns = losses.gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = gae_by_definition(
            rewards[row].tolist(), values[row].tolist(), length, gamma, lam
        )
        assert advantages[row, :length].tolist() == pytest.approx(expected)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values[row].tolist())]
        )
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_gae_identities():
    torch.manual_seed(0)
    rewards, values, mask = torch.randn(2, 5), torch.randn(2, 5), ragged([5, 5])
    _, returns = losses.gae(
        rewards, values, mask, gamma=1.0, lam=1.0
    )  # lam 1: the return is the rewards to go
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1), atol=1e-5)
    advantages, _ = losses.gae(
        rewards, values, mask, gamma=0.9, lam=0.0
    )  # lam 0: the temporal difference
    assert torch.allclose(
        advantages, rewards + 0.9 * F.pad(values[:, 1:], (0, 1)) - values, atol=1e-6
    )


# PPO


def test_policy_loss_at_ratio_one_has_the_reinforce_gradient():
    torch.manual_seed(0)
    mask, advantages = ragged([3, 5]), torch.randn(2, 5)
    logp = torch.randn(2, 5, requires_grad=True)
    losses.policy_loss(logp, logp.detach(), advantages, mask)[0].backward()
    expected = -torch.where(mask, advantages, 0) / mask.sum()  # of -mean(A log pi)
    assert torch.allclose(logp.grad, expected, atol=1e-7)


@pytest.mark.parametrize(
    "ratio,advantage,loss,slope",
    [
        (0.5, 1.0, -0.5, -0.5),
        (1.0, 1.0, -1.0, -1.0),
        (1.5, 1.0, -1.2, 0.0),  # gains are capped above
        (0.5, -1.0, 0.8, 0.0),
        (1.0, -1.0, 1.0, 1.0),
        (1.5, -1.0, 1.5, 1.5),
    ],
)  # losses are not capped above
def test_policy_loss_in_its_six_cells(ratio, advantage, loss, slope):
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    got, stats = losses.policy_loss(
        logp, torch.zeros(1, 1), torch.tensor([[advantage]]), ragged([1]), clip=0.2
    )
    got.backward()
    assert got.item() == pytest.approx(loss) and logp.grad.item() == pytest.approx(slope)
    assert stats["clip_frac"].item() == float(slope == 0) and stats[
        "ratio_mean"
    ].item() == pytest.approx(ratio)


def test_approx_kl_is_the_kl_of_the_old_policy_from_the_new_one():
    torch.manual_seed(0)
    old, new = torch.randn(2, 1, 6).double().log_softmax(2)
    draws = torch.multinomial(
        old[0].exp(), 200000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    _, stats = losses.policy_loss(
        new[:, draws], old[:, draws], torch.zeros(1, 200000), torch.ones(1, 200000).bool()
    )
    assert stats["approx_kl"].item() == pytest.approx(
        (old.exp() * (old - new)).sum().item(), rel=0.02
    )


@pytest.mark.parametrize(
    "value,loss,slope",
    [
        (0.0, 2.0, -2.0),
        (0.1, 1.805, -1.9),
        (0.5, 1.62, 0.0),
        (3.0, 1.62, 0.0),
        (5.0, 4.5, 3.0),
        (-1.0, 4.5, -3.0),
    ],
)
def test_value_loss_takes_the_worse_of_clipped_and_unclipped(value, loss, slope):
    values = torch.tensor([[value]], requires_grad=True)  # old value 0, return 2, clip 0.2
    got, _ = losses.value_loss(
        values, torch.zeros(1, 1), torch.full((1, 1), 2.0), ragged([1]), clip=0.2
    )
    got.backward()
    assert got.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(slope)


def test_explained_variance():
    returns, mask = torch.tensor([[1.0, 2.0, 3.0]]), ragged([3])
    assert losses.value_loss(returns, returns, returns, mask)[1]["explained_variance"].item() == 1
    assert (
        losses.value_loss(returns * 0, returns, returns, mask)[1]["explained_variance"].item() == 0
    )


# gradients and invariances

WEIGHTS = torch.tensor([[0.3, -1.2, 0.7, 2.0], [1.1, -0.4, -0.9, 0.6]], dtype=torch.double)
FUNCTIONS = {
    "masked_mean": lambda x, y, m: losses.masked_mean(x * y, m),
    "whiten": lambda x, y, m: (losses.whiten(x, m) * WEIGHTS).sum(),
    "shaped_rewards": lambda x, y, m: (
        losses.shaped_rewards(torch.ones(2).double(), x, y, m, 0.1, kind="k3") ** 2
    ).sum(),
    "gae": lambda x, y, m: (losses.gae(x, y, m)[0] ** 2).sum(),
    "policy_loss": lambda x, y, m: losses.policy_loss(x, y, WEIGHTS, m)[0],
    "value_loss": lambda x, y, m: losses.value_loss(x, WEIGHTS, y, m)[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_in_double_precision_and_nan_under_the_mask(name):
    torch.manual_seed(1)
    function, mask = FUNCTIONS[name], ragged([2, 4])
    x, y = (torch.randn(2, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: function(x, y, mask), (x, y))
    clean = torch.autograd.grad(function(x, y, mask), (x, y), allow_unused=True)
    dirty_x, dirty_y = (t.detach().masked_fill(~mask, NAN).requires_grad_() for t in (x, y))
    value = function(dirty_x, dirty_y, mask)
    assert torch.equal(value, function(x, y, mask))
    if name == "masked_mean":  # its argument x * y is computed before the mask is applied
        return
    for got, expected in zip(
        torch.autograd.grad(value, (dirty_x, dirty_y), allow_unused=True), clean
    ):
        assert got is None or torch.allclose(
            got.masked_fill(~mask, 0), expected.masked_fill(~mask, 0)
        )
        assert got is None or got.isfinite().all()


def test_token_logprobs_gradcheck():
    logits = torch.randn(2, 3, 5, dtype=torch.double, requires_grad=True)
    ids = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: losses.token_logprobs(x, ids, 0.7), (logits,))


@pytest.mark.parametrize("cut", [(4,), (1, 3), (2, 1, 1), (1, 1, 1, 1)])
def test_every_cut_of_a_batch_gives_one_gradient(cut):
    torch.manual_seed(0)
    mask = ragged([1, 7, 3, 5])
    old_logp, advantages, returns = torch.randn(3, 4, 7)

    def gradient(cut, denom):
        logp, values = (
            torch.linspace(-1, 1, 28).view(4, 7).clone().requires_grad_() for _ in range(2)
        )
        for part in torch.arange(4).split(list(cut)):
            loss, _ = losses.policy_loss(
                logp[part], old_logp[part], advantages[part], mask[part], denom=denom
            )
            loss = (
                loss
                + losses.value_loss(
                    values[part], old_logp[part], returns[part], mask[part], denom=denom
                )[0]
            )
            (loss / (1 if denom is not None else len(cut))).backward()
        return torch.cat([logp.grad, values.grad])

    whole = gradient((4,), None)
    assert torch.allclose(gradient(cut, mask.sum()), whole, atol=1e-7)
    if len(cut) > 1:  # the negative control: the mean of means is another gradient
        assert not torch.allclose(gradient(cut, None), whole, atol=1e-3)


def test_row_order_does_not_matter():
    torch.manual_seed(0)
    mask, order = ragged([1, 7, 3, 5]), torch.tensor([2, 0, 3, 1])
    logp, old_logp, advantages = torch.randn(3, 4, 7)
    a = losses.policy_loss(logp, old_logp, advantages, mask)[0]
    b = losses.policy_loss(logp[order], old_logp[order], advantages[order], mask[order])[0]
    assert torch.allclose(a, b)
