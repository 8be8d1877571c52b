"""Exponential moving average of the policy, as Ouyang et al. 2022 (arXiv:2203.02155) keep one."""
local = lambda parameter: getattr(parameter, "ds_tensor", parameter).detach()    # ZeRO-3's shard

class EMA:
    """An fp32 shadow of this rank's trained parameters (under ZeRO-3 its shard)."""
    # differs: DeepSpeed-Chat's is in the model's dtype, every micro-batch, and lost under ZeRO-3
    def __init__(self, module, decay=0.992):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.decay, self.shadow = decay, [local(p).float().clone() for p in self.parameters]
    def update(self):
        """Once an optimizer step: shadow <- decay * shadow + (1 - decay) * parameter."""
        for shadow, parameter in zip(self.shadow, self.parameters):
            shadow.lerp_(local(parameter).float(), 1 - self.decay)
    def load(self):
        """Overwrite the module's weights with the average, once the trained ones are saved."""
        for shadow, parameter in zip(self.shadow, self.parameters): local(parameter).copy_(shadow)
