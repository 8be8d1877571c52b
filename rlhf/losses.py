"""The mathematics of RLHF: pure functions, tensors in, scalars and detached metrics out.
Shapes: B batch, R response (right-padded), V vocabulary.  Index t is the action that emits response
token t: `logp[t] = log pi(y_t | x, y_<t)`, `values[t] = V(x, y_<t)`.  `mask` is (B, R) bool, True
on a response's actions, its end token included.  What stands under a False mask, NaN too, reaches
no result or gradient.  `denom` divides a micro-batch's sum instead of its own token count: no
gradient depends on how a batch is cut (`engine.global_denom`).  All is in fp32, or float64."""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

_wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))     # half: ratios off by 1 %

def token_logprobs(logits, ids, temperature=1.0):
    """Log-probability of each token under softmax(logits / temperature).
    logits (B, R, V) of any float type, ids (B, R) -> (B, R) fp32.  The fp32 copy of the logits is
    made again in the backward pass; until then only the model's own (B, R, V) logits are kept."""
    def logprobs(logits, ids):
        scaled = _wide(logits) if temperature == 1.0 else _wide(logits) / temperature
        losses = F.cross_entropy(scaled.flatten(0, 1), ids.flatten(), reduction="none")
        return -losses.view(ids.shape)
    return checkpoint(logprobs, logits, ids, use_reentrant=False, preserve_rng_state=False)

def masked_mean(x, mask, denom=None):
    """Sum of x over the mask, over `denom` or else the mask's count.  Any shape -> scalar."""
    total = _wide(x).masked_fill(~mask, 0.0).sum()
    return total / (mask.sum() if denom is None else denom)

def masked_moments(x, mask):
    """Mean and (biased) variance of x over the valid tokens of ALL ranks -> two scalars."""
    def over_ranks(sums):
        if dist.is_available() and dist.is_initialized(): dist.all_reduce(sums)
        return sums
    x = _wide(x).masked_fill(~mask, 0.0)
    total, count = over_ranks(torch.stack([x.sum(), mask.sum().to(x.dtype)]))
    deviation = (x - total / count).masked_fill(~mask, 0.0)
    return total / count, over_ranks(deviation.square().sum()) / count

