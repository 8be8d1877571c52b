"""Every schema becomes the right texts, phases never share a prompt, bad input is named."""

import argparse
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models as tokenizer_models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import train_dpo
import train_ppo
import train_rm
import train_sft
from rlhf import data, evaluate, models, render
from rlhf.args import InputError
from tests.conftest import ROOT, SHARED, arguments, make_tokenizer, rows_of, write_jsonl


def pairs(n):
    return [
        {"prompt": f"w{i % 30} w{i // 30 % 30}", "chosen": f" w{i % 7} w1", "rejected": " w2"}
        for i in range(n)
    ]


def rendered(path, row, phase, tokenizer=None):
    layout = data.layout_of(path, row, "here")
    reason, name, *texts = render.render(row, "here", layout, phase, tokenizer or make_tokenizer())
    assert name or reason != "used"
    return reason, *texts


# rows become texts

H, A = "\n\nHuman:", "\n\nAssistant:"
AB = {"prompt": f"{H} x{A}", "chosen": " a", "rejected": " b"}
PASSAGES = {"positive_passages": [{"text": "a"}, {"text": "c"}]}
PASSAGES["negative_passages"] = [{"text": "b"}]
MKQA = {"queries": {"zh_cn": "x", "ja": "y"}}
MKQA["answers"] = {"zh_cn": [{"text": "a"}], "ja": [{"text": "c"}]}
ASKED = [{"role": "user", "content": "x"}]
SAID = {name: ASKED + [{"role": "assistant", "content": name}] for name in "ab"}
PAIR = (f"{H} x{A}", " a", " b")
SINGLE = (f"{H} x{A}", " a", None)
SCHEMAS = {  # data set: a row in its schema, and what it must become
    "Dahoas/rm-static": ({**AB, "response": " a"}, PAIR),
    "Dahoas/full-hh-rlhf": ({**AB, "response": " a"}, PAIR),
    "Dahoas/synthetic-instruct-gptj-pairwise": (
        {"prompt": "x", "chosen": "a", "rejected": "b"},
        PAIR,
    ),
    "yitingxie/rlhf-reward-datasets": (
        {
            "prompt": f"{H} x\n\n",
            "chosen": f"{H} y{A} z{H} x{A} a",
            "rejected": f"{H} y{A} z{H} x{A} b",
        },
        PAIR,
    ),
    "openai/webgpt_comparisons": (
        {
            "question": {"full_text": "x"},
            "answer_0": "b [1, 2]",
            "answer_1": "a [3] (4)",
            "score_0": -0.5,
            "score_1": 0.5,
        },
        PAIR,
    ),
    "stanfordnlp/SHP": (
        {"history": "x", "human_ref_A": "b", "human_ref_B": "a", "labels": 0, "score_ratio": 2.0},
        PAIR,
    ),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": (
        {"prompt": "USER: x ASSISTANT:", "label": "a"},
        SINGLE,
    ),
    "wangrui6/Zhihu-KOL": (
        {"INSTRUCTION": "x", "RESPONSE": "a", "SOURCE": "zhihu", "METADATA": "{}"},
        SINGLE,
    ),
    "Cohere/miracl-zh-queries-22-12": ({"query_id": "1", "query": "x", **PASSAGES}, PAIR),
    "Cohere/miracl-ja-queries-22-12": ({"query_id": "1", "query": "x", **PASSAGES}, PAIR),
    "Hello-SimpleAI/HC3-Chinese": (
        {"question": "x", "human_answers": ["a"], "chatgpt_answers": ["c"]},
        SINGLE,
    ),
    "mkqa-Chinese": (MKQA, SINGLE),
    "mkqa-Japanese": (MKQA, (f"{H} y{A}", " c", None)),
    "lmqg/qg_jaquad": ({"question": "x", "sentence": "a", "answer": "c"}, SINGLE),
    "lmqg/qag_jaquad": ({"questions": ["x", "y"], "paragraph": "a", "answers": ["c"]}, SINGLE),
    "Anthropic/hh-rlhf": (
        {"chosen": f"{H} y{A} z{H} x{A} a", "rejected": f"{H} y{A} z{H} x{A} b"},
        (f"{H} y{A} z{H} x{A}", " a", " b"),
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        {"prompt": "x", "chosen": SAID["a"], "rejected": SAID["b"], "messages": SAID["a"]},
        PAIR,
    ),
    "tatsu-lab/alpaca": (
        {"instruction": "x", "input": "i", "output": "a", "text": "whole"},
        (f"{H} x\n\ni{A}", " a", None),
    ),
    "databricks/databricks-dolly-15k": (
        {"instruction": "x", "context": "", "response": "a", "category": "qa"},
        SINGLE,
    ),
    "columns prompt, chosen, rejected": (AB, PAIR),
    "columns with a demonstration": ({**AB, "response": " a"}, PAIR),
    "columns prompt, response": ({"prompt": "x ", "response": "a"}, ("x ", "a", None)),
    "columns prompt, completion": ({"prompt": "x ", "completion": "a"}, ("x ", "a", None)),
    "columns messages": ({"messages": SAID["a"]}, SINGLE),
    "columns prompt": ({"prompt": "x"}, ("x", None, None)),
}
NOT_BY_COLUMNS = {  # these say the same as others, and only the name tells them apart
    "Dahoas/synthetic-instruct-gptj-pairwise",
    "yitingxie/rlhf-reward-datasets",
    "mkqa-Japanese",
}


