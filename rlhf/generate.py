"""Sampling from the policy."""
import torch
from rlhf.args import InputError

@torch.no_grad()
def sample(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0):
    """Draw a response to every row of `prompts`: prompt_ids, prompt_mask (B, P), left-padded.
    Returns them with `response_ids` and `mask` (B, R), R the longest response drawn.  The mask ends
    with the first end-of-sequence token.  Always samples: of an argmax the ratio means nothing."""
    ids = model.generation_config                          # says no more than these: models.py
    try:
        sequences = model.eval().generate(
            prompts["prompt_ids"], attention_mask=prompts["prompt_mask"].long(), do_sample=True,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise InputError("the policy's probabilities are not finite: its weights have diverged, so "
                         "take an earlier model and a lower learning rate") from error
    response = sequences[:, prompts["prompt_ids"].shape[1]:]                            # (B, R)
    ends = (response == ids.eos_token_id).int()
    mask = ends.cumsum(1) - ends == 0                     # no end before this token
    return {**prompts, "response_ids": response.masked_fill(~mask, ids.pad_token_id), "mask": mask}

def finished(batch, eos_token_id):
    """(B,) bool: the response ended by itself, not at the length limit."""
    last = batch["mask"].sum(1, keepdim=True) - 1
    return batch["response_ids"].gather(1, last).squeeze(1) == eos_token_id
