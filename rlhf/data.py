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
import shutil
import sys

import torch
from datasets import Dataset, concatenate_datasets, load_dataset, load_from_disk

from rlhf import engine, toy
from rlhf.args import InputError, split_shares
from rlhf.log import say

NEEDS = {1: ("prompt", "response"), 2: ("prompt", "chosen", "rejected"), 3: ("prompt",)}
WHERE = "_where"                            # column of a row that says which file and line it is
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")


def load(args, tokenizer, phase, max_prompt=None):
    """One phase's tokenised training and held-out rows, all of --data_path together.

    -> two Datasets with columns prompt, chosen, rejected (lists of ids).  Phases 1 and 2 cut a row
    to --max_seq_len tokens, phase 3 drops prompts of more than max_prompt.  InputError for what
    cannot be read or used."""
    sources = [(path, phase) for path in args.data_path]
    sources += [(path, None) for path in getattr(args, "sft_only_data_path", [])]    # whole
    parts = [_cached(path, share, phase, args, tokenizer, max_prompt) for path, share in sources]
    train, held_out = (concatenate_datasets(list(split)) for split in zip(*parts))
    if len(parts) > 1:
        held_out = held_out.shuffle(seed=args.seed, keep_in_memory=True)
    return train, held_out.select(range(min(len(held_out), args.max_eval_rows)))


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
    """This rank's share of the held-out rows.  All ranks get equally many, the first rows coming
    round again, so that collectives match; engine.gather_rows restores order, without repeats."""
    rank, world = engine.rank(), engine.world_size()
    mine = [i % len(rows) for i in range(rank, -(-len(rows) // world) * world, world)]
    for start in range(0, len(mine), batch_size):
        yield collate([rows[i] for i in mine[start:start + batch_size]])


def collate(tokenizer, rows, responses=("chosen",)):
    """Rows of ids -> a batch (see models.py).  Two response columns are stacked, all chosen before
    all rejected; none leaves the prompts alone."""
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


def stack(batches, pad_token_id):
    """Batches of other widths -> one; prompts are widened on the left, the rest on the right."""
    def widen(name, tensor):
        if tensor.ndim == 1:
            return tensor
        missing = max(batch[name].shape[1] for batch in batches) - tensor.shape[1]
        sides = (missing, 0) if name.startswith("prompt_") else (0, missing)
        fill = pad_token_id if name.endswith("_ids") else 0
        return torch.nn.functional.pad(tensor, sides, value=fill)
    return {name: torch.cat([widen(name, b[name]) for b in batches]) for name in batches[0]}


def text_stream(args, tokenizer):
    """Endless batches of plain text for the unsupervised loss; None if no data set is named for it.

    Texts are joined, eos after each, and cut into blocks.  A block's first token is its prompt."""
    path, length = args.unsupervised_dataset_name, args.max_prompt_seq_len + args.max_answer_seq_len
    if path is None:
        return None
    if path == "toy":
        texts = toy.texts(args.seed)
    elif os.path.isfile(path):
        with _open_text(path) as file:
            texts = file.read().split("\n\n")
    else:
        texts = _hub(path, "train", args.unsupervised_dataset_config_name)["text"]
    ids = [i for text in texts for i in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]
    blocks = [ids[i:i + length] for i in range(0, len(ids) - length + 1, length)]
    rows = [{"prompt": block[:1], "chosen": block[1:]} for block in blocks]
    cut = (args.per_device_training_batch_size, 1)
    steps_per_epoch(rows, *cut, "--per_device_training_batch_size")
    steps = optimizer_steps(rows, lambda rows: collate(tokenizer, rows), *cut, args.seed, 1 << 62)
    return (micro_batch for _, [micro_batch] in steps)


def decode(tokenizer, experience):
    """A rollout as text: dicts of prompt, response, score and kl."""
    columns = ("prompt_ids", "prompt_mask", "response_ids", "mask", "score", "kl")
    return [{"prompt": tokenizer.decode(prompt[seen]), "response": tokenizer.decode(response[said]),
             "score": score.item(), "kl": kl.item()}
            for prompt, seen, response, said, score, kl in zip(*(experience[c] for c in columns))]


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
    return {"prompt": prompt[-room:], **responses}


def _cached(path, share, phase, args, tokenizer, max_prompt):
    """The two splits of one data set, from the cache or built."""
    max_seq_len = getattr(args, "max_seq_len", 1 << 30)
    files = [path] if os.path.isfile(path) else \
        sorted(e.path for e in os.scandir(path)) if os.path.isdir(path) else []
    stats = [(os.path.abspath(f), os.stat(f).st_size, os.stat(f).st_mtime_ns) for f in files]
    identity = [path, stats, share, phase, args.data_split, args.seed, args.eval_fraction,
                max_seq_len, max_prompt, tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token,
                inspect.getsource(sys.modules[__name__]), inspect.getsource(toy)]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    folder = os.path.join(args.data_output_path, name)
    if not all(engine.gather(torch.tensor(os.path.isdir(folder), device=engine.device())).tolist()):
        engine.on_rank_zero(lambda: _build(folder, path, share, phase, args, tokenizer, max_seq_len,
                                           max_prompt))
    with open(os.path.join(folder, "report.txt")) as file:
        say(file.read())
    return [load_from_disk(os.path.join(folder, split)) for split in ("train", "held_out")]


def _build(folder, path, share, phase, args, tokenizer, max_seq_len, max_prompt):
    """Read, split and tokenise one data set into `folder`, which appears whole or not at all."""
    rows, held_out = read(path, args)
    if share is not None:
        rows = phase_rows(rows, share, args)
    built, report = {}, []
    for split, raw in (("train", rows), ("held_out", held_out)):
        kept, useless, long = [], 0, 0
        for row in raw:
            text = render(row, phase)
            ids = text and tokenise(text, tokenizer, max_seq_len, max_prompt)
            useless, long = useless + (text is None), long + (text is not None and ids is None)
            if ids:
                kept.append({**ids, "bayes": row["bayes"]} if "bayes" in row else ids)
        dropped = f"dropped: {useless} empty or alike" + (
            f", {long} of more than {max_prompt} tokens" if max_prompt else "")
        if not kept:
            raise InputError(f"--data_path {path}: none of {len(raw)} {split} rows can serve step "
                             f"{phase} ({dropped})")
        built[split] = Dataset.from_list(kept)
        report.append(f"{len(kept)} {split.replace('_', '-')} rows"
                      + (f" ({dropped})" if useless or long else ""))
    temporary = f"{folder}.{os.getpid()}"
    for split, rows in built.items():
        rows.save_to_disk(os.path.join(temporary, split))
    with open(os.path.join(temporary, "report.txt"), "w") as file:
        file.write(f"{path}, step {phase}: {', '.join(report)}")
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
