"""Samples come from the policy: from its distribution, masked to their first end, with log-probs
the training forward agrees on."""

import pytest
import torch
from transformers import GenerationConfig

from rlhf import batches, models
from rlhf.generate import finished, sample
from tests.conftest import FAMILIES


@pytest.fixture
def policy(model_folder):
    def make(family="llama", specials="own pad", **settings):
        folder = model_folder(family, specials)
        if settings:
            GenerationConfig(do_sample=True, **settings).save_pretrained(folder)
        tokenizer = models.load_tokenizer(folder)
        return models.load_policy(folder, tokenizer).eval(), tokenizer

    return make


def prompts(tokenizer, *rows):
    return batches.collate(tokenizer, [{"prompt": row} for row in rows], responses=())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("specials", ["own pad", "no pad", "bos is eos"])
def test_the_mask_ends_with_the_first_end_of_sequence_token(policy, family, specials):
    model, tokenizer = policy(family, specials)
    torch.manual_seed(0)
    batch = sample(model, prompts(tokenizer, *[[3, 4, 5], [6]] * 100), 20)
    ended = finished(batch, tokenizer.eos_token_id)
    assert 0.02 < ended.float().mean() < 0.98
    for ids, mask, end in zip(batch["response_ids"], batch["mask"], ended):
        length = mask.sum().item()
        assert mask[:length].all() and 1 <= length <= 20
        assert (ids[: length - 1] != tokenizer.eos_token_id).all()
        assert end == (ids[length - 1] == tokenizer.eos_token_id) and (end or length == 20)


@pytest.mark.parametrize(
    "temperature,top_k,top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.6)]
)
def test_samples_follow_the_policys_distribution(policy, temperature, top_k, top_p):
    """Chi-square of first tokens against the exact, truncated and renormalised softmax; the
    folder's own generation settings (a model that penalises repetition and samples from its top 3)
    must have no say."""
    model, tokenizer = policy(repetition_penalty=5.0, top_k=3, min_new_tokens=4)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # a less uniform distribution
    prompt, draws = [3, 4, 5], 20000
    probs = (model(torch.tensor([prompt])).logits[0, -1].double() / temperature).softmax(0)
    order = probs.argsort(descending=True)
    keep = order[: top_k or len(probs)]
    keep = keep[(probs[keep].cumsum(0) - probs[keep]) < top_p]
    expected = torch.zeros_like(probs).index_copy(0, keep, probs[keep])
    expected = draws * expected / expected.sum()
    torch.manual_seed(0)
    got = sample(model, prompts(tokenizer, *[prompt] * draws), 1, temperature, top_p, top_k)[
        "response_ids"
    ][:, 0]
    counts = torch.bincount(got, minlength=len(probs)).double()
    assert counts[expected == 0].sum() == 0
    cells = expected > 5
    chi_square = ((counts - expected)[cells] ** 2 / expected[cells]).sum().item()
    freedom = cells.sum().item() - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_and_training_agree_on_the_log_probs(policy, family):
    """The decoder's own scores of what it sampled, left-padded, against the training forward: a
    masked bos or shifted positions would show here."""
    model, tokenizer = policy(family, "bos is eos")
    batch = prompts(tokenizer, [2, 3, 4, 5, 6], [2, 7], [8, 9, 10])
    torch.manual_seed(0)
    out = model.generate(
        batch["prompt_ids"],
        attention_mask=batch["prompt_mask"].long(),
        max_new_tokens=6,
        top_k=0,
        do_sample=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    torch.manual_seed(0)
    drawn = sample(model, batch, 6)
    response = out.sequences[:, 5:]
    assert torch.equal(drawn["response_ids"][drawn["mask"]], response[drawn["mask"]])
    scores = torch.stack(out.logits, 1).log_softmax(2).gather(2, response[..., None]).squeeze(2)
    logp = models.policy_logprobs(model, drawn)
    assert torch.allclose(logp[drawn["mask"]], scores[drawn["mask"]], atol=1e-5)
