"""The memory that is foretold is the memory that is used."""

import json
import sys

from tests.conftest import ENV, make_model, run


def test_foretold_memory_is_within_15_percent_of_real_steps(tmp_path):
    shape = dict(hidden_size=384, intermediate_size=1536, num_hidden_layers=4, head_dim=96)
    shape.update(num_attention_heads=4, num_key_value_heads=4, vocab_size=12000)
    path = make_model(tmp_path / "model", **shape)
    done = run([sys.executable, "tests/peaks.py", path, str(tmp_path / "out.json")], **ENV)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out.json") as file:
        found = json.load(file)
    assert len(found) == 7
    for name, (real, foretold) in found.items():
        assert abs(foretold / real - 1) < 0.15, (name, real, foretold)
