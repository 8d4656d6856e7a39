#!/usr/bin/env bash
# Builds the wheel and installs it into an empty environment: what a user gets, without the checkout.
# It finds what an editable install hides: an undeclared dependency, a file that did not travel.
# Costs one install of torch. Usage: tests/wheel_check.sh PYTHON, where PYTHON has `build`.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" -m build --wheel --outdir "$scratch" "$root" >"$scratch/build.log" || { cat "$scratch/build.log"; exit 1; }
"$python" -m venv "$scratch/venv"
cd "$scratch" # away from the checkout, so that only the wheel can be imported
venv/bin/pip install -q -c "$root/constraints.txt" torch
venv/bin/pip install -q -c "$root/constraints.txt" fp8lab-*.whl
venv/bin/pip check
venv/bin/fp8lab --help >/dev/null
venv/bin/python -W error - <<'PYTHON'
from pathlib import Path

import fp8lab

package = Path(fp8lab.__file__).parent
for needed in ("py.typed", "kernels/cpu.c", "report/page.html.j2", "_experiments/*.py"):
    assert any(package.glob(needed)), f"{needed} did not travel in the wheel"
PYTHON
echo "wheel: installs alone, fp8lab --help runs, experiments travel"
