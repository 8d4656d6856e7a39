"""The shape of the package, held as data: who may import whom, how long a file may be.

The hourglass pays only while nobody cuts through it: a report opens on a laptop without torch, and
the monitor watches a model that nobody converted. So TABLE names, room by room, all that it may
import, and the source is walked as syntax: top level, function bodies and `if TYPE_CHECKING` alike.
What only running shows (torch unimported, the time of `import fp8lab`) is measured in fresh
processes, a few seconds in all. The alternative, import-linter, is a dependency and a second
vocabulary for what the walk below says in our words.
"""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOOR = "__init__"
FILE_LINES = 500
FUNCTION_LINES = 60
IMPORT_SECONDS = 0.1

ARITHMETIC = {"formats", "recipe", "plan", "rounding", "kernels", "casting", "regions", "linear"}
ARITHMETIC |= {"scaling", "optim", "accumulation", "rewriting", "agreement"}
STORE = {"store", "runs", "segments", "wanted"}
NECK = {"formats", "recipe", "sketch", "record"} | STORE
SITES = {
    "sites",
    "sites.tracing",
    "sites.probing",
    "sites.gating",
    "sites.te_modules",
    "sites.te_inside",
    "sites.te_casts",
}
SITES |= {"sites.torchao_casts"}
MONITOR = {
    "monitor",
    "monitor.probes",
    "monitor.taps",
    "monitor.step_probes",
    "monitor.recorder",
    "monitor.ranks",
    "monitor.selection",
}
MONITOR |= {
    "monitor.measure",
    "monitor.statistics",
    "sites.observe",
    "monitor.about",
    "monitor.precision",
    "monitor.beginning",
}
LAB = (
    (ARITHMETIC | NECK | SITES | MONITOR)
    | {"ffn", "engines", "conversion", "mitigations"}
    | {"forecast"}
    | {"diagnosis", "guard", "checkpoint", "failure"}
)
ALL = LAB | {"comparison", "lab", "bisection", "progress", "report", "integrations"}
ALL |= {"listing", "live", "terminal", "ending"}

