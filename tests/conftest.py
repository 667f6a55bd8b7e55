"""Commands that take long on a slow machine write no lines of progress: tests read stderr.

Without a GPU kernels run in Triton's interpreter, which must be asked for before anything imports triton.

Other tests import it too, through transformers, and are collected first: so this stands here, not in `tests/kernels`.
"""

import os

import torch

os.environ["KVCAL_PROGRESS"] = "0"


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::kvcal.calibrate.sample_size.SmallSampleWarning")


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
