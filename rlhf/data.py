"""Data sets: raw rows -> three disjoint phases -> ids in an Arrow cache that all ranks map.

    python -m rlhf.data --data_path Dahoas/rm-static --phase 2 --tokenizer facebook/opt-350m

prints what training would see.  To add a data set, add a row to DATASETS."""
import hashlib, inspect, json, os, re, tempfile
from collections import Counter
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Callable, NamedTuple
import datasets
import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from rlhf import args as flags, engine, log, models, render, toy
from rlhf.args import InputError, check_writable, split_shares

class Layout(NamedTuple):
    """How a row's columns, each a text or a list of messages, become text; "{a[b][0]}" goes into
    one.  fix: a row -> a better one, or why to drop it."""
    prompt: str | None                 # None: what comes before the last answer
    chosen: str | None = None          # the better response, or the only one
    rejected: str | None = None
    response: str | None = None        # what step 1 learns, where that is not `chosen`
    fix: Callable | None = None

def _webgpt(row):
    """The better answer first, without its citations."""
    columns = ("answer_0", "answer_1")[::1 if row["score_0"] > row["score_1"] else -1]
    best, worst = (re.sub(r"\s*[\[(]\d\d?(, ?\d\d?)*[\])]", "", row[c] or "") for c in columns)
    better = {**row, "answer_0": best, "answer_1": worst}
    return "tie" if row["score_0"] == row["score_1"] else better

_speakers = lambda row: {**row, "prompt": re.sub(r"\s*\bASSISTANT:", render.ASSISTANT, re.sub(
    r"\s*\bUSER:", render.HUMAN, row["prompt"] or ""))}
_alpaca = lambda row: {**row, "instruction": (row["instruction"] or "") + "\n\n" + about} \
    if (about := row.get("input", row.get("context"))) else row
_shp = lambda row: row if row["labels"] == 1 else {                 # 1: the first is the better one
    **row, "human_ref_A": row["human_ref_B"], "human_ref_B": row["human_ref_A"]}
_last_answer = lambda row: {**row, **{                              # without the prompt before it
    column: (row[column] or "").rpartition("Assistant:")[2] for column in ("chosen", "rejected")}}
ask = (render.HUMAN + " {{{}}}" + render.ASSISTANT).format                # a column -> a template
PAIR = "{prompt}", "{chosen}", "{rejected}"
MIRACL = Layout(ask("query"), " {positive_passages[0][text]}", " {negative_passages[0][text]}")

# A data set is known by its hub id, else row by row by its columns: the layout that uses most.
DATASETS = {
    "columns prompt, chosen, rejected": Layout(*PAIR),
    "columns with a demonstration": Layout(*PAIR, "{response}"),
    "columns prompt, response": Layout("{prompt}", "{response}"),
    "columns prompt, completion": Layout("{prompt}", "{completion}"),
    "columns messages": Layout(None, "{messages}"),
    "columns prompt": Layout("{prompt}"),
    "Dahoas/synthetic-instruct-gptj-pairwise": Layout(ask("prompt"), " {chosen}", " {rejected}"),
    "yitingxie/rlhf-reward-datasets": Layout("{prompt}Assistant:", *PAIR[1:], fix=_last_answer),
    "openai/webgpt_comparisons": Layout(ask("question[full_text]"), " {answer_0}", " {answer_1}",
                                        fix=_webgpt),
    "stanfordnlp/SHP": Layout(ask("history"), " {human_ref_A}", " {human_ref_B}", fix=_shp),
    "pvduy/sharegpt_alpaca_oa_vicuna_format": Layout("{prompt}", " {label}", fix=_speakers),
    "wangrui6/Zhihu-KOL": Layout(ask("INSTRUCTION"), " {RESPONSE}"),
    "Cohere/miracl-zh-queries-22-12": MIRACL, "Cohere/miracl-ja-queries-22-12": MIRACL,
    "Hello-SimpleAI/HC3-Chinese": Layout(ask("question"), " {human_answers[0]}"),
    "mkqa-Chinese": Layout(ask("queries[zh_cn]"), " {answers[zh_cn][0][text]}"),
    "mkqa-Japanese": Layout(ask("queries[ja]"), " {answers[ja][0][text]}"),
    "lmqg/qg_jaquad": Layout(ask("question"), " {sentence}"),
    "lmqg/qag_jaquad": Layout(ask("questions[0]"), " {paragraph}"),
    "Anthropic/hh-rlhf": Layout(None, "{chosen}", "{rejected}"),
    "tatsu-lab/alpaca": Layout(ask("instruction"), " {output}", fix=_alpaca),
    "databricks/databricks-dolly-15k": Layout(ask("instruction"), " {response}", fix=_alpaca),
}
# length: the longer one's; key, twin: hashes of prompt, all; bayes: P(chosen better); row: as JSON
COLUMNS = {"prompt": "ids", "chosen": "ids", "rejected": "ids", "length": "int32", "cut": "bool",
           "key": "int64", "twin": "int64", "bayes": "float64", "row": "string"}
