"""Rows become the right tokens, phases never share a row, and bad input is named."""

import argparse
import gzip
import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rlhf import data, engine, models
from rlhf.args import InputError
from tests.conftest import SHARED, make_tokenizer, write_jsonl


SPLITS = ["train", "held_out"]


def arguments(tmp_path, *paths, **changes):
    return argparse.Namespace(
        **{
            **dict(
                data_path=[str(p) for p in paths],
                data_split="2,4,4",
                seed=1234,
                eval_fraction=0.1,
                max_eval_rows=100,
                data_output_path=str(tmp_path / "cache"),
                max_seq_len=32,
            ),
            **changes,
        }
    )


def pairs(n):
    return [
        {"prompt": f"w{i % 30} w{i // 30 % 30}", "chosen": f" w{i % 7} w1", "rejected": " w2"}
        for i in range(n)
    ]


def test_the_response_ends_with_eos_and_stands_apart_from_the_prompt():
    tokenizer = make_tokenizer()
    row = data.tokenise(
        {"prompt": "w0 w1", "chosen": " w2 w3", "rejected": " w4"}, tokenizer, 32, None
    )
    assert row == {"prompt": [3, 4], "chosen": [5, 6, 2], "rejected": [7, 2]}


def test_truncation_keeps_the_end_of_the_prompt_and_the_eos():
    tokenizer = make_tokenizer()
    row = {"prompt": " ".join(f"w{i}" for i in range(20)), "chosen": " w1 w2 w3", "rejected": None}
    assert data.tokenise(row, tokenizer, 8, None) == {
        "prompt": [19, 20, 21, 22],
        "chosen": [4, 5, 6, 2],
        "rejected": [],
    }
    row = {"prompt": "w0 w1", "chosen": " ".join(f"w{i}" for i in range(20)), "rejected": None}
    cut = data.tokenise(row, tokenizer, 8, None)
    assert (
        len(cut["prompt"]) + len(cut["chosen"]) == 8
        and cut["chosen"][-1] == tokenizer.eos_token_id
        and cut["prompt"]
    )


def test_truncation_keeps_the_bos():
    tokenizer = make_tokenizer("bos is eos")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    row = {"prompt": " ".join(f"w{i}" for i in range(20)), "chosen": " w1 w2 w3", "rejected": None}
    assert data.tokenise(row, tokenizer, 8, None)["prompt"] == [2, 20, 21, 22]
    assert data.tokenise(row, tokenizer, 64, None)["prompt"] == [2, *range(3, 23)]


def test_a_tokenizer_that_invents_a_leading_space_does_not_invent_one_in_the_response():
    folder = SHARED / "stories260K"
    if not folder.is_dir():
        pytest.skip("the real tokenizer is not here")
    tokenizer = models.load_tokenizer(str(folder))
    row = data.tokenise(
        {"prompt": "Human: hi Assistant:", "chosen": " you too", "rejected": None},
        tokenizer,
        64,
        None,
    )
    whole = tokenizer("Human: hi Assistant: you too")["input_ids"]
    assert row["prompt"] + row["chosen"] == whole + [tokenizer.eos_token_id]


def test_phases_are_disjoint_cover_everything_and_do_not_depend_on_the_phase(tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs(200))
    rows, _ = data.read(path, arguments(tmp_path))
    parts = [
        [json.dumps(row) for row in data.phase_rows(rows, phase, arguments(tmp_path))]
        for phase in (1, 2, 3)
    ]
    assert [len(part) for part in parts] == [36, 72, 72]
    assert len({row for part in parts for row in part}) == 180
    assert parts[1] == [json.dumps(row) for row in data.phase_rows(rows, 2, arguments(tmp_path))]


def test_held_out_rows_come_from_the_test_files_or_a_seeded_cut(tmp_path):
    args = arguments(tmp_path)
    rows, held_out = data.read(write_jsonl(tmp_path / "all.jsonl", pairs(200)), args)
    assert len(held_out) == 20 and not {json.dumps(r) for r in rows} & {
        json.dumps(r) for r in held_out
    }
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", pairs(10))
    with gzip.open(folder / "test.jsonl.gz", "wt") as file:
        file.write(json.dumps(pairs(1)[0]) + "\n")
    rows, held_out = data.read(str(folder), args)
    assert (len(rows), len(held_out)) == (10, 1)


def test_loading_reports_drops_caches_and_follows_changed_files(tmp_path, capsys):
    rows = pairs(100)
    rows[0]["chosen"], rows[1]["chosen"], rows[2]["prompt"] = " ", rows[1]["rejected"], ""
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    tokenizer, args = make_tokenizer(), arguments(tmp_path, path, data_split="0,1,0")
    train, held_out = data.load(args, tokenizer, 2, SPLITS)
    assert len(train) + len(held_out) == 97 and "empty or alike" in capsys.readouterr().out
    cache = sorted(p.name for p in (tmp_path / "cache").iterdir())
    data.load(args, tokenizer, 2, SPLITS)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == cache
    write_jsonl(tmp_path / "pairs.jsonl", pairs(150))
    assert len(data.load(args, tokenizer, 2, SPLITS)[0]) > len(train)


def test_step_3_drops_long_prompts_and_says_how_many(tmp_path, capsys):
    rows = pairs(100) + [{"prompt": "w1 " * 50}] * 10
    args = arguments(tmp_path, write_jsonl(tmp_path / "p.jsonl", rows), data_split="0,0,1")
    train, held_out = data.load(args, make_tokenizer(), 3, SPLITS, max_prompt=10)
    assert (
        len(train) + len(held_out) == 100
        and "90 of 99 used (0 empty or alike, 9 too long)" in capsys.readouterr().out
    )


