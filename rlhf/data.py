"""Data sets: rows of a prompt and one or two responses -> three disjoint phases -> ids -> batches.

A row is read by convention: `prompt` with `chosen` and `rejected` (pairs) or with `response`
(instructions; step 1 prefers it where a pair has one).  Tokenised rows are an Arrow file, built by
rank 0 and memory-mapped by all, in a folder named by the SHA-256 of all that determines it."""
import gzip
import hashlib
import inspect
import json
import os
import random
import re
import shutil
import sys

import torch
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk

from rlhf import engine, toy
from rlhf.args import InputError, check_writable, split_shares
from rlhf.log import say

NEEDS = {1: ("prompt", "response"), 2: ("prompt", "chosen", "rejected"), 3: ("prompt",)}
WHERE = "_where"                              # a row's column that says where it stands
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def load(args, tokenizer, phase, splits, max_prompt=None):
    """One phase's tokenised rows of all --data_path together, of each split: train, held_out.

    -> a Dataset each, with columns prompt, chosen, rejected (lists of ids).  Phases 1 and 2 cut a
    row to --max_seq_len tokens, phase 3 drops prompts of more than max_prompt.  InputError for what
    cannot be read or used."""
    check_writable(args.data_output_path, "--data_output_path")
    sources = [(path, phase) for path in args.data_path]
    sources += [(path, None) for path in getattr(args, "sft_only_data_path", [])]    # whole
    loaded = []
    for split in splits:
        rows = concatenate_datasets([_cached(path, share, phase, split, args, tokenizer, max_prompt)
                                     for path, share in sources])
        if split == "held_out":
            order = range(len(rows))
            if len(sources) > 1:
                order = random.Random(args.seed).sample(order, len(rows))
            rows = rows.select(order[:args.max_eval_rows], keep_in_memory=True)
        loaded.append(rows)
    return loaded


def steps_per_epoch(rows, batch_size, accumulation, flag):
    """Optimizer steps in one pass.  InputError when the rows do not fill a single one."""
    span = batch_size * accumulation * engine.world_size()
    if len(rows) < span:
        raise InputError(f"{len(rows)} training rows do not fill one step of {span} (batch x "
                         f"accumulation x ranks): lower {flag} or add data")
    return len(rows) // span


