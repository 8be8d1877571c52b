"""Padding, packing and grouping move tokens around, and change neither rows nor numbers."""

import argparse

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, MistralConfig
from transformers import Qwen3NextConfig

from rlhf import batches, engine, models
from rlhf.args import InputError
from rlhf.losses import masked_mean
from tests.conftest import FAMILIES, SHAPE, arguments, make_tokenizer, rows_of


def ragged(n, seed=0):
    """Rows whose lengths vary twentyfold."""
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 20, (n, 2), generator=draw)
    words = torch.randint(0, 30, (n, 40), generator=draw).tolist()
    texts = [
        (" ".join(f"w{i}" for i in row[:p]), "".join(f" w{i}" for i in row[20 : 20 + r]))
        for row, (p, r) in zip(words, sizes.tolist())
    ]
    return Dataset.from_list(rows_of(make_tokenizer(), texts))


def all_steps(monkeypatch, world, units, batch, accumulation, total, by_length=False):
    """What every rank gets -> {step: (ranks x micro-batches) lists of units}."""
    seen = {}
    for rank in range(world):
        monkeypatch.setattr(engine, "rank", lambda: rank)
        monkeypatch.setattr(engine, "world_size", lambda: world)
        args = argparse.Namespace(seed=7, group_by_length=by_length)
        for step, parts in batches.steps(args, units, list, (batch, accumulation), total):
            assert [len(part) for part in parts] == [batch] * accumulation
            seen.setdefault(step, []).extend(parts)
    return seen


@pytest.mark.parametrize("by_length", [False, True])
def test_every_cut_of_a_step_covers_the_same_rows(monkeypatch, by_length):
    rows = Dataset.from_list([{"length": i * 7 % 50, "number": i} for i in range(50)])

    def steps(world, batch, accumulation):
        seen = all_steps(monkeypatch, world, rows, batch, accumulation, 14, by_length)
        return {
            step: sorted(row["number"] for part in parts for row in part)
            for step, parts in seen.items()
        }

    whole = steps(1, 8, 1)
    assert steps(2, 4, 1) == steps(2, 2, 2) == steps(1, 1, 8) == whole and len(whole) == 14
    first, second = (
        [row for step in part for row in whole[step]] for part in (range(1, 7), range(7, 13))
    )
    # each epoch its own order, no repeats
    assert len(set(first)) == len(set(second)) == 48 and first != second


def test_grouping_by_length_keeps_an_epochs_rows_and_saves_padding(monkeypatch):
    rows = ragged(1000)

    def epoch(by_length):
        seen = all_steps(monkeypatch, 2, rows, 4, 2, 62, by_length)
        parts = [part for step in seen.values() for part in step]
        widths = [len(part) * max(row["length"] for row in part) for part in parts]
        used = [row["length"] for part in parts for row in part]
        means = [sum(r["length"] for p in step for r in p) for step in seen.values()]
        key = sorted(str(row) for part in parts for row in part)
        return key, sum(used) / sum(widths), means

    (plain, wasteful, _), (grouped, tight, means) = epoch(False), epoch(True)
    assert plain == grouped and wasteful < 0.75 and tight > 0.95
    falls = sum(a > b for a, b in zip(means, means[1:]))
    assert 15 < falls < 46  # of 61: the steps come in random order


def test_too_few_rows_for_a_step():
    with pytest.raises(InputError, match="5 rows .* do not fill a step of 8"):
        settings = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
        batches.plan(argparse.Namespace(**settings), range(5))


@pytest.mark.parametrize("total,world", [(10, 1), (10, 3), (2, 4)])
def test_evaluation_covers_every_row_once_on_any_number_of_ranks(monkeypatch, total, world):
    parts = []
    for rank in range(world):
        monkeypatch.setattr(engine, "rank", lambda: rank)
        monkeypatch.setattr(engine, "world_size", lambda: world)
        rows = [row for batch in batches.eval_batches(range(total), list, 2) for row in batch]
        parts.append(torch.tensor(rows))
    monkeypatch.setattr(engine, "gather", lambda values: torch.stack(parts))
    assert engine.gather_rows(parts[0], total).tolist() == list(range(total))


def test_stack_pads_prompts_left_and_responses_right():
    tokenizer = make_tokenizer()
    one, two = (
        batches.collate(tokenizer, [row])
        for row in ({"prompt": [5], "chosen": [6, 2]}, {"prompt": [7, 8], "chosen": [2]})
    )
    both = models.stack([{**one, "score": torch.ones(1)}, {**two, "score": torch.zeros(1)}], 1)
    assert both["prompt_ids"].tolist() == [[1, 5], [7, 8]]
    assert both["prompt_mask"].tolist() == [[False, True], [True, True]]
    assert both["response_ids"].tolist() == [[6, 2], [2, 1]]
    assert both["mask"].tolist() == [[True, True], [True, False]]
    assert both["score"].tolist() == [1, 0]