def test_every_data_set_of_the_table_has_a_row_here():
    by_columns = {
        "Dahoas/rm-static",
        "Dahoas/full-hh-rlhf",
        "HuggingFaceH4/ultrafeedback_binarized",
    }
    assert SCHEMAS.keys() == data.DATASETS.keys() | by_columns


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_row_in_a_data_sets_schema_becomes_its_texts_in_every_phase(name, tmp_path):
    row, (prompt, chosen, rejected) = SCHEMAS[name]
    # a copy is known by its folder, any other by its columns
    os.makedirs(tmp_path / os.path.basename(name))
    copies = [name, f"{name}:default", f"{tmp_path / os.path.basename(name)}/"]
    for path in copies + ["somewhere/else"] * (name not in NOT_BY_COLUMNS):
        assert rendered(path, row, 3) == ("used", prompt, "", "")
        if chosen:
            assert rendered(path, row, 1) == ("used", prompt, chosen, "")
        else:
            with pytest.raises(InputError, match="here: step 1 needs responses"):
                rendered(path, row, 1)
        if rejected:
            assert rendered(path, row, 2) == ("used", prompt, chosen, rejected)
        else:
            with pytest.raises(InputError, match="here: step 2 needs pairs"):
                rendered(path, row, 2)


FLAWS = [  # data set or "", changes to its row, phase, why it is dropped
    ("openai/webgpt_comparisons", {"score_0": 0.5}, 2, "tie"),
    ("openai/webgpt_comparisons", {"answer_1": None}, 2, "no response"),
    ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"prompt": "USER:  ASSISTANT:"}, 1, "no prompt"),
    ("pvduy/sharegpt_alpaca_oa_vicuna_format", {"label": " "}, 1, "no response"),
    ("Cohere/miracl-zh-queries-22-12", {"negative_passages": []}, 2, "no response"),
    ("Cohere/miracl-zh-queries-22-12", {"negative_passages": []}, 1, "used"),
    ("Hello-SimpleAI/HC3-Chinese", {"human_answers": []}, 1, "no response"),
    ("mkqa-Chinese", {"answers": {"zh_cn": [{"text": None}]}}, 1, "no response"),
    ("tatsu-lab/alpaca", {"instruction": "", "input": ""}, 1, "no prompt"),
    ("Anthropic/hh-rlhf", {"rejected": f"{H} q{A} b"}, 1, "prompts of a pair differ"),
    ("Anthropic/hh-rlhf", {"rejected": None}, 2, "no response"),
    ("Anthropic/hh-rlhf", {"chosen": f"{H} y{A} q{H} x{A} a"}, 1, "prompts of a pair differ"),
    ("tatsu-lab/alpaca", {"instruction": None, "input": ""}, 1, "no prompt"),
    (
        "Anthropic/hh-rlhf",
        {"rejected": SCHEMAS["Anthropic/hh-rlhf"][0]["chosen"]},
        2,
        "identical pair",
    ),
    ("HuggingFaceH4/ultrafeedback_binarized", {"rejected": SAID["a"]}, 2, "identical pair"),
    (
        "HuggingFaceH4/ultrafeedback_binarized",
        {"rejected": SAID["b"][1:]},
        2,
        "prompts of a pair differ",
    ),
    ("columns messages", {"messages": ASKED}, 1, "no response"),
    ("columns messages", {"messages": None}, 1, "no response"),
    ("columns prompt, chosen, rejected", {"prompt": ASKED, "chosen": None}, 2, "no response"),
    ("columns prompt, chosen, rejected", {"prompt": ASKED, "rejected": None}, 2, "no response"),
    (
        "columns prompt, chosen, rejected",
        {"prompt": ASKED, "chosen": "a", "rejected": "b"},
        2,
        "used",
    ),
    ("columns prompt, chosen, rejected", {"chosen": None, "rejected": SAID["b"]}, 2, "no response"),
    (
        "columns prompt, chosen, rejected",
        {"prompt": None, "chosen": SAID["a"], "rejected": []},
        1,
        "used",
    ),
    ("columns messages", {"messages": ASKED}, 3, "used"),
    (
        "columns messages",
        {"messages": ASKED + [{"role": "assistant", "content": ""}]},
        1,
        "no response",
    ),
    ("columns messages", {"messages": []}, 3, "no prompt"),
    ("columns prompt, chosen, rejected", {"prompt": None}, 3, "no prompt"),
    ("columns prompt, chosen, rejected", {"chosen": None}, 2, "no response"),
    ("columns prompt, chosen, rejected", {"chosen": None}, 3, "used"),
    (
        "columns prompt, chosen, rejected",
        {"chosen": "x" * 10_000_000},
        2,
        "over a million characters",
    ),
]