def test_every_cut_of_a_step_covers_the_same_rows(monkeypatch):
    def steps(world, batch, accumulation):
        seen = {}
        for rank in range(world):
            monkeypatch.setattr(engine, "rank", lambda: rank)
            monkeypatch.setattr(engine, "world_size", lambda: world)
            for step, micro_batches in data.optimizer_steps(
                range(50), list, batch, accumulation, 7, 14
            ):
                assert [len(micro) for micro in micro_batches] == [batch] * accumulation
                seen.setdefault(step, []).extend(row for micro in micro_batches for row in micro)
        return {step: sorted(rows) for step, rows in seen.items()}

    whole = steps(1, 8, 1)
    assert steps(2, 4, 1) == steps(2, 2, 2) == steps(1, 1, 8) == whole and len(whole) == 14
    first, second = (
        [row for step in part for row in whole[step]] for part in (range(1, 7), range(7, 13))
    )
    assert (
        len(set(first)) == len(set(second)) == 48 and first != second
    )  # each epoch its own order, no repeats


@pytest.mark.parametrize("total,world", [(10, 1), (10, 3), (2, 4)])
def test_evaluation_covers_every_row_once_on_any_number_of_ranks(monkeypatch, total, world):
    parts = []
    for rank in range(world):
        monkeypatch.setattr(engine, "rank", lambda: rank)
        monkeypatch.setattr(engine, "world_size", lambda: world)
        parts.append(
            torch.tensor(
                [row for batch in data.eval_batches(range(total), list, 2) for row in batch]
            )
        )
    monkeypatch.setattr(engine, "gather", lambda values: torch.stack(parts))
    assert engine.gather_rows(parts[0], total).tolist() == list(range(total))


def test_stack_pads_prompts_left_and_responses_right():
    tokenizer = make_tokenizer()
    one, two = (
        data.collate(tokenizer, [row])
        for row in ({"prompt": [5], "chosen": [6, 2]}, {"prompt": [7, 8], "chosen": [2]})
    )
    both = models.stack([{**one, "score": torch.ones(1)}, {**two, "score": torch.zeros(1)}], 1)
    assert both["prompt_ids"].tolist() == [[1, 5], [7, 8]] and both["prompt_mask"].tolist() == [
        [False, True],
        [True, True],
    ]
    assert both["response_ids"].tolist() == [[6, 2], [2, 1]] and both["mask"].tolist() == [
        [True, True],
        [True, False],
    ]
    assert both["score"].tolist() == [1, 0]


BROKEN = {
    "absent.jsonl": (None, "there is no such file or folder"),
    "empty.jsonl": (b"", "it has no rows"),
    "blank.jsonl": (b"\n\n", "it has no rows"),
    "text.jsonl": (b"hello\n", "text.jsonl, line 1: not JSON"),
    "number.jsonl": (
        b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n3\n',
        "line 2: not a JSON object",
    ),
    "column.jsonl": (
        b'{"prompt": "a", "chosen": "b"}\n' * 20,
        "column rejected is missing (found: prompt, chosen)",
    ),
    "type.jsonl": (
        b'{"prompt": "a", "chosen": 3, "rejected": "c"}\n' * 20,
        "column chosen has type int",
    ),
    "alike.jsonl": (
        b'{"prompt": "a", "chosen": "c", "rejected": "c"}\n' * 20,
        "train rows: 0 of 7 used (7 empty or alike",
    ),
    "surrogate.jsonl": (
        b'{"prompt": "a \\ud800 b", "chosen": "b", "rejected": "c"}\n' * 20,
        "surrogate.jsonl, line 1: column prompt holds half a surrogate pair",
    ),
    "one.jsonl": (b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "train rows: 0 of 0 used"),
    "latin.jsonl": (b'{"prompt": "\xe9"}\n', "cannot be read"),
    "torn.jsonl.gz": (gzip.compress(b'{"prompt": "a"}\n' * 1000)[:40], "cannot be read"),
    "plain.jsonl.gz": (b'{"prompt": "a"}\n', "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_in_one_sentence(tmp_path, name):
    content, expected = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        data.load(arguments(tmp_path, tmp_path / name), make_tokenizer(), 2, SPLITS)
    assert (
        expected in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    )
    assert not [p for p in tmp_path.rglob("report.txt")]


def test_a_bad_row_stops_every_step_and_not_only_the_one_it_falls_to(tmp_path):
    rows = [*pairs(60), {"prompt": "w1", "chosen": None, "rejected": " w2"}, *pairs(60)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    for split in ("1,0,0", "0,1,0", "1,1,1"):
        with pytest.raises(InputError, match="line 61: column chosen has type NoneType"):
            data.load(arguments(tmp_path, path, data_split=split), make_tokenizer(), 2, SPLITS)


def test_too_few_rows_for_a_step_and_a_bad_split(tmp_path):
    with pytest.raises(InputError, match="5 training rows do not fill one step of 8"):
        data.steps_per_epoch(range(5), 4, 2, "--per_device_train_batch_size")
    path = write_jsonl(tmp_path / "pairs.jsonl", pairs(50))
    for split in ("1,2", "a,b,c", "0,0,0", "1,-1,1"):
        with pytest.raises(InputError, match="--data_split"):
            data.load(arguments(tmp_path, path, data_split=split), make_tokenizer(), 2, SPLITS)


def test_the_real_preference_pairs():
    folder = SHARED / "rm-static"
    if not folder.is_dir():
        pytest.skip("the real data is not here")
    rows, held_out = data.read(str(folder), argparse.Namespace(seed=1234, eval_fraction=0.1))
    assert (len(rows), len(held_out)) == (4960, 530)
    assert all(data.render(row, phase) for row in rows[:200] for phase in (1, 3))