ALIASES = {"mkqa-Chinese": "mkqa", "mkqa-Japanese": "mkqa", "local/jsonfile": "data"}    # DSC's

_features = lambda kinds: Features({name: List(Value("int32")) if kind == "ids" else Value(kind)
                                    for name, kind in kinds.items()})
column = lambda rows, name: rows.with_format("numpy")[name][:]     # numbers, as an array

def layout_of(path, row, where):
    """The Layout of a data set, or of a row by its columns."""
    folder = os.path.isdir(path) and os.path.basename(os.path.normpath(path))          # of a copy
    for name, layout in DATASETS.items():
        if path.partition(":")[0] == name or folder == name.rpartition("/")[2]: return layout
    needs = lambda layout: {*re.findall(r"{(\w+)", "".join(filter(None, layout[:4])))}
    if known := [layout for layout in DATASETS.values() if needs(layout) <= row.keys()]:
        return max(known, key=lambda layout: len(needs(layout)))
    raise InputError(f"{where}: no layout fits columns {', '.join(row)}: rename them to prompt and "
                     f"response, or prompt, chosen and rejected")

def load(args, tokenizer, phase, max_prompt=None):
    """One phase's rows of all --data_path -> training rows, held-out rows: Datasets with COLUMNS.
    Prompts over max_prompt tokens are cut, in phase 3 left out.  InputError for unusable data."""
    given = {"sft_only_data_path": [], "max_seq_len": 1 << 30, "train_on_prompt": 0} | vars(args)
    shares = np.cumsum([0.0, *split_shares(args.data_split)])[phase - 1:phase + 1].tolist()
    sources = [(path, shares) for path in args.data_path]
    sources += [(path, [0.0, 1.0]) for path in given["sft_only_data_path"] if phase == 1]
    settings = {"max_seq_len": given["max_seq_len"] if phase < 3 else 1 << 30,
                "max_prompt": max_prompt, "train_on_prompt": given["train_on_prompt"]}
    parts = []
    for name, share in sources:
        path = name if os.path.exists(name) else ALIASES.get(name, name)
        identity = [name, fingerprint(path), share, phase, args.seed, args.eval_fraction,
                    args.dedup_prompts, settings]
        folder = cached(args, tokenizer, identity, partial(
            _build, name, path, share, phase, args, tokenizer, settings))
        log.say(Path(folder, "report.txt").read_text())
        parts.append(load_from_disk(folder))
    train, held_out = (concatenate_datasets([p[s] for p in parts]) for s in ("train", "held_out"))
    if args.dedup_prompts:
        firsts = lambda rows: np.sort(np.unique(column(rows, "twin"), return_index=True)[1])
        before = len(train) + len(held_out)
        train, held_out = train.select(firsts(train)), held_out.select(firsts(held_out))
        own = np.flatnonzero(~np.isin(column(train, "key"), column(held_out, "key")))
        if (kept := len(own) + len(held_out)) < before:
            log.say(f"{before - kept} rows left out: repeated, or to train on a held-out prompt")
            train = train.select(own)
    if not train: raise InputError("no training row is left: hold out others or --no-dedup_prompts")
    order = np.random.default_rng(args.seed).permutation(len(held_out))
    return train, held_out.select(order[:args.max_eval_rows])

def _build(name, path, share, phase, args, tokenizer, settings, folder):
    """Render and tokenise one phase of a data set into `folder`, row by row from a stream."""
    report, saved, work = [], {}, os.path.dirname(folder)
    train, held_out = (_texts(rows, name, phase, args, tokenizer, os.path.join(work, str(part)))
                       for part, rows in enumerate(render.read(path, args.seed)))
    if not train: raise InputError(f"{path}: it has no rows")
    keys = column(train, "key")
    prompts = np.unique(keys[keys != 0])      # in the order of their hashes: a seeded permutation
    place, cut = np.searchsorted(prompts, keys), len(prompts)
    if not held_out: cut -= max(1, round(args.eval_fraction * cut))
    low, high = (round(edge * cut) for edge in share)
    chosen = {"train": (train, (low <= place) & (place < high) | (keys == 0)),
              "held_out": (held_out, np.full(len(held_out), True)) if held_out
              else (train, (cut <= place) & (keys != 0))}
    for split, (texts, mine) in chosen.items():
        reasons = column(texts, "reason")
        counts = Counter(render.REASONS[reason] for reason in reasons[mine])
        rows = np.flatnonzero(mine & (reasons == 0))
        texts = texts.select(rows).remove_columns("reason")
        function = partial(render.tokenise, tokenizer, **settings)
        saved[split] = tokenised(texts, function, args, **COLUMNS)
        counts["too long, of no tokens, or alike once cut"] = len(rows) - len(saved[split])
        del counts["used"]
        lost = ", ".join(f"{n} {reason}" for reason, n in (+counts).items())
        report.append(f"{name}, step {phase}, {split} rows: {len(saved[split])} of {mine.sum()} "
                      f"used{f' ({lost})' if lost else ''}")
        if not saved[split]:
            raise InputError(f"{report[-1]}: choose other data, --data_split or lengths")
    datasets.DatasetDict(saved).save_to_disk(folder)
    Path(folder, "report.txt").write_text("\n".join(report))

