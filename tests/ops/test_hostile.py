"""Whatever an op is given, it answers or raises: no call that must be refused ends the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import htv
from htv.ops import backend, schema

pytestmark = pytest.mark.skipif(
    backend.NOT_BUILT is not None, reason="htv was built without compiled kernels"
)


@pytest.fixture(scope="module")
def outcomes():
    search = [str(Path(htv.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search)}
    command = [sys.executable, str(Path(__file__).with_name("hostile_calls.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", schema.OPS)
def test_refused_with_a_clear_exception(op, outcomes):
    of_this = {name: said for name, said in outcomes.items() if name.split(":")[0] == op}
    assert len(of_this) > 15
    assert {name: said for name, said in of_this.items() if said != "refused"} == {}
