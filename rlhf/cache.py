"""Arrow files on disk, built once, memory-mapped by all: memory does not grow with the data."""
import hashlib
import inspect
import json
import os
import shutil
import uuid
from itertools import chain

import torch
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError

from rlhf import engine, files, render, toy
from rlhf.args import InputError, check_writable

column = lambda rows, name: rows.with_format("numpy")[name][:]     # numbers, as an array

def cached(args, tokenizer, identity, build):
    """The folder that build(folder), a partial, fills, whole or not at all; named by the SHA-256 of
    all that determines it.  Where it is missing, each node's first rank builds it."""
    fast = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    code = [inspect.getsource(m) for m in (files, render, toy, inspect.getmodule(build.func))]
    everything = [identity, fast, tokenizer.special_tokens_map, tokenizer.chat_template, code]
    name = hashlib.sha256(json.dumps(everything, default=str).encode()).hexdigest()
    folder = os.path.join(args.data_output_path, name)
    temporary = f"{folder}.{uuid.uuid4().hex}"

    def build_whole():
        check_writable(args.data_output_path, "--data_output_path")
        try:
            build(temporary)
            shutil.rmtree(os.path.join(temporary, "work"), ignore_errors=True)
            os.rename(temporary, folder)
        except OSError as error:
            if not os.path.isdir(folder):     # if it is, another run was faster, and is as good
                raise InputError(f"--data_output_path {folder} cannot be built: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    here = torch.tensor(float(os.path.isdir(folder)), device=engine.device())
    if not engine.gather(here).all():
        engine.on_rank_zero(build_whole, every_node=True)
    return folder

def fingerprint(path):
    """A data set's name, and the name, size and time of each of its files here."""
    names = [path] if os.path.isfile(path) else sorted(
        os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
    return path, [(os.path.abspath(name), os.stat(name).st_size, os.stat(name).st_mtime_ns)
                  for name in names if os.path.exists(name)]

def collect(rows, cache_dir, **kinds):
    """An iterator of dicts -> a Dataset on disk with columns of these kinds."""
    features, first = _features(kinds), next(rows, None)
    if first is None:
        return Dataset.from_dict({name: [] for name in kinds}, features)
    try:
        return Dataset.from_generator(lambda: chain([first], rows), features, cache_dir,
                                      fingerprint="rows")    # it could not hash an open file
    except DatasetGenerationError as error:
        raise error.__cause__ or error

def tokenised(texts, function, args, **kinds):
    """The Dataset that the function makes of batches of texts, on several processes."""
    workers = min(args.preprocessing_num_workers, 1 + len(texts) // 5000)
    return texts.map(function, batched=True, remove_columns=texts.column_names,
                     features=_features(kinds), num_proc=workers if workers > 1 else None,
                     load_from_cache_file=False)

def _features(kinds):
    return Features({n: List(Value("int32")) if k == "ids" else Value(k) for n, k in kinds.items()})
