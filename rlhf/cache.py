"""Arrow files on disk, built once, memory-mapped by all: memory does not grow with the data."""
import hashlib, inspect, json, os, tempfile
from itertools import chain
from pathlib import Path
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from rlhf import engine, files, render, toy
from rlhf.args import InputError, check_writable

_features = lambda kinds: Features({name: List(Value("int32")) if kind == "ids" else Value(kind)
                                    for name, kind in kinds.items()})
column = lambda rows, name: rows.with_format("numpy")[name][:]     # numbers, as an array

def cached(args, tokenizer, identity, build, compute=None):
    """The folder that build(folder), a partial, makes inside a work folder, named by the SHA-256 of
    all that determines it.  Where it is missing, each node's first rank builds it, whole or not at
    all, from what compute(), if any, returned on all ranks together."""
    fast = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    code = [inspect.getsource(m) for m in (files, render, toy, inspect.getmodule(build.func))]
    everything = [identity, fast, tokenizer.special_tokens_map, tokenizer.chat_template, code]
    name = hashlib.sha256(json.dumps(everything, default=str).encode()).hexdigest()
    folder = os.path.join(args.data_output_path, name)
    def build_whole():
        check_writable(args.data_output_path, "--data_output_path")
        with tempfile.TemporaryDirectory(prefix=f"{name}.", dir=args.data_output_path) as work:
            try:
                build(os.path.join(work, "new"), *made)
                os.rename(os.path.join(work, "new"), folder)
            except OSError as error:
                if not os.path.isdir(folder):    # if it is, another run was faster, and is as good
                    raise InputError(f"{folder} cannot be built: {error}") from error
    if engine.anywhere(not os.path.isdir(folder)):
        made = [compute()] if compute else []
        engine.on_rank_zero(build_whole, every_node=True)
    return folder

def fingerprint(path):
    """A data set's name, and the name, size and time of each of its files here."""
    found = [file for file in (Path(path), *sorted(Path(path).rglob("*"))) if file.is_file()]
    return path, [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in found]

def collect(rows, cache_dir, **kinds):
    """An iterator of dicts -> a Dataset on disk with columns of these kinds."""
    features, first = _features(kinds), next(rows, None)
    if first is None: return Dataset.from_dict({name: [] for name in kinds}, features)
    try:
        return Dataset.from_generator(lambda: chain([first], rows), features, cache_dir,
                                      fingerprint="rows")    # it could not hash an open file
    except DatasetGenerationError as error:
        raise error.__cause__ or error

def tokenised(texts, function, args, **kinds):
    """The Dataset that the function makes of batches of texts, on several processes."""
    workers = min(args.preprocessing_num_workers, 1 + len(texts) // 5000)
    return texts.map(function, batched=True, load_from_cache_file=False, features=_features(kinds),
                     num_proc=workers if workers > 1 else None, remove_columns=texts.column_names)