def test_packs_hold_every_row_once_and_little_air():
    rows = ragged(500)
    packs = batches.Packs(rows, 64)
    sizes = [sum(row["length"] for row in packs[i]) for i in range(len(packs))]
    assert sorted(number for pack in packs.packs for number in pack) == list(range(500))
    assert max(sizes) <= 64 and sum(sizes) / 64 / len(packs) > 0.98


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_probs_and_gradients_are_those_of_each_row_alone(family):
    torch.manual_seed(0)
    tokenizer, rows = make_tokenizer(), ragged(24)
    policy = AutoModelForCausalLM.from_config(FAMILIES[family](len(tokenizer))).eval()
    padded = batches.collate(tokenizer, list(rows))
    packs = batches.Packs(rows, 64)
    packed = batches.collate_packs(tokenizer, [packs[i] for i in range(len(packs))])
    assert 2 < len(packs) < 12 and packed["mask"].sum() == padded["mask"].sum()
    logp = models.policy_logprobs(policy, padded)
    expected = [logp[i][padded["mask"][i]] for pack in packs.packs for i in pack]
    got = models.policy_logprobs(policy, packed)[packed["mask"]]
    torch.testing.assert_close(got, torch.cat(expected), rtol=1e-5, atol=1e-5)

    gradients = []
    for batch in (padded, packed):
        policy.zero_grad()
        (-masked_mean(models.policy_logprobs(policy, batch), batch["mask"])).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    # the control: without positions that restart, a sequence sees those before it
    blind = {**packed, "position_ids": torch.arange(packed["position_ids"].shape[1])[None]}
    leaked = models.policy_logprobs(policy, blind)[packed["mask"]]
    assert (leaked - got).abs().max() > 1e-3


WINDOW = dict(**SHAPE, vocab_size=33, num_key_value_heads=2)
HYBRID = dict(**WINDOW, head_dim=8, layer_types=["linear_attention", "full_attention"])
HYBRID.update(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8)
HYBRID.update(linear_value_head_dim=8, num_experts=0)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=33, hidden_size=16, n_layer=2, n_head=2),
        FalconConfig(alibi=True, vocab_size=33, **SHAPE),
        Qwen3NextConfig(**HYBRID),
        MistralConfig(sliding_window=4, **WINDOW),
    ],
    ids=["Bloom's ALiBi", "Falcon's ALiBi", "a state that flows on", "a window"],
)
def test_a_model_that_cannot_keep_packed_sequences_apart_is_refused(config):
    torch.manual_seed(0)
    packs = batches.collate_packs(make_tokenizer(), [ragged(4)])
    with pytest.raises(InputError, match="cannot keep packed sequences apart"):
        models.policy_logprobs(AutoModelForCausalLM.from_config(config), packs)


def test_a_window_that_no_pack_outgrows_is_no_hindrance():
    torch.manual_seed(0)
    rows = ragged(4)
    config = MistralConfig(sliding_window=sum(row["length"] for row in rows), **WINDOW)
    model = AutoModelForCausalLM.from_config(config).eval()
    packed, alone = (
        [models.policy_logprobs(model, batch)[batch["mask"]] for batch in made]
        for made in (
            [batches.collate_packs(make_tokenizer(), [rows])],
            [batches.collate(make_tokenizer(), [row]) for row in rows],
        )
    )
    torch.testing.assert_close(packed[0], torch.cat(alone), rtol=0, atol=1e-5)


def test_the_unsupervised_text_is_packed_and_its_texts_kept_apart(tmp_path):
    texts = [" ".join(f"w{i}" for i in range(n)) for n in (3, 5, 25, 1, 9)] * 20
    (tmp_path / "text.txt").write_bytes(("\r\n\r\n".join(texts) + "\n\n \n\n").encode())
    text = dict(unsupervised_dataset_config_name=None, per_device_training_batch_size=2)
    text.update(max_prompt_seq_len=8, max_answer_seq_len=8, max_steps=1)
    text.update(gradient_accumulation_steps=1, updates=1)
    args = arguments(tmp_path, unsupervised_dataset_name=str(tmp_path / "text.txt"), **text)
    tokenizer, plain = make_tokenizer(), make_tokenizer()
    for text, expected in [
        (" \n\n ", "there is no text in it"),
        ("w1 w2", "do not fill a step of 2"),
    ]:
        broken = argparse.Namespace(**vars(args))
        broken.unsupervised_dataset_name = str(tmp_path / "broken.txt")
        (tmp_path / "broken.txt").write_text(text)
        with pytest.raises(InputError, match=expected):
            batches.text_stream(broken, tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>",
        special_tokens=[("</s>", 2)],  # its own eos must not be a second one
    )
    stream, found = batches.text_stream(args, tokenizer), []
    for _ in range(16):  # more than an epoch: 48 tokens a round of texts, 60 packs of 16
        [batch] = next(stream)
        ids = torch.cat([batch["prompt_ids"], batch["response_ids"]], 1)
        trained = torch.cat([torch.zeros(2, 1).bool(), batch["mask"]], 1)
        assert ids.shape[0] == 2 and ids.shape[1] <= 16
        # every token but a sequence's first is trained on
        assert torch.equal(trained, (batch["position_ids"] > 0) & (ids != tokenizer.pad_token_id))
        for row, positions in zip(ids.tolist(), batch["position_ids"].tolist()):
            starts = [i for i, position in enumerate(positions) if position == 0] + [len(row)]
            pieces = [row[a:b] for a, b in zip(starts, starts[1:])]
            found += [tuple(piece) for piece in pieces if piece != [tokenizer.pad_token_id]]
    whole = [plain(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts[:5]]
    pieces = {tuple(text[i : i + 16]) for text in whole for i in (0, 16) if text[i:]}
    assert set(found) == pieces and len(pieces) == 6