def whiten(x, mask):
    """(B, R) -> (B, R) with mean 0, variance 1 over the valid tokens of all ranks; padding is 0."""
    x = _wide(x).masked_fill(~mask, 0.0)
    mean, variance = masked_moments(x, mask)
    return ((x - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(~mask, 0.0)

def bradley_terry_loss(chosen, rejected):
    """Mean of -log sigmoid(chosen - rejected).  Scores (B,), (B,) -> scalar.
    Ouyang et al. 2022 (arXiv:2203.02155) eq. 1, after Bradley and Terry 1952."""
    # differs: one score a sequence; DeepSpeed-Chat averages over token positions, padding included
    return -F.logsigmoid(_wide(chosen) - _wide(rejected)).mean()                        # eq. 1

def dpo_loss(logp_chosen, logp_rejected, ref_logp_chosen, ref_logp_rejected, beta,
             label_smoothing=0.0, kind="sigmoid"):
    """Direct preference optimisation.  Log-probs of whole responses (B,) -> scalar, stats.
    Rafailov et al. 2023 (arXiv:2305.18290) eq. 7: `bradley_terry_loss` on the implicit rewards of
    eq. 5, beta * log(pi / pi_ref), less a constant.  kind "hinge": Liu et al. 2023
    (arXiv:2309.06657); "ipo": Azar et al. 2023 (arXiv:2310.12036) eq. 17, whose tau is beta.
    label_smoothing: rate of wrong labels (Mitchell 2023).  stats: chosen_, rejected_reward (B,)"""
    loss_of = {"sigmoid": bradley_terry_loss, "hinge": lambda a, b: F.relu(1 - (a - b)).mean(),
               "ipo": lambda a, b: ((a - b) / beta - 1 / (2 * beta)).square().mean()}[kind]
    chosen = beta * (_wide(logp_chosen) - _wide(ref_logp_chosen))                       # eq. 5
    rejected = beta * (_wide(logp_rejected) - _wide(ref_logp_rejected))
    loss = (1 - label_smoothing) * loss_of(chosen, rejected) \
        + label_smoothing * loss_of(rejected, chosen)                                   # eq. 7
    return loss, {"chosen_reward": chosen.detach(), "rejected_reward": rejected.detach()}

def kl_estimate(logp, ref_logp, kind="k1"):
    """Per-token estimate of KL(pi || ref) from tokens drawn from pi.  (B, R), (B, R) -> (B, R).
    Schulman 2020, "Approximating KL divergence": k1 is unbiased but may be negative, k3 is unbiased
    and never negative, k2 is biased but its gradient is the KL's.  KeyError for another kind."""
    logr = _wide(logp) - _wide(ref_logp)           # of the policy that was sampled to the reference
    return {"k1": logr, "k2": logr.square() / 2, "k3": torch.expm1(-logr) + logr}[kind]

def shaped_rewards(score, logp, ref_logp, mask, kl_coef, clip_reward=5.0, kind="k1"):
    """-kl_coef * KL on every action, plus on a response's last one the score, clipped to
    +-clip_reward.  score (B,), others (B, R) -> (B, R).  Ziegler et al. 2019 (arXiv:1909.08593)."""
    logp, ref_logp = logp.masked_fill(~mask, 0.0), ref_logp.masked_fill(~mask, 0.0)
    position = torch.arange(mask.shape[1], device=mask.device)
    is_last = mask & (position == mask.sum(1, keepdim=True) - 1)                        # (B, R)
    score = _wide(score).clamp(-clip_reward, clip_reward)[:, None].masked_fill(~is_last, 0.0)
    return score - kl_coef * kl_estimate(logp, ref_logp, kind)                          # eq. 2

def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation.  All (B, R) -> advantages, returns = advantages + values.
    Schulman et al. 2015 (arXiv:1506.02438) eq. 16.  The value after the last action is 0: an
    episode ends there, by its end-of-sequence token or by the length limit.  Padding is 0."""
    rewards, values = (_wide(x).masked_fill(~mask, 0.0) for x in (rewards, values))
    advantages, advantage, next_value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage                                     # eq. 16
        advantages[:, t], next_value = advantage, values[:, t]
    return advantages, advantages + values

def policy_loss(logp, old_logp, advantages, mask, clip=0.2, denom=None):
    """Clipped surrogate, negated; all (B, R) -> scalar, stats: ratio_mean, ratio_min, ratio_max,
    clip_frac (no gradient), approx_kl (k3).  Schulman et al. 2017 (arXiv:1707.06347) eq. 7."""
    logr = (_wide(logp) - _wide(old_logp)).masked_fill(~mask, 0.0)     # padding has ratio 1
    advantages = _wide(advantages).masked_fill(~mask, 0.0)
    ratio = logr.exp()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    loss = -masked_mean(torch.minimum(unclipped, clipped), mask, denom)                 # eq. 7
    with torch.no_grad():
        mean = lambda x: masked_mean(x, mask, denom)
        stats = {"ratio_mean": mean(ratio), "ratio_min": ratio.min(), "ratio_max": ratio.max(),
                 "clip_frac": mean(clipped < unclipped), "approx_kl": mean(logr.expm1() - logr)}
    return loss, stats

def value_loss(values, old_values, returns, mask, clip=0.2, denom=None):
    """Half the squared error, the move away from old_values clipped.  All (B, R) -> scalar, stats.
    Schulman et al. 2017 (arXiv:1707.06347) eq. 9, second term; the clipping is in their code only
    (Engstrom et al. 2020, arXiv:2005.12729).  stats of the batch: clip_frac, explained_variance."""
    values, old_values, returns = (
        _wide(x).masked_fill(~mask, 0.0) for x in (values, old_values, returns))
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, denom)
    with torch.no_grad():
        error = (returns - values)[mask].var(correction=0)
        stats = {"clip_frac": masked_mean(clipped > unclipped, mask, denom),
                 "explained_variance": 1 - error / returns[mask].var(correction=0).clamp(min=1e-8)}
    return loss, stats
