"""Triton kernels compiled for a GPU that need not be there; imported by scripts of their own.

pytest switches the interpreter on, and then nothing compiles: `support.run_compiling` runs a script
in a process without it, and the script imports this module.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

__all__ = ["compiled", "instructions", "resources"]


@functools.cache
def _tool() -> Path:
    return Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: Sequence[str] = (),
    capability: int = 90,
    **options: Any,
) -> Any:
    """Compile a kernel.

    types: of arguments, "*fp32" or "i32", for all that are no constants; aligned: names of
    arguments that are multiples of 16; options: num_warps and the like.
    """
    signature = {
        name: "constexpr" if name in constants else types[name] for name in kernel.arg_names
    }
    hinted = set(aligned) - set(constants)
    places = [i for i, name in enumerate(kernel.arg_names) if name in hinted]
    hints = {(i,): [["tt.divisibility", 16]] for i in places}
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def instructions(code: Any, names: str) -> list[str]:
    """All PTX instructions whose first word is one of `names` ("fma|mul")."""
    return re.findall(rf"\b(?:{names})\.[a-z0-9.]+", code.asm["ptx"])


def resources(code: Any) -> dict[str, int]:
    """Registers of a thread (REG), bytes of its stack (STACK: spills), shared bytes (SHARED)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(code.asm["cubin"])
        used = subprocess.run(
            [_tool(), "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    found = {n: re.search(rf"{n}:(\d+)", used) for n in ("REG", "STACK")}
    report = {n: int(match.group(1)) for n, match in found.items() if match}
    return {**report, "SHARED": int(code.metadata.shared)}
