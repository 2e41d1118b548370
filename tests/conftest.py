"""Settings every test shares: one thread per process, no compiler at run time, wandb offline and
silent, property tests with the same examples everywhere.
"""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tests that run make are not part of the `make test` that may have started them.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)

# A job in the background ignores Ctrl-C, and so do its children: tests of Ctrl-C need it back.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Everyone tests the same examples; `make test-random` draws others and prints how to repeat one.
# No deadline: a first example may import DeepSpeed.
settings.register_profile("same", derandomize=True, deadline=None, print_blob=True)
settings.register_profile(
    "random", derandomize=False, deadline=None, database=None, print_blob=True
)
settings.load_profile(os.environ.get("MOE_LOCALITY_HYPOTHESIS", "same"))


@pytest.fixture(scope="session")
def routing_data() -> Path:
    """Directory of real routing traces (.npz), named by MOE_LOCALITY_DATA."""
    folder = os.environ.get("MOE_LOCALITY_DATA")
    if not folder:
        pytest.skip("MOE_LOCALITY_DATA is not set: it names the directory of real routing traces")
    if not Path(folder).is_dir():
        pytest.fail(f"MOE_LOCALITY_DATA names {folder}, which is not a directory")
    return Path(folder)