@pytest.mark.parametrize("name,changes,phase,reason", FLAWS)
def test_a_flawed_row_is_dropped_for_its_reason(name, changes, phase, reason):
    assert rendered(name, {**SCHEMAS[name][0], **changes}, phase)[0] == reason


def test_messages_beside_a_prompt_are_what_counts():  # HuggingFaceH4/ultrachat_200k
    row = {"prompt": "x", "prompt_id": "1", "messages": SAID["a"]}
    assert rendered("", row, 1) == ("used", *PAIR[:2], "")


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_messages_follow_the_tokenizers_chat_template():
    tokenizer = make_tokenizer("bos is eos")
    tokenizer.chat_template = TEMPLATE
    talk = [{"role": "system", "content": "s"}, *SAID["a"]]
    expected = ("used", "</s><|system|>s</s>\n<|user|>x</s>\n<|assistant|>", "a", "")
    assert rendered("", {"messages": talk}, 1, tokenizer) == expected
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )  # a tokenizer that begins with bos itself does not get another one
    assert rendered("", {"messages": talk}, 1, tokenizer)[1] == expected[1].removeprefix("</s>")
    # TRL's ways to write a pair: the prompt in a column of its own, or in front of both answers
    apart = {"prompt": ASKED, "chosen": SAID["a"][1:], "rejected": SAID["b"][1:]}
    within = {"chosen": SAID["a"], "rejected": SAID["b"]}
    assert rendered("", apart, 2, tokenizer) == rendered("", within, 2, tokenizer)
    assert rendered("", {"prompt": ASKED}, 3, tokenizer)[1] == "<|user|>x</s>\n<|assistant|>"
    layout = data.DATASETS["columns messages"]  # a prompt's phase does not depend on the template
    names = [
        render.render({"messages": talk}, "", layout, 1, t)[1]
        for t in (tokenizer, make_tokenizer())
    ]
    assert names[0] == names[1] == f" s{H} x{A}"
    # what is trained on must be what follows the prompt that a rollout gets
    tokenizer.chat_template = TEMPLATE.replace(
        "<|assistant|>{% endif", "<|assistant|><think>{% endif"
    )
    with pytest.raises(InputError, match="here: the chat template words a prompt otherwise once"):
        rendered("", {"messages": talk}, 1, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match="here: the chat template refuses it: roles must alt"):
        rendered("", {"messages": talk}, 1, tokenizer)
    with pytest.raises(InputError, match="here: a message needs texts role and content"):
        rendered("", {"messages": [{"from": "human", "value": "x"}]}, 1)


# texts become ids


def test_the_response_ends_with_eos_and_stands_apart_from_the_prompt():
    [row] = rows_of(make_tokenizer(), [("w0 w1", " w2 w3", " w4")])
    assert row == dict(prompt=[3, 4], chosen=[5, 6, 2], rejected=[7, 2], length=5, cut=False)
    [row] = rows_of(make_tokenizer(), [("w0 w1", " w2 w3")], train_on_prompt=True)
    assert row == dict(prompt=[3], chosen=[4, 5, 6, 2], rejected=[], length=5, cut=False)


def test_truncation_keeps_the_end_of_the_prompt_and_the_eos():
    tokenizer, long = make_tokenizer(), " ".join(f"w{i}" for i in range(20))
    prompts, answers = rows_of(tokenizer, [(long, " w1 w2 w3"), ("w0 w1", long)], 8)
    assert prompts["prompt"] == [19, 20, 21, 22] and prompts["chosen"] == [4, 5, 6, 2]
    assert answers["prompt"] == [3, 4] and answers["chosen"] == [*range(3, 8), 2]
    [both] = rows_of(tokenizer, [(long, long)], 8)  # neither leaves the other less than half
    assert both["prompt"] == [*range(19, 23)] and both["chosen"] == [3, 4, 5, 2]
    assert [(row["length"], row["cut"]) for row in (prompts, answers)] == [(8, True)] * 2


def test_truncation_keeps_the_bos():
    tokenizer = make_tokenizer("bos is eos")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    text = (" ".join(f"w{i}" for i in range(20)), " w1 w2 w3")
    assert rows_of(tokenizer, [text], 8)[0]["prompt"] == [2, 20, 21, 22]
    assert rows_of(tokenizer, [text], 64)[0]["prompt"] == [2, *range(3, 23)]


def test_a_prompt_over_max_prompt_keeps_its_end_and_bos_or_without_responses_is_left_out():
    tokenizer = make_tokenizer("bos is eos")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    long, short = "w5 w6 w7 w8", "w1"
    pair = (" w1 w2 w3", " w4")
    cut, whole = rows_of(tokenizer, [(long, *pair), (short, *pair)], 64, max_prompt=3)
    assert (
        cut["prompt"] == [2, 10, 11] and cut["chosen"] == [4, 5, 6, 2] and cut["rejected"] == [7, 2]
    )
    assert (cut["length"], cut["cut"]) == (7, True)
    assert whole["prompt"] == [2, 4] and not whole["cut"]
    [one] = rows_of(tokenizer, [(long, *pair)], 64, max_prompt=1)
    assert one["prompt"] == [11]  # no room for bos too
    [room] = rows_of(tokenizer, [(long, " w1" * 9, " w2")], 8, max_prompt=3)
    assert (room["prompt"], len(room["chosen"])) == ([2, 10, 11], 5)  # what it leaves is theirs
    [plain] = rows_of(make_tokenizer(), [(long, *pair)], 64, max_prompt=3)
    assert plain["prompt"] == [9, 10, 11]
    [kept] = rows_of(tokenizer, [(long, ""), (short, "")], 64, max_prompt=3)
    assert kept["prompt"] == [2, 4] and not kept["chosen"]


