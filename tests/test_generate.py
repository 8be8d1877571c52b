"""Samples come from the policy: from its distribution, masked to their first end, with log-probs
the training forward agrees on."""

from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CompileConfig,
    FalconConfig,
    GenerationConfig,
    GPTNeoConfig,
    JambaConfig,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from rlhf import batches, generate, models
from rlhf.args import InputError
from rlhf.generate import sample, sample_compiled
from rlhf.losses import token_logprobs
from tests.conftest import FAMILIES, SHAPE

# families that reckon with the length of the keys
RECKONERS = {
    "GPT-Neo's window": GPTNeoConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        window_size=4,
        max_position_embeddings=64,
    ),
    "Bloom's ALiBi": BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4),
    "Falcon's ALiBi": FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    ),
}


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
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reordered_weights_are_the_same_map_and_leave_nothing_behind(model_folder, family, dtype):
    folder = model_folder(family)
    model = models.load_policy(folder, models.load_tokenizer(folder), dtype).eval()
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
    for linear in linears:
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.enable_flash_sdp(dtype == "bf16")
    try:
        with torch.no_grad(), pytest.raises(ZeroDivisionError):
            plain = [
                linear(torch.ones(2, 3, linear.in_features).to(model.dtype)) for linear in linears
            ]
            with generate.reordered(model):
                assert torch.get_float32_matmul_precision() == "highest"
                assert torch.backends.cuda.flash_sdp_enabled() == (dtype == "fp32")
                for linear, expected in zip(linears, plain):
                    assert "forward" in vars(linear)
                    for rows in (1, 2):
                        x = torch.ones(rows, 3, linear.in_features).to(model.dtype)
                        atol = 1e-5 if dtype == "fp32" else 1e-2
                        assert torch.allclose(linear(x), expected[:rows], rtol=atol, atol=atol)
                1 / 0
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.flash_sdp_enabled() == (dtype == "bf16")
        assert not any("forward" in vars(linear) for linear in linears)
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_flash_sdp(True)


