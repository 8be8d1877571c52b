"""Tokenizer, policy and scalar model (reward model, critic), loaded and saved in the HF layout.
A batch is a dict: `prompt_ids`, `prompt_mask` (B, P), left-padded; `response_ids`, `mask` (B, R),
right-padded.  Masks come from lengths and are carried along: any token may be the padding."""
import inspect, os, re, shutil, tempfile
from functools import cache
from pathlib import Path
import torch
from torch import nn
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoTokenizer, BitsAndBytesConfig, DynamicCache, GenerationConfig)
from transformers.cache_utils import DynamicLayer
from rlhf import lora, toy
from rlhf.args import InputError, opened
from rlhf.losses import token_logprobs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
pick_dtype = lambda flag: DTYPES[flag] if flag != "auto" else torch.bfloat16 if \
    torch.cuda.is_available() and torch.cuda.is_bf16_supported(False) else torch.float32
SAVED = r"(tokenizer|tokenizer_config|vocab|added_tokens|special_tokens_map)\.(json|model|txt)|" \
    r"merges\.txt|chat_template\.jinja|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
takes = cache(lambda kind, name: name in inspect.signature(kind.forward).parameters)
texts = lambda tokenizer, ids, mask: [                             # without special tokens
    tokenizer.decode(row[seen], skip_special_tokens=True) for row, seen in zip(ids, mask)]

def load_tokenizer(path, args=None):
    """A tokenizer ("toy": the embedded world's) whose eos is --end_of_conversation_token.  A pad
    that is missing or the eos becomes the unk, if that is its own token, else a new `<|pad|>`: a
    classifier reads the last non-pad token and would miss the eos.  InputError for none, no eos."""
    tokenizer = toy.tokenizer() if path == "toy" else \
        opened(AutoTokenizer.from_pretrained, path, "the tokenizer of", trust_remote_code=False)
    end, new = (args.end_of_conversation_token, args.add_eot_token) if args else (None, False)
    if new and not end:
        raise InputError("--add_eot_token adds the --end_of_conversation_token: name it")
    if end and not new and end not in tokenizer.get_vocab():
        raise InputError(f"--end_of_conversation_token {end}: {path} needs --add_eot_token for it")
    tokenizer.add_special_tokens({"eos_token": end} if end else {})
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path} has no eos token: set it in its tokenizer_config.json")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        taken = (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
        unk = tokenizer.unk_token if tokenizer.unk_token_id not in taken else "<|pad|>"
        tokenizer.add_special_tokens({"pad_token": unk})
    return tokenizer

def load_policy(path, tokenizer, dtype="fp32", length=0, in_4bit=False):
    """Any causal language model; toy: a fresh one of a million weights.  in_4bit: QLoRA's NF4.
    InputError for a missing, unexpected, misshapen weight or a context below `length` tokens."""
    return _load(AutoModelForCausalLM, path, tokenizer, pick_dtype(dtype), length, in_4bit)[0]

def load_scalar(path, tokenizer, dtype="fp32", length=0, new_head=False):
    """A backbone with a one-number head -> ScalarModel.  With new_head (step 2) a language model
    will do, and gets a fresh head; or it must be a reward model.  InputError as in load_policy."""
    kind = AutoModelForSequenceClassification
    model, fresh = _load(kind, path, tokenizer, pick_dtype(dtype), length, new_head=new_head)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise InputError(f"{path}: a {type(model).__name__} has no linear head named score: use a "
                         f"decoder-only language model")
    if fresh:                                   # Stiennon et al. 2020: scores start with variance 1
        nn.init.normal_(model.score.weight, std=(model.score.in_features + 1) ** -0.5)
    model.score.__class__ = Fp32Linear
    return ScalarModel(model)

class Fp32Linear(nn.Linear):
    """A head that computes in fp32 whatever its weights are: bf16 rounds a score of 3 to 1/64."""
    def forward(self, hidden):
        return nn.functional.linear(hidden.float(), *(p.float() for p in self.parameters()))

