"""Rows of ids -> padded or packed batches -> optimizer steps, the same on any number of ranks."""
import bisect, os
from functools import partial
import torch
from datasets import load_from_disk
from torch.nn.utils.rnn import pad_sequence
from rlhf import data, engine, render
from rlhf.args import InputError

def plan(args, units, kind="train", accumulation=None):
    """-> (micro-batch rows, micro-batches a step), steps of an epoch, of the run; or InputError."""
    flag = f"per_device_{kind}_batch_size"
    cut = (getattr(args, flag), accumulation or args.gradient_accumulation_steps)
    span = cut[0] * cut[1] * engine.world_size()
    if not (epoch := len(units) // span):
        raise InputError(f"{len(units)} rows (or packs, of text too) do not fill a step of {span} "
                         f"(batch x accumulation x ranks): lower --{flag} or add data")
    return cut, epoch, args.lr_range_test or args.max_steps or epoch * args.num_train_epochs

def steps(args, units, collate, cut, total, done=0):
    """Yields (step, list of micro-batches) for step done+1..total; a unit is a row or a pack.  Over
    the ranks a step covers the same units however it is cut.  Every epoch has its own order and
    leaves out another tail.  --group_by_length: within 50 steps rows are sorted; steps shuffled."""
    world, by_length = engine.world_size(), getattr(args, "group_by_length", False)
    span, step = cut[0] * cut[1] * world, done
    lengths = torch.as_tensor(data.column(units, "length")) if by_length else None
    while step < total:
        epoch, begun = divmod(step, len(units) // span)
        shuffle = torch.Generator().manual_seed(args.seed + epoch)
        order = torch.randperm(len(units), generator=shuffle)[:len(units) // span * span]
        if by_length:
            stretches = [part[lengths[part].argsort()] for part in order.split(50 * span)]
            order = torch.cat(stretches).view(-1, span)
            order = order[torch.randperm(len(order), generator=shuffle)].flatten()
        for whole in order.split(span)[begun:begun + total - step]:
            step += 1
            yield step, [collate([units[j] for j in part.tolist()])
                         for part in whole[engine.rank()::world].split(cut[0])]

def eval_batches(rows, collate, batch_size):
    """This rank's share of the rows, as many as all others': engine.gather_rows drops repeats."""
    rank, world = engine.rank(), engine.world_size()
    mine = [i % len(rows) for i in range(rank, -(-len(rows) // world) * world, world)]
    for start in range(0, len(mine), batch_size):
        yield collate([rows[i] for i in mine[start:start + batch_size]])

def collate(tokenizer, rows, responses=("chosen",)):
    """Rows of ids -> a batch (see models.py); of two responses: all chosen, then all rejected."""
    prompts = [row["prompt"] for row in rows] * max(1, len(responses))
    batch = dict(zip(("prompt_ids", "prompt_mask"), pad(prompts, tokenizer.pad_token_id, "left")))
    if responses:
        texts = [row[name] for name in responses for row in rows]
        batch.update(zip(("response_ids", "mask"), pad(texts, tokenizer.pad_token_id)))
    if rows[0].get("row"): batch["rows"] = [row["row"] for row in rows]     # for --reward_fn
    if "ref_logp" in rows[0]:                                  # train_dpo.py --precompute_ref_logp
        pairs = torch.tensor([row["ref_logp"] for row in rows], device=engine.device())
        batch["ref_logp"] = pairs.T.flatten()                                               # (2B,)
    return batch

def pad(sequences, fill, side="right"):
    """Lists of ids -> (B, longest) ids and mask, on this rank's device."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    ids = pad_sequence(rows, True, fill, side).to(engine.device())
    return ids, pad_sequence([torch.ones_like(row) for row in rows], True, 0, side).to(ids) > 0

class Packs:
    """Rows -> lists of rows that fit into `room` tokens: longest first, where the least remains."""
    def __init__(self, rows, room):
        lengths, self.rows, self.packs, free = data.column(rows, "length"), rows, [], []
        for number in (-lengths).argsort(kind="stable").tolist():
            at = bisect.bisect_left(free, (lengths[number], -1))
            left, pack = free.pop(at) if at < len(free) else (room, len(self.packs))
            if pack == len(self.packs): self.packs.append([])
            self.packs[pack].append(number)
            bisect.insort(free, (left - lengths[number], pack))         # the room left, where
    __len__ = lambda self: len(self.packs)
    __getitem__ = lambda self, index: [self.rows[i] for i in self.packs[index]]

def collate_packs(tokenizer, packs):
    """Lists of rows -> a batch; its row is a list, end to end, whose prompt is the first token.
    Position ids restart with each sequence; mask covers responses, prompt_mask (B, T) all else."""
    ids, seen = pad([[i for row in rows for i in row["prompt"] + row["chosen"]] for rows in packs],
                    tokenizer.pad_token_id)                                             # (B, T)
    trained, positions = torch.zeros_like(seen), torch.zeros_like(ids)
    for number, rows in enumerate(packs):
        end = 0
        for row in rows:
            start, end = end, end + len(row["prompt"]) + len(row["chosen"])
            positions[number, start:end] = torch.arange(end - start)
            trained[number, start + len(row["prompt"]):end] = True
    return {"prompt_ids": ids[:, :1], "response_ids": ids[:, 1:], "mask": trained[:, 1:],
            "prompt_mask": seen & ~trained, "position_ids": positions}

def text_stream(args, tokenizer, done=0):
    """Endless steps of packed plain text for the unsupervised loss, if a data set is named, after
    `done` iterations.  A text ends with eos; a long one is cut.  Its first token is its prompt."""
    name, length = args.unsupervised_dataset_name, args.max_prompt_seq_len + args.max_answer_seq_len
    if name is None: return None
    path = ":".join(filter(None, [name, args.unsupervised_dataset_config_name]))
    build = partial(_build_texts, path, length, args, tokenizer)
    identity = [data.fingerprint(path), length, args.seed]
    packs = Packs(load_from_disk(data.cached(args, tokenizer, identity, build)), length)
    cut, *_ = plan(args, packs, "training")
    collate, done = partial(collate_packs, tokenizer), done * args.updates
    return (micro_batches for _, micro_batches in steps(args, packs, collate, cut, 1 << 62, done))

def _build_texts(path, length, args, tokenizer, folder):
    def blocks(texts):
        ids = [i + [tokenizer.eos_token_id] for i in render.ids_of(tokenizer, texts["text"])]
        cut = [text[i:i + length] for text in ids for i in range(0, len(text) - 1, length)]
        return {"prompt": [block[:1] for block in cut], "chosen": [block[1:] for block in cut],
                "length": [len(block) for block in cut]}
    texts = render.plain_texts(path, args.seed)
    texts = data.collect(texts, os.path.dirname(folder), text="string")
    if not texts: raise InputError(f"{path}: there is no text in it")
    kinds = dict(prompt="ids", chosen="ids", length="int32")
    data.tokenised(texts, blocks, args, **kinds).save_to_disk(folder)
