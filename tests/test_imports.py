"""Imports: one direction, no circles, MPI in one place, and a package that starts nothing."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "distfl"
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sorted(PACKAGE.rglob("*.py"))}

# Lower lines may import upper lines, and within a line the right may import the left; never the reverse.
ORDER = """
    errors signals seeds files allocator forking parent settings config launching torchrun starting run_folder links
    model units shards corpora partition family huggingface optimizers replica
    frozen recipes messages
    transport.base checksums transport.local transport.control transport.mpi transport.torch_dist
    codecs.base codecs.bf16 codecs.int8 codecs.*
    encoding updates residuals
    costs fleet planner lora singular
    caps.base caps.process caps.rlimit caps.cgroup caps.cuda caps.choice
    steps features training
    methods.base methods.fedavg methods.lora methods.heterofl methods.*
    aggregation server_optimizer checkpoints
    hosting exchange calibration
    recovery results rounds
    pretrain reporting audit scaling jobs plans progress recording comparison standings comparison_tables comparison_pictures
    running
    doctor cli __main__
"""


def top_level(path: Path) -> list[ast.stmt]:
    """What runs when the module is imported: not functions, not `if TYPE_CHECKING`."""
    statements, todo = [], list(ast.parse(path.read_text()).body)
    while todo:
        statement = todo.pop()
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(statement, ast.If) and isinstance(statement.test, ast.Name) and statement.test.id == "TYPE_CHECKING":
            todo += statement.orelse
            continue
        statements.append(statement)
        todo += [child for child in ast.iter_child_nodes(statement) if isinstance(child, ast.stmt)]
    return statements


def imported(nodes) -> set[str]:
    """Full names of everything imported by some statements: modules, and names out of modules."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def dependencies(path: Path) -> set[str]:
    """distfl modules that importing this one imports by name (not the packages on the way to them)."""
    names = {name for name in imported(top_level(path)) if name in FILES}
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def place(module: str) -> int:
    """Position in ORDER."""
    words, name = ORDER.split(), module.removeprefix("distfl.")
    return words.index(name) if name in words else words.index(f"{name.rpartition('.')[0]}.*")


MODULES = [module for module, path in FILES.items() if path.name != "__init__.py"]


def test_every_module_has_its_place():
    for module in MODULES:
        place(module)
    named = [name for name in ORDER.split() if not name.endswith("*")]
    assert {f"distfl.{name}" for name in named} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_upwards_in_the_order(module):
    wrong = [name for name in dependencies(FILES[module]) - {"distfl"} if place(name) >= place(module)]
    assert not wrong, f"{module} imports {wrong}"


def test_there_are_no_circles():
    list(graphlib.TopologicalSorter({module: dependencies(path) - {module} for module, path in FILES.items()}).static_order())


def everything(path: Path) -> set[str]:
    """Imports anywhere, also inside functions."""
    return imported(ast.walk(ast.parse(path.read_text())))


def test_only_the_mpi_transport_imports_mpi4py():
    using = [module for module, path in FILES.items() if any(name.split(".")[0] == "mpi4py" for name in everything(path))]
    assert using == ["distfl.transport.control", "distfl.transport.mpi"]


def test_only_the_torch_transport_and_its_launcher_import_torch_distributed():
    using = {module for module, path in FILES.items() if any(name.startswith("torch.distributed") for name in everything(path))}
    assert using == {"distfl.transport.torch_dist", "distfl.torchrun"}


def test_only_the_outside_imports_rounds():
    importing = {module for module, path in FILES.items() if "distfl.rounds" in everything(path)}
    assert importing == {"distfl.running"}


@pytest.mark.parametrize("module", FILES)
def test_no_module_is_longer_than_420_lines(module):
    assert len(FILES[module].read_text().splitlines()) <= 420


@pytest.mark.parametrize(
    "module, heavy",
    [
        ("distfl", ("torch", "numpy", "mpi4py")),
        ("distfl.cli", ("torch", "numpy", "mpi4py", "transformers", "datasets")),  # the launcher only waits for mpirun
        # what a client rank imports
        ("distfl.rounds", ("mpi4py", "transformers", "datasets", "tokenizers", "tensorboard", "yaml", "torch._dynamo", "sympy")),
    ],
)
def test_importing_starts_nothing_heavy(module, heavy):
    script = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
