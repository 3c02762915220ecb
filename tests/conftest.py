"""Tests marked ``gpu`` run only when asked for (``pytest -m gpu``), and only where a GPU is.

Where pytest-xdist has several processes, the longest files begin, so that none is left alone with one at the end.
"""

import os

import pytest

LONGEST = (
    "test_kernels.py",
    "test_append_kernels.py",
    "test_step_kernels.py",
    "test_cpp_api.py",
    "test_transformers.py",
)


def pytest_collection_modifyitems(config, items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if "gpu" not in config.option.markexpr:
        for item in gpu_tests:
            items.remove(item)
        config.hook.pytest_deselected(items=gpu_tests)
    else:
        import torch  # the process that only hands out tests needs none of it

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
