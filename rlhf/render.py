"""Raw rows, wherever they lie (files, folders, save_to_disk folders, the hub) -> texts -> ids.  A
stream is of (row, where): a dict, and the place to name when something is wrong with it."""
import gzip, json, os, re, string, zlib
from functools import partial
from itertools import chain
from datasets import Dataset, load_dataset, load_from_disk
from rlhf import toy
from rlhf.args import InputError, opened

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
REASONS = ("used", "no prompt", "no response", "identical pair", "tie",
           "prompts of a pair differ", "over a million characters")
NEEDED = {1: 2, 2: 3, 3: 1}                      # of prompt, chosen, rejected, in each phase
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

def plain_texts(path, seed):
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

def render(row, where, layout, phase, tokenizer):
    """A raw row -> one of REASONS; the prompt's name, the same for every phase and tokenizer;
    prompt, chosen, rejected, empty where the phase needs none.  InputError for an unfit column."""
    if phase < 3 and layout[phase] is None:
        raise InputError(f"{where}: step {phase} needs {('responses', 'pairs')[phase - 1]}, but "
                         f"{', '.join(row)} hold none (for step 1 alone: --sft_only_data_path)")
    try:
        row = layout.fix(row) if layout.fix else row
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where}: a column is missing or of a wrong type: {error}") from error
    dropped = lambda reason, name="": (reason, name, "", "", "")
    if isinstance(row, str): return dropped(row)
    *texts, response = (_fill(template, row, where) for template in layout[:4])
    if phase == 1 and response: texts[1] = response
    name = texts[0]
    if any(isinstance(text, list) for text in texts):
        if (talk := _chat(*texts, where, tokenizer)) is None:
            return dropped("prompts of a pair differ")
        name, *texts = talk
    elif layout.prompt is None:                  # it is what the responses share
        if not texts[1] or (layout.rejected and not texts[2]): return dropped("no response")
        shared = os.path.commonprefix(texts[1:])
        end = shared.rfind(ASSISTANT) + len(ASSISTANT)
        if ASSISTANT not in shared or any(HUMAN in text[end:] for text in texts[1:]):
            return dropped("prompts of a pair differ")
        name, *texts = shared[:end], shared[:end], *(text[end:] for text in texts[1:])
    if not re.sub(r"\b(Human|Assistant):", "", name or "").strip(): return dropped("no prompt")
    prompt, *answers = [text or "" for text in texts[:NEEDED[phase]]]
    if sum(map(len, (prompt, *answers))) > 1_000_000:
        return dropped("over a million characters", name)
    reason = "no response" if not all(answer.strip() for answer in answers) else \
        "identical pair" if len(set(answers)) < len(answers) else "used"
    return (reason, name, prompt, *answers, "", "")[:5]

def _fill(template, row, where):
    """A layout's template -> text, messages, or None where a value is missing."""
    filled = ""
    for literal, column, _, _ in string.Formatter().parse(template or ""):
        filled += literal
        if column:
            try:
                value = string.Formatter().get_field(column, (), row)[0]
            except KeyError:
                raise InputError(f"{where}: column {column} is missing (found: {', '.join(row)})")
            except (IndexError, TypeError):                    # no answers at all
                value = None
            if value in (None, "") or isinstance(value, list):
                return value if template == f"{{{column}}}" else None
            if not isinstance(value, str):
                kind = type(value).__name__
                raise InputError(f"{where}: column {column} has type {kind}, but must be text")
            filled += value
    return filled

