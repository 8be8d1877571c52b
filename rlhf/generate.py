"""Sampling from the policy, one forward a token, and what makes that fast."""
import contextlib
import torch
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from rlhf.args import InputError
from rlhf.models import places, takes

def sample(model, prompts, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0, rows=0):
    """Draw a response to every row of `prompts`: prompt_ids, prompt_mask (B, P), left-padded.
    Returns them with `response_ids`, `mask` (B, R), R the longest response drawn, and `ended` (B,):
    did it end by itself?  The mask covers its end.  Of an argmax the ratio would mean nothing.
    rows: prompts are read in pieces of so many rows' tokens, but whole (as with 0) where layers
    keep more than keys and values, since some families lose a state between pieces."""
    config, ids, seen = model.eval().config, prompts["prompt_ids"], prompts["prompt_mask"].long()
    response = ids.new_full((len(ids), max_new_tokens), config.pad_token_id)
    mask, going = torch.zeros_like(response, dtype=torch.bool), torch.arange(len(ids)).to(ids)
    uniform = torch.rand(response.shape, dtype=torch.double, device=ids.device)
    cache, room = DynamicCache(config=config), seen.shape[1] + max_new_tokens
    cache.layers = [Room(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    plain = all(type(layer) in (Room, DynamicSlidingWindowLayer) for layer in cache.layers)
    width = -(-ids.shape[1] * rows // len(ids)) if rows and plain else ids.shape[1]   # of a piece
    if not (takes(type(model), "past_key_values") and model._supports_default_dynamic_cache()):
        raise InputError(f"a {type(model).__name__} keeps no keys and values: choose another model")
    with torch.inference_mode(), reordered(model) if ids.is_cpu else contextlib.nullcontext():
        for t in range(max_new_tokens):
            if not len(going): break
            for part in ids.split(width, 1):
                end = cache.get_seq_length() + part.shape[1]
                logits = model(input_ids=part, past_key_values=cache, use_cache=True, **places(
                    model, seen[:, :end], part.shape[1]), logits_to_keep=1).logits[:, -1]   # (b, V)
            token = draw(logits, uniform[going, t], temperature, top_p, top_k)
            response[going, t], mask[going, t] = token, True
            stay = (token != config.eos_token_id).nonzero()[:, 0]
            if len(stay) < len(going):                            # finished rows leave the batch
                going, token, seen = going[stay], token[stay], seen[stay]
                cache.reorder_cache(stay)
            ids, seen = token[:, None], torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
    longest = mask.any(0).sum()
    return {**prompts, "response_ids": response[:, :longest], "mask": mask[:, :longest],
            "ended": mask.any(1).index_fill(0, going, False)}

def sample_compiled(model, prompts, max_new_tokens, temperature, top_p, top_k, room):
    """sample() by Transformers' generate with a static cache for `room` tokens, which on a GPU
    makes a token's forward one CUDA graph.  InputError for a model where that would go wrong."""
    ids, config = prompts["prompt_ids"], model.eval().config
    if not model._can_compile_fullgraph or getattr(config, "alibi", False):
        raise InputError(f"a {type(model).__name__} cannot do --compiled_generation: leave it out")
    response = model.generate(ids, attention_mask=prompts["prompt_mask"].long(), top_k=top_k,
                              max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                              cache_implementation="static", max_cache_len=room,
                              remove_invalid_values=True)[:, ids.shape[1]:]   # for scoring to find
    ends = response == config.eos_token_id
    return {**prompts, "response_ids": response, "mask": ends.cumsum(1) - ends.long() == 0,
            "ended": ends.any(1)}

def draw(logits, uniform, temperature, top_p, top_k):
    """A token a row of logits (B, V): where its distribution function passes `uniform` (B,), one
    random number from [0, 1) a row; torch.multinomial takes V of them."""
    logits = logits.float() / temperature
    logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    logits = TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    passed = logits.softmax(1).double().cumsum(1)                                           # (B, V)
    if not passed[:, -1].isfinite().all():
        raise InputError("the policy's probabilities are not finite: it diverged, lower its rate")
    return torch.searchsorted(passed, (uniform * passed[:, -1])[:, None], right=True)[:, 0]

@contextlib.contextmanager
def reordered(model):
    """A model on the CPU whose linear maps read copies of their weights in oneDNN's own order.  For
    a token a row, MKL reads plain ones at a fraction of the memory's speed."""
    ops, precision = torch.ops.mkldnn, torch.get_float32_matmul_precision()
    flash = torch.backends.cuda.flash_sdp_enabled()
    able = hasattr(ops, "_linear_pointwise") and (model.dtype == torch.float32 or (
        model.dtype == torch.bfloat16 and ops._is_mkldnn_bf16_supported()))
    linears = [m for m in model.modules() if able and type(m) is torch.nn.Linear]
    torch.set_float32_matmul_precision("highest")              # else reordered at each use
    torch.backends.cuda.enable_flash_sdp(model.dtype == torch.float32)      # not bf16: 3 x the time
    try:
        for m in linears:
            m.forward = lambda x, W=ops._reorder_linear_weight(m.weight), b=m.bias: \
                ops._linear_pointwise(x, W, b, "none", [], "")
        yield
    finally:
        torch.set_float32_matmul_precision(precision), torch.backends.cuda.enable_flash_sdp(flash)
        for m in linears: vars(m).pop("forward", None)

class Room(StaticLayer):
    """Keys and values written into room for all, of which only the written part is shown."""
    written, is_compileable = 0, False
    get_seq_length = lambda self: self.written
    get_mask_sizes = lambda self, new: (self.written + new, 0)
    def update(self, keys, values, *_, **__):
        rooms = super().update(keys, values)
        self.written += keys.shape[2]
        return [room[:, :, :self.written] for room in rooms]