def _texts(stream, name, phase, args, tokenizer, cache_dir):
    """A stream of raw rows -> Dataset of texts, hashes, why to drop a row; a bad one ends it."""
    layouts = {}
    number = lambda *texts: int.from_bytes(hashlib.blake2b(
        "\0".join(texts).encode(), digest_size=8).digest(), "big", signed=True) or 1
    def rows():
        for row, where in stream:
            if (columns := tuple(row)) not in layouts:
                layouts[columns] = layout_of(name, row, where)
            reason, asked, *texts = render.render(row, where, layouts[columns], phase, tokenizer)
            if render.half_surrogate("".join((asked, *texts))):
                raise InputError(f"{where}: a text holds half a surrogate pair: repair it")
            key = number(str(args.seed), asked if args.dedup_prompts else os.path.basename(where))
            yield {**dict(zip(("prompt", "chosen", "rejected"), texts)),
                   "reason": render.REASONS.index(reason), "key": key if asked else 0,
                   "twin": number(*texts), "bayes": row["bayes"] if name == "toy" else None,
                   "row": json.dumps(row, default=str) if phase == 3 else ""}
    return collect(rows(), cache_dir, prompt="string", chosen="string", rejected="string",
                   reason="int8", key="int64", twin="int64", bayes="float64", row="string")

def cached(args, tokenizer, identity, build, compute=None):
    """The folder that build(folder), a partial, makes inside a work folder, named by the SHA-256 of
    all that determines it.  Where it is missing, each node's first rank builds it, whole or not at
    all, from what compute(), if any, returned on all ranks together."""
    fast = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    code = [inspect.getsource(m) for m in (render, toy, inspect.getmodule(build.func))]
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
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error

def tokenised(texts, function, args, **kinds):
    """The Dataset that the function makes of batches of texts, on several processes."""
    workers = min(args.preprocessing_num_workers, 1 + len(texts) // 5000)
    return texts.map(function, batched=True, load_from_cache_file=False, features=_features(kinds),
                     num_proc=workers if workers > 1 else None, remove_columns=texts.column_names)

def inspect_data():
    """What training would see: rows kept and dropped, lengths, three examples."""
    add = (parser := flags.Parser(__doc__, None)).add_argument
    add("--phase", type=int, choices=(1, 2, 3), default=1, help="step [ours]")
    add("--tokenizer", default="toy", help="toy, a model folder or a hub id [ours]")
    add("--max_seq_len", type=flags.at_least_2, default=512, help="of steps 1 and 2 [DSC]")
    add("--max_prompt_seq_len", type=flags.positive_int, default=256, help="of step 3 [DSC]")
    add("--sft_only_data_path", nargs="*", default=[], help="step 1's [DSC]")
    add("--train_on_prompt", action="store_true", help="step 1's [ours]")
    args = parser.parse_args()
    engine.prepare(args.log_level)
    tokenizer = models.load_tokenizer(args.tokenizer, args)
    rows, _ = load(args, tokenizer, args.phase, {3: args.max_prompt_seq_len}.get(args.phase))
    names = list(COLUMNS)[:render.NEEDED[args.phase]]
    tokens = rows.select_columns(names).to_pandas().map(len).describe([.05, .25, .5, .75, .95])
    print(f"\ntokens:\n{tokens.round(1)}\ncut off: {np.mean(rows['cut']):.1%} of rows")
    for row in rows.select(range(min(3, len(rows)))):
        print("\n" + tokenizer.decode(row["prompt"]), *(
            f"[{n}, trained] >>>{tokenizer.decode(row[n])}<<<" for n in names[1:]), sep="\n")

if __name__ == "__main__": flags.run(inspect_data)
