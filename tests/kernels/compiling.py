"""Compiles kernels for Hopper (sm_90) on a machine without a GPU: Triton brings ptxas, a launch needs only operands.

    compiled("from kvcal.kernels.score import score; score(…, backend='triton')")

runs that script with CPU tensors in a process of its own, where every launch is compiled in place of run.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def compiled(script: str) -> list[dict]:
    """Of every launch of the script: registers per thread, bytes of stack (spills) and of shared memory, a hash."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        environment |= {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, __file__, script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(script: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from kvcal.kernels import backend as dispatcher

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    launches = []

    def compile_only(self, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(self.signature, self.params, backend)
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        bound, specialization, options = bind(*args, **kwargs)
        options, signature, constants, attributes = self._pack_args(backend, kwargs, bound, specialization, options)
        source = ASTSource(self, signature, constants, attributes)
        kernel = triton.compile(source, target=target, options=options.__dict__)
        launches.append(usage(triton, kernel))

    JITFunction.run = compile_only
    choose = dispatcher.choose
    dispatcher.choose = lambda asked, tensor, **has: asked if asked == "triton" else choose(asked, tensor, **has)
    exec(script, {})
    print(json.dumps(launches))


def usage(triton, kernel) -> dict:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": kernel.metadata.shared, "hash": kernel.hash}


if __name__ == "__main__":
    main(sys.argv[1])
