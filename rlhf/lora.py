"""LoRA: linear maps W stay as they are and get a trained one of low rank beside them.
Hu et al. 2021 (arXiv:2106.09685) eq. 3: h = W x + (alpha / r) B A x.  B starts as zero, so that the
model starts as it was; with its adapters off it is the reference of PPO and DPO."""
import json
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from rlhf.args import InputError
layers = lambda model: {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}

class LoRA(nn.Module):
    """A Linear (perhaps in 4 bits) or GPT-2's Conv1D, with an adapter of this rank."""
    enabled = True                                                                     # all of them
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.rank, self.alpha = base, rank, alpha
        rows, columns = (base.nf, base.nx) if isinstance(base, Conv1D) else \
            (base.out_features, base.in_features)
        like = base.weight.new_empty(0, dtype=getattr(base, "compute_dtype", base.weight.dtype))
        self.lora_A = nn.Parameter(like.new_empty(rank, columns))
        self.lora_B = nn.Parameter(like.new_zeros(rows, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)              # as nn.Linear does, and PEFT
    def forward(self, x):
        if not self.enabled: return self.base(x)
        low = nn.functional.linear(x, self.lora_A)                                      # (B, T, r)
        return self.base(x) + self.alpha / self.rank * nn.functional.linear(low, self.lora_B)

def add(model, rank, alpha, modules, only):
    """Adapters (alpha None: 2 x rank) beside linear maps, but heads, with one of `modules` in their
    names (else InputError).  Their W are frozen; with `only`, all else but a scalar head."""
    parts = [""] if modules == "all-linear" else [p.strip() or " " for p in modules.split(",")]
    linears = {name: module for name, module in model.named_modules() if isinstance(
        module, (nn.Linear, Conv1D)) and not name.endswith(("lm_head", "embed_out", "score"))}
    chosen = {name: m for name, m in linears.items() if any(part in name for part in parts)}
    if not all(any(part in name for name in linears) for part in parts):
        raise InputError(f"--lora_module_name {modules} is in no linear layer's name: choose parts "
                         f"of names such as {', '.join([*linears][:3])}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and (not only or "score." in name))
    for name, base in chosen.items():
        base.weight.requires_grad_(False)
        model.set_submodule(name, LoRA(base, rank, alpha or 2 * rank))

class WithoutAdapters:
    """A trained engine as it was before its adapters, to be called as any model is."""
    def __init__(self, engine):
        self.engine, self.module = engine, engine.module
    def __call__(self, **inputs):
        LoRA.enabled = False
        outputs = self.engine(**inputs)
        LoRA.enabled = True
        return outputs

def merge(model, state):
    """A model's full state dict -> without adapters, each folded into its W in fp32."""
    merged = {name.replace(".base.", "."): w for name, w in state.items() if ".lora_" not in name}
    for name, layer in layers(model).items():
        A, B = (state[f"{name}.lora_{part}"].float() for part in "AB")
        change, weight = layer.alpha / layer.rank * B @ A, merged[f"{name}.weight"]     # (out, in)
        change = change.T if isinstance(layer.base, Conv1D) else change
        merged[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return merged

def save_adapter(model, state, path):
    """The adapter and any scalar head alone, in PEFT's file layout."""
    found = layers(model)
    state = {name.removeprefix("classifier."): w.contiguous() for name, w in state.items()}
    tensors = {f"base_model.model.{name}.lora_{part}.weight": state[f"{name}.lora_{part}"]
               for name in found for part in "AB"}
    head = {f"base_model.model.{name}": w for name, w in state.items() if name.startswith("score.")}
    one, start = next(iter(found.values())), model.config._name_or_path
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS" if head else "CAUSAL_LM",
              "base_model_name_or_path": start, "r": one.rank, "lora_alpha": one.alpha,
              "fan_in_fan_out": isinstance(one.base, Conv1D), "target_modules": [*found],
              "modules_to_save": ["score"] if head else None, "inference_mode": True}
    path.mkdir()
    save_file({**tensors, **head}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