def test_without_onednn_the_weights_are_read_as_they_are(policy, monkeypatch):
    model, tokenizer = policy()
    prompt, drawn = prompts(tokenizer, [3, 4], [5]), []
    for ops in (torch.ops.mkldnn, object()):
        monkeypatch.setattr(torch.ops, "mkldnn", ops)
        torch.manual_seed(0)
        drawn.append(sample(model, prompt, 8))
    assert torch.equal(drawn[0]["response_ids"], drawn[1]["response_ids"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("specials", ["own pad", "no pad", "bos is eos"])
def test_the_mask_ends_with_the_first_end_of_sequence_token(policy, family, specials):
    model, tokenizer = policy(family, specials)
    torch.manual_seed(0)
    batch = sample(model, prompts(tokenizer, *[[3, 4, 5], [6]] * 100), 20)
    ended = batch["ended"]
    assert 0.02 < ended.float().mean() < 0.98
    for ids, mask, end in zip(batch["response_ids"], batch["mask"], ended):
        length = mask.sum().item()
        assert mask[:length].all() and 1 <= length <= 20
        assert (ids[: length - 1] != tokenizer.eos_token_id).all()
        assert end == (ids[length - 1] == tokenizer.eos_token_id) and (end or length == 20)


@pytest.mark.parametrize(
    "temperature,top_k,top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.6)]
)
@pytest.mark.parametrize("draw", [sample, partial(sample_compiled, room=8)])
def test_samples_follow_the_policys_distribution(policy, draw, temperature, top_k, top_p):
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
    batch = draw(model, prompts(tokenizer, *[prompt] * draws), 1, temperature, top_p, top_k)
    got = batch["response_ids"][:, 0]
    counts = torch.bincount(got, minlength=len(probs)).double()
    assert counts[expected == 0].sum() == 0
    cells = expected > 5
    chi_square = ((counts - expected)[cells] ** 2 / expected[cells]).sum().item()
    freedom = cells.sum().item() - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 1


def check_agreement(model, eos, batch, tokens, monkeypatch, rows=0):
    """Every log-prob of what the decoder drew is the training forward's."""
    seen, draw = [], generate.draw

    def recorded(logits, uniform, *rest):
        logits[:, eos] += 2  # so that most rows end early
        token = draw(logits, uniform, *rest)
        seen.append((logits.log_softmax(1).gather(1, token[:, None])[:, 0], token))
        return token

    monkeypatch.setattr(generate, "draw", recorded)
    torch.manual_seed(0)
    batch = sample(model, batch, tokens, rows=rows)
    lengths = batch["mask"].sum(1)
    more = torch.zeros(model.config.vocab_size).index_fill(0, torch.tensor(eos), 2)
    monkeypatch.setattr(
        models, "token_logprobs", lambda x, ids, t: token_logprobs(x + more, ids, t)
    )
    with torch.no_grad():
        expected = models.policy_logprobs(model, batch)
    assert len(seen) == batch["mask"].shape[1] == lengths.max()
    for t, (logp, token) in enumerate(seen):
        alive = lengths > t  # the rows that are still in the batch, in their order
        assert torch.equal(token, batch["response_ids"][alive, t])
        assert torch.allclose(logp, expected[alive, t], atol=1e-5)
    assert not any(x.is_inference() for x in batch.values())  # those cannot be trained on
    return lengths, batch["ended"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [0, 7])
def test_sampling_and_training_agree_on_the_log_probs(policy, family, rows, monkeypatch):
    """Left-padded, and while rows leave the batch: a masked bos, shifted positions or another row's
    cache would show here.  Also with prompts read in pieces, the first of them all padding."""
    model, tokenizer = policy(family, "bos is eos")
    batch = prompts(tokenizer, *[[2, 3, 4, 5, 6], [2, 7], [8, 9, 10]] * 8)
    forward, read = model.forward, []
    model.forward = lambda **given: read.append(given["input_ids"]) or forward(**given)
    eos = tokenizer.eos_token_id
    lengths, ended = check_agreement(model, eos, batch, 12, monkeypatch, rows)
    pieces = [2, 2, 1] if rows else [5]
    assert [ids.shape[1] for ids in read[:-1]] == pieces + [1] * (lengths.max() - 1)
    assert len({*lengths.tolist()}) > 2 and ended.any()


@pytest.fixture
def multinomial(monkeypatch):
    """What torch.multinomial, which Transformers' generate draws with, gave: log-probs, tokens."""
    drawn, plain = [], torch.multinomial

    def recorded(probs, num_samples):
        tokens = plain(probs, num_samples)
        drawn.append((probs.log().gather(1, tokens)[:, 0], tokens[:, 0]))
        return tokens

    monkeypatch.setattr(torch, "multinomial", recorded)
    return drawn


@pytest.mark.parametrize("family", FAMILIES)
def test_a_static_cache_and_training_agree_on_the_log_probs(policy, family, multinomial):
    """Under a mask that ends with the first end, though rows stay in the batch."""
    model, tokenizer = policy(family, "pad is eos")
    batch = prompts(tokenizer, *[[2, 3, 4, 5, 6], [2, 7], [8, 9, 10]] * 60)
    torch.manual_seed(0)
    batch = sample_compiled(model, batch, 12, 0.7, 1.0, 0, room=32)
    with torch.no_grad():
        expected = models.policy_logprobs(model, batch, 0.7)
    lengths, ended = batch["mask"].sum(1), batch["ended"]
    assert torch.equal(batch["mask"], torch.arange(lengths.max()) < lengths[:, None])
    assert len({*lengths.tolist()}) > 2 and ended.any() and (ended | (lengths == 12)).all()
    ends = batch["mask"] & (batch["response_ids"] == tokenizer.eos_token_id)
    assert torch.equal(ends.sum(1), ended.long())
    for t, (logp, token) in enumerate(multinomial):
        alive = lengths > t
        assert torch.equal(token[alive], batch["response_ids"][alive, t])
        assert torch.allclose(logp[alive], expected[alive, t], atol=1e-5)


def test_the_static_caches_forward_is_compiled_once_and_draws_the_same(policy, monkeypatch):
    """PyTorch traces one graph for prompts of two lengths (here on the CPU, its code not generated:
    12 seconds)."""
    found, graphs = [], torch._dynamo.utils.counters["stats"]
    for compiled in (False, True):
        model, tokenizer = policy()
        model.train()
        monkeypatch.setattr(CompileConfig, "_compile_all_devices", compiled)
        how = CompileConfig(backend="eager", mode=None) if compiled else None
        model.generation_config.compile_config = how
        torch.manual_seed(0)
        before = graphs["unique_graphs"]
        for rows in ([[2, 3, 4], [5]], [[2, 3, 4, 5, 6], [7]]):
            batch = sample_compiled(model, prompts(tokenizer, *rows), 8, 1.0, 1.0, 0, room=16)
            found.append(batch["response_ids"])
        assert graphs["unique_graphs"] - before == compiled and not model.training
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])


