"""The four scripts in order as a user runs them, and the rules of the house."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("01_edit_data.py", "02_reward_model.py", "03_ppo.py", "04_eval.py")


def run_script(name, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, str(ROOT / name), *flags], capture_output=True, text=True,
                          env=environment, stdin=subprocess.DEVNULL)


def test_the_four_scripts_in_order(tmp_path):
    run = str(tmp_path / "run")
    commands = [
        ("01_edit_data.py", "--train_prompts", "80", "--val_prompts", "10", "--test_prompts", "20",
         "--sft_steps", "30", "--hidden_size", "32", "--layers", "2", "--max_edit_share", "1.0"),
        ("02_reward_model.py", "--epochs", "1", "--locate_epochs", "1"),
        ("03_ppo.py", "--updates", "2", "--rollout_batch", "16", "--minibatch", "8", "--rlmec_samples", "16",
         "--rlmec_epochs", "1"),
        ("04_eval.py",)]
    for name, *flags in commands:
        result = run_script(name, "--run", run, *flags)
        assert result.returncode == 0, result.stderr
        assert "\033[" not in result.stdout                           # pipes cleanly
        assert (tmp_path / "run" / f"{name[:2]}_args.json").exists()
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text())
    for policy in ("ppo_token", "ppo_sequence"):
        assert {"win_rate", "win_rate_se", "win_rate_ci95", "n", "accuracy", "wrong_steps_per_response",
                "kl_to_ref", "updates", "seconds", "episodes_to_best_baseline"} <= set(evaluation["policies"][policy])
        assert evaluation["policies"][policy]["n"] == 20
    assert {"pair_accuracy", "localisation"} <= set(evaluation["reward_models"]["token"])
    assert isinstance(evaluation["warnings"], list)
    header = (tmp_path / "run" / "ppo_token.csv").read_text().splitlines()[0].split(",")
    assert {"update", "episodes", "seconds", "accuracy", "kl", "clipfrac", "entropy"} <= set(header)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_field(name):
    result = run_script(name, "--help")
    assert result.returncode == 0
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    fields = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args").body
    for field in fields:
        assert f"--{field.target.id}" in result.stdout
        assert "help" in ast.unparse(field), f"{field.target.id} has no help text"


def test_copies_of_a_helper_are_equal():
    """No script imports another; a function that stands in several is the same, letter for letter."""
    seen = {}
    for name in SCRIPTS:
        source = (ROOT / name).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in ("main", "Args"):
                decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
                text = (decorators, ast.get_source_segment(source, node))
                assert seen.setdefault(node.name, text) == text, f"{node.name} in {name} differs"


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_and_lines(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    allowed = {"torch", "transformers", "numpy", "tqdm", "tokenizers", "huggingface_hub"} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert module.split(".")[0] in allowed
    assert max(map(len, source.splitlines())) <= 110


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_is_read(name):
    source = (ROOT / name).read_text(encoding="utf-8")
    fields = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    for field in fields.body:
        assert f"args.{field.target.id}" in source or f'"{field.target.id}"' in source


def test_readme_points_at_the_lines_and_flags_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\[`(\w+)`\]\((0\d_\w+\.py)#L(\d+)\)", readme)
    assert {"edit_distance", "fine_grained_loss", "scores_of", "gae", "policy_loss"} <= {name for name, _, _ in links}
    for name, script, line in links:
        text = (ROOT / script).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert text.startswith(f"def {name}("), f"README: {name} is not at {script} line {line}"
    sources = "".join((ROOT / name).read_text(encoding="utf-8") for name in SCRIPTS)
    for flag in set(re.findall(r"(?<![\w-])--([a-z][a-z_]+)", readme)) - {"help"}:
        assert f"    {flag}: " in sources, f"README: no script has --{flag}"


def test_ci_runs_the_commands_of_the_readme():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert all(line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines() for line in commands)


def test_readme_shows_the_prompts(edit_data, evaluation):
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for prompt in (edit_data.LLM_PROMPT, evaluation.JUDGE_PROMPT):
        assert " ".join(prompt.split()) in readme
