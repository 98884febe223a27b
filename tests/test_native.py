"""The core under the address and undefined-behaviour sanitizers, at every instruction-set level."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import ROOT, usable_levels

PROGRAMS = sorted(p.stem for p in (ROOT / "tests/native").glob("*.cpp"))


@pytest.mark.slow
@pytest.mark.parametrize("level", usable_levels())
@pytest.mark.parametrize("program", PROGRAMS)
def test_native_program_is_clean(native_build: Path, program: str, level: str):
    done = subprocess.run(
        [str(native_build / program)],
        env={**os.environ, "FLCORE_ISA": level, "ASAN_OPTIONS": "detect_leaks=1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.startswith(f"ok {level}"), done.stdout