def test_a_static_cache_leaves_what_is_not_finite_to_the_scoring(policy):
    model, tokenizer = policy()
    model.get_output_embeddings().weight.data[7] = float("nan")
    batch = sample_compiled(model, prompts(tokenizer, [3, 4]), 4, 0.5, 0.9, 0, room=8)
    assert not models.policy_logprobs(model, batch).isfinite().any()


@pytest.mark.parametrize("rows", [0, 2])
def test_a_sliding_window_shorter_than_the_sequence_is_kept(rows, monkeypatch):
    shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    shape.update(num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**shape, pad_token_id=0, eos_token_id=1))
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 5, 6, 7, 8]] * 4)
    batch = {"prompt_ids": ids, "prompt_mask": ids > 0}
    lengths, _ = check_agreement(model, 1, batch, 12, monkeypatch, rows)
    assert lengths.max() > 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_response_does_not_depend_on_the_batch_its_prompt_sits_in(policy, family, monkeypatch):
    model, tokenizer = policy(family)
    rows = [[3, 4, 5], [6], [7, 8, 9, 3, 4], [5, 5]]
    uniform = torch.rand(4, 10, dtype=torch.double)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform)
    together = sample(model, prompts(tokenizer, *rows), 10)
    for i, row in enumerate(rows):
        monkeypatch.setattr(torch, "rand", lambda *_, **__: uniform[i : i + 1])
        alone = sample(model, prompts(tokenizer, row), 10)
        length = alone["mask"].sum()
        assert torch.equal(alone["response_ids"][0], together["response_ids"][i, :length])
        assert together["mask"][i].sum() == length and together["ended"][i] == alone["ended"][0]


HYBRID = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts=2,
    num_experts_per_tok=1,
    pad_token_id=0,
    eos_token_id=1,
    initializer_range=0.3,
)


@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize(
    "config",
    [
        Qwen3NextConfig(
            layer_types=["linear_attention", "full_attention"] * 2,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            **HYBRID,
        ),
        JambaConfig(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, **HYBRID),
    ],
    ids=["Qwen3-Next", "Jamba"],
)
def test_layers_that_keep_a_state_instead_of_keys_sample_too(config, rows, monkeypatch):
    """Their layers have a cache of another kind, which loses its state between pieces of a prompt
    (Jamba's), or lets padding into it where a piece is one token."""
    torch.manual_seed(0)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 5, 6, 7, 8]] * 4)
    batch, model = (
        {"prompt_ids": ids.masked_fill(ids == 0, 9), "prompt_mask": ids > 0},
        AutoModelForCausalLM.from_config(config),
    )
    lengths, _ = check_agreement(model, 1, batch, 12, monkeypatch, rows)
    assert len({*lengths.tolist()}) > 2


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, pad_token_id=0),
        MiniMaxConfig(**SHAPE, vocab_size=64, num_key_value_heads=2, head_dim=8, pad_token_id=0),
    ],
    ids=["Mamba", "MiniMax"],
)
def test_a_model_without_keys_and_values_is_one_sentence(config):
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.tensor([[3, 4]])
    with pytest.raises(InputError, match="ForCausalLM keeps no keys and values: choose another"):
        sample(model, {"prompt_ids": ids, "prompt_mask": ids > 0}, 2)


