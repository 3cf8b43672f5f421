"""The rules of the house, read off the source: who may import whom, what is never called, how long a file may be."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up: a room imports only rooms that stand before it. Lazy imports inside functions count too.
LAYERS = {
    "toymodels": [
        "errors",
        "files",
        "plain_yaml",
        "one_line",
        "streams",
        "palette",
        "pages",
        "plots",
        "processes",
        "co_firing",
        "features",
        "mappings",
        "firing",
        "dictionaries",
        "hierarchies",
        "correlations",
        "draws",
        "models",
        "optim",
        "training",
        "geometry",
        "theory",
        "thresholds",
        "sparse_coding",
        "sequences",
        "worlds",
        "synthetic",
        "saelens",
        "transformer",
        "residual",
        "memory",
        "experiments",
        "runner",
        "gallery",
        "progress",
        "toymodels",
        "cli",
        "__main__",
    ],
    "sae": [
        "errors",
        "extras",
        "names",
        "stopping",
        "launch",
        "hub",
        "codes",
        "config_text",
        "scores",
        "console",
        "hooks",
        "config_base",
        "config",
        "plugins",
        "losses",
        "heavy_tails",
        "optim",
        "kernels",
        "sparsifiers",
        "model",
        "initialise",
        "levels",
        "by_autograd",
        "gradients",
        "dense_step",
        "refine",
        "ranks",
        "parts",
        "engine",
        "resampling",
        "schedules",
        "arrays",
        "held_out",
        "sources",
        "locks",
        "stores",
        "world_source",
        "prefetch",
        "metrics",
        "evaluation",
        "diagnosis",
        "capture",
        "trainer",
        "members",
        "checkpoint",
        "log",
        "directory",
        "formats",
        "ensemble",
        "networks",
        "report",
        "warm_start",
        "start",
        "run",
        "again",
        "elsewhere",
        "latents",
        "unfinished",
        "baselines",
        "digits",
        "demo",
        "sweep",
        "bench",
        "leaderboard",
        "sae",
        "commands",
        "cli",
        "__main__",
    ],
}
SLOW_TO_IMPORT = {"wandb", "matplotlib", "plotly", "sklearn", "transformers", "datasets", "tyro", "rich", "scipy"}
RUN_CODE_ON_LOADING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
MAX_LINES = 400


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {module_name(path): path for package in LAYERS for path in sorted((ROOT / package).rglob("*.py"))}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


@cache
def imports(module: str) -> frozenset[str]:
    """Every module that is imported anywhere in this one, by its full name."""
    names = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno} is a relative import; write the whole name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = inner & PATHS.keys()
            names |= modules if modules else {str(node.module)}
            if modules and modules != inner:
                names.add(str(node.module))
    return frozenset(names)


def room(module: str) -> str:
    """The file or folder right inside the package; the package's own __init__ has the package's name."""
    return module.split(".")[1] if "." in module else module


def own_imports(module: str) -> set[str]:
    """Those of the same package."""
    package = module.partition(".")[0]
    return {name for name in imports(module) if name.split(".")[0] == package} - {module}


def test_the_reader_sees_imports():
    """The proofs below are worth what `imports` finds: lazily imported modules, and modules named after `from`."""
    assert {"sae.checkpoint", "sae.start", "sae.directory", "sae.report"} <= imports("sae.run")
    assert "toymodels.files" in imports("sae.directory")
    assert "wandb" in imports("sae.log")


def test_toymodels_stands_alone():
    toys = [module for module in PATHS if module.split(".")[0] == "toymodels"]
    assert toys
    assert [f"{toy} imports {name}" for toy in toys for name in imports(toy) if name.split(".")[0] == "sae"] == []


def test_imports_make_no_circle():
    TopologicalSorter({module: own_imports(module) for module in PATHS}).prepare()


@pytest.mark.parametrize("package", LAYERS)
def test_imports_point_down(package):
    order = LAYERS[package]
    rooms = {room(module) for module in PATHS if module.split(".")[0] == package}
    assert rooms == set(order), "a new file takes its place in LAYERS, one that is gone leaves it"
    upward = [
        f"{module} imports {name}"
        for module in PATHS
        for name in own_imports(module)
        if module.split(".")[0] == package
        and room(name) != room(module)
        and order.index(room(name)) > order.index(room(module))
    ]
    assert upward == []


def test_import_sae_is_light():
    code = "import sys, sae; print(*{name.split('.')[0] for name in sys.modules})"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = set(ended.stdout.split())
    assert {"sae", "toymodels", "torch"} <= loaded
    assert loaded & SLOW_TO_IMPORT == set()


def runs_code(node: ast.AST) -> bool:
    """pickle and its kin, eval, exec, yaml.load, torch.load, and allow_pickle=True."""
    match node:
        case ast.Import(names=names):
            return any(alias.name.split(".")[0] in RUN_CODE_ON_LOADING for alias in names)
        case ast.ImportFrom(module=str(module), names=names):
            taken = {alias.name for alias in names}
            pickles = module.split(".")[0] in RUN_CODE_ON_LOADING and taken != {"UnpicklingError"}
            return pickles or _is_loader(module, taken)
        case ast.Call(func=ast.Name(id="eval" | "exec")):
            return True
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return _is_loader(owner, {name})
        case ast.keyword(arg="allow_pickle", value=value):
            return not (isinstance(value, ast.Constant) and value.value is False)
    return False


def running_code(root: ast.AST) -> list[ast.AST]:
    """All that does, but for torch.load(..., weights_only=True)."""
    safe = [
        node.func
        for node in ast.walk(root)
        if isinstance(node, ast.Call) and any(ast.unparse(word) == "weights_only=True" for word in node.keywords)
    ]
    return [node for node in ast.walk(root) if runs_code(node) and node not in safe]


def _is_loader(owner: str, names: set[str]) -> bool:
    return bool({"torch": {"load"}, "yaml": {"load", "unsafe_load", "full_load"}}.get(owner, set()) & names)


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from pickle import loads", "from yaml import load", "eval(x)"),
        *("torch.load(x)", "torch.load(x, weights_only=False)", "read = torch.load"),
        "np.load(x, allow_pickle=True)",
    ],
)
def test_what_runs_code_is_recognised(code):
    assert running_code(ast.parse(code))
    assert not running_code(ast.parse("torch.load(x, weights_only=True)"))


@pytest.mark.parametrize("module", PATHS)
def test_loading_never_runs_code(module):
    assert [f"{PATHS[module]}:{node.lineno}" for node in running_code(tree(module))] == []


@pytest.mark.parametrize("module", PATHS)
def test_files_are_small_and_say_what_they_are(module):
    assert len(PATHS[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    public = [
        node
        for node in tree(module).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(tree(module)), "a file begins with a line on what it holds"
    assert bare == [], "a public function or class has a docstring"