def test_a_tokenizer_that_invents_a_leading_space_does_not_invent_one_in_the_response():
    if not (folder := SHARED / "stories260K").is_dir():
        pytest.skip("the real tokenizer is not here")
    tokenizer = models.load_tokenizer(str(folder))
    [row] = rows_of(tokenizer, [("Human: hi Assistant:", " you too")])
    whole = tokenizer("Human: hi Assistant: you too")["input_ids"]
    assert row["prompt"] + row["chosen"] == whole + [tokenizer.eos_token_id]


@pytest.mark.parametrize("specials", ["own pad", "bos is eos"])
def test_an_end_of_conversation_token_is_the_eos_of_all_steps(model_folder, tmp_path, specials):
    folder = model_folder("opt", specials)

    def args(token, add=False):
        return argparse.Namespace(end_of_conversation_token=token, add_eot_token=add)

    with pytest.raises(
        InputError, match="--end_of_conversation_token <end>: .* needs --add_eot_token"
    ):
        models.load_tokenizer(folder, args("<end>"))
    with pytest.raises(InputError, match="--add_eot_token adds the --end_of_conversation_token"):
        models.load_tokenizer(folder, args(None, add=True))
    tokenizer = models.load_tokenizer(folder, args("<end>", add=True))
    policy = models.load_policy(folder, tokenizer)
    assert policy.get_input_embeddings().weight.shape[0] == len(tokenizer) == 34
    assert rows_of(tokenizer, [("w0", " w1")])[0]["chosen"] == [4, 33]
    models.save_model(policy, tokenizer, str(tmp_path / "next"))
    again = models.load_tokenizer(str(tmp_path / "next"))
    assert again.eos_token == "<end>" and again.bos_token == tokenizer.bos_token
    models.check_same_vocabulary(folder, tokenizer, str(tmp_path / "next"))
    other = models.load_tokenizer(str(tmp_path / "next"), args("w5"))  # it may be any token
    with pytest.raises(InputError, match="responses end with w5 for .*, <end> for"):
        models.check_same_vocabulary("here", other, str(tmp_path / "next"))


# reading, splitting, caching


def prompts_of(rows):
    return {tuple(ids) for ids in rows["prompt"]}


def test_phases_are_disjoint_cover_everything_and_keep_a_prompts_rows_together(tmp_path):
    rows = [{**row, "chosen": f" w{i}"} for row in pairs(200) for i in (3, 4)]
    args = arguments(tmp_path, write_jsonl(tmp_path / "pairs.jsonl", rows))
    loaded = [data.load(args, make_tokenizer(), phase) for phase in (1, 2, 3)]
    parts = [prompts_of(train) for train, _ in loaded]
    held_out = [prompts_of(rows) for _, rows in loaded]
    assert [len(part) for part in parts] == [36, 72, 72] and len(held_out[0]) == 20
    assert len(parts[0] | parts[1] | parts[2] | held_out[0]) == 200
    assert held_out[0] == held_out[1] == held_out[2]
    # a pair is two rows of step 2; step 3 needs a prompt once
    assert [len(train) for train, _ in loaded] == [72, 144, 72]
    write_jsonl(tmp_path / "pairs.jsonl", rows[::-1])  # another order: the same cut
    assert prompts_of(data.load(args, make_tokenizer(), 2)[0]) == parts[1]
    args.seed = 1
    assert prompts_of(data.load(args, make_tokenizer(), 2)[0]) != parts[1]
    args.dedup_prompts = False  # rows are cut, whatever their prompts
    loaded = [data.load(args, make_tokenizer(), phase) for phase in (1, 2, 3)]
    assert [len(train) for train, _ in loaded] == [72, 144, 144]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path, otherwise in (("pairs.jsonl", "./pairs.jsonl"), ("saved", "saved/")):
        found = []
        for name in (path, otherwise):  # spelt otherwise, the cut is the same
            args.data_path = [f"{tmp_path}/{name}"]
            found.append([{*part["twin"]} for part in data.load(args, make_tokenizer(), 2)])
        assert found[0] == found[1]
    assert prompts_of(loaded[0][0]) & prompts_of(loaded[1][0])