def test_models_that_a_static_cache_would_be_wrong_for_are_one_sentence(policy):
    """GPT-Neo's windows would be elsewhere; Falcon's ALiBi cannot read the mask."""
    for family in ("GPT-Neo's window", "Falcon's ALiBi"):
        config = RECKONERS[family]
        config.update(dict(pad_token_id=0, eos_token_id=1))
        model = AutoModelForCausalLM.from_config(config)
        ids = torch.tensor([[3, 4]])
        with pytest.raises(InputError, match="cannot do --compiled_generation: leave it out"):
            sample_compiled(model, {"prompt_ids": ids, "prompt_mask": ids > 0}, 2, 1.0, 1.0, 0, 8)


def test_keys_and_values_are_given_their_room_once(policy, monkeypatch):
    """Written in place until rows leave; no forward copies what stands there already."""
    model, tokenizer = policy()
    held, update = [], generate.Room.update

    def watched(layer, *new, **rest):
        keys, values = update(layer, *new, **rest)
        held.append((len(keys), keys.shape[2], layer.keys.shape[2], id(layer), keys.data_ptr()))
        return keys, values

    monkeypatch.setattr(generate.Room, "update", watched)
    torch.manual_seed(0)
    batch = sample(model, prompts(tokenizer, *[[3, 4, 5], [6]] * 8), 20)
    assert batch["ended"].any() and {room for _, _, room, *_ in held} == {3 + 20}
    layers = model.config.num_hidden_layers
    assert [shown for _, shown, *_ in held[::layers]] == [*range(3, 3 + len(held) // layers)]
    places = {}
    for rows, _, _, layer, address in held:
        places.setdefault((rows, layer), set()).add(address)
    assert len(places) > layers and all(len(found) == 1 for found in places.values())


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("config", RECKONERS.values(), ids=RECKONERS)
def test_families_that_reckon_with_the_length_of_the_keys_sample_too(config, rows, monkeypatch):
    """Room that is not written yet must not look like keys."""
    config.update(dict(pad_token_id=0, bos_token_id=1, eos_token_id=1, use_cache=True))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 5, 6, 7, 8]] * 4)
    batch = {"prompt_ids": ids, "prompt_mask": ids > 0}
    lengths, _ = check_agreement(model, 1, batch, 12, monkeypatch, rows)
    assert len({*lengths.tolist()}) > 2


def test_a_token_is_drawn_where_the_distribution_function_passes_the_number():
    """By hand: probabilities 1/2, 0, 1/4, 1/4, so the function jumps at 0, 1/2 and 3/4."""
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log()
    for number, token in ((0, 0), (0.499, 0), (0.5, 2), (0.749, 2), (0.75, 3), (1 - 2**-53, 3)):
        uniform = torch.tensor([number], dtype=torch.double)
        assert generate.draw(logits, uniform, 1.0, 1.0, 0).tolist() == [token]
    square = torch.tensor([0.6], dtype=torch.double)  # temperature 1/2: 2/3, 0, 1/6, 1/6
    assert generate.draw(logits, square, 0.5, 1.0, 0).tolist() == [0]
    assert generate.draw(logits, square, 1.0, 1.0, 1).tolist() == [0]  # top-k
    assert generate.draw(logits, square, 1.0, 0.4, 0).tolist() == [0]  # top-p


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Behind 50,000 tokens that hold nearly all, one of probability 1e-7, less than the steps of
    an fp32 distribution function near 1."""
    probs = torch.full((1, 50001), (1 - 1e-7) / 50000)
    probs[0, -1] = 1e-7
    edge = torch.tensor([1 - 1.2e-7, 1 - 0.8e-7], dtype=torch.double)
    drawn = generate.draw(probs.log().expand(2, -1), edge, 1.0, 1.0, 0)
    assert drawn[0] != 50000 and drawn[1] == 50000


def test_probabilities_that_are_not_finite_are_one_sentence(policy):
    model, tokenizer = policy()
    next(model.parameters()).data.fill_(float("nan"))
    with pytest.raises(InputError, match="probabilities are not finite: it diverged"):
        sample(model, prompts(tokenizer, [3, 4]), 4)
