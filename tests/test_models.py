"""Models load, score, save and load again, in every family and with every kind of tokenizer."""

import os
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    Phi3Config,
)

from rlhf import batches, models
from rlhf.args import InputError
from tests.conftest import FAMILIES, SHAPE, SPECIALS, make_tokenizer, rows_of

ROWS = [
    {"prompt": list(range(3, 3 + n)), "chosen": [5 + n] * r + [2]}
    for n, r in ((1, 4), (6, 1), (3, 2))
]


def scalar(folder, **kwargs):
    tokenizer = models.load_tokenizer(folder)
    return models.load_scalar(folder, tokenizer, new_head=True, **kwargs).eval(), tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("specials", SPECIALS)
def test_a_reward_model_gives_the_same_score_in_transformers(
    model_folder, tmp_path, family, specials
):
    model, tokenizer = scalar(model_folder(family, specials))
    folder = str(tmp_path / "saved")
    models.save_model(model, tokenizer, folder)

    texts = [("w1 w2 w3", " w4 w5"), ("w7", " w8 w9 w10 w11"), ("w3 w1", " w2")]
    rows = rows_of(tokenizer, texts)
    ours = models.sequence_scores(model, batches.collate(tokenizer, rows))
    theirs, their_tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    their_tokenizer.padding_side = "right"
    batch = their_tokenizer(
        [p + r + tokenizer.eos_token for p, r in texts], padding=True, return_tensors="pt"
    )
    assert batch["attention_mask"].sum(1).tolist() == [
        len(row["prompt"]) + len(row["chosen"]) for row in rows
    ]
    got = theirs(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits.squeeze(1)
    assert torch.allclose(got, ours, atol=1e-5), (got, ours)
    assert ours.std() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("specials", SPECIALS)
def test_a_policy_opens_in_transformers_with_tokenizer_and_generation_config(
    model_folder, tmp_path, family, specials
):
    start = model_folder(family, specials)
    tokenizer = models.load_tokenizer(start)
    policy, folder = models.load_policy(start, tokenizer).eval(), str(tmp_path / "saved")
    models.save_model(policy, tokenizer, folder)
    theirs, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.tensor([[3, 4, 5, 6]])
    assert torch.equal(theirs(ids).logits, policy(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == tokenizer.get_vocab()
    settings = GenerationConfig.from_pretrained(folder)
    assert (
        settings.eos_token_id == tokenizer.eos_token_id
        and settings.pad_token_id == tokenizer.pad_token_id
    )
    assert settings.do_sample and settings.pad_token_id != settings.eos_token_id
    assert not [name for name in os.listdir(folder) if name.startswith(".saving")]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_company_change_no_number(model_folder, family):
    """One row alone, in a batch that pads it left and right, and with more padding still: the same
    log-probs, values and score; whatever token pads."""
    folder = model_folder(family)
    model, tokenizer = scalar(folder)
    policy = models.load_policy(folder, tokenizer).eval()
    together = batches.collate(tokenizer, ROWS)
    wider = {
        name: torch.nn.functional.pad(x, (3, 0) if name.startswith("prompt") else (0, 2))
        for name, x in together.items()
    }
    other_pad = {
        **together,
        "prompt_ids": together["prompt_ids"].masked_fill(~together["prompt_mask"], 2),
        "response_ids": together["response_ids"].masked_fill(~together["mask"], 2),
    }
    for function, net in (
        (models.policy_logprobs, policy),
        (models.state_values, model),
        (models.sequence_scores, model),
    ):
        for index, row in enumerate(ROWS):
            alone, length = function(net, batches.collate(tokenizer, [row]))[0], len(row["chosen"])
            for batch in (together, wider, other_pad):
                inside = function(net, batch)[index]
                inside = inside[:length] if inside.ndim else inside
                assert torch.allclose(inside, alone, atol=1e-5), (function.__name__, inside, alone)


def test_padding_that_all_rows_have_is_not_computed(model_folder):
    """Prompts of up to 6, responses of up to 5 (their ends included): no row is longer than 8; the
    last row is shorter than the widest response."""
    model, tokenizer = scalar(model_folder())
    policy = models.load_policy(model_folder(), tokenizer).eval()
    widths = []
    seen = lambda _, args, inputs: widths.append((*args, inputs.get("input_ids"))[0].shape)
    batch = batches.collate(tokenizer, ROWS + [{"prompt": [3], "chosen": [4, 2]}])
    last, projected = {name: x[-1:] for name, x in batch.items()}, []
    for net, read in (
        (model.classifier.base_model, partial(models.state_values, model)),
        (policy, partial(models.policy_logprobs, policy)),
    ):
        net.register_forward_pre_hook(seen, with_kwargs=True)
        net.register_forward_hook(lambda _, __, out: projected.append(out[0].shape[1]))
        whole, alone = read(batch), read(last)
        assert batch["prompt_mask"].shape == (4, 6) and whole.shape == batch["mask"].shape == (4, 5)
        assert alone.shape == (1, 5)
        assert torch.allclose(whole[-1:][last["mask"]], alone[last["mask"]], atol=1e-5)
    assert widths == [(4, 8), (1, 3)] * 2
    assert projected[2:] == [5, 2]  # of the policy: the responses' logits alone


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_values_stand_at_the_actions(model_folder, family):
    """logp[t] is that of response token t given what precedes it; values[t] is the head's output
    before that token."""
    folder = model_folder(family)
    model, tokenizer = scalar(folder)
    policy, row = models.load_policy(folder, tokenizer).eval(), ROWS[2]
    ids, prompt = torch.tensor([row["prompt"] + row["chosen"]]), len(row["prompt"])
    logp = policy(ids).logits[0].log_softmax(1)
    hidden = model.classifier.base_model(ids)[0]
    scores, batch = model.classifier.score(hidden)[0, :, 0], batches.collate(tokenizer, [row])
    for t, token in enumerate(row["chosen"]):
        assert models.policy_logprobs(policy, batch)[0, t].item() == pytest.approx(
            logp[prompt + t - 1, token].item(), abs=1e-5
        )
        assert models.state_values(model, batch)[0, t].item() == pytest.approx(
            scores[prompt + t - 1].item(), abs=1e-5
        )
    assert models.sequence_scores(model, batch).item() == pytest.approx(scores[-1].item(), abs=1e-5)


def test_a_critic_loads_strictly_from_a_reward_model_folder(model_folder, tmp_path):
    model, tokenizer = scalar(model_folder())
    models.save_model(model, tokenizer, str(tmp_path / "rm"))
    again = models.load_scalar(str(tmp_path / "rm"), tokenizer)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )


def damage(folder, change):
    path = os.path.join(folder, "model.safetensors")
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def drop(name):
    return lambda weights: weights.pop(name)


def test_bad_model_folders_are_named_in_one_sentence(model_folder, tmp_path):
    good = model_folder()
    tokenizer = models.load_tokenizer(good)

    def message(load, *args, **kwargs):
        with pytest.raises(InputError) as error:
            load(*args, **kwargs)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no such file or folder" in message(
        models.load_tokenizer, str(tmp_path / "absent")
    )
    assert "absent/model" in message(models.load_tokenizer, "absent/model")
    assert "missing weight(s), score.weight first" in message(models.load_scalar, good, tokenizer)
    hurt = model_folder(name="hurt")
    damage(hurt, drop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in message(models.load_policy, hurt, tokenizer)
    assert "model.layers.1.mlp.up_proj.weight" in message(
        models.load_scalar, hurt, tokenizer, new_head=True
    )
    shape = model_folder(name="shape")
    damage(shape, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    assert "model.norm.weight has shape (7,), not (16,)" in message(
        models.load_policy, shape, tokenizer
    )
    extra = model_folder(name="extra")
    damage(
        extra, lambda weights: weights.update({"model.layers.9.mlp.up_proj.weight": torch.ones(7)})
    )
    assert "1 unexpected weight(s), model.layers.9" in message(models.load_policy, extra, tokenizer)
    bare = model_folder(name="bare")
    os.remove(os.path.join(bare, "model.safetensors"))
    assert "cannot load the weights" in message(models.load_policy, bare, tokenizer)
    torn = model_folder(name="torn")
    with open(os.path.join(torn, "model.safetensors"), "r+b") as file:
        file.truncate(1000)
    assert "cannot load the weights" in message(models.load_policy, torn, tokenizer)
    strange = model_folder(name="strange")
    with open(os.path.join(strange, "tokenizer.json")) as file:
        text = file.read()
    with open(os.path.join(strange, "tokenizer.json"), "w") as file:
        file.write(text.replace('"w29"', '"other"'))
    assert "different vocabularies" in message(
        models.check_same_vocabulary, good, tokenizer, strange
    )
    models.check_same_vocabulary(good, tokenizer, good)
    assert "64-token context" in message(models.load_policy, good, tokenizer, "fp32", 65)
    models.load_policy(good, tokenizer, length=64)


def test_a_longrope_model_is_good_for_its_first_context(tmp_path):
    """Past it, Transformers turns all rows of a batch by the longest one's frequencies."""
    factors = dict(short_factor=[1.0] * 4, long_factor=[4.0] * 4, rope_theta=1e4)
    config = Phi3Config(
        **SHAPE,
        vocab_size=33,
        original_max_position_embeddings=16,
        rope_parameters=dict(rope_type="longrope", **factors),
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
        initializer_range=1.0,
    )
    torch.manual_seed(0)
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), make_tokenizer()
    rows = [{"prompt": [3, 4], "chosen": [5, 2]}, {"prompt": [3], "chosen": [6] * 14 + [2]}]
    alone = models.policy_logprobs(model, batches.collate(tokenizer, rows[:1]))
    together = models.policy_logprobs(model, batches.collate(tokenizer, rows))
    assert torch.allclose(together[0, :2], alone[0], atol=1e-5)
    rows[1]["chosen"] *= 2
    together = models.policy_logprobs(model, batches.collate(tokenizer, rows))
    assert not torch.allclose(together[0, :2], alone[0], atol=1e-3)
    model.save_pretrained(tmp_path)
    models.load_policy(str(tmp_path), tokenizer, length=16)
    with pytest.raises(InputError, match="17 tokens exceed the 16-token context"):
        models.load_policy(str(tmp_path), tokenizer, length=17)


def test_a_saved_folder_holds_nothing_of_the_model_that_was_there(model_folder, tmp_path):
    """Of a tokenizer with a chat template, or shards; but whatever else stands there stays."""
    start, folder = model_folder(), tmp_path / "saved"
    tokenizer = models.load_tokenizer(start)
    policy = models.load_policy(start, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    policy.save_pretrained(folder, max_shard_size="2KB")
    models.save_model(policy, tokenizer, str(folder))
    kept = ["args.json", "metrics.jsonl", "model_notes.txt", "tokenizer.py", "pytorch_model.bin"]
    for name in kept:
        (folder / name).write_text("mine")
    assert models.load_tokenizer(str(folder)).chat_template
    tokenizer.chat_template = None
    models.save_model(policy, tokenizer, str(folder))
    assert models.load_tokenizer(str(folder)).chat_template is None
    fresh = tmp_path / "fresh"
    models.save_model(policy, tokenizer, str(fresh))
    assert {*os.listdir(folder)} == {*os.listdir(fresh), *kept}


def test_heads_compute_in_fp32_under_bf16_weights(model_folder):
    model, tokenizer = scalar(model_folder(), dtype="bf16")
    assert model.classifier.score.weight.dtype == torch.bfloat16
    values = models.state_values(model, batches.collate(tokenizer, ROWS))
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())


def test_an_interrupted_save_leaves_the_previous_model(model_folder, tmp_path, monkeypatch):
    start = model_folder()
    tokenizer = models.load_tokenizer(start)
    policy, folder = models.load_policy(start, tokenizer), str(tmp_path / "saved")
    models.save_model(policy, tokenizer, folder)
    before = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    monkeypatch.setattr(
        type(tokenizer),
        "save_pretrained",
        lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")),
    )
    with torch.no_grad():
        policy.lm_head.weight.zero_()
    with pytest.raises(OSError, match="disk full"):
        models.save_model(policy, tokenizer, folder)
    assert {
        name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)
    } == before


def test_the_real_language_model_loads_and_keeps_its_vocabulary():
    from tests.conftest import SHARED

    folder = SHARED / "stories260K"
    if not folder.is_dir():
        pytest.skip("the real model is not here")
    tokenizer = models.load_tokenizer(str(folder))
    policy = models.load_policy(str(folder), tokenizer).eval()
    assert policy.get_input_embeddings().weight.shape[0] == 512 and tokenizer.pad_token == "<unk>"
    [row] = rows_of(tokenizer, [("Once upon a time, there was a little girl", " named Lily.")])
    assert tokenizer.decode(row["chosen"], skip_special_tokens=True) == "named Lily."
    assert models.policy_logprobs(policy, batches.collate(tokenizer, [row]))[0, :-1].mean() > -1
