"""Imports flow one way: errors, layouts, configurations -> kernels -> compiler -> Python API -> integrations -> CLI.

Checked on the syntax tree, so that an import inside a function counts too.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Modules of the project by layer; a module may import from its own layer and from lower ones.
LAYERS = [
    {"cute_kernels", "cute_kernels.errors"},
    {"cute_kernels.checks"},
    {"cute_kernels.layouts", "cute_kernels.native", "cute_kernels.pack"},
    {"cute_kernels.config"},
    {"cute_kernels.*"},  # the kernels
    {"cute_kernels.compile"},
    {"bitdecoding.quantization", "bitdecoding.cpu", "bitdecoding.tuned", "bitdecoding.cuda"},
    {"bitdecoding.ops", "bitdecoding.torch_ops"},
    {"bitdecoding.cache", "bitdecoding.policy", "bitdecoding"},
    {"bitdecoding.integrations.*"},
    {"bitdecoding.info", "bitdecoding.models", "bitdecoding.*"},  # what the commands run
    {"bitdecoding.cli", "bitdecoding.__main__"},
]
# What a package may import from outside: nothing under cute_kernels knows torch, only the kernels know the compiler.
FORBIDDEN = {
    "cute_kernels": {"torch", "transformers", "bitdecoding"},
    "bitdecoding": {"cutlass", "cuda"},
}
NO_COMPILER = {"errors", "checks", "layouts", "native", "config", "pack", "__init__"}
OPTIONAL = {"transformers", "gguf", "matplotlib", "flashinfer"}  # below the integrations nothing needs them


def layer(module):
    for candidate in (module, f"{module.rpartition('.')[0]}.*"):
        for index, modules in enumerate(LAYERS):
            if candidate in modules:
                return index
    raise AssertionError(f"{module} is in no layer")


def module_name(path, base, package):
    parts = [package, *path.relative_to(base).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def project_files():
    for base, package in ((ROOT / "cute_kernels", "cute_kernels"), (ROOT / "python/bitdecoding", "bitdecoding")):
        for path in sorted(base.rglob("*.py")):
            yield module_name(path, base, package), path


KNOWN = {name for name, _ in project_files()} | set().union(*LAYERS)


def imported(tree, module, is_package):
    """Absolute names of the modules that a syntax tree imports; names from a package count as its submodules."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package
            for _ in range(node.level - 1):
                base = base.rpartition(".")[0]
            source = ".".join(part for part in ((base if node.level else ""), node.module or "") if part)
            # installed, cute_kernels is a part of bitdecoding
            source = source.removeprefix("bitdecoding.") if source.startswith("bitdecoding.cute_kernels") else source
            submodules = [f"{source}.{alias.name}" for alias in node.names]
            yield from (name if name in KNOWN else source for name in submodules)


def violations(module, source, is_package=False):
    top = module.partition(".")[0]
    found = []
    for name in imported(ast.parse(source), module, is_package):
        root = name.partition(".")[0]
        if root in FORBIDDEN[top]:
            found.append(f"{module} imports {name}")
        elif root == "cutlass" and module.rpartition(".")[2] in NO_COMPILER:
            found.append(f"{module} imports {name}: the ground needs no kernel compiler")
        elif root in OPTIONAL and layer(module) < layer("bitdecoding.integrations.transformers"):
            found.append(f"{module} imports {name}, which only an extra installs")
        elif root in ("cute_kernels", "bitdecoding") and layer(name) > layer(module):
            found.append(f"{module} imports {name}, which is above it")
    return found


@pytest.mark.parametrize(
    ("module", "path"), list(project_files()), ids=lambda value: str(value).removeprefix(f"{ROOT}/")
)
def test_no_import_goes_up(module, path):
    assert violations(module, path.read_text(), path.name == "__init__.py") == []


def test_all_sources_are_seen():
    names = dict(project_files())
    assert {"cute_kernels.layouts", "cute_kernels.config", "bitdecoding.ops", "bitdecoding.cli"} <= set(names)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cute_kernels.layouts", "import torch"),
        ("cute_kernels.decode", "def f():\n    from torch import Tensor"),
        ("cute_kernels.layouts", "from .config import QuantSpec"),
        ("cute_kernels.errors", "from . import layouts"),
        ("cute_kernels.config", "import cutlass.cute as cute"),
        ("cute_kernels.decode", "from . import compile"),
        ("bitdecoding.quantization", "from .ops import decode"),
        ("bitdecoding.cuda", "from . import cache"),
        ("bitdecoding.ops", "if True:\n    from .integrations import transformers"),
        ("bitdecoding.cache", "import transformers"),
        ("bitdecoding.integrations.transformers", "from ..cli import main"),
        ("bitdecoding.cuda", "import cutlass"),
    ],
)
def test_planted_violations_are_found(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cute_kernels.decode", "from .config import KernelConfig\nimport cutlass"),
        ("bitdecoding.ops", "from . import cpu\nfrom .cute_kernels import native\nimport torch"),
        ("bitdecoding.integrations.transformers", "from .. import ops\nimport transformers"),
    ],
)
def test_sound_imports_pass(module, source):
    assert violations(module, source) == []