def optimizer_steps(rows, collate, batch_size, accumulation, seed, total):
    """Yields (step, list of micro-batches) for step 1..total.

    Over the ranks a step covers the same rows however it is cut.  Every epoch has its own order and
    leaves out another tail, that fills no step."""
    world = engine.world_size()
    span, step = batch_size * accumulation * world, 0
    while step < total:
        shuffle = torch.Generator().manual_seed(seed + step // (len(rows) // span))
        order = torch.randperm(len(rows), generator=shuffle).tolist()
        for start in range(0, len(rows) - span + 1, span)[:total - step]:
            mine = order[start + engine.rank():start + span:world]
            step += 1
            yield step, [collate([rows[j] for j in mine[i:i + batch_size]])
                         for i in range(0, len(mine), batch_size)]


def eval_batches(rows, collate, batch_size):
    """This rank's share of the held-out rows, equally many on every rank: the first come round
    again.  engine.gather_rows restores the order and drops the repeats."""
    rank, world = engine.rank(), engine.world_size()
    mine = [i % len(rows) for i in range(rank, -(-len(rows) // world) * world, world)]
    for start in range(0, len(mine), batch_size):
        yield collate([rows[i] for i in mine[start:start + batch_size]])


def collate(tokenizer, rows, responses=("chosen",)):
    """Rows of ids -> a batch (see models.py); of two responses: all chosen, then all rejected."""
    prompts = [row["prompt"] for row in rows] * max(1, len(responses))
    batch = dict(zip(("prompt_ids", "prompt_mask"),
                     pad(prompts, tokenizer.pad_token_id, left=True)))
    if responses:
        texts = [row[name] for name in responses for row in rows]
        batch.update(zip(("response_ids", "mask"), pad(texts, tokenizer.pad_token_id)))
    return batch


def pad(sequences, fill, left=False):
    """Lists of ids -> (B, longest) ids and mask, on this rank's device."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), fill)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        span = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, span], mask[row, span] = torch.tensor(sequence, dtype=torch.long), True
    return ids.to(engine.device()), mask.to(engine.device())


def text_stream(args, tokenizer):
    """Endless batches of plain text for the unsupervised loss; None if no data set is named for it.

    Texts are joined, eos after each, and cut into blocks.  A block's first token is its prompt."""
    path, length = args.unsupervised_dataset_name, args.max_prompt_seq_len + args.max_answer_seq_len
    if path is None:
        return None
    if path == "toy":
        texts = toy.texts(args.seed)
    elif os.path.isfile(path):
        try:
            with _open_text(path) as file:
                texts = file.read().split("\n\n")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text: {error}") from error
    else:
        rows = _hub(path, "train", args.unsupervised_dataset_config_name)
        if "text" not in rows.column_names:
            raise InputError(f"{path}: no column text (found: {', '.join(rows.column_names)})")
        texts = rows["text"]
    ids = [i for text in texts for i in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]
    blocks = [ids[i:i + length] for i in range(0, len(ids) - length + 1, length)]
    rows = [{"prompt": block[:1], "chosen": block[1:]} for block in blocks]
    cut = (args.per_device_training_batch_size, 1)
    if len(rows) < cut[0] * engine.world_size():
        raise InputError(f"--unsupervised_dataset_name {path}: {len(ids)} tokens fill {len(rows)} "
                         f"blocks of {length}, fewer than one batch on every rank")
    steps = optimizer_steps(rows, lambda rows: collate(tokenizer, rows), *cut, args.seed, 1 << 62)
    return (micro_batch for _, [micro_batch] in steps)


def read(path, args):
    """A data set's raw rows -> training rows, held-out rows: sequences of dicts."""
    if path == "toy":
        return toy.rows(seed=args.seed)
    if os.path.isdir(path):
        files = [os.path.join(path, n) for n in sorted(os.listdir(path)) if n.endswith(SUFFIXES)]
        starts = lambda *kinds: [f for f in files if os.path.basename(f).startswith(kinds)]
        if not starts("train"):
            raise InputError(f"--data_path {path}: the folder holds no train.jsonl or the like "
                             f"({', '.join(SUFFIXES)})")
        rows, held_out = ([row for file in group for row in _json_rows(file)]
                          for group in (starts("train"), starts("test", "eval", "valid")))
    elif os.path.isfile(path):
        rows, held_out = _json_rows(path), []
    elif path.endswith(SUFFIXES) or path.startswith((".", "/")) or path.count("/") != 1:
        raise InputError(f"--data_path {path}: there is no such file or folder")
    else:
        splits = _hub(path)
        rows, held_out = splits["train"], splits.get("test", splits.get("validation", []))
    if len(rows) == 0:
        raise InputError(f"--data_path {path}: it has no rows")
    if len(held_out) == 0:
        order = random.Random(args.seed).sample(range(len(rows)), len(rows))
        cut = max(1, round(len(rows) * args.eval_fraction))
        rows, held_out = [rows[i] for i in order[cut:]], [rows[i] for i in order[:cut]]
    return rows, held_out


def phase_rows(rows, phase, args):
    """The phase's share of the rows, cut from one seeded order that is the same for every phase."""
    shares = split_shares(args.data_split)
    start, end = (round(sum(shares[:n]) * len(rows)) for n in (phase - 1, phase))
    order = random.Random(args.seed).sample(range(len(rows)), len(rows))
    return [rows[i] for i in order[start:end]]


def render(row, phase):
    """A raw row -> dict of prompt, chosen, rejected: text, or None where the phase needs none; None
    altogether if the row cannot serve.  InputError that names a missing or mistyped column."""
    where = row.get(WHERE, "a row")
    if phase == 1 and "response" not in row and "chosen" in row:
        row = {**row, "response": row["chosen"]}
    for name in NEEDS[phase]:
        if name not in row:
            raise InputError(f"{where}: column {name} is missing (found: "
                             f"{', '.join(n for n in row if n != WHERE)}); step "
                             f"{phase} needs {', '.join(NEEDS[phase])}")
        if not isinstance(row[name], str):
            kind = type(row[name]).__name__
            raise InputError(f"{where}: column {name} has type {kind}, but must be text")
        if not row[name].isascii() and re.search("[\ud800-\udfff]", row[name]):
            raise InputError(f"{where}: column {name} holds half a surrogate pair: repair it")
    values = [row[name] for name in NEEDS[phase]]
    if not all(value.strip() for value in values) or (phase == 2 and values[1] == values[2]):
        return None
    return dict(zip(("prompt", "chosen", "rejected"), values + [None, None]))


def tokenise(row, tokenizer, max_seq_len, max_prompt):
    """Text -> ids.  A response is tokenised behind its prompt, so that no tokenizer invents a space
    between the two, and ends with eos, also when cut.  None if the prompt exceeds max_prompt."""
    eos = tokenizer.eos_token_id
    def ids_of(text, **kwargs):
        ids = tokenizer(text, **kwargs)["input_ids"]
        return ids[:-1] if ids and ids[-1] == eos and len(ids) > 1 else ids     # some add it
    prompt, responses = ids_of(row["prompt"]), {"chosen": [], "rejected": []}
    if max_prompt is not None and len(prompt) > max_prompt:
        return None
    for name in responses:
        if row[name] is not None:
            both = ids_of(row["prompt"] + row[name])
            apart = both[:len(prompt)] == prompt        # not where a token spans the border
            response = both[len(prompt):] if apart else ids_of(row[name], add_special_tokens=False)
            responses[name] = response[:max_seq_len - 2] + [eos]
    room = max_seq_len - max(map(len, responses.values()))
    if len(prompt) > room > 1 and prompt[0] == tokenizer.bos_token_id:
        prompt = prompt[:1] + prompt[1 - room:]
    return {"prompt": prompt[-room:], **responses}


def _cached(path, share, phase, split, args, tokenizer, max_prompt):
    """One split of one data set, from the cache or built.  Every node builds its own."""
    max_seq_len = getattr(args, "max_seq_len", 1 << 30)
    files = sorted(e.path for e in os.scandir(path)) if os.path.isdir(path) else [path]
    stats = [(os.path.abspath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns)
             for f in files if os.path.exists(f)]
    fast = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    identity = [path, stats, share, phase, split, args.data_split, args.seed, args.eval_fraction,
                max_seq_len, max_prompt, fast, tokenizer.eos_token,
                inspect.getsource(sys.modules[__name__]), inspect.getsource(toy)]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = os.path.join(args.data_output_path, name)
    here = torch.tensor(float(os.path.isdir(folder)), device=engine.device())
    if not engine.gather(here).all():
        engine.on_rank_zero(lambda: _build(
            folder, *_select(path, share, phase, split, args),
            lambda text: tokenise(text, tokenizer, max_seq_len, max_prompt)), every_node=True)
    with open(os.path.join(folder, "report.txt")) as file:
        say(file.read())
    return load_from_disk(folder)


def _select(path, share, phase, split, args):
    """-> what this is, for the report; the rendered rows, None where one cannot serve.

    All rows of the split are rendered before the phase's are picked, so that a bad one stops every
    step and not just the one it falls to."""
    raw = read(path, args)[split == "held_out"]
    rows = [render(row, phase) for row in raw]
    if path == "toy":
        rows = [{**text, "bayes": row["bayes"]} for text, row in zip(rows, raw) if text]
    if share is not None and split == "train":
        rows = phase_rows(rows, share, args)
    return f"{path}, step {phase}, {split.replace('_', '-')} rows", rows


def _build(folder, title, rows, tokenise_row):
    """Tokenise one split into `folder`, which appears whole or not at all."""
    texts = [text for text in rows if text]
    kept = [{**text, **ids} for text in texts if (ids := tokenise_row(text))]
    report = f"{title}: {len(kept)} of {len(rows)} used"
    if len(kept) < len(rows):
        report += f" ({len(rows) - len(texts)} empty or alike, {len(texts) - len(kept)} too long)"
    if not kept:
        raise InputError(f"{report}: choose other data, --data_split or lengths")
    temporary = f"{folder}.{os.getpid()}"
    Dataset.from_list(kept).save_to_disk(temporary)
    with open(os.path.join(temporary, "report.txt"), "w") as file:
        file.write(report)
    try:
        os.rename(temporary, folder)
    except OSError:                           # another run was faster, and its folder is as good
        shutil.rmtree(temporary)


def _open_text(path):
    return (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8")


def _json_rows(path):
    rows = []
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise InputError(f"{path}, line {number}: not a JSON object, one a line")
                    rows.append({**row, WHERE: f"{path}, line {number}"})
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {number}: not JSON: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    return rows


def _hub(path, split=None, config=None):
    try:
        return load_dataset(path, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is neither a file here nor a data set on the hub that loads: "
                         f"{str(error).splitlines()[0]}") from error
