from setuptools import setup

setup(name="rlhf", version="0.1.0", license="MIT", python_requires=">=3.10", packages=["rlhf"],
      description="SFT, reward model and PPO for language models: small, proven, fast",
      install_requires=["torch>=2.6", "deepspeed>=0.17", "transformers>=5", "datasets>=4", "tqdm"],
      extras_require={"test": ["pytest", "pytest-xdist", "tensorboard", "peft"],
                      "log": ["tensorboard"], "plot": ["matplotlib"]})