def test_no_prompt_is_both_trained_on_and_held_out_whichever_data_set_it_comes_from(
    tmp_path, capsys
):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, train, test in ((one, pairs(60), pairs(90)[80:]), (two, pairs(90)[50:], pairs(5))):
        folder.mkdir()
        write_jsonl(folder / "train.jsonl", train + train[:3])
        write_jsonl(folder / "test.jsonl", test)
    args = arguments(tmp_path, one, two, data_split="0,1,0")
    train, held_out = data.load(args, make_tokenizer(), 2)
    assert not prompts_of(train) & prompts_of(held_out)
    # 3 twice in each, 10 in both; and 15 of the others
    assert "31 rows left out: repeated, or to train on a held-out prompt" in capsys.readouterr().out
    assert len(held_out) == 15 and len(train) == 90 - 15
    args.dedup_prompts = False
    assert len(data.load(args, make_tokenizer(), 2)[0]) == 106


def test_instructions_are_used_whole_in_step_1(tmp_path):
    rows = [{"prompt": f"w{i} w{i}", "response": " w1"} for i in range(20)]
    single, double = (
        write_jsonl(tmp_path / name, r) for name, r in (("a.jsonl", rows), ("b.jsonl", pairs(100)))
    )
    args = arguments(tmp_path, double, sft_only_data_path=[single])
    train, held_out = data.load(args, make_tokenizer(), 1)
    assert len(train) == 18 + 18 and len(held_out) == 2 + 10


def save_everywhere(tmp_path, train, test):
    """The same rows in every form that --data_path takes."""
    lines, array = "".join(json.dumps(row) + "\n" for row in train), json.dumps(train, indent=1)
    for folder, suffix, text in [
        ("jsonl", "jsonl", lines),
        ("json", "json", array),
        ("lines", "json", lines),
        ("shards", "jsonl", lines),
    ]:
        for packed, opener in (("", open), (".gz", gzip.open)):
            (tmp_path / (folder + packed)).mkdir()
            name = "train-00000-of-00001" if folder == "shards" else "train"
            with opener(tmp_path / (folder + packed) / f"{name}.{suffix}{packed}", "wt") as file:
                file.write(text)
            write_jsonl(tmp_path / (folder + packed) / "test.jsonl", test)
    (tmp_path / "parquet").mkdir()
    Dataset.from_list(train).to_parquet(tmp_path / "parquet" / "train.parquet")
    Dataset.from_list(test).to_parquet(tmp_path / "parquet" / "validation.parquet")
    saved = DatasetDict(train_prefs=Dataset.from_list(train), test_prefs=Dataset.from_list(test))
    saved.save_to_disk(tmp_path / "saved")
    return sorted(path for path in tmp_path.iterdir() if path.is_dir())


def test_every_form_of_a_data_set_gives_the_same_rows(tmp_path):
    train, test = pairs(40), pairs(50)[40:]
    forms = save_everywhere(tmp_path, train, test)
    assert len(forms) == 10
    for form in forms:
        read = [[row for row, _ in stream] for stream in render.read(str(form), 1234)]
        assert read == [train, test], form
    Dataset.from_list(train).save_to_disk(tmp_path / "plain")
    read = [[row for row, _ in stream] for stream in render.read(str(tmp_path / "plain"), 1234)]
    assert read == [train, []]


