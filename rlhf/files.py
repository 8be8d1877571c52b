"""Raw rows from wherever they lie, files, folders, save_to_disk folders, the hub, as streams of
(row, where): a dict, and the place to name when something is wrong with it."""
import gzip, json, os, re, zlib
from itertools import chain
from datasets import Dataset, load_dataset, load_from_disk
from rlhf import toy
from rlhf.args import InputError, opened

SUFFIXES = (".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz", ".parquet")
half_surrogate = re.compile("[\ud800-\udfff]").search                # such a text has no UTF-8
HELD_OUT = ("test", "validation", "valid", "eval", "dev")

def read(path, seed):
    """A data set's training rows and held-out rows, a stream each; the second may be empty."""
    if path == "toy": return [_rows("the embedded world", rows) for rows in toy.rows(seed=seed)]
    names = sorted(opened(os.listdir, path, "the folder")) if os.path.isdir(path) else None
    if os.path.isfile(path):
        streams = {"train": _file(path)}
    elif names is None and path.endswith(SUFFIXES):
        raise InputError(f"{path}: there is no such file or folder")
    elif names is None or {"state.json", "dataset_dict.json"} & {*names}:
        name, _, configuration = path.partition(":")
        loaded = opened(load_from_disk, path, "the data set") if names else \
            opened(load_dataset, name, "the data set", *filter(None, [configuration]))
        splits = {"train": loaded} if isinstance(loaded, Dataset) else loaded
        where = os.path.normpath(path)                               # without a last slash
        streams = {split: _rows(f"{where}, {split}", rows) for split, rows in splits.items()}
    else:
        streams = {n: _file(os.path.join(path, n)) for n in names if n.endswith(SUFFIXES)}
    shard = lambda name, kind: re.fullmatch(kind + r"([-_]?\d.*)?", name.split(".")[0])
    named = lambda like, kind: [name for name in streams if like(name, kind)]
    groups = [next(filter(None, (named(like, kind) for like in (shard, str.startswith)
                                 for kind in kinds)), []) for kinds in (("train",), HELD_OUT)]
    if not groups[0]:
        raise InputError(f"{path}: no train file or split in it, but {[*streams] or 'nothing'}")
    # Shards are files of one split; of the hub's train_sft, train_prefs the first will do.
    return [chain.from_iterable(streams[n] for n in (group if "." in group[0] else group[:1]))
            if group else () for group in groups]

def texts(path, seed):
    """Plain texts for the unsupervised loss: a .txt file's paragraphs, or a column text."""
    rows = [({"text": t}, path) for t in toy.texts(seed)] if path == "toy" else read(path, seed)[0]
    for row, where in rows:
        if not isinstance(row.get("text"), str) or half_surrogate(row["text"]):
            raise InputError(f"{where}: no sound text in column text (found: {', '.join(row)})")
        if row["text"].strip(): yield {"text": row["text"]}

def _rows(path, rows):
    try:
        for number, row in enumerate(rows, 1): yield row, f"{path}, row {number}"
    except Exception as error:            # of many libraries' own types
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error

def _file(path):
    if not path.endswith(SUFFIXES):
        raise InputError(f"{path}: its name ends in none of {', '.join(SUFFIXES)}")
    if not path.removesuffix(".gz").endswith((".jsonl", ".json")):
        options = {} if path.endswith(".parquet") else {"sample_by": "paragraph"}
        stream = lambda path: load_dataset("text" if options else "parquet", data_files=path,
                                           streaming=True, **options)["train"]
        yield from _rows(path, opened(stream, path, "the rows of"))
        return
    where = path
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            array = file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
            file.seek(0)
            for number, row in enumerate(json.load(file) if array else file, 1):
                where = f"{path}, {'row' if array else 'line'} {number}"
                if array or row.strip():
                    row = row if array else json.loads(row)
                    if not isinstance(row, dict): raise InputError(f"{where}: not a JSON object")
                    yield row, where
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{where}: cannot be read (as JSON in UTF-8): {error}") from error
