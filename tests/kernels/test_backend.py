"""The dispatcher: `auto` follows the tensors, a named backend is taken at its word."""

import subprocess
import sys

import pytest
import torch

from kvcal.kernels import backend as dispatcher
from kvcal.kernels.backend import choose, interpreting

ON_CPU = torch.zeros(1)


def test_auto_takes_the_reference_on_a_cpu_even_where_the_interpreter_could_run(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("auto", ON_CPU) == "reference"


def test_auto_takes_triton_on_a_gpu(monkeypatch):
    assert choose("auto", on_a_gpu()) == "triton"
    monkeypatch.setattr(dispatcher, "has_triton", lambda: False)
    assert choose("auto", on_a_gpu()) == "reference"


def test_auto_takes_numba_on_a_cpu_where_the_operation_has_it(monkeypatch):
    assert choose("auto", ON_CPU, numba=True) == choose("numba", ON_CPU, numba=True) == "numba"
    assert choose("auto", on_a_gpu(), numba=True) == "triton"
    assert choose("auto", on_a_gpu(), triton=False, numba=True) == "reference"
    for other in (ON_CPU.double(), ON_CPU.clone().requires_grad_()):
        assert choose("auto", other, numba=True) == "reference"
        with pytest.raises(ValueError, match="expected numbers of at most 32 bits on a CPU without gradients"):
            choose("numba", other, numba=True)
    monkeypatch.setattr(dispatcher, "has_numba", lambda: False)
    assert choose("auto", ON_CPU, numba=True) == "reference"
    with pytest.raises(ValueError, match="'numba', which is not installed"):
        choose("numba", ON_CPU, numba=True)


def test_a_kernel_that_an_operation_has_not_is_refused():
    with pytest.raises(ValueError, match="received 'numba', expected one of auto, triton, reference"):
        choose("numba", ON_CPU)
    with pytest.raises(ValueError, match="received 'triton', expected one of auto, numba, reference"):
        choose("triton", ON_CPU, triton=False, numba=True)


def test_the_reference_is_taken_anywhere():
    assert choose("reference", ON_CPU) == choose("reference", on_a_gpu()) == "reference"


def test_triton_without_a_gpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("triton", ON_CPU) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="'triton' for tensors on cpu"):
        choose("triton", ON_CPU)
    monkeypatch.setattr(dispatcher, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="not installed"):
        choose("triton", on_a_gpu())


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match="received 'cuda', expected one of auto, triton, reference"):
        choose("cuda", ON_CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels are compiled")
def test_these_tests_interpret_where_there_is_no_gpu():
    triton = pytest.importorskip("triton")
    assert interpreting() and triton.knobs.runtime.interpret
    assert type(triton.language.sum).__name__ == "InterpretedFunction", "triton was imported too early"


@pytest.mark.parametrize("module", ["kvcal.runtime", "kvcal.kernels.backend"])
def test_importing_loads_no_compiler(module):
    script = f"import sys, {module}; print({{'triton', 'numba'}} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def on_a_gpu():
    """What the dispatcher reads of a CUDA tensor."""

    class OnAGpu:
        is_cuda, requires_grad, dtype = True, False, torch.float32
        device = torch.device("cuda", 0)

    return OnAGpu()