# A room may always import itself.
TABLE: dict[str, set[str]] = {
    "formats": set(),
    "recipe": {"formats"},
    "plan": {"formats", "recipe"},
    "rounding": {"formats"},
    "sketch": {"formats", "recipe"},
    "record": {"formats", "sketch"},
    "kernels": {"formats", "sketch"},
    "scaling": {"formats", "recipe", "kernels"},
    "casting": {"formats", "recipe", "plan", "rounding", "kernels", "scaling"},
    "agreement": set(),
    "regions": {"agreement", "recipe"},
    "accumulation": {"recipe"},
    "rewriting": set(),
    "linear": {"formats", "recipe", "kernels", "scaling", "casting", "regions", "accumulation"}
    | {"rewriting", "rounding"},
    "optim": {"formats", "scaling"},
    "ffn": {"formats", "rounding"},
    "hooking": set(),
    "failure": set(),
    "sites.tracing": set(),
    "sites.gating": {"ffn", "sites.tracing"},
    "sites.probing": {"ffn", "sites.tracing", "sites.te_modules", "sites.te_casts"},
    "sites": {
        "ffn",
        "recipe",
        "sites.gating",
        "sites.probing",
        "sites.tracing",
        "sites.te_modules",
        "sites.te_casts",
    }
    | {"sites.torchao_casts"},
    "sites.te_casts": {"recipe", "plan", "rounding", "casting", "scaling"},
    "sites.torchao_casts": {"formats", "recipe", "rounding", "casting", "scaling"},
    "sites.te_inside": {"recipe", "sites.observe", "sites", "sites.te_casts"},
    "sites.te_modules": {"sites.observe", "sites", "sites.te_casts", "sites.te_inside"},
    "sites.observe": {"sites.gating", "hooking", "sites", "sites.tracing", "sites.te_modules"},
    "engines": {"formats", "recipe", "plan", "rounding", "regions"},
    "conversion": ARITHMETIC | {"sites", "sites.probing", "ffn", "engines"},
    "mitigations": ARITHMETIC | {"sites", "ffn", "conversion", "hooking"},
    "monitor.measure": {"formats", "recipe", "sketch", "kernels", "scaling", "casting"},
    "monitor.statistics": {"formats", "recipe", "rounding", "scaling", "casting"},
    "monitor.selection": {"plan"},
    "monitor.recorder": {
        "recipe",
        "record",
        "sketch",
        "casting",
        "monitor.measure",
        "monitor.statistics",
        "monitor.selection",
    },
    "monitor.ranks": {"agreement", "sketch", "store", "monitor.recorder"},
    "monitor.probes": {
        "casting",
        "sites.gating",
        "kernels",
        "monitor.measure",
        "sites",
        "sites.observe",
        "monitor.recorder",
    },
    "monitor.taps": {
        "casting",
        "monitor.measure",
        "sites.observe",
        "monitor.probes",
        "recipe",
        "monitor.recorder",
        "monitor.selection",
        "sites",
    }
    | {"hooking", "rewriting", "monitor.step_probes"},
    "monitor.step_probes": {"hooking", "sites.observe", "monitor.probes", "monitor.recorder"},
    "monitor.precision": {
        "hooking",
        "sites.observe",
        "monitor.probes",
        "monitor.ranks",
        "monitor.recorder",
        "sites.te_casts",
        "sites.torchao_casts",
        "agreement",
        "plan",
    },
    "monitor.beginning": {
        "agreement",
        "record",
        "monitor.precision",
        "monitor.ranks",
        "monitor.recorder",
        "monitor.selection",
        "monitor.taps",
        "sites",
        "store",
    },
    "monitor.about": {"monitor.precision", "monitor.probes", "sites"},
    "monitor": NECK
    | SITES
    | (MONITOR - {"monitor.measure", "monitor.statistics", "sites.observe"})
    | {"agreement", "casting", "failure"},
    "wanted": {"record"},
    "segments": {"record", "wanted"},
    "runs": {"record", "segments", "wanted"},
    "store": {"failure", "record", "runs", "segments"},
    "forecast": {"formats", "recipe", "plan", "record", "runs", "segments", "sketch"},
    "ending": {"runs"},
    "diagnosis": NECK | {"ending", "plan"},
    "guard": {
        "agreement",
        "monitor",
        "monitor.recorder",
        "diagnosis",
        "record",
        "runs",
        "wanted",
    },
    "progress": {"terminal"},
    "bisection": {"failure", "recipe", "plan", "runs", "store", "diagnosis"},
    "checkpoint": {"formats", "recipe", "rounding", "scaling", "casting", "kernels", "record"}
    | {"sites", "monitor", "store"},
    "comparison": {"runs"},
    "report": NECK | {"comparison", "forecast", "diagnosis"},
    "listing": {"comparison", "ending", "failure", "recipe", "runs", "store", "terminal"},
    "live": {"diagnosis", "ending", "record", "report", "runs", "segments", "terminal"},
    "terminal": set(),
    "integrations": {"monitor", "guard", "sites", "store", "recipe", "record", "monitor.statistics"}
    | {"casting", "plan"},
    "lab": LAB,
    "cli": ALL | {DOOR},
    DOOR: ALL,
}
TORCH_FREE = NECK | {"comparison", "forecast", "diagnosis", "report"}
TORCH_FREE |= {"listing", "live", "terminal", "failure", "ending"}


# module -> source, where a package is named by its file: `fp8lab.report.__init__`
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text()
    for path in sorted(ROOT.glob("fp8lab/**/*.py"))
}


def imports(module: str, source: str) -> Iterator[tuple[str, int, bool]]:
    """Yield (target, line, runs at import) for every import of fp8lab in `source`."""
    package = module.split(".")[:-1]

    def targets(node: ast.stmt) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            return [f"{origin}.{alias.name}" for alias in node.names]
        return []

    def walk(nodes: list[ast.stmt], now: bool) -> Iterator[tuple[str, int, bool]]:
        for node in nodes:
            for target in targets(node):
                if target.split(".")[0] == "fp8lab":
                    yield target, node.lineno, now
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for name, block in ast.iter_fields(node):
                later = is_function or (is_typing and name == "body")
                if isinstance(block, list):
                    yield from walk([n for n in block if isinstance(n, ast.AST)], now and not later)

    return walk(ast.parse(source).body, True)


def room_of(target: str) -> str:
    """The room that an import reaches; `fp8lab.convert` is a name in the door, not a room."""
    _, *parts = target.split(".")
    return next((room for room in (".".join(parts[:2]), *parts[:1]) if room in TABLE), DOOR)


def trespasses(module: str, source: str) -> list[str]:
    room = room_of(module)
    if room == DOOR != module.split(".")[1]:
        return [f"{module}: no room in the table"]
    return [
        f"{module}:{line} imports {target}; {room} may import {sorted(TABLE[room])}"
        for target, line, _ in imports(module, source)
        if room_of(target) not in TABLE[room] | {room}
    ]


