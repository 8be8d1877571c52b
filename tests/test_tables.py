"""The benchmarks' rows arrive in docs/speed.md, and nothing else of it changes."""

import sys

from tests.bench import tables


def test_one_command_writes_the_tables_and_the_commit(tmp_path, monkeypatch):
    before, page = tables.PAGE.read_text(), tmp_path / "speed.md"
    page.write_text(before)
    commands = []

    def output(command):
        commands.append(command)
        if command[0] == "git":
            return "abcdef0\n"
        return f"| step | TRL over ours |\n|---|---|\n| run {len(commands)} | 1.00 | ours |\n"

    monkeypatch.setattr(tables, "output", output)
    monkeypatch.setattr(tables, "PAGE", page)
    paths = ["--fixture", "F", "--ppo", "P", "D", "--steps", "Q"]
    monkeypatch.setattr(sys, "argv", ["tables.py", *paths])
    tables.main()
    rows = [f"| run {i} | 1.00 | ours |" for i in range(2, 9)]
    old, new = before.splitlines(), page.read_text().splitlines()
    assert [line for line in new if line not in old and "commit abcdef0" not in line] == rows
    gone = [line for line in old if line not in new]
    assert all(line.startswith("| ") or "range, at commit" in line for line in gone)
    assert len(gone) == 5 + 6 + 1 and "commit abcdef0" in page.read_text()
    assert [command[-2:] for command in commands[1:6]] == [["P", "D"]] * 5
    assert all(command[-1] == "Q" for command in commands[6:]) and len(commands) == 8