def _chat(prompt, chosen, rejected, where, tokenizer):
    """Messages -> the prompt in Human/Assistant words; prompt, chosen, rejected by the tokenizer's
    chat template, if it has one.  None for a pair whose prompts differ."""
    before, talks = prompt if isinstance(prompt, list) else [], []
    for answer in (chosen, rejected):
        if isinstance(answer, str) and answer: answer = [{"role": "assistant", "content": answer}]
        answer = answer or []
        talks.append(answer if answer[:len(before)] == before else before + answer)
    for message in sum(talks, before):
        if not (isinstance(message, dict) and isinstance(message.get("role"), str)
                and isinstance(message.get("content"), str)):
            raise InputError(f"{where}: a message needs texts role and content: {message!s:.80}")
    contexts = [talk[:-1] if talk[-1]["role"] == "assistant" else talk for talk in talks if talk]
    context = (contexts or [before])[0]
    if contexts and context != contexts[-1]: return None
    names = {"user": HUMAN, "assistant": ASSISTANT}
    plain = lambda talk: "".join(f"{names.get(m['role'], '')} {m['content']}" for m in talk)
    if not context or not context[-1]["content"].strip(): return "", "", "", ""
    name = start = plain(context) + ASSISTANT
    texts = [plain(talk).removeprefix(start) if len(talk) > len(context) else "" for talk in talks]
    if tokenizer.chat_template:
        write = partial(tokenizer.apply_chat_template, tokenize=False)
        try:
            start = write(context, add_generation_prompt=True)
            whole = [text.strip() and write(talk) for text, talk in zip(texts, talks)]
        except Exception as error:                            # the template's own
            raise InputError(f"{where}: the chat template refuses it: {error}") from error
        if not all(text.startswith(start) for text in whole if text):
            raise InputError(f"{where}: the chat template words a prompt otherwise once answered")
        texts = [t[len(start):].rstrip().removesuffix(tokenizer.eos_token).rstrip() for t in whole]
        if tokenizer.bos_token_id in tokenizer("")["input_ids"]:      # it adds the template's bos
            start = start.removeprefix(tokenizer.bos_token)
    return name, start, *texts

def ids_of(tokenizer, texts):
    """Texts -> lists of ids, without the eos that some tokenizers add."""
    end = -1 if tokenizer("a")["input_ids"][1:][-1:] == [tokenizer.eos_token_id] else None
    return [ids[:end] for ids in tokenizer(texts)["input_ids"]]

def tokenise(tokenizer, texts, max_seq_len, max_prompt=None, train_on_prompt=False):
    """Columns of texts -> columns of ids, their length, was something cut off.  A response is
    tokenised behind its prompt, lest a space be invented, and ends with eos, also when cut.  Of a
    long row the prompt keeps its end (and bos), half of the tokens (at most max_prompt) if need be,
    responses lose theirs; alone, it is left out.  train_on_prompt: one token is the prompt."""
    eos, rows = tokenizer.eos_token_id, []
    def responses(column):
        both = [prompt + text for prompt, text in zip(texts["prompt"], column)]
        whole = ids_of(tokenizer, both) if any(column) else prompts
        for prompt, both, text in zip(prompts, whole, column):
            if both[:len(prompt)] != prompt:                  # a token spans the border
                both = prompt + tokenizer(text, add_special_tokens=False)["input_ids"]
            yield both[len(prompt):] + [eos] if text else []
    prompts = ids_of(tokenizer, texts["prompt"])
    columns = zip(prompts, responses(texts["chosen"]), responses(texts["rejected"]))
    for i, (prompt, *answers) in enumerate(columns):
        if not prompt or (max_prompt and not answers[0] and len(prompt) > max_prompt): continue
        length, most = len(prompt) + max(map(len, answers)), max_prompt or max_seq_len
        limit = max_seq_len - min(len(prompt), most, max_seq_len // 2)
        answers = [a if len(a) <= limit else a[:limit - 1] + [eos] for a in answers]
        room = min(most, max_seq_len - max(map(len, answers)))
        if len(prompt) > room > 1 and prompt[0] == tokenizer.bos_token_id:
            prompt = prompt[:1] + prompt[1 - room:]
        prompt = prompt[-room:]
        if answers[0] == answers[1] != []: continue           # a pair that was told apart later
        if train_on_prompt: prompt, answers[0] = prompt[:1], prompt[1:] + answers[0]
        kept = len(prompt) + max(map(len, answers))
        rows.append({**{name: texts[name][i] for name in texts}, "prompt": prompt, "chosen":
                     answers[0], "rejected": answers[1], "length": kept, "cut": kept < length})
    return {name: [row[name] for row in rows] for name in (*texts, "length", "cut")}
