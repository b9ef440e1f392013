"""The rules of the house, and the four scripts as a user runs them."""

import ast, json, re, subprocess, sys
import pytest
from conftest import ROOT, STAGES, three
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT_LINES, SCRIPT_CHARACTERS = 1953, 108463   # only ever go down; the plan: 2,050 and 95,000
README_LINES, TEST_LINES, OPTIONS, FUNCTION_LINES, COLUMNS = 220, 1200, 22, 45, 100   # the plan's
PACKAGES = {"torch", "transformers", "numpy", "tqdm", "huggingface_hub", "tokenizers",
            "safetensors", *sys.stdlib_module_names}
QUIET = {"hf.logging.set_verbosity_error()", "hf.logging.disable_progress_bar()"}

def read(path):
    return path.read_text(encoding="utf-8")

OPTIONS_OF = {name: {*sys.modules[name].Args.__dataclass_fields__} for name in STAGES}

def test_the_whole_is_small():
    scripts = "".join(read(ROOT / f"{name}.py") for name in STAGES)
    assert len(scripts.splitlines()) <= SCRIPT_LINES and len(scripts) <= SCRIPT_CHARACTERS
    tests = "".join(map(read, (ROOT / "tests").glob("*.py")))
    assert 400 < len(tests.splitlines()) <= TEST_LINES
    assert len(read(ROOT / "README.md").splitlines()) <= README_LINES

def test_the_readme_points_at_its_functions():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", read(ROOT / "README.md"))
    assert len(links) > 20
    for name, script, line in links:
        there = read(ROOT / script).splitlines()[int(line) - 1]
        assert there.startswith(f"def {name}("), (name, there)

def test_lines_and_functions_are_short():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        nodes = list(ast.walk(ast.parse(read(path))))
        starts = [node.lineno for node in nodes if isinstance(node, ast.stmt)]
        sizes = {node.name: node.end_lineno - node.lineno + 1 for node in nodes
                 if isinstance(node, ast.FunctionDef)}
        assert not [line for line in read(path).splitlines() if len(line) > COLUMNS], path.name
        assert not [line for line in {*starts} if starts.count(line) > 1], path.name
        assert not [name for name, size in sizes.items() if size > FUNCTION_LINES], path.name

def test_copies_of_a_helper_are_equal():
    """A function or a constant that stands in several scripts is the same in all of them."""
    seen, copies = {}, 0
    for stage in STAGES:
        for node in ast.parse(read(ROOT / f"{stage}.py")).body:
            names = {getattr(node, "name", None), *map(ast.unparse, getattr(node, "targets", []))}
            for name in names - {None, "main", "Args"}:
                copies += name in seen
                assert seen.setdefault(name, ast.dump(node)) == ast.dump(node), (name, stage)
    assert copies > 20

@pytest.mark.parametrize("stage", STAGES)
def test_a_script_stands_alone(stage):
    """Few options, all read; only allowed packages, no other script; to import it runs nothing."""
    tree = ast.parse(read(ROOT / f"{stage}.py"))
    nodes = list(ast.walk(tree))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert 7 < len(OPTIONS_OF[stage]) <= OPTIONS
    assert not {f"args.{name}" for name in OPTIONS_OF[stage]} - names
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
    assert {module.split(".")[0] for module in modules} <= PACKAGES - {"importlib", "runpy"}
    *body, last = tree.body[1:]
    defines = (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef)
    assert {ast.unparse(node) for node in body if not isinstance(node, defines)} <= QUIET
    assert ast.unparse(last).startswith("if __name__ == '__main__':")

def test_the_four_scripts_in_order(tmp_path):
    flags = ["--train_prompts 40 --test_prompts 16 --sft_steps 9 --hidden_size 16 "
             "--samples 4 --max_edit_share 1.0", "--kind token --epochs 1",
             "--updates 1 --rollout_batch 8 --max_new_tokens 1", ""]
    for name, more in zip(STAGES, flags):
        result = subprocess.run([sys.executable, ROOT / f"{name}.py", "--run", "run",
                                 *more.split()], cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert {*json.loads(read(tmp_path / "run" / f"{name[:2]}_args.json"))} == OPTIONS_OF[name]
    assert len([*tmp_path.iterdir()]) == 1 and not [*(tmp_path / "run").glob("*.part")]
    row = json.loads(read(tmp_path / "run" / "eval.json"))["policies"]["ppo_token"]
    assert row["n"] == 16 and row["wrong_steps_per_response"] > 4  # four steps, and not ended

def test_model_folders_open_plainly(tiny_run):
    vocabulary = AutoTokenizer.from_pretrained(tiny_run / "policy").get_vocab()
    folders = [path.parent for path in tiny_run.glob("*/model.safetensors")]
    for path in folders:
        kind = path.name.removeprefix("reward_")
        auto_class = three.KINDS.get(kind, AutoModelForCausalLM)
        model, info = auto_class.from_pretrained(path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert auto_class is AutoModelForCausalLM or model.config.num_labels == 1
        assert AutoTokenizer.from_pretrained(path).get_vocab() == vocabulary
    assert len(folders) == 6