def cycle(sources: Mapping[str, str]) -> list[str]:
    """One cycle among the imports that run when a module is imported, or nothing."""

    def owner(target: str) -> str:
        for known in (target, f"{target}.{DOOR}"):
            if known in sources:
                return known
        return owner(target.rpartition(".")[0]) if "." in target else target

    graph = {
        module: {owner(target) for target, _, now in imports(module, source) if now}
        for module, source in sources.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def oversized(module: str, source: str) -> list[str]:
    num_lines = len(source.splitlines())
    too_long = [f"{module}: {num_lines} lines"] if num_lines > FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                too_long.append(f"{module}:{node.lineno} {node.name}: {length} lines")
    return too_long


def in_fresh_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imports_torch(modules: str) -> bool:
    return in_fresh_process(f"import sys, {modules}; print('torch' in sys.modules)") == "True"


def test_every_import_is_in_the_table() -> None:
    assert [line for module, source in SOURCES.items() for line in trespasses(module, source)] == []


def test_no_cycle_at_import() -> None:
    assert cycle(SOURCES) == []


def test_files_and_functions_fit() -> None:
    assert [line for module, source in SOURCES.items() for line in oversized(module, source)] == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fp8lab.sketch", "import fp8lab.casting"),
        ("fp8lab.sketch", "from fp8lab import casting"),
        ("fp8lab.linear", "from fp8lab import convert"),
        ("fp8lab.linear", "import fp8lab"),
        ("fp8lab.monitor", "def attach():\n    from fp8lab.linear import Fp8Linear"),
        ("fp8lab.monitor", "try:\n    pass\nexcept ImportError:\n    import fp8lab.lab"),
        ("fp8lab.monitor", "match 1:\n    case 1:\n        import fp8lab.lab"),
        ("fp8lab.monitor.measure", "from fp8lab.monitor import watch"),
        ("fp8lab.store", "if TYPE_CHECKING:\n    from .monitor import watch"),
        ("fp8lab.diagnosis.spikes", "from ..lab import model"),
        ("fp8lab.diagnosis.__init__", "from .. import lab"),
        ("fp8lab.utils", ""),
    ],
)
def test_a_trespass_is_caught(module: str, source: str) -> None:
    assert len(trespasses(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fp8lab.recipe", "import torch\nfrom fp8lab.formats import E4M3"),
        ("fp8lab.diagnosis.__init__", "from . import spikes\nfrom .spikes import find"),
        ("fp8lab.diagnosis.spikes", "from ..store import Run\nfrom fp8lab.diagnosis import drift"),
        ("fp8lab.cli", "def run():\n    import fp8lab\n    from fp8lab.lab import experiment"),
    ],
)
def test_what_the_table_allows_passes(module: str, source: str) -> None:
    assert trespasses(module, source) == []


def test_a_cycle_is_caught() -> None:
    loop = {"fp8lab.a": "import fp8lab.b", "fp8lab.b.__init__": "from fp8lab.a import name"}
    assert set(cycle(loop)) == set(loop)
    late = {"fp8lab.a": "def f():\n    import fp8lab.b", "fp8lab.b": "import fp8lab.a"}
    typed = {"fp8lab.a": "if TYPE_CHECKING:\n    import fp8lab.b", "fp8lab.b": "import fp8lab.a"}
    assert cycle(late) == cycle(typed) == []


def test_an_oversized_file_or_function_is_caught() -> None:
    body = "    pass\n"
    assert oversized("m", "def f():\n" + body * (FUNCTION_LINES - 1)) == []
    assert oversized("m", "def f():\n" + body * FUNCTION_LINES) == ["m:1 f: 61 lines"]
    assert oversized("m", "\n" * FILE_LINES) == []
    assert oversized("m", "\n" * (FILE_LINES + 1)) == ["m: 501 lines"]


def test_the_evidence_arm_leaves_torch_unimported() -> None:
    rooms = sorted(TORCH_FREE & {module.split(".")[1] for module in SOURCES})
    assert not imports_torch(", ".join(["fp8lab", *(f"fp8lab.{room}" for room in rooms)]))


def test_an_import_of_torch_is_caught() -> None:
    assert imports_torch("fp8lab, torch")


def test_importing_the_door_is_free() -> None:
    code = "import time; t = time.perf_counter(); import fp8lab; print(time.perf_counter() - t)"
    assert min(float(in_fresh_process(code)) for _ in range(5)) <= IMPORT_SECONDS


def test_the_lower_bounds_are_those_that_test_lowest_proves() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [*project["dependencies"], *project["optional-dependencies"]["lab"]]
    pins = re.findall(r"^[\w-]+==.+$", (ROOT / "constraints-lowest.txt").read_text(), re.MULTILINE)
    proven = {re.sub(r"(\.0)+$", "", pin.replace("==", ">=")) for pin in pins}
    assert {re.sub(r"(\.0)+$", "", bound) for bound in bounds} <= proven