class ScalarModel(nn.Module):
    """A sequence classifier with one label, read at every position, or the last (reward model)."""
    def __init__(self, classifier):
        super().__init__()
        self.classifier, self.config = classifier, classifier.config
    def forward(self, input_ids, attention_mask):
        """(B, T), (B, T) -> (B, T) fp32: the head's output after each token."""
        backbone = self.classifier.base_model
        hidden = backbone(input_ids, use_cache=False, **places(backbone, attention_mask))[0]
        return self.classifier.score(hidden).squeeze(-1)

def policy_logprobs(model, batch, temperature=1.0):
    """log pi(y_t | x, y_<t) -> (B, R) fp32: the one forward, and only the response is projected."""
    ids, mask, back = _flush_right(batch)
    net, R = getattr(model, "module", model), batch["mask"].shape[1]
    where = _apart(net, batch["position_ids"]) if "position_ids" in batch else places(net, mask)
    before = torch.arange(ids.shape[1] - 1, device=ids.device)[-R:]   # no slice: matmul copies W
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=before, **where).logits
    return back(token_logprobs(logits, ids[:, before + 1], temperature))        # of (B, R, V)

def state_values(model, batch):
    """V(x, y_<t) of a batch -> (B, R) fp32: the critic's output before each response token."""
    ids, mask, back = _flush_right(batch)
    return back(model(ids, mask)[:, :-1])

def sequence_scores(model, batch):
    """The reward model's score of each row, read at its last real token -> (B,) fp32."""
    return model(*_flush_right(batch)[:2])[:, -1]

def _flush_right(batch):
    """-> ids, mask (B, t): all rows end in the last column, and padding that all have is left out;
    a function that puts the last R columns, (B, R), back to where a batch's responses are."""
    ids = torch.cat([batch["prompt_ids"], batch["response_ids"]], 1)                    # (B, P + R)
    mask = torch.ones_like(ids) if "position_ids" in batch else \
        torch.cat([batch["prompt_mask"], batch["mask"]], 1).long()
    order, R = mask.argsort(dim=1, stable=True)[:, -mask.sum(1).max():], batch["mask"].shape[1]
    back = lambda x: x.new_zeros(mask.shape).scatter(1, order[:, -x.shape[1]:], x)[:, -R:]
    return ids.gather(1, order), mask.gather(1, order), back

def stack(batches, pad_token_id):
    """Batches of other widths -> one; prompts are widened on the left, the rest on the right."""
    def join(name):
        rows = [row for batch in batches for row in batch[name]]
        side = "left" if name.startswith("prompt_") else "right"
        return torch.stack(rows) if rows[0].ndim == 0 else \
            nn.utils.rnn.pad_sequence(rows, True, pad_token_id * name.endswith("_ids"), side)
    return {name: join(name) for name in batches[0] if name != "rows"}

def save_model(model, tokenizer, path, state=None):
    """Write weights, configs, tokenizer to a temporary folder in `path`, then move them there: an
    interrupted save leaves the previous model.  `state`: weights that are sharded.  Adapters are
    merged, and written to `path`/adapter if nothing else was trained."""
    if getattr(model, "is_quantized", False): model.cpu().dequantize()
    classifier, state = getattr(model, "classifier", model), state or model.state_dict()
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".saving-") as folder:
        if lora.layers(model):
            if not classifier.get_input_embeddings().weight.requires_grad:
                lora.save_adapter(classifier, state, Path(folder, "adapter"))
            state = lora.merge(model, state)
        state = {name.removeprefix("classifier."): weight for name, weight in state.items()}
        classifier.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(Path(path, "adapter"), ignore_errors=True)              # of another run
        new = sorted(Path(folder).rglob("*.*"), key=lambda file: file.name == "config.json")
        for file in new:
            target = Path(path, file.relative_to(folder))
            target.parent.mkdir(exist_ok=True)
            file.replace(target)
        for file in {*Path(path).iterdir()} - {Path(path, file.name) for file in new}:
            if re.fullmatch(SAVED, file.name): file.unlink()                # of another model

