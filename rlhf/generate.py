"""Sampling from the policy."""
import torch
from transformers import GenerationConfig


@torch.no_grad()
def sample(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0):
    """Draw a response to every row of `prompts`: prompt_ids, prompt_mask (B, P), left-padded.
    Returns them with `response_ids` and `mask` (B, R), R the longest response drawn.  The mask ends
    with the first end-of-sequence token, included.  Always samples: of an argmax PPO's importance
    ratio would mean nothing."""
    ids = model.generation_config
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id,
        do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    model.eval()
    # What stays None in `settings` would be taken from the model's own generation_config.
    kept, model.generation_config = model.generation_config, settings
    try:
        sequences = model.generate(prompts["prompt_ids"], generation_config=settings,
                                   attention_mask=prompts["prompt_mask"].long())
    finally:
        model.generation_config = kept
    response = sequences[:, prompts["prompt_ids"].shape[1]:]                            # (B, R)
    ends = (response == ids.eos_token_id).int()
    mask = ends.cumsum(1) - ends == 0                     # no end before this token
    return {**prompts, "response_ids": response.masked_fill(~mask, ids.pad_token_id), "mask": mask}


def finished(batch, eos_token_id):
    """(B,) bool: the response ended by itself, not at the length limit."""
    last = batch["mask"].sum(1, keepdim=True) - 1
    return batch["response_ids"].gather(1, last).squeeze(1) == eos_token_id
