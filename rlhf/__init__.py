"""The reference implementation of RLHF: supervised fine-tuning, reward model, PPO."""