def check_same_vocabulary(path, tokenizer, other_path):
    """InputError unless both models, if there is a second, know the same tokens: they share ids."""
    other = load_tokenizer(other_path) if other_path else tokenizer
    if other.get_vocab() != tokenizer.get_vocab():
        raise InputError(f"{path} and {other_path} have different vocabularies: use one family")
    if (end := tokenizer.eos_token) != other.eos_token:
        raise InputError(f"responses end with {end} for {path}, {other.eos_token} for {other_path}:"
                         f" give all steps one --end_of_conversation_token")

def places(model, mask, new=0):
    """Where the `new` (or all) last tokens are: the mask and, for models that take them (those with
    ALiBi do not), position ids that follow it."""
    ids = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]}
    return {"attention_mask": mask, **(ids if takes(type(model), "position_ids") else {})}

def _apart(model, position_ids):
    """Position ids that start again with each sequence of a row, and the mask that keeps them
    apart: explicit, since not every family would infer it.  InputError where that is not enough:
    for ALiBi, layers that pass on a state, windows shorter than the row, which it would undo."""
    wide = lambda layer: type(layer) is DynamicLayer or \
        getattr(layer, "sliding_window", 0) >= position_ids.shape[1]
    if not takes(type(model), "position_ids") or getattr(model.config, "alibi", False) \
            or not all(map(wide, DynamicCache(config=model.config).layers)):
        raise InputError(f"a {type(model).__name__} cannot keep packed sequences apart here: do "
                         f"without --packing or --unsupervised_dataset_name, or take fewer tokens")
    sequence, dtype = (position_ids == 0).cumsum(1), next(model.parameters()).dtype         # (B, T)
    seen = (sequence[:, :, None] == sequence[:, None]).tril()[:, None]                # (B, 1, T, T)
    mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    return {"position_ids": position_ids, "attention_mask": mask}

def _load(kind, path, tokenizer, dtype, length, in_4bit=False, new_head=False):
    """Strict loading (new_head: but for the head) -> the model, was any weight missing?
    Its embeddings grow if the tokenizer gained a token; its configs get the special ids."""
    config = toy.model_config(tokenizer) if path == "toy" else \
        opened(AutoConfig.from_pretrained, path, "the configuration of", trust_remote_code=False)
    config.num_labels, transposed = 1, config.model_type in ("gpt2", "openai-gpt")       # Conv1D's
    rope, name = getattr(config, "rope_parameters", None) or {}, "max_position_embeddings"
    long = rope.get("rope_type") == "longrope"      # past its first context rows change each other
    if length > (limit := rope["original_" + name] if long else getattr(config, name, length)):
        raise InputError(f"--max_*_len: {length} tokens exceed the {limit}-token context of {path}")
    if getattr(config, "quantization_config", None) or in_4bit and transposed:
        raise InputError(f"{path}: give weights that are not quantised; for 4 bits no GPT-1 or -2")
    if path == "toy":
        model, fresh = kind.from_config(config, dtype=dtype), True
    else:
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype) if in_4bit else None
        model, report = opened(kind.from_pretrained, path, "the weights of", config=config, dtype=
                               dtype, trust_remote_code=False, output_loading_info=True,
                               ignore_mismatched_sizes=True, quantization_config=nf4)
        model.apply(lambda m: setattr(m, "support_avx512bf16_for_cpu", False))  # stops gradients
        fresh, heads = report["missing_keys"], ("score.", "lm_head.", "embed_out.")
        for how in ("missing", "unexpected"):
            bad = sorted(n for n in report[f"{how}_keys"] if not (new_head and n.startswith(heads)))
            hint = ": it is no reward model, see train_rm.py" if "score.weight" in bad else ""
            if bad: raise InputError(f"{path} has {len(bad)} {how} weight(s), {bad[0]} first{hint}")
        for name, found, wanted in report["mismatched_keys"]:
            raise InputError(f"{path}: weight {name} has shape {tuple(found)}, not {tuple(wanted)}")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("pad", "eos", "bos")}
    model.config.update(ids)
    if model.can_generate():          # a fresh one: step 3 samples plainly, whatever was there
        model.generation_config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, **ids)
    small = getattr(model.config, "hidden_size", 256) < 256 and length <= 512
    if small and torch.get_float32_matmul_precision() == "medium":
        torch.backends.cuda.enable_flash_sdp(False)      # it starts many small products of oneDNN's
    return model, fresh