def test_shards_a_byte_order_mark_and_a_broken_link(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", pairs(3))
    (tmp_path / "train2.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(pairs(5)[3:]).encode())
    (tmp_path / "notes").symlink_to(tmp_path / "nowhere")
    (tmp_path / "training_notes.txt").write_text("no row")
    assert [row for row, _ in render.read(str(tmp_path), 1)[0]] == pairs(5)
    args = arguments(tmp_path, tmp_path, data_split="0,1,0", data_output_path=str(tmp_path / "c"))
    assert len(data.load(args, make_tokenizer(), 2)[0]) == 4


def test_years_are_no_citations():
    row = {**SCHEMAS["openai/webgpt_comparisons"][0], "answer_1": "a (1939) [3, 12]."}
    assert rendered("", row, 2)[2] == " a (1939)."


def test_rows_without_tokens_are_left_out_and_huge_ones_not_stored(tmp_path):
    letters = Tokenizer(tokenizer_models.BPE({"w": 0, "1": 1, " ": 2, "</s>": 3}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="</s>")
    assert len(rows_of(tokenizer, [("日本", " w1"), ("w1", " w1")])) == 1
    huge = {"prompt": "w1 " * 400_000, "chosen": " w1", "rejected": " w2"}
    assert rendered("", huge, 2) == ("over a million characters", "", "", "")


def test_copies_of_a_held_out_row_count_once(tmp_path):
    rows = [row for row in pairs(100) for _ in range(5)]
    args = arguments(tmp_path, write_jsonl(tmp_path / "p.jsonl", rows), data_split="0,1,0")
    assert [len(rows) for rows in data.load(args, make_tokenizer(), 2)] == [90, 10]


def test_pairs_that_are_alike_once_cut_are_left_out():
    same = " w1" * 9
    texts = [("w3", same + " w1", same + " w2"), ("w3", " w1", " w2")]
    rows = rows_of(make_tokenizer(), texts, 8)
    assert len(rows) == 1 and len(rows_of(make_tokenizer(), texts, 16)) == 2
    assert len(rows_of(make_tokenizer(), [("w3", same)], 8)) == 1


@pytest.mark.parametrize("split", ["2,4,4", "5,5,0"])
def test_by_default_no_step_trains_on_what_the_evaluation_holds_out(tmp_path, monkeypatch, split):
    path = write_jsonl(tmp_path / "p.jsonl", pairs(400))
    monkeypatch.setattr(sys, "argv", ["x", f"--data_path={path}", f"--data_split={split}"])
    tokenizer, prompts = make_tokenizer(), {}
    steps = [(evaluate, 1), (train_sft, 1), (train_rm, 2), (train_dpo, 2), (train_ppo, 3)]
    for module, phase in steps if split == "2,4,4" else steps[:4]:
        args = module.parse()
        args.data_output_path, args.max_seq_len = str(tmp_path / "cache"), 32
        prompts[module] = [
            {tuple(prompt) for prompt in part["prompt"]}
            for part in data.load(args, tokenizer, phase)
        ]
    _, held_out = prompts.pop(evaluate)
    assert len(held_out) == 40
    for trained, own in prompts.values():
        assert own == held_out and not trained & held_out
    assert prompts[train_rm] == prompts[train_dpo]


def test_evaluation_takes_its_share_of_every_data_set(tmp_path):
    (tmp_path / "a").mkdir()
    write_jsonl(tmp_path / "a" / "train.jsonl", pairs(50))
    write_jsonl(tmp_path / "a" / "test.jsonl", pairs(150)[50:])
    other = [{"prompt": f"w1 w2 w{i % 30} w{i // 30}", "response": " w5"} for i in range(800)]
    b = write_jsonl(tmp_path / "b.jsonl", other)
    args = arguments(tmp_path, tmp_path / "a", b, max_eval_rows=60, eval_fraction=0.25)
    _, held_out = data.load(args, make_tokenizer(), 1)
    share = sum(row["prompt"][:2] == [4, 5] for row in held_out)  # 200 of 300
    assert len(held_out) == 60 and 30 < share < 50


def test_whatever_determines_the_rows_names_the_cache(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", pairs(60))
    known = make_tokenizer()
    other = make_tokenizer("bos is eos")
    other.chat_template = TEMPLATE

    def folders(tokenizer=known, phase=1, max_prompt=None, **changes):
        data.load(arguments(tmp_path, path, **changes), tokenizer, phase, max_prompt)
        return len(list((tmp_path / "cache").iterdir()))

    steps = [folders(), folders(), folders(max_eval_rows=3, preprocessing_num_workers=2)]
    assert steps == [1, 1, 1]
    steps = [folders(max_seq_len=8), folders(eval_fraction=0.5), folders(seed=2), folders(phase=2)]
    steps += [folders(data_split="1,1,1"), folders(dedup_prompts=False), folders(other)]
    steps += [folders(phase=3), folders(phase=3, max_prompt=9), folders(train_on_prompt=True)]
    os.utime(path, (1, 1))
    assert [*steps, folders()] == [*range(2, 13)]


def test_deepspeed_chats_local_file(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.json", pairs(40))
    write_jsonl(tmp_path / "data" / "eval.json", pairs(50)[40:])
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path, "local/jsonfile", data_split="0,1,0")
    assert [len(rows) for rows in data.load(args, make_tokenizer(), 2)] == [40, 10]
    write_jsonl(tmp_path / "data" / "train.json", pairs(30))
    assert len(data.load(args, make_tokenizer(), 2)[0]) == 30


def test_a_hub_id_that_needs_a_script_says_how_to_convert_it(tmp_path, monkeypatch):
    def load_dataset(path, *configuration):
        assert (path, configuration) in [("mkqa", ()), ("some/set", ("main",))]
        raise RuntimeError(f"Dataset scripts are no longer supported, but found {path}.py")

    monkeypatch.setattr(render, "load_dataset", load_dataset)
    for name in ("mkqa-Chinese", "some/set:main"):
        with pytest.raises(InputError, match="load it with datasets<4, save_to_disk"):
            data.load(arguments(tmp_path, name), make_tokenizer(), 1)


def test_loading_reports_drops_caches_and_follows_changed_files(tmp_path, capsys):
    rows = pairs(100)
    rows[0]["chosen"], rows[1]["chosen"], rows[2]["prompt"] = " ", rows[1]["rejected"], ""
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    tokenizer, args = make_tokenizer(), arguments(tmp_path, path, data_split="0,1,0")
    train, held_out = data.load(args, tokenizer, 2)
    said = capsys.readouterr().out
    assert len(train) + len(held_out) == 97 and "1 no prompt" in said
    assert "1 no response" in said and "1 identical pair" in said
    cache = sorted(p.name for p in (tmp_path / "cache").iterdir())
    data.load(args, tokenizer, 2)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == cache
    assert capsys.readouterr().out == said
    write_jsonl(tmp_path / "pairs.jsonl", pairs(150))
    assert len(data.load(args, tokenizer, 2)[0]) > len(train)


def test_step_3_drops_long_prompts_and_says_how_many(tmp_path, capsys):
    rows = pairs(100) + [{"prompt": f"w{i} " + "w1 " * 50} for i in range(10)]
    args = arguments(tmp_path, write_jsonl(tmp_path / "p.jsonl", rows), data_split="0,0,1")
    train, held_out = data.load(args, make_tokenizer(), 3, max_prompt=10)
    assert len(train) + len(held_out) == 100
    assert "or alike once cut)" in capsys.readouterr().out


def test_processes_that_tokenise_give_what_one_gives(tmp_path):
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": f"{i} w1", "response": " w2"} for i in range(13000)]
    )
    one, three = (
        data.load(
            arguments(
                tmp_path / str(n),
                path,
                preprocessing_num_workers=n,
                data_split="1,0,0",
                max_eval_rows=1300,
            ),
            make_tokenizer(),
            1,
        )
        for n in (1, 3)
    )
    assert [rows.to_list() for rows in one] == [rows.to_list() for rows in three]
    assert [len(rows) for rows in one] == [11700, 1300]


def _load_in_a_process(args, results):
    results.put([rows.to_list() for rows in data.load(args, make_tokenizer(), 2)])


def test_concurrent_runs_build_one_cache_and_read_whole_rows(tmp_path):
    args = arguments(tmp_path, write_jsonl(tmp_path / "pairs.jsonl", pairs(900)))
    context = multiprocessing.get_context("forkserver")  # this process has threads by now
    context.set_forkserver_preload([__name__])
    results = context.Queue()
    runs = [context.Process(target=_load_in_a_process, args=(args, results)) for _ in range(4)]
    for run in runs:
        run.start()
    first, *others = [results.get(timeout=240) for _ in runs]
    assert all(rows == first for rows in others)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # and nothing half-written is left


def test_a_build_that_is_killed_leaves_nothing_that_is_read(tmp_path):
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": f"{i} w1", "response": " w2"} for i in range(20000)]
    )
    flags = ["--data_path", path, "--data_output_path", str(tmp_path / "cache"), "--phase", "1"]
    command = [sys.executable, "-m", "rlhf.data", *flags, "--data_split", "1,0,0"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    while not list(tmp_path.glob("cache/*/*/*/*/*/*.arrow")):  # it has begun to write
        time.sleep(0.005)
        assert run.poll() is None
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not list(tmp_path.glob("cache/*/report.txt"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "train rows: 18000 of 18000 used" in done.stdout, done.stderr


# bad input

GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
BROKEN = {
    "absent.jsonl": (None, "there is no such file or folder"),
    "empty.jsonl": (b"", "it has no rows"),
    "empty.json": (b"[]", "it has no rows"),
    "blank.jsonl": (b"\n\n", "it has no rows"),
    "name.csv": (GOOD, "its name ends in none of .jsonl"),
    "text.jsonl": (GOOD + b"hello\n", "text.jsonl, line 2: cannot be read"),
    "half.jsonl": (GOOD + GOOD[:20], "half.jsonl, line 2: cannot be read"),
    "number.jsonl": (GOOD + b"3\n", "line 2: not a JSON object"),
    "null.json": (b"[" + GOOD + b", null]", "null.json, row 2: not a JSON object"),
    "column.jsonl": (b'{"prompt": "a", "chosen": "b"}\n', "line 1: step 2 needs pairs"),
    "mixed.jsonl": (GOOD + b'{"prompt": "a", "text": "b"}\n', "mixed.jsonl, line 2: step 2 needs"),
    "other.jsonl": (GOOD + b'{"source": "a"}\n', "other.jsonl, line 2: no layout fits columns"),
    "type.jsonl": (
        GOOD + b'{"prompt": "a", "chosen": 3, "rejected": "c"}\n',
        "type.jsonl, line 2: column chosen has type int",
    ),
    "list.jsonl": (
        GOOD + b'{"prompt": "a", "chosen": ["b"], "rejected": "c"}\n',
        "list.jsonl, line 2: a message needs",
    ),
    "alike.jsonl": (
        b"".join(b'{"prompt": "%d", "chosen": "c", "rejected": "c"}\n' % i for i in range(20)),
        "train rows: 0 of 7 used (7 identical pair)",
    ),
    "nulls.jsonl": (
        b'{"prompt": null, "chosen": null, "rejected": null}\n' * 20,
        "train rows: 0 of 20 used (20 no prompt)",
    ),
    "surrogate.jsonl": (
        b'{"prompt": "a \\ud800 b", "chosen": "b", "rejected": "c"}\n' * 20,
        "surrogate.jsonl, line 1: a text holds half a surrogate pair",
    ),
    "one.jsonl": (GOOD, "train rows: 0 of 0 used"),
    "latin.jsonl": (
        GOOD + b'{"prompt": "\xe9"}\n',
        "latin.jsonl, line 2: cannot be read (as JSON in UTF-8)",
    ),
    "deep.jsonl": (b"[" * 100_000, "cannot be read"),
    "torn.jsonl.gz": (gzip.compress(GOOD * 1000)[:50], "cannot be read"),
    "plain.jsonl.gz": (GOOD, "cannot be read"),
    "torn.parquet": (b"PAR1 and no more", "torn.parquet"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, name):
    content, expected = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        data.load(arguments(tmp_path, tmp_path / name), make_tokenizer(), 2)
    said = str(error.value)
    assert expected in said and name in said and "\n" not in said
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_without_training_rows_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "test.jsonl", pairs(4))
    with pytest.raises(InputError, match="data: no train file or split in it, but .'test.jsonl'"):
        data.load(arguments(tmp_path, tmp_path / "data"), make_tokenizer(), 2)
    DatasetDict(more=Dataset.from_list(pairs(4))).save_to_disk(tmp_path / "saved")
    with pytest.raises(InputError, match="saved: no train file or split in it, but .'more'"):
        data.load(arguments(tmp_path, tmp_path / "saved"), make_tokenizer(), 2)
    (tmp_path / "saved" / "more" / "state.json").write_text("{")
    with pytest.raises(InputError, match="cannot load the data set .*saved"):
        data.load(arguments(tmp_path, tmp_path / "saved"), make_tokenizer(), 2)


def test_a_bad_row_stops_every_step_and_not_only_the_one_it_falls_to(tmp_path):
    rows = [*pairs(60), {"prompt": "w1", "chosen": 3, "rejected": " w2"}, *pairs(60)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    for split in ("1,0,0", "0,1,0", "1,1,1"):
        with pytest.raises(InputError, match="line 61: column chosen has type int"):
            data.load(arguments(tmp_path, path, data_split=split), make_tokenizer(), 2)


def test_a_bad_split(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs(50))
    for split in ("1,2", "a,b,c", "0,0,0", "1,-1,1"):
        with pytest.raises(InputError, match="--data_split"):
            data.load(arguments(tmp_path, path, data_split=split), make_tokenizer(), 2)


def test_an_eos_that_the_tokenizer_adds_is_not_taken_for_one_in_the_text():
    tokenizer = make_tokenizer()
    rows = rows_of(tokenizer, [("w0 </s>", " w1")])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    assert rows == rows_of(tokenizer, [("w0 </s>", " w1")])
    assert rows[0]["prompt"] == [3, 2] and rows[0]["chosen"] == [4, 2]


def test_the_page_of_what_training_would_see(tmp_path):
    rows = [{**row, "prompt": f"w1 w1 {row['prompt']}"} for row in pairs(100)] + pairs(5)
    rows.append({**rows[0], "chosen": " w1" * 40})
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--data_path", path, "--phase", "2", "--data_split", "0,1,0", "--max_seq_len", "16"]
    flags += ["--tokenizer", str(tmp_path / "tokenizer"), "--data_output_path", str(tmp_path)]
    command = [sys.executable, "-m", "rlhf.data", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{path}, step 2, train rows: ") and " used" in lines[0]
    header = lines.index("tokens:") + 1
    table = {line.split()[0]: line.split()[1:] for line in lines[header + 1 : header + 11]}
    assert lines[header].split() == ["prompt", "chosen", "rejected"]
    assert all(table[name][2] == "2.0" for name in ("mean", "min", "50%", "max"))
    assert table["max"][:2] == ["4.0", "12.0"]
    assert any("trained] >>>w" in line and line.endswith("</s><<<") for line in lines)
    write_jsonl(tmp_path / "train.jsonl", rows)
    write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(InputError, match="no training row is left: hold out others"):
        data.load(arguments(tmp_path, tmp_path, data_split="0,1,0"), make_tokenizer(), 2)


# the real rows


def test_the_real_pairs_are_the_same_in_both_layouts(tmp_path):
    folders = [SHARED / "rm-static", SHARED / "hh-rlhf"]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("the real data is not here")
    both = []
    for folder in folders:
        streams = render.read(str(folder), 1234)
        both.append(
            [rendered("", row, phase) for rows in streams for row, _ in rows for phase in (2,)]
        )
    assert len(both[0]) == 5490 and both[0] == both[1]
    assert {reason for reason, *_ in both[0]} == {"used"}


@pytest.mark.parametrize(
    "name,rows",
    [("sharegpt_vicuna", 3299), ("instructions.jsonl.gz", 9680), ("prompts.jsonl.gz", 10017)],
)
def test_the_other_real_rows(name, rows):
    if not (SHARED / name).exists():
        pytest.skip("the real data is not here")
    phase = 3 if name.startswith("prompts") else 1
    made = [rendered("", row, phase) for row, _ in render.read(str(SHARED / name), 1234)[0]]
    assert len(made) == rows and sum(reason == "used" for reason, *_ in made) > 0.99 * rows
    assert name != "sharegpt_vicuna" or all("USER:" not in prompt for _, prompt, *_ in made)


def test_a_thousand_rows_in_a_row_that_are_dropped_are_counted(tmp_path):
    """A batch of the tokenising map in which no row is left."""
    long = [{"prompt": f"w{i % 30} " * 30, "response": " w1"} for i in range(1500)]
    short = [{"prompt": f"w{i % 30} w{i // 30}", "response": " w1"} for i in range(600)]
    path = write_jsonl(tmp_path / "rows.jsonl", long + short)
    args = arguments(tmp_path, path, data_split="0,0,1", dedup_prompts=False)
    train, _ = data.load(args, make_tokenizer(), 3, max_prompt=8)
    assert 400 < len(train) < 600 and max(train["length"]) <= 8
