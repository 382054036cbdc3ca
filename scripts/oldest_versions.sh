#!/usr/bin/env bash
# The default test suite with the oldest versions that pyproject.toml allows: each lower bound as the version itself.
#
#     scripts/oldest_versions.sh FOLDER [arguments of pytest]
#
# Makes a virtual environment in FOLDER (7 GB), or brings the one there up to date, and runs pytest in it.
#
# 2026-11-26, Python 3.11.7, x86_64, two CPU cores: 2338 passed, 115 skipped (they need a GPU), none failed.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?usage: scripts/oldest_versions.sh FOLDER [arguments of pytest]}
shift
python=${PYTHON:-python3.11} # the oldest Python that has wheels of all of them
[ -e "$folder/bin/activate" ] || "$python" -m venv "$folder"
# shellcheck disable=SC1091
source "$folder/bin/activate"

python - >"$folder/oldest.txt" <<'PYTHON'
import re
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for requirement in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
    if not requirement.startswith("segdcn["):
        print(re.sub(r"(?<=\w)>=", "==", requirement))  # a marker's comparison has a space before it
PYTHON

pip install --quiet --constraint "$folder/oldest.txt" -e ".[test]"
pytest -n auto "$@"
